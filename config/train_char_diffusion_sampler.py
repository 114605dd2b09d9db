# The full recipe: a diffusion trunk, a sampler head from iteration 1000 and a critic from 3000 on.
# Two CPU cores: shrunk in proportion, about 12 minutes, validation NELBO 1.90 nats per character (docs/results.md).
# One GPU: 6 layers, 384 channels, 6000 iterations; not measured yet.
out_dir = 'out'
dataset = 'shakespeare_char'

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 64
max_iters = 6000
warmup_iters = 200
learning_rate = 6e-3
eval_interval = 1000
eval_iters = 8
ema_decay = 0.998

add_sampler_head = True
start_sampler_iteration = 1000
add_critic_head = True
start_critic_iteration = 3000
end_critic_iteration = 5000
critic_row_stride = 4

if device == 'cpu':
    n_layer = 4
    n_head = 4
    n_embd = 128
    block_size = 128
    batch_size = 32
    max_iters = 6000 // 4
    start_sampler_iteration = 1000 // 4
    start_critic_iteration = 3000 // 4
    end_critic_iteration = 5000 // 4
    warmup_iters = 200 // 4
    learning_rate = 12e-3  # narrower, hence higher
    eval_interval = 1000 // 4
    eval_iters = 16
    ema_decay = 0.99

sampler_n_embd = 3 * n_embd  # what neighbours tell each other needs width (docs/LOG.md)
lr_decay_iters = max_iters
min_lr = learning_rate / 20
