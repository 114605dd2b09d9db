# Block diffusion on byte-pair tokens: blocks of 4, each written from one trunk call through the sampler head.
# Two CPU cores: shrunk in proportion; 3.45 nats per token after 500 iterations (docs/blocks.md).
# One GPU: 6 layers, 384 channels, 6000 iterations; not measured yet.
base_config = 'config/train_char_block.py'
out_dir = 'out-block-bpe'
dataset = 'shakespeare_bpe'
block_length = [4]
sampler_context_left = 3  # all others of a block
