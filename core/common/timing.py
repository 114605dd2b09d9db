"""Where the time goes: named stages, measured with the device synchronised, added up and printed as a table."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from core.common.runtime import synchronize


class TimingAccumulator:
    """Total seconds and counts of named stages.

        with timer.measure('prediction'):
            ...

    Work on a GPU is asynchronous, so the device is synchronised when a stage begins and ends; on a CPU that costs
    nothing. Stages may lie inside each other: each counts its own time without that of the stages inside it, so the
    shares of a run add up to one.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device('cpu')
        self.reset()

    def reset(self) -> None:
        """Forget everything measured so far."""
        self.totals: dict[str, float] = {}  # seconds
        self.counts: dict[str, int] = {}
        self._inner: list[float] = []  # seconds spent in the stages inside each open stage

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time of the `with` block to `stage`, also if the block raises."""
        synchronize(self.device)
        self._inner.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self.device)
            seconds = time.perf_counter() - start
            inner = self._inner.pop()
            if self._inner:
                self._inner[-1] += seconds
            self.totals[stage] = self.totals.get(stage, 0.0) + seconds - inner
            self.counts[stage] = self.counts.get(stage, 0) + 1

    @property
    def measured(self) -> float:
        """Seconds inside any stage."""
        return sum(self.totals.values())

    def summary(self) -> str:
        """A table of the stages, the longest first: seconds, share, calls and milliseconds per call."""
        if not self.totals:
            return 'no times were measured'
        width = max(len('stage'), *map(len, self.totals))
        lines = [f'{"stage":<{width}} {"seconds":>10} {"share":>7} {"calls":>7} {"ms/call":>10}']
        for stage, seconds in sorted(self.totals.items(), key=lambda item: -item[1]):
            share = seconds / self.measured if self.measured else 0.0
            count = self.counts[stage]
            lines.append(f'{stage:<{width}} {seconds:>10.3f} {share:>7.1%} {count:>7} {1000 * seconds / count:>10.2f}')
        return '\n'.join(lines)


_GLOBAL_TIMER = TimingAccumulator()


def get_global_timer() -> TimingAccumulator:
    """The one timer that sampling and its helpers share; a script sets its `device` and calls `reset` before a run."""
    return _GLOBAL_TIMER
