"""Two records of bench.py compared: how many times as fast each row is that both hold."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.bench.cases import Shape
from core.bench.records import COPY
from core.bench.report import TITLES, Spread, machine_lines, ratios, read_record
from core.common.errors import UserError
from core.common.tables import markdown_table

USAGE = 'bench.py --compare before.json after.json'
TOLERANCE = 0.1  # a warning says which rates differ by a larger share
MACHINE = {'processor': 'the processor', 'processors': 'the number of processors', 'threads': 'the number of threads',
           'devices': 'the GPUs', 'platform': 'the system'}
PACKAGES = ('python', 'torch', 'numpy')
SETTINGS = {'device': 'the device', 'dtype': 'the precision of training', 'sampling_dtype': 'the precision of sampling',
            'compile': 'whether training is compiled', 'critic_row_stride': 'the rows that the critic is trained on'}

Record = Mapping[str, Any]


def run_comparison(arguments: Sequence[str], say: Callable[[str], object]) -> None:
    """Answer `arguments`, the whole command line after bench.py. UserError if they do not fit `USAGE`, if a file is no
    record, or if the two records have nothing in common."""
    if len(arguments) != 3 or arguments[0] != '--compare' or any(one.startswith('-') for one in arguments[1:]):
        raise UserError(f'--compare takes two records and no other option, as in {USAGE}')
    before, after = (Path(one) for one in arguments[1:])
    say('\n'.join(comparison(before, read_record(before), after, read_record(after))))


def comparison(before_path: Path, before: Record, after_path: Path, after: Record) -> list[str]:
    """Lines in Markdown: both machines, warnings, and a table for each shape that both records hold."""
    lines = [f'before: {before_path}', *machine_lines(before['machine']), '', f'after: {after_path}',
             *machine_lines(after['machine'])]
    warnings, tables = machine_differences(before['machine'], after['machine']), []
    for name in (name for name in before['shapes'] if name in after['shapes']):
        one, other = before['shapes'][name], after['shapes'][name]
        if Shape(**one['shape']) != Shape(**other['shape']):
            warnings.append(f'{name} is another shape in each, so its rows are left out')
            continue
        rows = [[label, *(Spread.of([1e3 * value for value in seconds]).show('{:.1f}'.format) for seconds in pair),
                 *(f'{gain:.3f}' for gain in times_as_fast(*pair))] for label, pair in common_rows(one, other).items()]
        if not rows:
            continue
        warnings += [f'{name}: {text}' for text in shape_differences(one, other)]
        tables += ['', f'### {name}', '', *markdown_table(
            ['row', 'before ms', 'after ms', 'times as fast', 'lowest', 'highest'], rows)]
        earlier, later = ratios(one), ratios(other)
        within = [[label, spread.show(write), later[label][0].show(write)]
                  for label, (spread, write) in earlier.items() if label in later]
        if within:
            tables += ['', 'Within a round:', '', *markdown_table(['ratio', 'before', 'after'], within)]
    if not tables:
        raise UserError(f'{before_path} ({_holdings(before)}) and {after_path} ({_holdings(after)}) have no row in '
                        f'common; measure both with the same --shapes and --groups')
    return [*lines, *(['', *(f'warning: {text}' for text in warnings)] if warnings else []), *tables]


def common_rows(one: Record, other: Record) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    """The seconds per round of each case and each policy's run that both entries of a shape hold, from both entries."""
    found = {}
    for group, key, prefix in (*((title, 'cases', '') for title in TITLES), ('policies', 'runs', 'policy ')):
        earlier, later = (entry.get(group, {key: {}})[key] for entry in (one, other))
        found |= {prefix + name: (case['seconds'], later[name]['seconds'])
                  for name, case in earlier.items() if name in later}
    return found


def times_as_fast(before: Sequence[float], after: Sequence[float]) -> Spread:
    """How many times as fast a row became: by the medians; by the best before and the worst after; and by the worst
    before and the best after. Rounds of two runs are not paired, because they do not belong together."""
    return Spread(statistics.median(before) / statistics.median(after), min(before) / max(after),
                  max(before) / min(after))


def machine_differences(before: Record, after: Record) -> list[str]:
    """Differences between the machines and the versions, in words."""
    pairs = [(words, before[key], after[key]) for key, words in MACHINE.items()]
    pairs += [(f'the version of {package}', before['versions'][package], after['versions'][package])
              for package in PACKAGES]
    return [f'{words} differs: {one} before, {other} after' for words, one, other in pairs if one != other]


def shape_differences(one: Record, other: Record) -> list[str]:
    """Settings of a shape that differ, and rates of the machine that differ by more than `TOLERANCE`, in words."""
    found = [f'{words} differs: {one[key]} before, {other[key]} after'
             for key, words in SETTINGS.items() if one[key] != other[key]]
    for group in (group for group in TITLES if group in one and group in other):
        for name in (name for name in one[group]['rates'] if name in other[group]['rates']):
            rates = [statistics.median(entry[group]['rates'][name]) / 1e9 for entry in (one, other)]
            if max(rates) / min(rates) > 1 + TOLERANCE:
                words, unit = ('copy rate', 'GB/s') if name == COPY else (f'{name} matrix rate', 'GFLOP/s')
                found.append(f'the {words} of {group} differs: {rates[0]:.0f} {unit} before, {rates[1]:.0f} after')
    return found


def _holdings(record: Record) -> str:
    """'small: training, fill; large: policies'"""
    groups = (*TITLES, 'policies')
    return '; '.join(f'{name}: {", ".join(group for group in groups if group in entry)}'
                     for name, entry in record['shapes'].items())
