# A sampler head on the frozen trunk of a masked language model in Hugging Face's form (docs/pretrained.md):
#     python train.py config/train_head_on_pretrained.py --model=FOLDER_OR_NAME --text_file=FILE
# The head that is kept has the lowest loss on the last tenth of the text. docs/pretrained.md has times and losses.
model = ''  # give --model=FOLDER_OR_NAME
out_dir = 'out-head'

add_sampler_head = True
sampler_kind = 'layer_neighbours'  # sees all tokens drawn since the trunk call, and its neighbours separately
sampler_context = 4
sampler_gate = True  # chooses how far to trust the trunk, which was not trained to see everything masked
sampler_output = 'shared_detached'  # reads the trunk's output matrix; own pays for small vocabularies

batch_size = 16
learning_rate = 2e-3
min_lr = 1e-4
max_iters = 2000
lr_decay_iters = max_iters
warmup_iters = 50
eval_interval = 250
eval_iters = 4
