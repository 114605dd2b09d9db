"""What dependability costs: saving with verification against a bare save, and random numbers by counter.

    python -m core.bench.costs out/ckpt.pt        with nothing else running; the checkpoint is read, never changed

Prints how many times `torch.save` with `fsync` a verified save takes, and which share of a training step goes into
drawing random numbers. Both are medians over rounds, the two sides of a ratio measured in turns.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest import mock

import torch

from core.bench.cases import SHAPES
from core.bench.training_cases import training_cases
from core.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from core.common.errors import run_script
from core.common.randomness import RowRandom
from core.common.runtime import start_runtime, stop_runtime

SHAPE = SHAPES['small']  # a larger model spends a smaller share on its random numbers
CRITIC_ROW_STRIDE = 4  # as in the full recipe
FIRST_STEPS = 3  # slower than those that follow


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def saving_times(path: Path, rounds: int) -> list[tuple[float, float]]:
    """(seconds of a bare save, seconds of a verified one) of the checkpoint at `path`, into a folder beside it."""
    payload = load_checkpoint(path).to_payload()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        bare, verified = Path(folder) / 'bare.pt', Path(folder) / 'verified.pt'

        def save_bare() -> None:
            with open(bare, 'wb') as file:
                torch.save(payload, file)
                file.flush()
                os.fsync(file.fileno())

        return [(seconds(save_bare), seconds(lambda: save_checkpoint(verified, payload))) for _ in range(rounds)]


def randomness_shares(steps: int) -> list[float]:
    """For each training step of all three stages at once, the share of its time in which numbers were drawn (CPU)."""
    runtime = start_runtime('cpu', 'auto', False, width=SHAPE.n_embd, iterations=steps)
    spent, draw = 0.0, RowRandom.uniform

    def timed(*given: object, **named: object) -> torch.Tensor:
        nonlocal spent
        begin = time.perf_counter()
        numbers = draw(*given, **named)
        spent += time.perf_counter() - begin
        return numbers

    shares = []
    try:
        step = training_cases(SHAPE, runtime, CRITIC_ROW_STRIDE)['stage 3'].run
        with mock.patch.object(RowRandom, 'uniform', timed):
            for number in range(FIRST_STEPS + steps):
                spent = 0.0
                whole = seconds(lambda: step(number))
                shares.append(spent / whole)
    finally:
        stop_runtime(runtime)
    return shares[FIRST_STEPS:]


def main(arguments: list[str]) -> None:
    """The command at the top of this file."""
    parser = argparse.ArgumentParser(prog='python -m core.bench.costs', description='Measure what dependability costs.')
    parser.add_argument('checkpoint', type=Path, help='a checkpoint that a run goes on from, such as out/ckpt.pt')
    parser.add_argument('--rounds', type=int, default=21, help='saves of either kind, and steps')
    options = parser.parse_args(arguments)
    times = saving_times(options.checkpoint, options.rounds)
    bare, verified = (median(one) for one in zip(*times))
    print(f'saving {options.checkpoint} ({options.checkpoint.stat().st_size / 2**20:.1f} MiB), median of '
          f'{options.rounds}: torch.save and fsync {1000 * bare:.0f} ms, verified {1000 * verified:.0f} ms, '
          f'{median(two / one for one, two in times):.2f} times as long')
    shares = randomness_shares(options.rounds)
    print(f'random numbers, {SHAPE.n_layer} layers, {SHAPE.n_embd} channels, {SHAPE.batch_size} rows of '
          f'{SHAPE.block_size} tokens: {100 * median(shares):.2f}% of a step (at most {100 * max(shares):.2f}%)')


if __name__ == '__main__':
    run_script(main)
