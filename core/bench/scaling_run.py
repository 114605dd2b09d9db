"""Memory and step time of the sizes of core/bench/scaling.py: measured on this processor, and by formula beyond.

This is what `bench.py --scaling` does. New models train on random tokens, eager and in float32. docs/memory.md says
what the columns mean.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.batches import BatchPlan, RowShare, unmasking_batches
from core.bench.cases import SPECIAL
from core.bench.measuring import describe_machine
from core.bench.options import BenchConfig, measurement_problems
from core.bench.records import (SCALING_FORMAT, SCALING_VERSION, RecordKind, ScalingRecord, file_problems,
                                name_problems, read_json_record, show_and_write)
from core.bench.report import machine_lines
from core.bench.scaling import CHARACTERS, PLANNED, SIZES, Size, link_bytes, parameters, peak_bytes, rank_operations
from core.bench.training_cases import TOKENS, TRAINING
from core.checkpoints.kinds import CheckpointKind
from core.common.drawing import allowed_ids
from core.common.errors import UserError, raise_problems, run_script
from core.common.printing import say
from core.common.runtime import PEAK_RATES, measure_matrix_rate, start_runtime, stop_runtime
from core.common.tables import markdown_table
from core.noise import Masking, seen_neighbours
from core.training_step import TrainingState, training_step
from model import GPT

Say = Callable[[str], None]

KIND = RecordKind('bench.py --scaling', ScalingRecord, 'docs/results/scaling.md',
                  '<!-- bench.py --scaling writes from here -->', '<!-- bench.py --scaling writes to here -->')
FEWEST_STEPS = 3  # moments exist from step 2 on; DDP rebuilds its buckets after step 1 and uses them in step 3
EMPTY = Size(2, 1, 8, 8, rows=4, steps=FEWEST_STEPS, **CHARACTERS)  # shows what a process holds without a model
ASSUMED_GPU, ASSUMED_SHARE = 'H200', 0.4  # of the extrapolation: a GPU, and the share of its peak that a step reaches


def run_scaling(config: BenchConfig, explicit: Mapping[str, str], say: Say) -> None:
    """Measure as `config` says, or read --from_json; print and write the report. UserError if that cannot be done."""
    raise_problems(option_problems(config, explicit))
    if config.from_json is None:
        process_peak()  # raises if the system does not tell it
    record = read_json_record(Path(config.from_json), KIND) if config.from_json is not None else \
        measure_sizes({name: SIZES[name] for name in asked_sizes(config)}, say)
    show_and_write(config, record, scaling_report(record), KIND, say)


def asked_sizes(config: BenchConfig) -> list[str]:
    """The names in --sizes; all of them by default."""
    return list(SIZES) if config.sizes is None else config.sizes.split(',')


def option_problems(config: BenchConfig, explicit: Mapping[str, str]) -> list[str]:
    """What is wrong with the options; checked before minutes are spent."""
    return [*measurement_problems(explicit, scaling=True), *name_problems('sizes', asked_sizes(config), SIZES),
            *file_problems(config, explicit, KIND)]


# The measurement ----------------------------------------------------------------------------------------------------

def measure_sizes(sizes: Mapping[str, Size], say: Say) -> ScalingRecord:
    """The record of `sizes`, in built-in types. Each size has what `measure_here` finds in a process of its own.

    'process_bytes' replaces its 'peak_bytes'. 'tensor_bytes' is the peak of a second process, which returns every large
    block to the system at once. Both subtract the peak of a process that trains `EMPTY` in the same way, on as many
    ranks."""
    record: ScalingRecord = {'format': SCALING_FORMAT, 'version': SCALING_VERSION, 'machine': describe_machine(),
                             'sizes': {}}
    empty: dict[tuple[Size, bool], int] = {}
    for name, size in sizes.items():
        nothing = replace(EMPTY, ranks=size.ranks, sharded=size.sharded, optimizer=size.optimizer)
        peaks = {}
        for tidy, steps in ((True, FEWEST_STEPS), (False, size.steps)):
            if (nothing, tidy) not in empty:
                empty[nothing, tidy] = measure_apart(f'the empty size before {name}', nothing, tidy)['peak_bytes']
            found = measure_apart(name, replace(size, steps=steps), tidy)
            peaks['tensor_bytes' if tidy else 'process_bytes'] = found.pop('peak_bytes') - empty[nothing, tidy]
        record['sizes'][name] = {'size': size.described(), **found, **peaks}
        say(f'{name}: tensors {peaks["tensor_bytes"] / 1e6:.0f} MB, process {peaks["process_bytes"] / 1e6:.0f} MB, '
            f'{step_seconds(found):.2f} s a step')
    return record


def measure_apart(name: str, size: Size, tidy: bool) -> dict[str, Any]:
    """What `measure_here` finds in a process of its own. With several ranks there is a process for each; they share the
    processors, and the first one answers. UserError if there is no answer.

    tidy: the C library returns each freed block to the system. Otherwise it keeps blocks of up to 32 MiB. New blocks do
    not always fit into these, so a process holds more than its tensors.
    """
    module = ['-m', 'core.bench.scaling_run', json.dumps(size.described())]
    ranks = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={size.ranks}'] if size.ranks > 1 else []
    environment = {**os.environ, 'OMP_NUM_THREADS': str(max(1, torch.get_num_threads() // size.ranks))} | \
        ({'MALLOC_MMAP_THRESHOLD_': '131072'} if tidy else {})
    result = subprocess.run([sys.executable, *ranks, *module], cwd=Path(__file__).parents[2], encoding='utf-8',
                            errors='replace', env=environment, capture_output=True)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ['it said nothing'])[-1]
        raise UserError(f'{name} could not be measured, its process ended with code {result.returncode} ({last}); '
                        f'free some memory, or leave the size out with --sizes=...')
    return json.loads(result.stdout.splitlines()[-1])


def measure_here(size: Size) -> dict[str, Any] | None:
    """Train `size.steps` steps in this process, together with other ranks if there are any. Only the first rank returns
    something, the others None.

    'parameters'. 'peak_bytes': the most that this process ever held. For each step: 'seconds'; 'rates', the matrix rate
    after it; 'positions' of each micro-step of this rank; 'predicted', the positions of all ranks together.
    """
    runtime = start_runtime('cpu', 'float32', False, width=size.n_embd, iterations=size.steps)
    config, base = size.config, size.vocab_size - SPECIAL
    try:
        masking = Masking(base, 'masked_mean', seen_neighbours(config), config.critic_row_stride,
                          config.critic_target_scope)
        plan = BatchPlan(np.random.default_rng(0).integers(0, base, TOKENS, dtype=np.uint16), 1, size.block_size,
                         RowShare(size.rows, size.micro_steps, runtime.rank, runtime.world_size), masking)
        model = GPT(config)
        found: dict[str, Any] = {'parameters': model.parameter_count(), 'seconds': [], 'rates': [], 'positions': [],
                                 'predicted': []}
        settings = replace(TRAINING, optimizer=size.optimizer, activation_checkpointing=size.recompute,
                           sharded=size.sharded)
        state = TrainingState(model, allowed_ids(size.vocab_size, base), runtime, plan,
                              CheckpointKind.UNMASKING, settings)
        for step in range(size.steps):
            begin = time.perf_counter()
            training_step(state, step, TRAINING.learning_rate)
            found['seconds'].append(time.perf_counter() - begin)
            found['rates'].append(measure_matrix_rate(runtime.device, runtime.dtype))
            found['positions'].append([len(batch.positions)
                                       for batch in unmasking_batches(plan, step, runtime.total_count)])
            found['predicted'].append(runtime.total_count(sum(found['positions'][-1])))
        found['peak_bytes'] = process_peak()
        state.leave_ranks()
        return found if runtime.is_writer else None
    finally:
        stop_runtime(runtime)


def process_peak() -> int:
    """The most bytes of memory that this process ever held; UserError on Windows, which does not tell.

    A child's peak includes what its parent held when the child began, so parents measure nothing.
    """
    try:
        import resource
    except ImportError as error:
        raise UserError('this system does not say how much memory a process has held; measure on Linux') from error
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux


# The report ---------------------------------------------------------------------------------------------------------

def step_seconds(found: Mapping[str, Any]) -> float:
    """The median seconds of a step, without the first."""
    return statistics.median(found['seconds'][1:])


def formula_bytes(found: Mapping[str, Any]) -> int:
    """What `peak_bytes` of core/bench/scaling.py expects of a measured size."""
    return peak_bytes(Size(**found['size']), max(max(one) for one in found['positions']))


def rate_share(found: Mapping[str, Any]) -> float:
    """Operations per second as a share of the matrix rate measured after the same step: the median of all steps
    except the first."""
    size = Size(**found['size'])
    shares = [rank_operations(size, predicted) / seconds / rate
              for predicted, seconds, rate in zip(found['predicted'], found['seconds'], found['rates'], strict=True)]
    return statistics.median(shares[1:])


def scaling_report(record: ScalingRecord) -> str:
    """The measured and the extrapolated table in Markdown."""
    head = ['layers', 'channels', 'tokens', 'ids', 'rows', 'ranks', 'weights']
    measured = [[name, *_shape_cells(Size(**found['size']), found['parameters']), f'{formula_bytes(found) / 1e6:,.0f}',
                 f'{found["tensor_bytes"] / 1e6:,.0f}', f'{found["tensor_bytes"] / formula_bytes(found):.2f}',
                 f'{found["process_bytes"] / 1e6:,.0f}',
                 f'{rank_operations(Size(**found["size"]), statistics.median(found["predicted"][1:])) / 1e9:,.0f}',
                 f'{step_seconds(found):.2f}', f'{rate_share(found):.0%}'] for name, found in record['sizes'].items()]
    rate = PEAK_RATES[ASSUMED_GPU] * ASSUMED_SHARE
    planned = []
    for name, size in PLANNED.items():
        operations = rank_operations(size, size.positions * size.micro_steps * size.ranks)
        planned.append([name, *_shape_cells(size, parameters(size.config)),
                        f'{peak_bytes(size, size.positions) / 1e9:,.1f}', f'{operations / 1e12:,.0f}',
                        f'{operations / rate:.2f}', f'{link_bytes(size) / 1e9:,.1f}'])
    return '\n'.join([
        *machine_lines(record['machine']), '', 'Measured, eager, in float32:', '',
        *markdown_table(['size', *head, 'MB by formula', 'MB of tensors', 'ratio', 'MB of the process', 'GFLOP',
                         'seconds', 'share of the rate'],
                        measured),
        '', f"Extrapolated, not measured: eager, in bfloat16, at an assumed {ASSUMED_SHARE:.0%} of the {ASSUMED_GPU}'s "
            f'peak of {PEAK_RATES[ASSUMED_GPU] / 1e12:.0f} TFLOP/s:', '',
        *markdown_table(['size', *head, 'GB by formula', 'TFLOP', 'seconds', 'GB sent'], planned)])


def _shape_cells(size: Size, weights: int) -> list[str]:
    return [f'{size.n_layer}', f'{size.n_embd}', f'{size.block_size:,}', f'{size.vocab_size:,}',
            f'{size.micro_steps} x {size.rows}', f'{size.ranks}', f'{weights / 1e6:,.1f} M']


def main(arguments: list[str]) -> None:
    """`measure_apart` starts this: measure the size that the only argument describes, and print the result."""
    found = measure_here(Size(**json.loads(arguments[0])))
    if found is not None:
        say(json.dumps(found))


if __name__ == '__main__':
    run_script(main)
