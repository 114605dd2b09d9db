"""Config files: what each sets on a CPU and on a GPU, recorded from files that said every line themselves."""

import dataclasses
import re
from pathlib import Path

import pytest

from configurator import configure
from core.options import TrainConfig

CONFIGS = Path(__file__).parent.parent / 'config'

# Options that differ from the defaults of train.py: of the character models, then of each by itself.
SHARED = {
    'cpu': {'eval_interval': 250, 'block_size': 128, 'n_layer': 4, 'n_head': 4, 'n_embd': 128,
        'learning_rate': 0.012, 'max_iters': 1500, 'warmup_iters': 50, 'lr_decay_iters': 1500,
        'min_lr': 0.0006000000000000001, 'ema_decay': 0.99},
    'cuda': {'eval_interval': 1000, 'eval_iters': 8, 'batch_size': 64, 'max_iters': 6000, 'warmup_iters': 200,
        'lr_decay_iters': 6000, 'min_lr': 0.00030000000000000003, 'ema_decay': 0.998}}
BLOCK = {'attention_type': 'block', 'predicts': 'next', 'whole_block_share': 1.0, 'add_sampler_head': True,
         'sampler_context_right': 0, 'sampler_order': 'left_to_right', 'sampler_gate': True, 'sampler_gradient': 'trunk'}
HEAD = {'model': '', 'out_dir': 'out-head', 'add_sampler_head': True, 'sampler_output': 'shared_detached',
        'sampler_kind': 'layer_neighbours', 'sampler_gate': True, 'sampler_context': 4, 'batch_size': 16, 'learning_rate': 2e-3, 'min_lr': 1e-4, 'max_iters': 2000,
        'lr_decay_iters': 2000, 'warmup_iters': 50, 'eval_interval': 250, 'eval_iters': 4}
RECORDED = {
    ('train_bpe_block', 'cpu'): SHARED['cpu'] | BLOCK | {'out_dir': 'out-block-bpe', 'dataset': 'shakespeare_bpe',
        'block_length': [4], 'sampler_context_left': 3, 'sampler_n_embd': 384, 'max_iters': 1000,
        'lr_decay_iters': 1000},
    ('train_bpe_block', 'cuda'): SHARED['cuda'] | BLOCK | {'out_dir': 'out-block-bpe',
        'dataset': 'shakespeare_bpe', 'block_length': [4], 'sampler_context_left': 3, 'sampler_n_embd': 1152},
    ('train_char_block', 'cpu'): SHARED['cpu'] | BLOCK | {'out_dir': 'out-block', 'block_length': [8],
        'sampler_context_left': 7, 'sampler_n_embd': 384, 'max_iters': 1000, 'lr_decay_iters': 1000},
    ('train_char_block', 'cuda'): SHARED['cuda'] | BLOCK | {'out_dir': 'out-block', 'block_length': [8],
        'sampler_context_left': 7, 'sampler_n_embd': 1152},
    ('train_char_ar', 'cpu'): SHARED['cpu'] | {'out_dir': 'out-ar', 'attention_type': 'causal'},
    ('train_char_ar', 'cuda'): SHARED['cuda'] | {'out_dir': 'out-ar', 'attention_type': 'causal'},
    ('train_char_diffusion', 'cpu'): SHARED['cpu'] | {'out_dir': 'out-diffusion'},
    ('train_char_diffusion', 'cuda'): SHARED['cuda'] | {'out_dir': 'out-diffusion'},
    ('train_char_diffusion_sampler', 'cpu'): SHARED['cpu'] | {'add_sampler_head': True,
        'start_sampler_iteration': 250, 'sampler_n_embd': 384, 'add_critic_head': True,
        'start_critic_iteration': 750, 'end_critic_iteration': 1250, 'critic_row_stride': 4},
    ('train_char_diffusion_sampler', 'cuda'): SHARED['cuda'] | {'add_sampler_head': True,
        'start_sampler_iteration': 1000, 'sampler_n_embd': 1152, 'add_critic_head': True,
        'start_critic_iteration': 3000, 'end_critic_iteration': 5000, 'critic_row_stride': 4},
    ('train_char_judge', 'cpu'): SHARED['cpu'] | {'out_dir': 'out-judge',
        'init_from_checkpoint': 'out-remasking/ckpt_best.pt', 'eval_interval': 100, 'block_size': 129,
        'training_type': 'judge', 'corruption_checkpoint': 'out/ckpt_best.pt', 'learning_rate': 0.004,
        'max_iters': 400, 'warmup_iters': 20, 'lr_decay_iters': 400, 'min_lr': 0.0002},
    ('train_char_judge', 'cuda'): SHARED['cuda'] | {'out_dir': 'out-judge',
        'init_from_checkpoint': 'out-remasking/ckpt_best.pt', 'eval_interval': 400, 'block_size': 257,
        'training_type': 'judge', 'corruption_checkpoint': 'out/ckpt_best.pt', 'learning_rate': 0.002,
        'max_iters': 1600, 'warmup_iters': 80, 'lr_decay_iters': 1600, 'min_lr': 0.0001},
    ('train_char_reference', 'cpu'): SHARED['cpu'] | {'out_dir': 'out-reference', 'train_split': 'ref',
        'attention_type': 'causal', 'seed': 20011},
    ('train_char_reference', 'cuda'): SHARED['cuda'] | {'out_dir': 'out-reference', 'train_split': 'ref',
        'dropout': 0.2, 'attention_type': 'causal', 'max_iters': 3000, 'lr_decay_iters': 3000, 'seed': 20011,
        'eval_interval': 500},
    ('train_char_remasking', 'cpu'): SHARED['cpu'] | {'out_dir': 'out-remasking', 'eval_interval': 300,
        'training_type': 'remasking', 'remasking_loss_type': 'balanced',
        'corruption_checkpoint': 'out/ckpt_best.pt', 'max_iters': 600, 'lr_decay_iters': 600},
    ('train_char_remasking', 'cuda'): SHARED['cuda'] | {'out_dir': 'out-remasking', 'eval_interval': 1200,
        'training_type': 'remasking', 'remasking_loss_type': 'balanced',
        'corruption_checkpoint': 'out/ckpt_best.pt', 'max_iters': 2400, 'lr_decay_iters': 2400},
    ('train_head_on_pretrained', 'cpu'): HEAD,
    ('train_head_on_pretrained', 'cuda'): HEAD,
    ('train_gpt2_diffusion', 'cpu'): {'out_dir': 'out-gpt2', 'dataset': 'openwebtext', 'eval_interval': 100,
        'eval_iters': 8, 'batch_size': 8, 'n_layer': 4, 'n_head': 4, 'n_embd': 128, 'add_sampler_head': True,
        'start_sampler_iteration': 75, 'sampler_output': 'shared_detached', 'learning_rate': 0.012,
        'max_iters': 450, 'beta2': 0.95, 'warmup_iters': 20, 'lr_decay_iters': 450, 'min_lr': 0.0006000000000000001,
        'ema_decay': 0.99},
    ('train_gpt2_diffusion', 'cuda'): {'out_dir': 'out-gpt2', 'dataset': 'openwebtext', 'eval_interval': 1000,
        'eval_iters': 40, 'gradient_accumulation_steps': 40, 'batch_size': 12, 'block_size': 1024, 'n_layer': 12,
        'n_head': 12, 'n_embd': 768, 'add_sampler_head': True, 'start_sampler_iteration': 3000,
        'sampler_output': 'shared_detached', 'learning_rate': 0.003, 'max_iters': 18000, 'beta2': 0.95,
        'warmup_iters': 500, 'lr_decay_iters': 18000, 'min_lr': 0.00015000000000000001, 'ema_decay': 0.999}}


def resolved(path, *arguments, device='cpu'):
    return configure(TrainConfig, [str(path), *arguments], resolve_device=lambda _: device).config


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.py')), ids=lambda path: path.stem)
def test_a_config_file_holds_differences_only(path):
    """On either device something of it counts, and no line says again what its base or the defaults say."""
    text = path.read_text(encoding='utf-8')
    base = re.match(r"(?:#.*\n)*base_config = 'config/(\w+)\.py'\n", text)
    if base is None:
        return
    above = [dataclasses.asdict(resolved(CONFIGS / f'{base[1]}.py', device=device)) for device in ('cpu', 'cuda')]
    for key in dict.fromkeys(re.findall(r'^ *(\w+) = ', text, re.M)[1:]):
        here = [dataclasses.asdict(resolved(path, device=device))[key] for device in ('cpu', 'cuda')]
        assert here != [config[key] for config in above], f'{path.name} sets {key}, but the base says the same'


@pytest.mark.parametrize('name, device', RECORDED)
def test_resolved_options_are_the_recorded_ones(name, device):
    config = dataclasses.asdict(resolved(CONFIGS / f'{name}.py', device=device))
    assert config == dataclasses.asdict(TrainConfig()) | RECORDED[name, device]


def test_the_command_line_reaches_what_follows_from_an_option():
    config = resolved(CONFIGS / 'train_char_diffusion_sampler.py', '--max_iters=100', '--n_embd=64')
    assert (config.lr_decay_iters, config.sampler_n_embd, config.eval_interval) == (100, 192, 250)
