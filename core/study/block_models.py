"""The sections of docs/results/blocks.md: block models, their controls, and causal models of the same trunk."""

from collections.abc import Mapping

from core.common.tables import markdown_table
from core.study.pages import Experiment, Records, Section
from core.study.records import Record
from core.study.words import Row, commands, difference, signed, spread

PAGE = 'docs/results/blocks.md'
SEEDS = (1337, 1, 2)
CONTROL = 'control of the'  # begins the label of a control; the rest is the label of the model
CHARACTERS, TOKENS = 'config/train_char_block.py', 'config/train_bpe_block.py'
BLIND = ' --predicts=own --sampler_gate=False --sampler_zero_hidden=True'
SHORT = ' --max_iters=500 --lr_decay_iters=500'
LARGE = (' --n_layer={layers} --n_head=6 --n_embd=384 --block_size=256 --batch_size=16 --learning_rate=0.006 '
         '--min_lr=0.0003 --warmup_iters=50 --sampler_n_embd=1152 --max_iters=1100 --lr_decay_iters=1100')


def _block(label: str, folder: str, options: str, seed: int = 1337, windows: int = 512) -> Experiment:
    """A block model, measured with one trunk call for each block."""
    folder = f'{folder}-{seed}'
    return Experiment(f'{label}, seed {seed}', f'python train.py {options} --out_dir={folder} --seed={seed} '
                      f'--dtype=bfloat16', f'{folder}/ckpt_best.pt', 'likelihood',
                      {'policies': 'strided', 'trunk_calls': [1.0], 'windows': windows})


def _causal(label: str, folder: str, options: str, seed: int = 1337) -> Experiment:
    folder = f'{folder}-{seed}'
    return Experiment(f'{label}, seed {seed}', f'python train.py config/train_char_ar.py{options} --out_dir={folder} '
                      f'--seed={seed} --dtype=bfloat16', f'{folder}/ckpt_best.pt', 'nelbo', {'windows': 512})


def one_call(record: Record) -> dict[int | None, dict[str, Row]]:
    """The rows of a record by block length, then by 'alone' (independent draws) and 'head'. A causal model has one row,
    at no block length."""
    found: dict[int | None, dict[str, Row]] = {}
    for row in record['rows']:
        found.setdefault(row.get('block_length'), {})['alone' if row.get('head') == 'none' else 'head'] = row
    return found


def blocks_text(records: Records) -> str:
    """A line for each model and block length: exact nats per token, mean over seeds with the standard deviation. Then
    each model less its control, seed by seed and paired over windows."""
    by_label: dict[str, dict[str, Mapping[int | None, Mapping[str, Row]]]] = {}
    for name, record in records.items():
        label, seed = name.rsplit(', seed ', 1)
        by_label.setdefault(label, {})[seed] = one_call(record)
    body, gains = [], []
    for label, seeds in by_label.items():
        for length in next(iter(seeds.values())):
            found = {kind: [one[length][kind]['nats'] for one in seeds.values() if kind in one[length]]
                     for kind in ('alone', 'head')}
            body.append([label, '-' if length is None else str(length), str(len(seeds)), spread(found['alone']),
                         spread(found['head'])])
        controls = by_label.get(f'{CONTROL} {label}', {})
        for seed, one in seeds.items():
            if seed in controls:
                length = next(iter(one))
                pair = difference(one[length]['head'], controls[seed][length]['head'])
                gains.append([label, seed, signed(pair)])
    lines = [*commands(records, SEEDS), '', *markdown_table(
        ['model', 'block length', 'seeds', 'independent draws', 'left to right'], body)]
    return '\n'.join(lines + (['', *markdown_table(['model', 'seed', 'less its control (standard error)'], gains)]
                              if gains else []))


def _with_control(label: str, folder: str, options: str, control: str, seed: int = 1337,
                  windows: int = 512) -> tuple[Experiment, Experiment]:
    return (_block(label, folder, options, seed, windows),
            _block(f'{CONTROL} {label}', f'{folder}-blind', control + BLIND, seed, windows))


SECTIONS = (
    Section('block_characters', (
        _causal('causal model', 'out-causal', ' --max_iters=1000 --lr_decay_iters=1000'),
        *(experiment for seed in SEEDS for experiment in _with_control(
            'block model', 'out-block', CHARACTERS, CHARACTERS, seed))), blocks_text, page=PAGE),
    Section('block_tokens', (
        _causal('causal model', 'out-causal-bpe', f' --dataset=shakespeare_bpe{SHORT}'),
        *_with_control('block model', 'out-block-bpe', TOKENS + SHORT, TOKENS + SHORT)), blocks_text, page=PAGE),
    Section('block_large', _with_control(
        'block model', 'out-block-large', CHARACTERS + LARGE.format(layers=6), CHARACTERS + LARGE.format(layers=1),
        windows=256), blocks_text, page=PAGE),
    Section('block_mixtures', (
        _block('blocks of 8 and causal', 'out-block-causal', f'{CHARACTERS} --block_length=[8,1]'),
        _block('main config', 'out-main', 'config/train_char_diffusion_sampler.py'),
        _block('begun as a causal model, 500 iterations', 'out-block-begun', f'{CHARACTERS}{SHORT} '
               f'--init_from_checkpoint=out-causal-1337/ckpt_best.pt'),
        _block('head alone, on a diffusion trunk', 'out-block-wide', f'{CHARACTERS} --predicts=own '
               f'--block_length=128 --init_from_checkpoint=out-diffusion/ckpt_best.pt --freeze_transformer=True '
               f'--sampler_gradient=head --sampler_context_left=8 --whole_block_share=0.5')), blocks_text, page=PAGE))
