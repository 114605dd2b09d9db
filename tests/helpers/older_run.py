"""A corpus and a run folder as the program wrote them before run folders had a marker, written by code.

Nothing of the program is imported: what is written here is what lies on people's disks, and stays as it is whatever the
program becomes. The values are integers from a fixed rule, divided; they are the same on every machine.
"""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CORPUS = 'older'
LAYERS, WIDTH, BLOCK = 1, 16, 16
ITERATION = 10
WORDS = ['to ', 'be ', 'or ', 'not, ', 'king\n', 'MARY:\n', 'queen ']
TEXTS = {split: ''.join(WORDS[(index * index * 5 + index // 3 + shift) % 7] for index in range(words))
         for split, words, shift in (('train', 1400, 0), ('ref', 400, 2), ('val', 200, 4))}
CHARACTERS = sorted(set(''.join(TEXTS.values())))
BASE = len(CHARACTERS)  # mask, wrong, pad and cls follow


def write_older_corpus(data: Path) -> None:
    """The corpus CORPUS in the folder `data`: three token files and meta.pkl."""
    folder = data / CORPUS
    folder.mkdir(parents=True)
    for split, ids in _token_files().items():
        (folder / f'{split}.bin').write_bytes(ids)
    counts = {split: len(text) for split, text in TEXTS.items()}
    hashes = _file_hashes()
    (folder / 'meta.pkl').write_bytes(pickle.dumps({
        'format': 'masked-diffusion-corpus', 'version': 1, 'source': 'made up', 'vocabulary': _vocabulary(),
        'vocabulary_hash': _vocabulary_hash(), 'base_size': BASE,
        'special_ids': {'mask': BASE, 'wrong': BASE + 1, 'pad': BASE + 2, 'cls': BASE + 3}, 'dtype': 'uint16',
        'sizes': counts, 'characters': counts, 'utf8_bytes': counts, 'file_hashes': hashes,
        'data_hash': _data_hash()}, protocol=4))


def write_older_run(folder: Path) -> None:
    """A run of ITERATION iterations, both heads begun, stopped after a validation; it has no run.json."""
    folder.mkdir(parents=True)
    config = _config(folder)
    for name, optimizers in (('ckpt.pt', True), ('ckpt_best.pt', False), (f'ckpt_unmasking_{ITERATION}.pt', False)):
        torch.save(_payload(config, optimizers), folder / name)
    (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
    versions = {'python': '3.11.7', 'torch': '2.13.0', 'numpy': '2.4.6', 'safetensors': '0.8.0', 'tiktoken': '0.14.0',
                'wandb': None}
    (folder / 'environment.json').write_text(json.dumps({
        'versions': versions, 'git_revision': None, 'command_line': ['train.py', f'--out_dir={folder}'],
        'platform': 'Linux', 'processors': 2, 'threads': 1, 'devices': []}, indent=2) + '\n')
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in _metrics()))
    (folder / 'run.lock').write_text('1234\n')


# ---- corpus

def _token_files() -> dict[str, bytes]:
    return {split: np.array([CHARACTERS.index(one) for one in text], dtype='<u2').tobytes()
            for split, text in TEXTS.items()}


def _file_hashes() -> dict[str, str]:
    return {split: hashlib.sha256(ids).hexdigest() for split, ids in _token_files().items()}


def _data_hash() -> str:
    hashes = _file_hashes()
    return hashlib.sha256(''.join(f'{split} {hashes[split]}\n' for split in sorted(hashes)).encode()).hexdigest()


def _vocabulary() -> dict[str, object]:
    return {'kind': 'characters', 'tokens': CHARACTERS, 'pattern': ''}


def _vocabulary_hash() -> str:
    tokens = [one.encode().hex() for one in CHARACTERS]
    return hashlib.sha256(json.dumps(['characters', '', tokens, ('mask', 'wrong', 'pad', 'cls')]).encode()).hexdigest()


# ---- run folder

def _config(folder: Path) -> dict[str, object]:
    """Every option that train.py had."""
    return {
        'out_dir': str(folder), 'dataset': CORPUS, 'train_split': 'train', 'init_from': 'scratch',
        'init_from_checkpoint': None, 'force_resume': False, 'eval_interval': 5, 'log_interval': 1, 'eval_iters': 2,
        'eval_only': False, 'always_save_checkpoint': False, 'keep_snapshots': 2, 'sample_length': 12,
        'wandb_log': False, 'wandb_project': 'masked-diffusion', 'wandb_run_name': 'run',
        'gradient_accumulation_steps': 2, 'batch_size': 4, 'block_size': BLOCK, 'n_layer': LAYERS, 'n_head': 2,
        'n_embd': WIDTH, 'dropout': 0.1, 'bias': False, 'attention_type': 'bidirectional',
        'position_encoding': 'rotary', 'loss_weighting': 'masked_mean', 'training_type': 'unmasking',
        'remasking_kind': 'token', 'remasking_loss_type': 'all_positions', 'remasking_corruption': 'random',
        'corruption_checkpoint': None, 'add_sampler_head': True, 'start_sampler_iteration': 4, 'sampler_context': 1,
        'sampler_output': 'own', 'sampler_residual': True, 'sampler_n_embd': None, 'sampler_zero_hidden': False,
        'sampler_min_neighbors_ratio': 0.01, 'add_critic_head': True, 'start_critic_iteration': 8,
        'end_critic_iteration': 12, 'critic_alpha': 0.5, 'critic_target_scope': 'masked_only',
        'critic_gradient': 'trunk', 'critic_row_stride': 1, 'freeze_transformer': False,
        'unfreeze_at_iteration': None, 'unfreeze_lr_multiplier': 0.1, 'optimizer': 'muon', 'learning_rate': 0.02,
        'max_iters': 15, 'weight_decay': 0.05, 'beta1': 0.9, 'beta2': 0.99, 'grad_clip': 1.0, 'skip_spikes': 0.0,
        'decay_lr': True, 'warmup_iters': 2, 'lr_decay_iters': 15, 'min_lr': 0.001, 'ema_decay': 0.9, 'seed': 1337,
        'device': 'cpu', 'dtype': 'float32', 'compile': False, 'sharding': 'none', 'activation_checkpointing': False,
        'backend': None}


def _model_config() -> dict[str, object]:
    """Every field that the model's description had."""
    return {
        'block_size': BLOCK, 'vocab_size': BASE + 4, 'n_layer': LAYERS, 'n_head': 2, 'n_embd': WIDTH, 'dropout': 0.1,
        'bias': False, 'ignore_index': -100, 'attention_type': 'bidirectional', 'position_encoding': 'rotary',
        'mode': 'language_model', 'num_token_classes': 2, 'cls_token_id': BASE + 3, 'mask_token_id': BASE,
        'pad_token_id': BASE + 2, 'wrong_token_id': BASE + 1, 'freeze_transformer': False,
        'init_from_checkpoint': None, 'unfreeze_at_iteration': None, 'unfreeze_lr_multiplier': 0.1,
        'add_critic_head': True, 'critic_alpha': 0.5, 'critic_target_scope': 'masked_only',
        'critic_gradient': 'trunk', 'critic_row_stride': 1, 'start_critic_iteration': 8, 'end_critic_iteration': 12,
        'add_sampler_head': True, 'start_sampler_iteration': 4, 'sampler_min_neighbors_ratio': 0.01,
        'sampler_context': 1, 'sampler_output': 'own', 'sampler_residual': True, 'sampler_n_embd': None,
        'sampler_zero_hidden': False}


SHAPES = {  # weights in the order of the model; lm_head.weight is transformer.wte.weight
    'transformer.wte.weight': (BASE + 4, WIDTH), 'transformer.h.0.ln_1.weight': (WIDTH,),
    'transformer.h.0.attn.c_attn.weight': (3 * WIDTH, WIDTH), 'transformer.h.0.attn.c_proj.weight': (WIDTH, WIDTH),
    'transformer.h.0.attn.query_norm.weight': (WIDTH // 2,), 'transformer.h.0.attn.key_norm.weight': (WIDTH // 2,),
    'transformer.h.0.ln_2.weight': (WIDTH,), 'transformer.h.0.mlp.c_fc.weight': (4 * WIDTH, WIDTH),
    'transformer.h.0.mlp.c_proj.weight': (WIDTH, 4 * WIDTH), 'transformer.ln_f.weight': (WIDTH,),
    'lm_head.weight': (BASE + 4, WIDTH), 'sampler_head.input.weight': (WIDTH, 3 * WIDTH),
    'sampler_head.input.bias': (WIDTH,), 'sampler_head.norm_1.weight': (WIDTH,), 'sampler_head.norm_1.bias': (WIDTH,),
    'sampler_head.hidden.weight': (WIDTH, WIDTH), 'sampler_head.hidden.bias': (WIDTH,),
    'sampler_head.norm_2.weight': (WIDTH,), 'sampler_head.norm_2.bias': (WIDTH,),
    'sampler_head.output_head.weight': (BASE + 4, WIDTH), 'critic_head.weight': (1, WIDTH),
    'critic_head.bias': (1,)}
MUON = (['transformer.h.0.attn.c_attn.weight', 'transformer.h.0.attn.c_proj.weight', 'transformer.h.0.mlp.c_fc.weight',
         'transformer.h.0.mlp.c_proj.weight'], ['sampler_head.input.weight', 'sampler_head.hidden.weight'])
ADAMW = (['transformer.wte.weight'],
         [name for name in SHAPES if len(SHAPES[name]) == 1 and name.startswith('transformer')],
         [name for name in SHAPES if len(SHAPES[name]) == 1 and not name.startswith('transformer')],
         ['sampler_head.output_head.weight', 'critic_head.weight'])


def _numbers(name: str, shape: tuple[int, ...], least: float, most: float) -> Tensor:
    """Multiples of 2**-20 from `least` to `most`, exact in float32, drawn from the hash of `name`."""
    count = int(np.prod(shape))
    drawn = b''.join(hashlib.sha256(f'{name} {part}'.encode()).digest() for part in range(-(-count * 4 // 32)))
    integers = np.frombuffer(drawn, dtype='<u4', count=count) % (round((most - least) * 2**20) + 1)
    return torch.from_numpy((integers + np.float64(least) * 2**20).astype(np.float32) / np.float32(2**20)).view(shape)


def _weights(copy: str) -> dict[str, Tensor]:
    """Weights of plausible sizes; `copy` tells the latest ones from the averaged ones."""
    made = {}
    for name, shape in SHAPES.items():
        if name == 'lm_head.weight':
            made[name] = made['transformer.wte.weight']
        elif name.endswith('.bias'):
            made[name] = _numbers(f'{copy} {name}', shape, -0.125, 0.125)
        elif len(shape) == 1:
            made[name] = _numbers(f'{copy} {name}', shape, 0.75, 1.25)
        else:
            made[name] = _numbers(f'{copy} {name}', shape, -0.25, 0.25)
    return made


def _optimizers() -> list[dict[str, object]]:
    """State of Muon and AdamW, as `state_dict` gives it."""
    muon, adamw = [[name for group in groups for name in group] for groups in (MUON, ADAMW)]
    muon_state = {index: {'momentum_buffer': _numbers(f'momentum {name}', SHAPES[name], -2**-9, 2**-9)}
                  for index, name in enumerate(muon)}
    adamw_state = {index: {'step': torch.tensor(float(_steps(name))),
                           'exp_avg': _numbers(f'average {name}', SHAPES[name], -2**-7, 2**-7),
                           'exp_avg_sq': _numbers(f'square {name}', SHAPES[name], 2**-16, 2**-12)}
                   for index, name in enumerate(adamw)}
    first, other = [], []
    for group, trunk in zip(MUON, (True, False)):
        first.append({'trunk': trunk, 'weight_decay': 0.05, 'lr': 0.01, 'momentum': 0.95,
                      'params': [muon.index(name) for name in group]})
    for group, trunk, decay in zip(ADAMW, (True, True, False, False), (0.05, 0.0, 0.0, 0.05)):
        other.append({'trunk': trunk, 'weight_decay': decay, 'lr': 0.01, 'betas': (0.9, 0.99), 'eps': 1e-8,
                      'amsgrad': False, 'maximize': False, 'foreach': None, 'capturable': False,
                      'differentiable': False, 'fused': True, 'decoupled_weight_decay': True,
                      'params': [adamw.index(name) for name in group]})
    return [{'state': muon_state, 'param_groups': first}, {'state': adamw_state, 'param_groups': other}]


def _steps(name: str) -> int:
    """How often a weight was updated: since its stage began."""
    return ITERATION - (4 if name.startswith('sampler') else 8 if name.startswith('critic') else 0)


def _payload(config: dict[str, object], optimizers: bool) -> dict[str, object]:
    """What a checkpoint file holds; without `optimizers` the averaged weights alone."""
    latest, averaged = _weights('latest'), _weights('averaged')
    guard = {'counts': torch.zeros(2, dtype=torch.int64),
             'recent': torch.full((2, 128), torch.nan, dtype=torch.float64)}
    return {
        'format_version': 1, 'kind': 'unmasking', 'model_config': _model_config(), 'config': config,
        'vocabulary': _vocabulary(), 'vocabulary_hash': _vocabulary_hash(), 'data_hash': _data_hash(),
        'data_sizes': {split: len(text) for split, text in TEXTS.items()},
        'model': latest if optimizers else averaged, 'iteration': ITERATION, 'ema': averaged if optimizers else None,
        'optimizers': _optimizers() if optimizers else [], 'scaler': None, 'guard': guard if optimizers else None,
        'best_value': 2.75, 'extra': {'best_is_final': False, 'train_seconds': 1.5, 'resumable': optimizers}}


def _metrics() -> list[dict[str, object]]:
    """metrics.jsonl: a validation every five iterations, before the iteration of that number."""
    records = []
    for iteration in range(ITERATION + 1):
        if iteration % 5 == 0:
            records.append({'kind': 'evaluation', 'iteration': iteration, 'val/nelbo': 3.0 - iteration / 40,
                            'val/nelbo_standard_error': 0.01, 'val/bits': 4.25, 'train_seconds': iteration * 0.15})
        if iteration < ITERATION:
            heads = {'train/loss_sampler': 3.0} if iteration >= 4 else {}
            heads |= {'train/loss_critic': 0.5} if iteration >= 8 else {}
            records.append({'kind': 'iteration', 'iteration': iteration, 'train/loss': 3.0, 'train/loss_main': 3.0,
                            **heads, 'lr': 0.01, 'seconds': 0.15, 'mfu': 0.05})
    return records
