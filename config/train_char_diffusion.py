# Masked diffusion without heads: the trunk of train_char_diffusion_sampler.py alone. The configs of the other character
# models begin with this one (base_config) and hold only their differences.
# Two CPU cores: shrunk in proportion, 1500 iterations of 0.23 seconds. On an idle machine about 6 minutes, compilation
# and validations included; validation NELBO 1.89 nats per character.
# One GPU: 6 layers, 384 channels, 6000 iterations; not measured yet.
out_dir = 'out-diffusion'
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

if device == 'cpu':
    n_layer = 4
    n_head = 4
    n_embd = 128
    block_size = 128
    batch_size = 32
    max_iters = 6000 // 4
    warmup_iters = 200 // 4
    learning_rate = 12e-3  # higher, because the model is narrower
    eval_interval = 1000 // 4
    eval_iters = 16
    ema_decay = 0.99

lr_decay_iters = max_iters
min_lr = learning_rate / 20
