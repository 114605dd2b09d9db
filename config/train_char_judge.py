# A judge estimates which share of a text's tokens is wrong (docs/remasking.md). Its texts are clean, or have some
# random tokens, or some tokens of the main checkpoint, which train_char_diffusion_sampler.py makes. Without that
# checkpoint give --corruption_checkpoint=None. A judge starts from a remasking model, because one number for each text
# teaches too little. First: python train.py config/train_char_remasking.py --remasking_corruption=model
#       --init_from_checkpoint=out/ckpt_best.pt --learning_rate=6e-3
# Two CPU cores: 3 minutes 21 seconds (docs/remasking.md). One GPU: not measured yet.
# A block holds the CLS token and as many tokens as the main model writes at once.
base_config = 'config/train_char_diffusion.py'
out_dir = 'out-judge'
training_type = 'judge'
corruption_checkpoint = 'out/ckpt_best.pt'
init_from_checkpoint = 'out-remasking/ckpt_best.pt'

block_size = 257
max_iters = 1600
warmup_iters = 80
learning_rate = 2e-3
eval_interval = 400

if device == 'cpu':
    block_size = 129
    max_iters = 1600 // 4
    warmup_iters = 80 // 4
    learning_rate = 4e-3  # higher, because the model is narrower
    eval_interval = 400 // 4

lr_decay_iters = max_iters
min_lr = learning_rate / 20
