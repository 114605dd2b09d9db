# The full recipe: a diffusion trunk, a sampler head from iteration 1000 and a critic from 3000 on.
# Two CPU cores: shrunk in proportion, about 12 minutes, validation NELBO 1.90 nats per character (docs/results.md).
# One GPU: 6 layers, 384 channels, 6000 iterations; not measured yet.
base_config = 'config/train_char_diffusion.py'
out_dir = 'out'

add_sampler_head = True
start_sampler_iteration = 1000
sampler_n_embd = 3 * n_embd  # the head needs width to use its neighbours (docs/LOG.md)
add_critic_head = True
start_critic_iteration = 3000
end_critic_iteration = 5000
critic_row_stride = 4

if device == 'cpu':
    start_sampler_iteration = 1000 // 4
    start_critic_iteration = 3000 // 4
    end_critic_iteration = 5000 // 4
