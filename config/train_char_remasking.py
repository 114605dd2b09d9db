# A remasking model: which tokens of a text are wrong (docs/remasking.md).
# Variants, each by one flag: --remasking_loss_type=corrupted_only (A), all_positions (B) or balanced;
# --remasking_corruption=model (errors of the main checkpoint, which train_char_diffusion_sampler.py makes);
# --remasking_kind=binary.
# Two CPU cores: 4 minutes 15 seconds with the errors and the weights of the main checkpoint (docs/remasking.md). One GPU:
# 6 layers, 384 channels, 2400 iterations; not measured yet.
out_dir = 'out-remasking'
dataset = 'shakespeare_char'
training_type = 'remasking'
remasking_loss_type = 'balanced'
remasking_corruption = 'random'
corruption_checkpoint = 'out/ckpt_best.pt'  # read for remasking_corruption=model only

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 64
max_iters = 2400
warmup_iters = 200
learning_rate = 6e-3
eval_interval = 1200
eval_iters = 8
ema_decay = 0.998

if device == 'cpu':
    n_layer = 4
    n_head = 4
    n_embd = 128
    block_size = 128
    batch_size = 32
    max_iters = 2400 // 4
    warmup_iters = 200 // 4
    learning_rate = 12e-3  # narrower, hence higher
    eval_interval = 1200 // 4
    eval_iters = 16
    ema_decay = 0.99

lr_decay_iters = max_iters
min_lr = learning_rate / 20
