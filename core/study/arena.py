"""The arena: sampler heads on one frozen trunk, compared by exact nats, operations and seconds.

    python evaluate.py --measure=arena --checkpoints="out-arena/*/ckpt.pt" --report=docs/results/arena.md

A contestant is a checkpoint with a trained head. Contestants with exactly the same trunk form a group and are compared
with each other. If there are trunks of several seeds, there are several groups, and each head has a contestant in each
group. Every group contains the reference, a head of kind `neighbours`. Differences from it are paired by window.

Letters: S seeds (trunks), W windows.
"""

import glob
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from core.common.errors import UserError, raise_problems
from core.common.files import write_whole
from core.common.plots import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILION, save_picture, tidy
from core.common.printing import say
from core.common.tables import markdown_table, split_at_markers, write_between
from core.evaluation.arena import ARENA, arena_cells, label
from core.evaluation.measure import CACHE_NAME, Evaluation, Result, ResultCache
from core.evaluation.options import EvaluateConfig
from core.evaluation.quality_tables import command_of, markers
from core.evaluation.run import compute_cells, load_evaluation, option_problems, table
from model import GPT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, NOBODY = 'docs/results/arena.md', 'independent draws'
NAMES = {'random': 'random', 'strided': 'strided', 'left_to_right': 'blocks'}  # of orders; a block: a run of places
HEAD = ('head', 'calls', 'nats', 'difference (s.e.)', 'seeds from .. to', 'thousand multiply-adds', 'of it the head',
        'ms a text', 'head calls', 'ms verified', 'calls verified')
COLOURS, STYLES = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY), ('-', '--', ':')


class Contestant(NamedTuple):
    """path: of the checkpoint; trunk: hash of its trunk's weights; head: its label; rows: of `arena_cells`."""

    path: str
    trunk: str
    head: str
    rows: list[Result]


def write_arena(config: EvaluateConfig, explicit: Mapping[str, str], say: Callable[[str], None] = say) -> list[Result]:
    """Measure all of `config.checkpoints`, print the table and write the page; returns its rows."""
    raise_problems(option_problems(config, explicit))
    if config.report is not None:
        split_at_markers(Path(config.report), *markers(ARENA), PAGE)
    contestants: list[Contestant] = []
    for path in checkpoint_paths(config.checkpoints):
        place = Path(path)
        evaluation = load_evaluation(replace(config, out_dir=str(place.parent), checkpoint_name=place.name),
                                     {**explicit, 'out_dir': path, 'checkpoint_name': path}, say)
        if not evaluation.sampler_head:
            say(f'{path} is left out: it has no trained sampler head')
            continue
        contestants += measured(evaluation, path, {one.trunk for one in contestants}, say)
    rows = compared(contestants)
    for line in table(ARENA, ('policy', 'trunk_calls', 'head', 'nats', 'difference', 'difference_error', 'cost'), rows):
        say(line)
    if config.report is not None:
        publish(Path(config.report), contestants, rows, command_of(config, explicit, ARENA), say)
    return rows


def checkpoint_paths(patterns: str | None) -> list[str]:
    """The files that `patterns` name. Commas separate patterns; * matches anything. UserError if one names no file."""
    if patterns is None:
        raise UserError('measure is arena, but no checkpoints are named; give --checkpoints=... of heads on one trunk, '
                        'separated by commas, * for anything')
    found = {pattern.strip(): sorted(glob.glob(pattern.strip())) for pattern in patterns.split(',') if pattern.strip()}
    raise_problems([f'checkpoints holds {pattern!r}, but there is no such file; train one, or leave it out'
                    for pattern, paths in found.items() if not paths])
    return list(dict.fromkeys(path for paths in found.values() for path in paths))


def measured(evaluation: Evaluation, path: str, known: Iterable[str], say: Callable[[str], None]) -> list[Contestant]:
    """The contestant of a checkpoint, as far as possible from its cache. Also the contestant of its trunk without a
    head, if that trunk is not `known` yet."""
    model, cache = evaluation.model, ResultCache(evaluation.out_dir / CACHE_NAME, say)
    trunk = trunk_hash(model)
    ways = [(label(model.config), model.config.sampler_order), *([] if trunk in known else [(NOBODY, 'none')])]
    say(f'{path}: {ways[0][0]}, trunk {trunk[:12]}')
    torch.set_flush_denormal(evaluation.runtime.device.type == 'cpu')
    try:
        return [Contestant(path, trunk, name, compute_cells(evaluation, cache, ARENA, arena_cells(evaluation, way)))
                for name, way in ways]
    finally:
        torch.set_flush_denormal(False)


def trunk_hash(model: GPT) -> str:
    """SHA-256 (hex) of the trunk's weights, including its output matrix."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        if not name.startswith(('sampler_head.', 'critic_head.')):
            digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def reference_of(contestants: Sequence[Contestant]) -> str:
    """The label of the head that all others are compared with. UserError unless each trunk has the same heads, each
    exactly once, including this one."""
    trunks = list(dict.fromkeys(one.trunk for one in contestants))
    heads = list(dict.fromkeys(one.head for one in contestants))
    if not contestants:
        raise UserError('none of the checkpoints has a trained sampler head; give others')
    of = {(one.trunk, one.head): [other.path for other in contestants if (other.trunk, other.head) ==
                                  (one.trunk, one.head)] for one in contestants}
    problems = [f'{" and ".join(paths)} hold the same head ({head}) on one trunk; leave one of them out'
                for (_, head), paths in of.items() if len(paths) > 1]
    names = {trunk: next(one.path for one in contestants if one.trunk == trunk) for trunk in trunks}
    problems += [f'no head "{head}" is on the trunk of {names[trunk]} (their weights are compared); train it there, or '
                 f'leave it out' for trunk in trunks for head in heads if (trunk, head) not in of]
    reference = next((head for head in heads if head.startswith('neighbours')), None)
    if reference is None:
        problems.append('no checkpoint has a head of sampler_kind=neighbours, which the others are compared with; add '
                        'one')
    raise_problems(problems)
    return reference


def compared(contestants: Sequence[Contestant]) -> list[Result]:
    """A row for every order, number of trunk calls and head: means over trunks and windows, and the difference from the
    reference, paired by trunk and window. difference_error: standard error over windows of the mean over trunks.
    lowest, highest: of the differences of single trunks. cost: multiply-adds for each token. head_cost: the head's part
    of them."""
    reference, rows = reference_of(contestants), []
    by_head: dict[str, list[Contestant]] = {}
    for one in sorted(contestants, key=lambda one: one.trunk):
        by_head.setdefault(one.head, []).append(one)
    heads = [NOBODY, reference, *(head for head in by_head if head not in (NOBODY, reference))]
    for number in range(len(contestants[0].rows)):
        base = nats_of([one.rows[number] for one in by_head[reference]])
        for head in heads:
            mine = [one.rows[number] for one in by_head[head]]
            found = nats_of(mine)  # [S, W]
            difference = found - base
            error = difference.mean(0).std() / math.sqrt(difference.size(1))
            first = mine[0]
            rows.append({
                'policy': first['policy'], 'trunk_calls': first['trunk_calls'], 'head': head, 'seeds': len(mine),
                'nats': found.mean().item(), 'difference': difference.mean().item(), 'difference_error': error.item(),
                'lowest': difference.mean(1).min().item(), 'highest': difference.mean(1).max().item(),
                'cost': first['trunk'] + first['head'], 'head_cost': first['head'],
                **{name: sum(row[name] for row in mine) / len(mine) for name in (
                    'seconds', 'head_calls', 'verified_seconds', 'verified_calls') if name in first}})
    return rows


def nats_of(rows: Sequence[Result]) -> Tensor:
    """float64 [S, W]: nats per token of every window."""
    return torch.tensor([row['window_nats'] for row in rows], dtype=torch.float64)


# The page -------------------------------------------------------------------------------------------------------------

def publish(page: Path, contestants: Sequence[Contestant], rows: Sequence[Result], command: str,
            say: Callable[[str], None]) -> None:
    """Write the table between the page's markers, and arena.json (the rows) and arena.png (the picture) next to it."""
    write_between(page, *markers(ARENA), text_of(contestants, rows, command), PAGE)
    kept = {'command': command, 'contestants': [
        {'checkpoint': one.path, 'trunk': one.trunk, 'head': one.head} for one in contestants], 'rows': rows}
    write_whole(page.with_name(f'{ARENA}.json'), json.dumps(kept, indent=1, ensure_ascii=False) + '\n')
    save_picture(page.with_name(f'{ARENA}.png'), (12, 5), lambda figure: draw(figure, rows), say)
    say(f'{ARENA} written to {page} and {page.with_name(f"{ARENA}.json")}')


def text_of(contestants: Sequence[Contestant], rows: Sequence[Result], command: str) -> str:
    """Markdown: what was measured, the picture, and a table for each order."""
    first = contestants[0].rows[0]
    lines = [f'    {command}', '', f'Trunks: {rows[0]["seeds"]}. Windows: {first["windows"]} of {first["split"]} of '
             f'{first["dataset"]}, {first["dtype"]}, orders of seed {first["seed"]}. Times are of {first["texts"]} '
             f'texts drawn at once, and are those of the machine that measured.', '',
             f'![nats against multiply-adds]({ARENA}.png)']
    for policy in dict.fromkeys(row['policy'] for row in rows):
        mine = [row for row in rows if row['policy'] == policy]
        lines += ['', f'### {NAMES.get(policy, policy)}', '', *markdown_table(HEAD, [cells_of(row) for row in mine])]
    return '\n'.join(lines)


def cells_of(row: Result) -> list[str]:
    """The cells of a row of the table, as text."""
    def milliseconds(name: str) -> str:
        return f'{1000 * row[name]:.1f}' if name in row else ''

    return [row['head'], str(row['trunk_calls']), f'{row["nats"]:.4f}',
            f'{row["difference"]:+.4f} ({row["difference_error"]:.4f})',
            f'{row["lowest"]:+.4f} .. {row["highest"]:+.4f}',
            f'{row["cost"] / 1000:.0f}', f'{row["head_cost"] / row["cost"]:.1%}', milliseconds('seconds'),
            f'{row["head_calls"]:.0f}', milliseconds('verified_seconds'),
            f'{row["verified_calls"]:.0f}' if 'verified_calls' in row else '']


def draw(figure: 'Figure', rows: Sequence[Result]) -> None:
    """Nats against multiply-adds, a panel for each order and a line for each head."""
    policies, heads = (list(dict.fromkeys(row[name] for row in rows)) for name in ('policy', 'head'))
    for axes, policy in zip(figure.subplots(1, len(policies), sharey=True, squeeze=False)[0], policies):
        for number, head in enumerate(heads):
            mine = [row for row in rows if (row['policy'], row['head']) == (policy, head)]
            axes.plot([row['cost'] for row in mine], [row['nats'] for row in mine], marker='o', markersize=3,
                      linewidth=1.2, color=INK if head == NOBODY else COLOURS[number % len(COLOURS)],
                      linestyle=STYLES[number // len(COLOURS) % len(STYLES)], label=head)
        axes.set_xscale('log')
        axes.set_title(NAMES.get(policy, policy), color=INK, fontsize=10)
        tidy(axes, 'both')
    figure.supxlabel('multiply-adds for each token, trunk and head', color=INK, fontsize=10)
    figure.supylabel('nats per token', color=INK, fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside upper center', ncols=3, frameon=False, labelcolor=INK, fontsize=8)
