# The reference model: a causal trunk that scores what other models write (docs/evaluation.md).
#     python train.py config/train_char_reference.py
# It reads ref.bin, which no generator sees, and shares neither seed nor weights with one. That split is a bit more than
# a quarter of train.bin, so it is seen many times: hence dropout.
# Two CPU cores, shrunk in proportion: 456 s of steps, validation loss 1.381 nats per character. One GPU: 6 layers, 384
# channels, 3000 iterations; not measured yet.
out_dir = 'out-reference'
dataset = 'shakespeare_char'
train_split = 'ref'
attention_type = 'causal'
seed = 20011

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 64
dropout = 0.2
max_iters = 3000
warmup_iters = 200
learning_rate = 6e-3
eval_interval = 500
eval_iters = 8
ema_decay = 0.998

if device == 'cpu':
    n_layer = 4
    n_head = 4
    n_embd = 128
    block_size = 128
    batch_size = 32
    dropout = 0.0  # so narrow a model does not learn it by heart
    max_iters = 3000 // 2
    warmup_iters = 200 // 4
    learning_rate = 12e-3  # narrower, hence higher
    eval_interval = 500 // 2
    eval_iters = 16
    ema_decay = 0.99

lr_decay_iters = max_iters
min_lr = learning_rate / 20
