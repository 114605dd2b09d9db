"""One process at a time at a file that several may change."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

PATIENCE = 60.0  # seconds; who holds a lock only reads and writes a small file


class ChangeLock:
    """The right to change a file, which `<name>.lock` beside it stands for; waits for other processes.

    Some file systems have no locks. There the work goes on without, and `say` is told so once.
    """

    def __init__(self, path: Path, say: Callable[[str], object]) -> None:
        self.path, self.say = path, say
        self._lock: filelock.BaseFileLock | None = filelock.FileLock(f'{path}.lock', timeout=PATIENCE)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock inside the `with` block."""
        if self._lock is not None:
            try:
                self._lock.acquire()
            except (OSError, NotImplementedError) as error:  # a lock that is held for too long is an OSError too
                self._lock = None
                self.say(f'{self.path} is changed without a lock ({getattr(error, "strerror", None) or error}); '
                         f'do not let two commands write to it at once')
        try:
            yield
        finally:
            if self._lock is not None:
                self._lock.release()
