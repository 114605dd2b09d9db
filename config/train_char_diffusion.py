# Masked diffusion without heads.
out_dir = 'out-diffusion'
dataset = 'shakespeare_char'

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 64
max_iters = 5000
lr_decay_iters = 5000
dropout = 0.1

if device == 'cpu':
    n_layer = 4
    n_head = 4
    n_embd = 128
    block_size = 128
    batch_size = 32
    max_iters = 2000
    lr_decay_iters = 2000
    eval_interval = 500
    dropout = 0.0
