# Policy gradient: a trained generator learns from the judge of its texts (docs/reinforcement.md). First
#     python train.py config/train_char_diffusion_sampler.py
#     python train.py config/train_char_judge.py                    (its first lines say what it needs first)
# Without a judge: --reward=line_ends. Shape and corpus are those of the generator.
# Two CPU cores: 60 iterations of about 3 seconds of processor time each. One GPU: not measured yet.
out_dir = 'out-grpo'
training_type = 'grpo'
init_from_checkpoint = 'out/ckpt_best.pt'
judge_checkpoint_name = 'out-judge/ckpt_best.pt'

reward = 'judge'
group_size = 8
batch_size = 64
prompt_length = 16
draw_policy = 'random'
draw_calls = 8
kl_weight = 0.2

optimizer = 'adamw'
learning_rate = 3e-4
weight_decay = 0.0
decay_lr = False
warmup_iters = 5
ema_decay = 0.9
max_iters = 200
eval_interval = 50
eval_iters = 2
log_interval = 10
sample_length = 0  # another policy would draw the preview

if device == 'cpu':
    batch_size = 16
    max_iters = 60
    eval_interval = 20
    eval_iters = 4
