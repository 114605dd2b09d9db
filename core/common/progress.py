"""A progress bar that can fail without anyone's work failing with it."""

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from core.common.printing import optional

WHAT = 'there is no progress bar'


class ProgressBar:
    """tqdm on standard error where that is a terminal and `wanted`, else nothing; a context manager.

    total: what the bar counts to; look: further arguments of tqdm. The first failure ends the bar.
    """

    def __init__(self, total: float, wanted: bool = True, **look: Any) -> None:
        self._bar: tqdm | None = None
        if wanted and sys.stderr.isatty():
            self._bar = optional(WHAT, lambda: tqdm(total=total, **look))

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

    def move(self, step: float) -> None:
        """Move forward by `step`."""
        self._try(lambda bar: bar.update(step))

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
