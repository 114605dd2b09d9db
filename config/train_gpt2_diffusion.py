# GPT-2's smallest shape as a diffusion model of OpenWebText: 124 million parameters, 1,024 tokens, a sampler head.
# First: python data/openwebtext/prepare.py, or the same with --input FILE ... for your own text.
# Eight GPUs: torchrun --nproc_per_node=8 train.py config/train_gpt2_diffusion.py; not measured yet.
# Two CPU cores: a reduced shape, on plays of 1.35 million tokens: 10.85 nats a token at first, 6.55 after 100
# iterations, 6.39 after 400, at 1 to 2.5 s each. One step of the full shape, 12 rows: 102 s and 18.6 GB
# (docs/memory.md).
out_dir = 'out-gpt2'
dataset = 'openwebtext'

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
batch_size = 12
gradient_accumulation_steps = 5 * 8  # over all ranks: 12 * 40 * 1,024 = 0.49 million tokens an iteration
max_iters = 18000  # about once through the corpus
warmup_iters = 500
learning_rate = 3e-3
beta2 = 0.95
eval_interval = 1000
eval_iters = 40
ema_decay = 0.999

add_sampler_head = True
sampler_output = 'shared_detached'  # a matrix of its own would add 39 million parameters
start_sampler_iteration = 3000

if device == 'cpu':
    n_layer = 4
    n_head = 4
    n_embd = 128
    block_size = 256
    batch_size = 8
    gradient_accumulation_steps = 1
    max_iters = 18000 // 40
    start_sampler_iteration = 3000 // 40
    warmup_iters = 20
    learning_rate = 12e-3  # higher, because the model is narrower
    eval_interval = 1000 // 10
    eval_iters = 8
    ema_decay = 0.99

lr_decay_iters = max_iters
min_lr = learning_rate / 20
