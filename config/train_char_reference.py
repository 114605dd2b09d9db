# The reference model: a causal trunk that scores what other models write (docs/evaluation.md).
#     python train.py config/train_char_reference.py
# It reads ref.bin, which no generator sees, and has its own seed and weights. ref.bin has a bit more than a quarter of
# the size of train.bin, so the model sees it many times and needs dropout.
# Two CPU cores, shrunk in proportion: 456 s of steps, validation loss 1.381 nats per character. One GPU: 6 layers, 384
# channels, 3000 iterations; not measured yet.
base_config = 'config/train_char_diffusion.py'
out_dir = 'out-reference'
train_split = 'ref'
attention_type = 'causal'
seed = 20011

dropout = 0.2
max_iters = 3000
eval_interval = 500

if device == 'cpu':
    dropout = 0.0  # a model this narrow does not learn it by heart
    max_iters = 3000 // 2
    eval_interval = 500 // 2

lr_decay_iters = max_iters
