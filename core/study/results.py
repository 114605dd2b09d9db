"""The sections of docs/results/study.md: the experiments of the study, and what the page says about their records.

All figures come from records (core/study/pages.py), so a saved record gives the same text again.

Letters: K trunk calls, C neighbours that a head sees on each side.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from core.common.files import write_whole
from core.common.tables import markdown_table
from core.evaluation.error_detection import DETECTORS, SHOWN_SHARE, arranged as arranged_errors
from core.evaluation.error_plots import plot_errors
from core.evaluation.likelihood import draw as draw_likelihood
from core.evaluation.quality_tables import REAL, Equal, at_equal_entropy, curves_text, draw_curves
from core.study.pages import Experiment, Records, Say, Section
from core.study.records import Record
from core.study.words import SEEDS, Row, calls_at, commands, difference, figure, signed, spread

TRAIN = 'python train.py config/train_char_diffusion.py'
MAIN = 'python train.py config/train_char_diffusion_sampler.py'


# The main command ---------------------------------------------------------------------------------------------------

def main_text(records: Records) -> str:
    """Validations and last losses of the main training."""
    record = records['main']
    body = [[str(line['iteration']), f'{line["nelbo"]:.4f} ({line["nelbo_standard_error"]:.4f})', f'{line["bits"]:.3f}']
            for line in record['validations']]
    losses = ', '.join(f'{name.removeprefix("train/loss_")} {value:.4f}' for name, value in record['losses'].items()
                       if name.startswith('train/loss_'))
    return '\n'.join([*commands(records), '', *markdown_table(['iteration', 'NELBO, nats per character',
                                                               'bits per character'], body), '',
                      f'{record["iterations"]} iterations in {record["seconds"]:.0f} s without validations, '
                      f'{record["step_ms"]:.0f} ms a logged step (median). Last batch: {losses}.'])


def draw_main(records: Records, folder: Path, say: Say) -> None:
    """Copy loss.png of the training, if its checkpoint exists."""
    picture = Path('out/loss.png')
    if Path('out/ckpt_best.pt').exists() and picture.exists():
        write_whole(folder / picture.name, picture.read_bytes())


# The sampler head ---------------------------------------------------------------------------------------------------

HEAD_POLICIES = 'random,left_to_right,strided'
ALL_CALLS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]


def by_setting(record: Record) -> dict[tuple[str, int, str], Row]:
    """Rows of measure likelihood by policy, trunk calls and head."""
    return {(row['policy'], row['trunk_calls'], row['head']): row for row in record['rows']}


def calls_without(rows: Mapping[tuple[str, int, str], Row], policy: str, nats: float) -> str:
    """The number of trunk calls at which the trunk alone reaches `nats` with a policy."""
    return calls_at([(calls, row['nats']) for (name, calls, head), row in rows.items()
                     if name == policy and head == 'none'], nats)


def head_text(records: Records) -> str:
    """For each policy: nats at each K without a head and with it, their paired differences, and the K at which the
    trunk alone is equally good."""
    rows = by_setting(records['main'])
    first = records['main']['rows'][0]
    lines = [*commands(records), '', f'{first["windows"]} windows, seed {first["seed"]}; the head takes '
             f'{first["head_share"]:.1%} of the trunk\'s multiply-adds per token.', '']
    for policy in dict.fromkeys(policy for policy, _, _ in rows):
        lines += [f'`{policy}`:', '', *_head_table(rows, policy), '']
    return '\n'.join([*lines, '![Exact likelihood against trunk calls](likelihood.png)'])


def _head_table(rows: Mapping[tuple[str, int, str], Row], policy: str) -> list[str]:
    calls = sorted({K for name, K, _ in rows if name == policy})
    body = []
    for K in calls:
        alone, wave, left = (rows[policy, K, head] for head in ('none', 'wave', 'left_to_right'))
        twice = rows.get((policy, 2 * K, 'none'))
        body.append([str(K), figure(alone), figure(wave), figure(left), signed(difference(wave, alone)),
                     '-' if twice is None else signed(difference(wave, twice)),
                     calls_without(rows, policy, wave['nats'])])
    return markdown_table(['K', 'trunk alone', 'head, waves', 'head, left to right', 'waves - alone',
                           'waves - alone at 2 K', 'K alone that equals waves'], body)


def draw_head(records: Records, folder: Path, say: Say) -> None:
    """likelihood.png."""
    draw_likelihood(records['main']['rows'], 'trunk calls per 128 characters', 'nats per character',
                    folder / 'likelihood.png', say)


HEAD = Section('head', (Experiment('main', MAIN, 'out/ckpt_best.pt', 'likelihood', {
    'policies': HEAD_POLICIES, 'trunk_calls': ALL_CALLS}),), head_text, draw_head)


# Windows and their control ------------------------------------------------------------------------------------------

WINDOW_CALLS = [1.0, 4.0, 8.0, 16.0]


def frozen(name: str, trunk: str, context: int, blind: bool, more: str = '') -> str:
    """The command that trains a head on a frozen trunk."""
    return (f'{TRAIN}{more} --out_dir={name} --init_from_checkpoint={trunk}/ckpt_best.pt --freeze_transformer=True '
            f'--add_sampler_head=True --sampler_context={context} --sampler_n_embd=384'
            + (' --sampler_zero_hidden=True' if blind else '') + ' --max_iters=600 --eval_interval=300')


def window_experiments(prefix: str, trunk: str, training: str, contexts: Sequence[int],
                       more: str = '') -> tuple[Experiment, ...]:
    """The trunk alone, then for each context a head and its control, which does not see the trunk's hidden states."""
    options = {'policies': HEAD_POLICIES, 'trunk_calls': WINDOW_CALLS}
    found = [Experiment('trunk alone', training, f'{trunk}/ckpt_best.pt', 'likelihood', {
        'policies': HEAD_POLICIES, 'trunk_calls': [*WINDOW_CALLS, 128.0], 'heads': 'none'})]
    for context in contexts:
        for kind in ('head', 'blind'):
            folder = f'{prefix}{kind}-{context}'
            found.append(Experiment(f'C = {context}, {kind}', frozen(folder, trunk, context, kind == 'blind', more),
                                    f'{folder}/ckpt_best.pt', 'likelihood', {**options, 'heads': 'left_to_right'}))
    return tuple(found)


def windows_text(records: Records) -> str:
    """For each policy: nats of the trunk, of heads with C neighbours, and of the same heads without the trunk's hidden
    states; and what the hidden states gain."""
    lines = [*commands(records), '']
    policies = list(dict.fromkeys(row['policy'] for record in records.values() for row in record['rows']))
    for policy in policies:
        lines += [f'`{policy}`:', '', *_windows_table(records, policy), '']
    shares = ', '.join(f'{name.removesuffix(", head")}: {record["rows"][0]["head_share"]:.1%}'
                       for name, record in records.items() if name.endswith('head'))
    return '\n'.join([*lines, f"Multiply-adds of the head over the trunk's: {shares}."] if shares else lines[:-1])


def _windows_table(records: Records, policy: str) -> list[str]:
    found = {name: {row['trunk_calls']: row for row in record['rows'] if row['policy'] == policy}
             for name, record in records.items()}
    calls = sorted({K for rows in found.values() for K in rows})
    body = [[name, *(figure(rows[K]) if K in rows else '-' for K in calls)] for name, rows in found.items()]
    for name, rows in found.items():
        blind = found.get(name.replace('head', 'blind'))
        if name.endswith('head') and blind is not None:
            body.append([f'{name} - blind', *(signed(difference(rows[K], blind[K])) if K in rows else '-'
                                              for K in calls)])
    return markdown_table(['', *(f'K = {K}' for K in calls)], body)


WINDOWS = Section('windows', window_experiments('out-', 'out-diffusion', TRAIN, (1, 2, 4, 8)), windows_text)
_BPE = ' --dataset=shakespeare_bpe'
BPE = Section('bpe', window_experiments('out-bpe-', 'out-bpe', f'{TRAIN}{_BPE} --out_dir=out-bpe --max_iters=800 '
                                        f'--eval_interval=400', (1, 4), _BPE), windows_text)


# Models compared ---------------------------------------------------------------------------------------------------

def models_text(records: Records) -> str:
    """Held-out nats, bits and training seconds of each model."""
    body = []
    for name, record in records.items():
        row = record['rows'][0]
        body.append([name, 'exact' if row['kind'] == 'causal' else 'bound', figure(row),
                     f'{row["bits"]:.3f} per {row["unit"]}', f'{record["iterations"]}', f'{record["seconds"]:.0f}'])
    return '\n'.join([*commands(records), '', *markdown_table(
        ['model', 'is', 'nats per token (s.e.)', 'bits', 'iterations', 'training seconds'], body)])


MODELS = Section('models', (
    Experiment('diffusion with both heads', MAIN, 'out/ckpt_best.pt', 'nelbo'),
    Experiment('diffusion, trunk only', TRAIN, 'out-diffusion/ckpt_best.pt', 'nelbo'),
    Experiment('causal, same trunk', 'python train.py config/train_char_ar.py', 'out-ar/ckpt_best.pt', 'nelbo'),
    Experiment('reference, on ref.bin', 'python train.py config/train_char_reference.py',
               'out-reference/ckpt_best.pt', 'nelbo')), models_text)


# Curves -------------------------------------------------------------------------------------------------------------

def curves_section(records: Records) -> str:
    """The table of `curves` and its picture."""
    record = records['main']
    return '\n'.join([f'    {record["training"]}', curves_text(record['rows'], record['evaluation']), '',
                      '![Reference bits at equal entropy against cost](curves.png)'])


CURVES = Section('curves', (Experiment('main', MAIN, 'out/ckpt_best.pt', 'curves', {
    'num_samples': 16, 'trunk_calls': [8.0, 16.0, 32.0]}),), curves_section,
    lambda records, folder, say: draw_curves(records['main']['rows'], folder / 'curves.png', say))


# The sampler head in samples ----------------------------------------------------------------------------------------

SAMPLED = {'policies': 'random,strided,left_to_right', 'num_samples': 32, 'temperatures': [0.5, 0.7, 0.9, 1.1, 1.3]}


def samples_text(records: Records) -> str:
    """For each policy and budget: reference bits at equal trigram entropy with and without a head, and the number of
    calls at which the model without it is equally good."""
    found = {name: by_budget(record['rows']) for name, record in records.items()}
    real = next(row for row in records['head']['rows'] if row.get('control') == REAL)
    lines = [*commands(records), '', f'{real["samples"]} texts of {real["length"]} tokens a setting, seed '
             f'{real["seed"]}, temperature interpolated to the trigram entropy of real text of this size, '
             f'{real["entropy_3"]:.3f} nats (reference bits {real["reference_bits"]:.3f}).', '']
    body = []
    for (policy, calls), with_head in found['head'].items():
        alone = found['alone'].get((policy, calls))
        bits = with_head.figures['reference_bits']
        others = [(one.wanted, one.figures['reference_bits']) for (name, _), one in found['alone'].items()
                  if name == policy and one.figures['reference_bits'] is not None]
        body.append([f'`{policy}`', str(calls), bits_at_equal_entropy(with_head),
                     '-' if alone is None else bits_at_equal_entropy(alone),
                     '-' if bits is None or not others else calls_at(others, bits)])
    return '\n'.join([*lines, *markdown_table(
        ['policy', 'trunk calls', 'bits, head', 'bits, trunk alone', 'calls alone that equal the head'], body)])


def by_budget(rows: Sequence[Row]) -> dict[tuple[str, int], Equal]:
    """Settings at equal entropy, by policy (with its guidance) and trunk calls."""
    return {(equal.name, equal.wanted): equal for equal in at_equal_entropy(rows)}


def bits_at_equal_entropy(equal: Equal) -> str:
    """'bits (low - high)', or a dash if no temperature reaches the entropy."""
    figures = equal.figures
    return '-' if figures['reference_bits'] is None else \
        f'{figures["reference_bits"]:.3f} ({figures["low"]:.3f} - {figures["high"]:.3f})'


SAMPLES = Section('samples', (
    Experiment('head', MAIN, 'out/ckpt_best.pt', 'curves', {**SAMPLED, 'trunk_calls': [2.0, 4.0, 8.0, 16.0]}),
    Experiment('alone', MAIN, 'out/ckpt_best.pt', 'curves', {
        **SAMPLED, 'trunk_calls': [4.0, 8.0, 16.0, 32.0, 64.0], 'use_sampler_head': False})), samples_text)


# The generator's own errors -----------------------------------------------------------------------------------------

def errors_text(records: Records) -> str:
    """AUROC of each detector at each share of masks. At one half, also how good its probabilities are."""
    record = records['main']
    shares = arranged_errors(record['rows'])
    names = [name for name in DETECTORS if name in shares[0]]
    body = [[f'{line["mask_share"]:.1f}', f'{line["error_rate"]:.3f}', *(line[name] for name in names)]
            for line in shares]
    lines = [*commands(records), '', f'{record["rows"][0]["windows"]} windows; AUROC with its 95 % interval.', '',
             *markdown_table(['mask share', 'error rate', *(name.replace('_', ' ') for name in names)], body), '',
             f'As probabilities, at mask share {SHOWN_SHARE}:', '']
    body = [[row['detector'].replace('_', ' '), *(f'{row[name]:.3f}' for name in (
        'auroc', 'expected_auroc', 'brier', 'calibration_error'))]
        for row in record['rows'] if row.get('mask_share') == SHOWN_SHARE and 'brier' in row]
    lines += markdown_table(['detector', 'AUROC', 'AUROC if exact', 'Brier score', 'calibration error'], body)
    for row in record['rows']:
        if 'mask_shares' in row:
            lines += ['', f'The critic over all mask shares, on windows that its calibration was not fitted on: AUROC '
                      f'{row["auroc"]:.3f}, calibration error {row["calibration_error"]:.3f} as it is and '
                      f'{row["calibrated_error"]:.3f} calibrated.']
    return '\n'.join([*lines, '', '![How well errors are found, and how calibrated](errors.png)'])


ERRORS = Section('errors', (Experiment('main', MAIN, 'out/ckpt_best.pt', 'errors'),), errors_text,
                 lambda records, folder,
                 say: plot_errors([row for row in records['main']['rows'] if 'mask_share' in row],
                                                          SHOWN_SHARE, folder / 'errors.png', say))


# Training choices ---------------------------------------------------------------------------------------------------

VARIANTS = {
    'base': ('masked_mean, averaged weights, Muon, rotary', 500, ''),
    'elbo': ('elbo weighting', 500, ' --loss_weighting=elbo'),
    'noema': ('no averaging of weights', 500, ' --ema_decay=0'),
    'adamw': ('AdamW for everything', 560, ' --optimizer=adamw --learning_rate=4e-3'),
    'absolute': ('absolute positions', 500, ' --position_encoding=absolute'),
}


def training_text(records: Records) -> str:
    """NELBO of each variant by seed, its mean and spread, and its difference from the first, seed by seed."""
    values = {key: record['rows'][0]['nats'] for key, record in records.items()}
    body = []
    for name, (words, iterations, _) in VARIANTS.items():
        mine = [values[f'{name} {seed}'] for seed in SEEDS if f'{name} {seed}' in values]
        gaps = [values[f'{name} {seed}'] - values[f'base {seed}'] for seed in SEEDS
                if f'{name} {seed}' in values and f'base {seed}' in values]
        body.append([words, str(iterations), ', '.join(f'{value:.3f}' for value in mine) or '-', spread(mine),
                     spread(gaps, '+') if name != 'base' else '-'])
    head = ['variant', 'iterations', 'NELBO of each seed', 'mean (s.d.)', 'from the first (s.d.)']
    return '\n'.join([*commands(records), '', *markdown_table(head, body)])


def _variant(name: str, seed: int) -> Experiment:
    _, iterations, more = VARIANTS[name]
    folder = f'out-train-{name}-{seed}'
    return Experiment(f'{name} {seed}', f'{TRAIN} --out_dir={folder} --seed={seed} --max_iters={iterations} '
                      f'--eval_interval={iterations}{more}', f'{folder}/ckpt_best.pt', 'nelbo', {'windows': 1024})


TRAINING = Section('training', tuple(_variant(name, seed) for name in VARIANTS for seed in SEEDS), training_text)


# Tiny Shakespeare ---------------------------------------------------------------------------------------------------

TINY_TRAINING = (f'{TRAIN} --dataset=tinyshakespeare_char --max_iters=700 --eval_interval=350 --eval_iters=64 '
                 f'--out_dir=out-tiny')


def tiny_text(records: Records) -> str:
    """The bound and the best exact likelihood."""
    bound = records['bound']
    rows = sorted(records['orders']['rows'], key=lambda row: row['nats'])[:5]
    body = [['any order (NELBO, a bound)', '-', figure(bound['rows'][0])],
            *([row['policy'], str(row['trunk_calls']), figure(row)] for row in rows)]
    return '\n'.join([*commands(records), '', f'{bound["iterations"]} iterations, {bound["seconds"]:.0f} s of training '
                      f'with compilation, without validations. The bound, and the five best exact likelihoods:', '',
                      *markdown_table(['order', 'K', 'nats per character (s.e.)'], body)])


TINY = Section('tiny', (
    Experiment('bound', TINY_TRAINING, 'out-tiny/ckpt_best.pt', 'nelbo', {'windows': 2048}),
    Experiment('orders', TINY_TRAINING, 'out-tiny/ckpt_best.pt', 'likelihood', {
        'policies': 'random,left_to_right,strided,top_probability', 'trunk_calls': [16.0, 128.0]})), tiny_text)


# The page -----------------------------------------------------------------------------------------------------------

MAIN_RUN = Section('main', (Experiment('main', MAIN, 'out/ckpt_best.pt'),), main_text, draw_main)

SECTIONS = (MAIN_RUN, MODELS, HEAD, WINDOWS, BPE, ERRORS, TRAINING, TINY, SAMPLES, CURVES)
