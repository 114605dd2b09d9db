# Block diffusion on byte-pair tokens: blocks of 4, each written from one trunk call through the sampler head.
# Two CPU cores: shrunk in proportion; minutes and loss are in docs/blocks.md.
# One GPU: 6 layers, 384 channels, 6000 iterations; not measured yet.
out_dir = 'out-block-bpe'
dataset = 'shakespeare_bpe'
attention_type = 'block'
block_length = [4]

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
start_sampler_iteration = 0
sampler_order = 'left_to_right'
sampler_context_left = 3  # all others of a block
sampler_context_right = 0
sampler_gate = True
sampler_gradient = 'trunk'  # the trunk learns what the head needs of it

if device == 'cpu':
    n_layer = 4
    n_head = 4
    n_embd = 128
    block_size = 128
    batch_size = 32
    max_iters = 1000
    warmup_iters = 50
    learning_rate = 12e-3  # narrower, hence higher
    eval_interval = 250
    eval_iters = 16
    ema_decay = 0.99

sampler_n_embd = 3 * n_embd
lr_decay_iters = max_iters
min_lr = learning_rate / 20
