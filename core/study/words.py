"""The words of the study's pages: commands, figures with their errors, differences, spreads over seeds."""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import mean, stdev
from typing import Any

from core.study.pages import Records

Row = Mapping[str, Any]
SEEDS = (1337, 1338, 1339)


def commands(records: Records, known: Sequence[int] = SEEDS) -> list[str]:
    """The commands of all records as a code block: trainings, then evaluations, each once. Commands that differ only in
    which of the `known` seeds they name become one loop over the seeds."""
    found = dict.fromkeys([*(record['training'] for record in records.values()),
                           *(record['evaluation'] for record in records.values() if 'evaluation' in record)])
    seeds_of: dict[str, list[str]] = {}  # by the command with $seed in place of a seed
    for command in found:
        named = [(str(seed), re.compile(rf'(?<=[-=]){seed}(?![\w.])')) for seed in known]
        seeds = [(seed, pattern) for seed, pattern in named if pattern.search(command)]
        assert len(seeds) < 2, f'two seeds in {command}'
        general = seeds[0][1].sub('$seed', command) if seeds else command
        seeds_of.setdefault(general, []).extend(seed for seed, _ in seeds)
    lines = []
    for seeds, group in groupby(seeds_of.items(), key=lambda item: item[1]):
        if len(seeds) < 2:
            lines += [command.replace('$seed', *seeds) if seeds else command for command, _ in group]
        else:
            lines += [f'for seed in {" ".join(seeds)}; do', *(f'    {command}' for command, _ in group), 'done']
    return [f'    {line}' for line in lines]


def figure(row: Row) -> str:
    """'nats (standard error)' of a row."""
    return f'{row["nats"]:.3f} ({row["standard_error"]:.3f})'


def difference(one: Row, other: Row) -> tuple[float, float]:
    """The mean over windows of the nats of `one` minus those of `other`, and its standard error (paired)."""
    values = [a - b for a, b in zip(one['window_nats'], other['window_nats'], strict=True)]
    return mean(values), stdev(values) / math.sqrt(len(values))


def signed(value: tuple[float, float]) -> str:
    """'+mean (standard error)'."""
    return f'{value[0]:+.3f} ({value[1]:.3f})'


def spread(values: Sequence[float], sign: str = '') -> str:
    """'mean (standard deviation)'."""
    if not values:
        return '-'
    return f'{mean(values):{sign}.3f} ({stdev(values):.3f})' if len(values) > 1 else f'{values[0]:{sign}.3f}'


def calls_at(points: Sequence[tuple[float, float]], wanted: float) -> str:
    """The calls at which a figure falls to `wanted`, from points (calls, figure), interpolated in the logarithm of the
    calls. '< fewest' if all figures are lower than `wanted`, '> most' if all are higher."""
    ordered = sorted(points)
    for (calls, above), (more, below) in zip(ordered, ordered[1:]):
        if above >= wanted >= below:
            share = (above - wanted) / (above - below) if above > below else 0.0
            return f'{calls * (more / calls) ** share:.1f}'
    return f'> {ordered[-1][0]:g}' if wanted < ordered[-1][1] else f'< {ordered[0][0]:g}'
