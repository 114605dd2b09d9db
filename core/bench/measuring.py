"""Speed: what bench.py measures. Raw seconds go into one record of built-in types; core/bench/report.py reads it.

The speed of a noisy machine drifts. So the cases of a group run in turns (A B C A B C), together with the machine's own
rates, and every ratio is taken within a round. core/bench/training_cases.py and core/bench/sampling_cases.py say what
the cases are.
"""

import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.bench.cases import Case, Shape, base_vocabulary, model_config, short_name
from core.bench.records import COPY, FORMAT, VERSION, BenchRecord, Machine, ShapeRecord
from core.bench.sampling_cases import (POLICY_ROWS, TEMPERATURE, PolicyRun, decode_cases, fill_cases, policy_runs,
                                       sampling_cases, sampling_network)
from core.bench.training_cases import baseline_cases, training_cases
from core.checkpoints.environment import environment
from core.common.drawing import DrawRule
from core.common.randomness import RowRandom
from core.common.runtime import Runtime, has_fast_bfloat16, measure_matrix_rate, start_runtime, synchronize
from core.recorded_step import STEPS_BEFORE
from core.sampling.generation import GenerationSettings, generate
from core.sampling.loading import choose_autocast
from core.sampling.network import Network
from core.sampling.prompt import Layout
from model import GPT

Say = Callable[[str], None]

FEWEST, USUAL = 3, 5  # repetitions by default: the second number, or only the first if they take longer than
PATIENCE = 75.0  # seconds
SHORTEST = 0.4  # seconds: a quicker call is repeated and timed as one, so that the clock's resolution does not matter
MOST_CALLS = 50
COPIED = 2 ** 28  # bytes: more than any cache holds
GROUPS = ('training', 'fill', 'sampling', 'policies')
YARDSTICKS = ('training', 'decode')  # groups that are compared with a yardstick


# The measurement ----------------------------------------------------------------------------------------------------

def benchmark(shapes: Mapping[str, Shape], groups: Sequence[str], say: Say, *, device: str, dtype: str,
              compile: bool | None, repetitions: int | None, critic_row_stride: int,
              baseline: bool = False) -> BenchRecord:
    """The record of `groups` (of `GROUPS`) of all `shapes`, in built-in types. repetitions None: `USUAL`, or fewer if
    they take long, but at least `FEWEST`.

    dtype 'auto' and compile None choose as train.py and sample.py do. baseline: the yardstick's rows are added to
    training, and a group 'decode' to sampling. Training and 'decode' then always take `USUAL` rounds.
    """
    found: BenchRecord = {'format': FORMAT, 'version': VERSION, 'machine': describe_machine(), 'shapes': {}}
    for name, shape in shapes.items():
        runtime = start_runtime(device, dtype, compile, width=shape.n_embd, iterations=10_000)  # as for a real run
        for reason in runtime.reasons:
            say(f'{name}: {reason}')
        torch.compiler.reset()  # graphs of the previous shape are of no use
        found['shapes'][name] = measure_shape(name, shape, groups, runtime, dtype, say, repetitions=repetitions,
                                              critic_row_stride=critic_row_stride, baseline=baseline)
    return found


def describe_machine() -> Machine:
    """Versions and machine. The load average shows whether something else was running."""
    described = environment()
    del described['command_line']
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
        processor = next(line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return {**described, 'processor': processor, 'fast_bfloat16': has_fast_bfloat16(torch.device('cpu')),
            'load_average': round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None}


def measure_shape(name: str, shape: Shape, groups: Sequence[str], runtime: Runtime, dtype: str, say: Say, *,
                  repetitions: int | None, critic_row_stride: int, baseline: bool) -> ShapeRecord:
    """Training in `runtime`'s precision, then sampling in the precision that `dtype` chooses for it."""
    device, autocast = runtime.device, choose_autocast(dtype, runtime.device)
    with_heads = model_config(shape, add_sampler_head=True, add_critic_head=True)
    found: dict[str, Any] = {
        'shape': asdict(shape), 'device': str(device), 'dtype': short_name(runtime.dtype),
        'sampling_dtype': short_name(autocast or torch.float32), 'compile': runtime.compile,
        'critic_row_stride': critic_row_stride, 'parameters': GPT(with_heads).parameter_count()}
    in_turns: dict[str, Callable[[], dict[str, Case]]] = {
        'training': lambda: (baseline_cases(shape, runtime) if baseline else {})
        | training_cases(shape, runtime, critic_row_stride),
        'fill': lambda: fill_cases(shape, device, autocast),
        'sampling': lambda: sampling_cases(shape, device, autocast),
        'decode': lambda: decode_cases(shape, device, decode_precisions(dtype, device))}
    wanted = {*groups, 'decode'} if baseline and 'sampling' in groups else set(groups)
    for group in (one for one in in_turns if one in wanted):
        cases = in_turns[group]()
        # the last warm-up shows how long a call takes
        warm_ups = 2 if group == 'training' and runtime.compile or device.type == 'cuda' else 1
        if group == 'training' and device.type == 'cuda':
            warm_ups = STEPS_BEFORE + 2  # until steps are replayed
        found[group] = measure_in_turns(
            cases, rates_of(cases, device), runtime.synchronize, lambda line: say(f'{name} {group}: {line}'),
            repetitions=repetitions or (USUAL if baseline and group in YARDSTICKS else None), warm_ups=warm_ups)
    if 'policies' in groups:
        found['policies'] = measure_policies(policy_runs(shape), sampling_network(with_heads, device, autocast),
                                             lambda line: say(f'{name} policies: {line}'), repetitions=repetitions)
    return found


def decode_precisions(dtype: str, device: torch.device) -> list[torch.dtype | None]:
    """The precisions of autocast that are measured. Each side of the comparison counts with its fastest one."""
    if dtype != 'auto':
        return [choose_autocast(dtype, device)]
    fast = has_fast_bfloat16(device) or device.type == 'cpu' and torch.cpu._is_avx512_bf16_supported()
    return [None, torch.bfloat16] if fast else [None]


def rates_of(cases: Mapping[str, Case], device: torch.device) -> dict[str, Callable[[], float]]:
    """How to measure each rate that the floors of `cases` need, by `short_name` of the dtype, or `COPY`."""
    rates = {short_name(dtype): partial(measure_matrix_rate, device, dtype)
             for dtype in dict.fromkeys(case.dtype for case in cases.values())}
    return rates | ({COPY: partial(measure_copy_rate, device)}
                    if any(case.bytes is not None for case in cases.values()) else {})


def measure_copy_rate(device: torch.device, seconds: float = 0.2) -> float:
    """Bytes read and written per second when a tensor is copied that is larger than the caches: the median of as many
    copies as fit into `seconds`."""
    source, target = (torch.ones(COPIED // 4, device=device) for _ in range(2))
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times) < 4:
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * COPIED / sorted(times[1:])[len(times[1:]) // 2]


def measure_in_turns(cases: Mapping[str, Case], rates: Mapping[str, Callable[[], float]],
                     synchronize: Callable[[], None], say: Say, *, repetitions: int | None,
                     warm_ups: int) -> dict[str, Any]:
    """Rounds that measure each rate and each case once: {'rates': {name: per round}, 'cases': {name: {'seconds': of one
    call, per round; 'first_seconds': of the very first call; the other fields of the case}}}."""
    numbers = iter(range(10 ** 9))

    def seconds_a_call(case: Case, calls: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            case.run(next(numbers))
        synchronize()
        return (time.perf_counter() - start) / calls

    calls, found = {}, {}
    for name, case in cases.items():
        warm = [seconds_a_call(case, 1) for _ in range(warm_ups)]
        calls[name] = min(MOST_CALLS, max(1, math.ceil(SHORTEST / warm[-1])))
        found[name] = {'seconds': [], 'first_seconds': warm[0], 'operations': case.operations, 'tokens': case.tokens,
                       'dtype': short_name(case.dtype), 'bytes': case.bytes}
        say(f'{name}: first call {warm[0]:.2f} s')
    measured: dict[str, list[float]] = {name: [] for name in rates}
    begin, done = time.perf_counter(), 0
    while another_round(repetitions, done, time.perf_counter() - begin):
        for name, rate in rates.items():
            measured[name].append(rate())
        for name, case in cases.items():
            found[name]['seconds'].append(seconds_a_call(case, calls[name]))
        done += 1
        say(f'round {done} done after {time.perf_counter() - begin:.1f} s')
    return {'rates': measured, 'cases': found}


def another_round(repetitions: int | None, done: int, seconds: float) -> bool:
    """Whether there is another round: up to `repetitions`, or if that is None, as `benchmark` says."""
    if repetitions is not None:
        return done < repetitions
    return done < FEWEST or (done < USUAL and seconds < PATIENCE)


def measure_policies(runs: Mapping[str, PolicyRun], network: Network, say: Say, *,
                     repetitions: int | None) -> dict[str, Any]:
    """Rounds that measure a single trunk call and each run once: {'bare_seconds': of the single call, per round;
    'runs': {name: {'tokens', 'trunk_calls' and 'network_calls' of a run; 'seconds' of the run, and 'trunk_seconds' and
    'network_seconds' inside these calls, per round}}}.

    Calls are timed inside the run, so the rest of its time is that of the same run outside the network.
    """
    device = next(network.model.parameters()).device
    bare: list[float] = []
    found: dict[str, Any] = {}

    def call(tokens: Tensor) -> float:
        network.timer.reset()
        with network.precision():
            network.encode(tokens)
        return network.timer.totals['trunk']

    tokens = next(iter(runs.values())).tokens.to(device)
    say(f'first call {call(tokens):.2f} s')
    begin = time.perf_counter()
    while another_round(repetitions, len(bare), time.perf_counter() - begin):
        bare.append(call(tokens))
        for name, run in runs.items():
            one = _timed_run(network, run, RowRandom(len(bare), 0, torch.arange(POLICY_ROWS, device=device)))
            masked = run.tokens == network.model.config.mask_token_id
            seen = found.setdefault(name, {'tokens': int(masked.sum()), 'seconds': [], 'trunk_seconds': [],
                                           'network_seconds': []})
            seen.update(trunk_calls=network.trunk_calls, network_calls=network.network_calls)
            for key, value in one.items():
                seen[key].append(value)
        say(f'round {len(bare)} done after {time.perf_counter() - begin:.1f} s')
    return {'bare_seconds': bare, 'runs': found}


def _timed_run(network: Network, run: PolicyRun, generator: RowRandom) -> dict[str, float]:
    """Seconds of one run, and how many of them inside the trunk and the network. The network counts only this run."""
    config, device = network.model.config, generator.rows.device
    tokens = run.tokens.to(device)
    settings = GenerationSettings('diffusion', DrawRule(base_vocabulary(config, device), TEMPERATURE), run.policy,
                                  head='wave' if run.use_sampler_head else 'none', use_critic=run.use_critic)
    network.timer.reset()
    network.trunk_calls = network.network_calls = 0
    with network.timer.measure('run'):
        generate(network, Layout(tokens, tokens != config.mask_token_id), settings, generator)
    inside = {stage: network.timer.totals.get(stage, 0.0) for stage in ('trunk', 'critic')}
    return {'seconds': network.timer.measured, 'trunk_seconds': inside['trunk'],
            'network_seconds': sum(inside.values())}
