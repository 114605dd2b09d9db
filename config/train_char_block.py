# Block diffusion: blocks of 8 characters from left to right, each written from one trunk call through the sampler head.
# Two CPU cores: shrunk in proportion, 8 minutes 4 seconds, 1.43 nats per character at one call a block
# (docs/blocks.md).
# One GPU: 6 layers, 384 channels, 6000 iterations; not measured yet.
base_config = 'config/train_char_diffusion.py'
out_dir = 'out-block'
attention_type = 'block'
block_length = [8]

predicts = 'next'  # as in a causal model; learns a little faster
whole_block_share = 1.0  # each block is written from one trunk call, so training shows nothing else

add_sampler_head = True
sampler_order = 'left_to_right'
sampler_context_left = 7  # all others of a block
sampler_context_right = 0
sampler_gate = True
sampler_gradient = 'trunk'  # the trunk learns what the head needs
sampler_n_embd = 3 * n_embd

if device == 'cpu':
    max_iters = 1000

lr_decay_iters = max_iters
