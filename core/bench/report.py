"""The report of a benchmark's record: figures and tables, computed from the raw seconds, and the files they go to."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from configurator import bound_problems
from core.bench.cases import SHAPES, Shape
from core.bench.measuring import GROUPS, Say, benchmark
from core.bench.options import BenchConfig, measurement_problems
from core.bench.records import (BASELINES, COPY, BenchRecord, RecordKind, file_problems, name_problems, read_json_record,
                                show_and_write)
from core.bench.sampling_cases import FILL_ROWS, POLICY_ROWS, PREDICTIONS
from core.common.errors import raise_problems
from core.common.runtime import resolve_device
from core.common.tables import markdown_table

KIND = RecordKind('bench.py', BenchRecord, 'docs/results/performance.md', '<!-- bench.py writes from here -->',
                  '<!-- bench.py writes to here -->')
CASES = {  # what a case is called in a table
    'baseline': 'baseline: eager float32 causal step',
    **{name: f'{name.replace("baseline,", "baseline:")} causal step' for name in BASELINES},
    'causal': 'causal step of the same trunk', 'stage 1': 'stage 1: diffusion, main loss only',
    'stage 2': 'stage 2: and the sampler head', 'stage 3': 'stage 3: and the critic on {rows}',
    'block': 'block diffusion: two streams, main loss only',
    'trunk call': f'trunk call, {FILL_ROWS} rows', 'wavefront fill': f'wavefront fill of {FILL_ROWS} fully masked rows',
}
TITLES = {'training': 'training step', 'fill': 'part of a prediction', 'sampling': 'sampling',
          'decode': 'sampling and the yardstick'}  # of the tables of cases


# Figures ------------------------------------------------------------------------------------------------------------

class Spread(NamedTuple):
    """The middle and both ends of a figure over the rounds."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> 'Spread':
        return cls(statistics.median(values), min(values), max(values))

    def show(self, write: Callable[[float], str]) -> str:
        """'median (lowest - highest)', each number as `write` puts it."""
        return f'{write(self.median)} ({write(self.lowest)} - {write(self.highest)})'


def per_round(group: Mapping[str, Any], first: str, second: str, combine: Callable[[float, float], float]) -> Spread:
    """`combine` of the seconds that cases `first` and `second` took in the same round."""
    cases = group['cases']
    return Spread.of([combine(one, other) for one, other in
                      zip(cases[first]['seconds'], cases[second]['seconds'], strict=True)])


def ratio(group: Mapping[str, Any], first: str, second: str) -> Spread:
    """How many times as long `first` takes as `second`."""
    return per_round(group, first, second, lambda one, other: one / other)


def added_share(group: Mapping[str, Any], whole: str, without: str) -> Spread:
    """The share of the time of `whole` that `without` saves."""
    return per_round(group, whole, without, lambda one, other: (one - other) / one)


def rate_share(group: Mapping[str, Any], name: str) -> Spread:
    """Achieved operations per second of a case as a share of the matrix rate of the same round."""
    case = group['cases'][name]
    return Spread.of([case['operations'] / seconds / rate
                      for seconds, rate in zip(case['seconds'], group['rates'][case['dtype']], strict=True)])


def floors(group: Mapping[str, Any], name: str) -> tuple[float, float | None]:
    """The least seconds of a call of a case at the median rates: for its matrix products, and for the other bytes
    (None if these are not counted). One comes after the other, so the floor is their sum."""
    case, rates = group['cases'][name], group['rates']
    return (case['operations'] / statistics.median(rates[case['dtype']]),
            None if case['bytes'] is None else case['bytes'] / statistics.median(rates[COPY]))


def gap(group: Mapping[str, Any], name: str) -> Spread:
    """Measured seconds of a case, divided by its floor at the rates of the same round."""
    case, rates = group['cases'][name], group['rates']
    floor = [case['operations'] / rate for rate in rates[case['dtype']]]
    if case['bytes'] is not None:
        floor = [one + case['bytes'] / rate for one, rate in zip(floor, rates[COPY], strict=True)]
    return Spread.of([seconds / least for seconds, least in zip(case['seconds'], floor, strict=True)])


def fastest(group: Mapping[str, Any], prefix: str) -> str:
    """Of the cases whose names begin with `prefix`, the name of the one with the lowest median time."""
    return min((name for name in group['cases'] if name.startswith(prefix)),
               key=lambda name: statistics.median(group['cases'][name]['seconds']))


def overhead(run: Mapping[str, Any]) -> Spread:
    """Time of a policy's run outside the network, as a share of the time inside, per round."""
    return Spread.of([(seconds - inside) / inside
                      for seconds, inside in zip(run['seconds'], run['network_seconds'], strict=True)])


def ratios(entry: Mapping[str, Any]) -> dict[str, tuple[Spread, Callable[[float], str]]]:
    """Every ratio of one shape's groups, and how it is written."""
    found = {}
    if training := entry.get('training'):
        found |= {'diffusion step / causal step': (ratio(training, 'stage 1', 'causal'), _times),
                  'stage 2 / stage 1': (ratio(training, 'stage 2', 'stage 1'), _times),
                  'stage 3 / stage 1': (ratio(training, 'stage 3', 'stage 1'), _times),
                  'sampler head, share of a stage 2 step': (added_share(training, 'stage 2', 'stage 1'), _percent),
                  'critic, share of a stage 3 step': (added_share(training, 'stage 3', 'stage 2'), _percent)}
        if 'block' in training['cases']:
            found['block diffusion step / causal step'] = (ratio(training, 'block', 'causal'), _times)
        if any(name.startswith('baseline') for name in training['cases']):
            found |= {f'tokens/s of the {step} step / of the baseline': (
                ratio(training, fastest(training, 'baseline'), name), _times)
                      for step, name in (('causal', 'causal'), ('diffusion', 'stage 1'))}
    if fill := entry.get('fill'):
        found['wavefront fill / trunk call'] = (ratio(fill, 'wavefront fill', 'trunk call'), _times)
    if sampling := entry.get('sampling'):
        for name in sampling['cases']:
            method, _, batch = name.partition(', ')
            if method == 'diffusion':
                found[f'tokens/s of diffusion / of standard, {batch}'] = (
                    ratio(sampling, f'standard, {batch}', name), _times)
    if decode := entry.get('decode'):
        for prefix in dict.fromkeys(name.rpartition(', ')[0] for name in decode['cases']):
            method, _, batch = prefix.partition(', ')
            if method != 'causal_decode':
                found[f'tokens/s of {method} / of causal_decode, {batch}'] = (
                    ratio(decode, fastest(decode, f'causal_decode, {batch}, '), fastest(decode, f'{prefix}, ')), _times)
    if policies := entry.get('policies'):
        inside = [[seconds / run['trunk_calls'] for seconds in run['trunk_seconds']]
                  for run in policies['runs'].values()]
        found['trunk call within the runs of policies / by itself'] = (
            Spread.of([statistics.median(calls) / bare
                       for *calls, bare in zip(*inside, policies['bare_seconds'], strict=True)]), _times)
    return found


# Tables -------------------------------------------------------------------------------------------------------------

def report(record: BenchRecord) -> str:
    """The whole report in Markdown that also reads well on a terminal."""
    lines = machine_lines(record['machine'])
    for name, entry in record['shapes'].items():
        lines += ['', *shape_report(name, entry)]
    return '\n'.join(lines)


def machine_lines(machine: Mapping[str, Any]) -> list[str]:
    """The machine and the versions in words."""
    versions = machine['versions']
    devices = ', '.join(machine['devices']) or 'no GPU'
    load = 'unknown' if machine['load_average'] is None else machine['load_average']
    return [f'{machine["processor"]}, {machine["processors"]} processors, {machine["threads"]} threads, {devices}; '
            f'{"fast" if machine["fast_bfloat16"] else "no fast"} bfloat16 on the processor; load average '
            f'{load} at the start.',
            f'{machine["platform"]}; Python {versions["python"]}, torch {versions["torch"]}, numpy '
            f'{versions["numpy"]}; revision {machine["git_revision"] or "unknown"}.']


def shape_report(name: str, entry: Mapping[str, Any]) -> list[str]:
    """Heading, settings and tables of one shape."""
    shape, sampling_dtype = Shape(**entry['shape']), entry['sampling_dtype']
    lines = [f'### {name}: {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} channels, {shape.block_size} '
             f'tokens, batch {shape.batch_size}', '',
             f'{entry["parameters"]:,} parameters with both heads, on {entry["device"]}. Training in {entry["dtype"]}, '
             f'{"compiled" if entry["compile"] else "not compiled"}; sampling in {sampling_dtype}, not compiled, '
             f'diffusion with {PREDICTIONS} predictions.']
    for group, title in TITLES.items():
        if group in entry:
            lines += ['', _rate_line(entry[group]), '', *_group_table(title, entry, entry[group], group == 'training')]
    if 'policies' in entry:
        lines += ['', f'{POLICY_ROWS} rows, {len(entry["policies"]["bare_seconds"])} interleaved rounds:', '',
                  *_policy_table(entry['policies'])]
    rows = [[label, write(one.median), write(one.lowest), write(one.highest)]
            for label, (one, write) in ratios(entry).items()]
    return [*lines, '', 'Within a round:', '', *markdown_table(['ratio', 'median', 'lowest', 'highest'], rows)]


def _rate_line(group: Mapping[str, Any]) -> str:
    words = []
    for name, rates in group['rates'].items():
        rate = Spread.of(rates).show(lambda one: f'{one / 1e9:.0f}')
        words.append(f'copy rate {rate} GB/s' if name == COPY else f'{name} matrix rate {rate} GFLOP/s')
    return f'{", ".join(words)}, {len(rates)} interleaved rounds:'


def _group_table(title: str, entry: Mapping[str, Any], group: Mapping[str, Any], with_start_up: bool) -> list[str]:
    stride, rows = entry['critic_row_stride'], []
    judged = 'every row' if stride == 1 else f'one row in {stride}'
    floor_heads = ['products ms', 'copies ms'] if COPY in group['rates'] else ['floor ms']
    for name, case in group['cases'].items():
        seconds = Spread.of(case['seconds'])
        least = ['-' if floor is None else f'{1e3 * floor:.1f}' for floor in floors(group, name)][:len(floor_heads)]
        rows.append([CASES.get(name, name).format(rows=judged), *least, _times(gap(group, name).median),
                     seconds.show(lambda one: f'{1e3 * one:.1f}'), f'{case["tokens"] / seconds.median:,.0f}',
                     f'{case["operations"] / seconds.median / 1e9:,.0f}', rate_share(group, name).show(_percent),
                     *([f'{max(0.0, case["first_seconds"] - seconds.median):.1f}'] if with_start_up else [])])
    return markdown_table([title, *floor_heads, 'gap', 'measured ms', 'tokens/s', 'GFLOP/s', 'share of the rate',
                           *(['start-up s'] if with_start_up else [])], rows)


def _policy_table(group: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, run in group['runs'].items():
        seconds = Spread.of(run['seconds'])
        rows.append([name, f'{run["trunk_calls"]}', f'{run["network_calls"]}', f'{run["tokens"]:,}',
                     seconds.show(lambda one: f'{one:.2f}'), f'{run["tokens"] / seconds.median:,.0f}',
                     overhead(run).show(_percent)])
    return markdown_table(['policy', 'trunk calls', 'network calls', 'tokens', 'seconds', 'tokens/s',
                           "the loop's overhead"], rows)


def _times(value: float) -> str:
    return f'{value:.3f}' if value < 10 else f'{value:.1f}'


def _percent(value: float) -> str:
    return f'{value:.1%}'


# Files --------------------------------------------------------------------------------------------------------------

def run_benchmark(config: BenchConfig, explicit: Mapping[str, str], say: Say) -> None:
    """Measure as `config` (the options of bench.py) says, or read --from_json; print and write the report."""
    raise_problems(option_problems(config, explicit))
    if config.from_json is not None:
        record = read_record(Path(config.from_json))
    else:
        record = benchmark({name: SHAPES[name] for name in config.shapes.split(',')}, config.groups.split(','), say,
                           device=resolve_device(config.device), dtype=config.dtype, compile=config.compile,
                           repetitions=config.repetitions, critic_row_stride=config.critic_row_stride,
                           baseline=config.baseline)
    show_and_write(config, record, report(record), KIND, say)


def option_problems(config: BenchConfig, explicit: Mapping[str, str]) -> list[str]:
    """What is wrong with the options; checked before minutes are spent."""
    problems = bound_problems(config)
    problems += [f'critic_row_stride is {config.critic_row_stride}, but must be at least 1'] \
        if config.critic_row_stride < 1 else []
    problems += [*name_problems('shapes', config.shapes.split(','), SHAPES),
                 *name_problems('groups', config.groups.split(','), GROUPS),
                 *measurement_problems(explicit, scaling=False)]
    if config.baseline and not {'training', 'sampling'} & set(config.groups.split(',')):
        problems.append(f'baseline adds rows to training and sampling, but groups is {config.groups!r}; name one of '
                        f'them or leave --baseline out')
    return problems + file_problems(config, explicit, KIND)


def read_record(path: Path) -> BenchRecord:
    """A record that --json wrote. UserError for anything else."""
    return read_json_record(path, KIND)
