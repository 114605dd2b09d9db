"""A progress bar. If it fails, the work goes on."""

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from core.common.printing import optional

WHAT = 'there is no progress bar'
FEWEST_SECONDS = 10  # between two lines, so that short work prints none


class ProgressBar:
    """tqdm on standard error if that is a terminal and a bar is `wanted`, else lines or nothing. A context manager.

    total: what the bar counts to. tell: without a terminal, gets a line at every tenth of the work, at least
    `FEWEST_SECONDS` after the last line. look: further arguments of tqdm. The first failure ends the bar.
    """

    def __init__(self, total: float, wanted: bool = True, tell: Callable[[str], None] | None = None,
                 **look: Any) -> None:
        self._bar: tqdm | None = None
        self._lines: _Tenths | None = None
        if wanted and sys.stderr.isatty():
            self._bar = optional(WHAT, lambda: tqdm(total=total, **look))
        elif wanted and tell is not None:
            self._lines = _Tenths(total, look.get('initial', 0), look['desc'], tell)

    @property
    def shown(self) -> bool:
        """Whether there is a bar on a terminal."""
        return self._bar is not None

    def __enter__(self) -> 'ProgressBar':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def move_to(self, position: float) -> None:
        """Move forward to `position` of the total; a bar never moves back."""
        self._try(lambda bar: bar.update(max(0, position - bar.n)))
        if self._lines is not None:
            self._lines.reach(position)

    def move(self, step: float) -> None:
        """Move forward by `step`."""
        self._try(lambda bar: bar.update(step))
        if self._lines is not None:
            self._lines.reach(self._lines.position + step)

    def note(self, text: str) -> None:
        """Show `text`, such as a rate, after the bar or in the lines from now on."""
        self._try(lambda bar: bar.set_postfix_str(text, refresh=False))
        if self._lines is not None:
            self._lines.note = text

    def clear(self) -> None:
        """Take the bar off the screen, so that a line can be printed; the next move shows it again."""
        self._try(lambda bar: bar.clear())

    def close(self) -> None:
        """Finish the bar; may be called more than once."""
        self._try(lambda bar: bar.close())
        self._bar = None

    def _try(self, call: Callable[[tqdm], object]) -> None:
        bar = self._bar
        if bar is not None and optional(WHAT, lambda: (call(bar),)) is None:
            self._bar = None


class _Tenths:
    """Tells a line whenever another tenth of the work from `start` to `total` is done."""

    def __init__(self, total: float, start: float, what: str, tell: Callable[[str], None]) -> None:
        self._total, self._start, self._what, self._tell = total, start, what, tell
        self.position, self.note = start, ''
        self._told = self._tenth()
        self._begun = self._last = time.monotonic()

    def _tenth(self) -> int:
        return int(10 * self.position / self._total + 1e-9) if self._total > 0 else 10

    def reach(self, position: float) -> None:
        """The work is done up to `position`; it never goes back."""
        self.position, now = max(self.position, position), time.monotonic()
        if self._tenth() == self._told or now - self._last < FEWEST_SECONDS:
            return
        self._told, self._last = self._tenth(), now
        left = (now - self._begun) * (self._total - self.position) / (self.position - self._start)
        parts = [f'{self.position / self._total:.0%} done', self.note, f'about {_duration(left)} left']
        self._tell(f'{self._what}: {", ".join(part for part in parts if part)}')


def _duration(seconds: float) -> str:
    return f'{seconds:.0f} s' if seconds < 100 else f'{seconds / 60:.0f} min'
