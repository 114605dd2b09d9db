# A remasking model says which tokens of a text are wrong (docs/remasking.md).
# Variants, each by one flag: --remasking_loss_type=corrupted_only (A), all_positions (B) or balanced;
# --remasking_corruption=model (errors of the main checkpoint, which train_char_diffusion_sampler.py makes);
# --remasking_corruption=shuffled (tokens of nearby places) or mixed (each way at a third of the places);
# --remasking_kind=binary, or multiclass with mixed.
# Two CPU cores: 4 minutes 15 seconds with the errors and the weights of the main checkpoint (docs/remasking.md). One
# GPU: 6 layers, 384 channels, 2400 iterations; not measured yet.
base_config = 'config/train_char_diffusion.py'
out_dir = 'out-remasking'
training_type = 'remasking'
# The default, corrupted_only, has the wrong id as its only target, so the model learns to call every token wrong.
remasking_loss_type = 'balanced'
corruption_checkpoint = 'out/ckpt_best.pt'  # read for remasking_corruption=model and mixed only

max_iters = 2400
eval_interval = 1200

if device == 'cpu':
    max_iters = 2400 // 4
    eval_interval = 1200 // 4

lr_decay_iters = max_iters
