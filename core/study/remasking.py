"""The sections of docs/results/remasking.md: remasking models, what guides remasking, and judges."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, NamedTuple

from core.common.plots import INK, save_picture, tidy
from core.common.tables import markdown_table
from core.evaluation.error_detection import SHOWN_SHARE
from core.evaluation.measure import Result
from core.evaluation.quality_plots import COLOURS, MARKERS
from core.evaluation.quality_tables import REAL, at_equal_entropy
from core.study.pages import Experiment, Records, Say, Section
from core.study.records import Record
from core.study.results import MAIN
from core.study.words import SEEDS, calls_at, commands, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Which of them finds real errors ------------------------------------------------------------------------------------

REMASKING_PAGE = 'docs/results/remasking.md'
REMASKING = 'python train.py config/train_char_remasking.py'
FROM_GENERATOR = "from the generator's weights"
FROM = ' --remasking_corruption=model --init_from_checkpoint=out/ckpt_best.pt --learning_rate=0.006'
KINDS = {
    'a-random': ('A, random', ' --remasking_loss_type=corrupted_only'),
    'b-random': ('B, random', ' --remasking_loss_type=all_positions'),
    'balanced-random': ('balanced, random', ''),
    'balanced-model': ('balanced, model', ' --remasking_corruption=model'),
    'init-a': (f'A, model, {FROM_GENERATOR}', f'{FROM} --remasking_loss_type=corrupted_only'),
    'init-b': (f'B, model, {FROM_GENERATOR}', f'{FROM} --remasking_loss_type=all_positions'),
    'init-model': (f'balanced, model, {FROM_GENERATOR}', FROM),
    'init-binary': (f'binary, balanced, model, {FROM_GENERATOR}', f'{FROM} --remasking_kind=binary'),
    'binary-model': ('binary, balanced, model', ' --remasking_kind=binary --remasking_corruption=model'),
}


def _remasking(kind: str, seed: int) -> Experiment:
    folder = f'out-remask-{kind}-{seed}'
    return Experiment(f'{kind} {seed}', f'{REMASKING} --out_dir={folder} --seed={seed} --max_iters=600 '
                      f'--eval_interval=300{KINDS[kind][1]}', f'{folder}/ckpt_best.pt', 'errors',
                      {'out_dir': 'out', 'checkpoint_name': 'ckpt_best.pt',
                       'remasking_checkpoint_name': f'{folder}/ckpt_best.pt'}, _is_shown)


def _is_shown(row: Result) -> bool:
    """Whether the table shows a row. The other detectors do not depend on the remasking model: one share is enough."""
    return row['detector'] == 'remasking' or row.get('mask_share') == SHOWN_SHARE


def detection_text(records: Records) -> str:
    """AUROC on the generator's own errors by kind of remasking model, mean and spread over seeds; what each learnt."""
    lines = [*commands(records), '']
    found = {kind: [record for key, record in records.items() if key.split(' ')[0] == kind] for kind in KINDS}
    body = []
    for kind, mine in found.items():
        if not mine:
            continue
        own = [{row['mask_share']: row['auroc'] for row in record['rows']
                if row['detector'] == 'remasking' and 'mask_share' in row} for record in mine]
        last = [record['validations'][-1] for record in mine]
        corrections = [line['correction_accuracy'] for line in last if 'correction_accuracy' in line]
        real = [row['correction_accuracy'] for record in mine for row in record['rows']
                if row.get('mask_share') == SHOWN_SHARE and row.get('correction_accuracy') is not None]
        body.append([KINDS[kind][0], str(len(mine)),
                     *(spread([one[share] for one in own]) for share in (0.1, 0.5, 0.9)),
                     *(spread([line[name] for line in last]) for name in (
                         'auroc', 'accuracy_clean', 'accuracy_corrupted')), spread(corrections), spread(real)])
    head = ['remasking model', 'seeds', 'AUROC at mask share 0.1', 'at 0.5', 'at 0.9', 'AUROC, own corruption',
            'accuracy, right', 'accuracy, wrong', 'correction', 'correction of real errors']
    lines += markdown_table(head, body)
    others = {row['detector']: row['auroc'] for record in records.values() for row in record['rows']
              if row.get('mask_share') == SHOWN_SHARE and row['detector'] != 'remasking'}
    said = ', '.join(f'{name.replace("_", " ")} {value:.3f}' for name, value in others.items())
    return '\n'.join([*lines, '', f'Others at mask share {SHOWN_SHARE}: {said}.'])


DETECTION = Section('detection', tuple(_remasking(kind, seed) for kind in KINDS for seed in SEEDS), detection_text,
                    page=REMASKING_PAGE)


# Who guides remasking -----------------------------------------------------------------------------------------------

class Guide(NamedTuple):
    """policy and guidance: of evaluate.py, guidance None where the policy asks nobody; calls: of the trunk; model: the
    remasking model that guides, a key of `KINDS`. Remasking asks a guide once between two trunk calls."""

    policy: str
    guidance: str | None
    calls: list[float]
    model: str | None = None
    temperatures: list[float] = [0.8, 1.0, 1.2, 1.4, 1.7]


ALONE, WITH_GUIDE = [7.0, 15.0, 31.0], [4.0, 8.0, 16.0]  # trunk calls of equal network calls
NETWORK_CALLS = (7, 15, 31)
BY_CHANCE = 0.4  # of the tokens taken back; at sample.py's own share guides differ less
GUIDES = {
    'chance': Guide('remask', 'random', ALONE),
    'self-confidence': Guide('remask', 'self', ALONE, temperatures=[1.2, 1.4, 1.7, 2.0, 2.5]),
    'critic': Guide('remask', 'critic', WITH_GUIDE),
    'remasking model A': Guide('remask', 'model', WITH_GUIDE, 'init-a'),
    'remasking model B': Guide('remask', 'model', WITH_GUIDE, 'init-b'),
    'remasking model, balanced': Guide('remask', 'model', WITH_GUIDE, 'init-model'),
    'remasking model, binary': Guide('remask', 'model', WITH_GUIDE, 'init-binary'),
    'remdm_loop': Guide('remdm_loop', None, ALONE),
    'llada, no remasking': Guide('llada', None, ALONE, temperatures=[1.4, 2.0, 3.0, 4.5, 6.0]),
}


def _guided(name: str, seed: int) -> Experiment:
    guide = GUIDES[name]
    options = {'out_dir': 'out', 'checkpoint_name': 'ckpt_best.pt', 'policies': guide.policy,
               'trunk_calls': guide.calls, 'temperatures': guide.temperatures, 'seed': seed}
    training, checkpoint = MAIN, 'out/ckpt_best.pt'
    if guide.guidance is not None:
        options['guidance'] = guide.guidance
    if guide.guidance not in (None, 'random'):
        options['randomness_strength'] = BY_CHANCE
    if guide.model is not None:
        model = _remasking(guide.model, seed)
        training, checkpoint = model.training, model.checkpoint
        options['remasking_checkpoint_name'] = checkpoint
    return Experiment(f'{name} {seed}', training, checkpoint, 'curves', options)


def guides_text(records: Records) -> str:
    """Reference bits at equal trigram entropy by network calls, differences from the critic, and the network calls that
    each needs for what the critic reaches with most."""
    found = {name: [_bits(records[f'{name} {seed}']) for seed in SEEDS if f'{name} {seed}' in records]
             for name in GUIDES}
    body = []
    wanted = _mean_at(found['critic'], NETWORK_CALLS[-1])
    for name, seeds in found.items():
        if not seeds:
            continue
        means = [(calls, bits) for calls in NETWORK_CALLS if (bits := _mean_at(seeds, calls)) is not None]
        gaps = [spread([one[calls] - critic[calls] for one, critic in zip(seeds, found['critic'])
                        if calls in one and calls in critic], '+') for calls in NETWORK_CALLS]
        body.append([name, *(spread([one[calls] for one in seeds if calls in one]) for calls in NETWORK_CALLS),
                     *(['-'] * len(NETWORK_CALLS) if name == 'critic' else gaps),
                     '-' if wanted is None or not means else calls_at(means, wanted)])
    rows = next(iter(records.values()))['rows']
    real = next(row for row in rows if row.get('control') == REAL)
    head = ['guide', *(f'{calls} network calls' for calls in NETWORK_CALLS),
            *(f'minus critic, {calls}' for calls in NETWORK_CALLS), 'calls for the bits of the critic at 31']
    return '\n'.join([*commands(records), '', f'{real["samples"]} texts of {real["length"]} tokens a setting and seed, '
                      f'through the sampler head; trigram entropy {real["entropy_3"]:.3f} nats, that of real text of '
                      f'this size (reference bits {real["reference_bits"]:.3f}). Mean over seeds (standard deviation); '
                      f'differences are seed by seed. A dash: no temperature of the sweep has that entropy.', '',
                      *markdown_table(head, body)])


def _bits(record: Record) -> dict[int, float]:
    """Reference bits at equal entropy by network calls, rounded: a guide is not asked where nothing is left."""
    found = {}
    for equal in at_equal_entropy(record['rows']):
        if equal.figures['reference_bits'] is not None:
            found[round(equal.figures['network_calls'])] = equal.figures['reference_bits']
    return found


def _mean_at(seeds: Sequence[Mapping[int, float]], calls: int) -> float | None:
    values = [one[calls] for one in seeds if calls in one]
    return sum(values) / len(values) if values else None


def draw_guides(records: Records, folder: Path, say: Say) -> None:
    """Reference bits against trigram entropy, a panel for each number of network calls: means over seeds at each
    temperature."""
    save_picture(folder / 'remask_guides.png', (12, 4), lambda figure: _draw_guides(figure, records), say)


def _draw_guides(figure: 'Figure', records: Records) -> None:
    real = next(row for row in next(iter(records.values()))['rows'] if row.get('control') == REAL)
    panels = figure.subplots(1, len(NETWORK_CALLS), sharex=True, sharey=True)
    for place, (axes, calls) in enumerate(zip(panels, NETWORK_CALLS)):
        for number, (name, guide) in enumerate(GUIDES.items()):
            rows = [row for seed in SEEDS for row in records.get(f'{name} {seed}', {'rows': []})['rows']
                    if row.get('wanted_calls') == guide.calls[place]]
            points = [[mean(row[figure] for row in rows if row['temperature'] == temperature)
                       for figure in ('entropy_3', 'reference_bits')]
                      for temperature in sorted({row['temperature'] for row in rows})]
            axes.plot(*zip(*points), color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)],
                      linestyle='-' if number < len(COLOURS) else '--', markersize=4, linewidth=1.2, label=name)
        axes.axvline(real['entropy_3'], color=INK, linewidth=0.9, linestyle=(0, (5, 3)), label='real text')
        axes.set_title(f'{calls} network calls', color=INK, fontsize=10)
        axes.set_xlabel('trigram entropy, nats', color=INK)
        tidy(axes, 'both')
    panels[0].set_ylabel('reference bits per character', color=INK)
    panels[-1].legend(frameon=False, fontsize=8, labelcolor=INK, loc='center left', bbox_to_anchor=(1.0, 0.5))


GUIDANCE = Section('guides', tuple(_guided(name, seed) for name in GUIDES for seed in SEEDS), guides_text,
                   draw_guides, REMASKING_PAGE)


# Judges -------------------------------------------------------------------------------------------------------------

JUDGE = 'python train.py config/train_char_judge.py'


def judge_text(records: Records) -> str:
    """How often a judge ranks clean text above corrupted text."""
    last = [record['validations'][-1] for record in records.values()]
    body = [[name.removeprefix('judge '), *(f'{line[key]:.4f}' for key in ('loss', 'above_random', 'above_filled')),
             f'{record["seconds"]:.0f}'] for (name, record), line in zip(records.items(), last)]
    return '\n'.join([*commands(records), '', *markdown_table(
        ['seed', 'squared error', 'above a tenth replaced', 'above three tenths filled', 'training seconds'], body)])


JUDGES = Section('judges', tuple(Experiment(
    f'judge {seed}', f'{JUDGE} --out_dir=out-judge-{seed} --seed={seed} '
                     f'--init_from_checkpoint=out-remask-init-model-{seed}/ckpt_best.pt',
    f'out-judge-{seed}/ckpt_best.pt')
    for seed in SEEDS), judge_text, page=REMASKING_PAGE)

SECTIONS = (DETECTION, GUIDANCE, JUDGES)
