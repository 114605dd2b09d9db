"""One process at a time at what several may change, on file systems that have locks and on those that have none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from core.common.files import NOT_OFFERED
from core.common.printing import complain_once

PATIENCE = 60.0  # seconds; who holds a lock only reads and writes small files


@contextmanager
def held(path: Path, refused: Callable[[Exception], object]) -> Iterator[None]:
    """Hold the lock that the file `path` stands for inside the `with` block; waits for other processes.

    Where it is not to be had, `refused` gets the error and may raise: `filelock.Timeout` where another process keeps
    it, else what the file system says that has no locks. Otherwise the work goes on without.
    """
    lock = filelock.FileLock(path, timeout=PATIENCE)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # a lock that is held for too long is an OSError too
        refused(error)
    try:
        yield
    finally:
        lock.release()


class ChangeLock:
    """The right to change a file: a lock on `<name>.lock` in its folder. `say` gets one line if locking fails."""

    def __init__(self, path: Path, say: Callable[[str], object]) -> None:
        self.path, self.say, self._lost = path, say, False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock inside the `with` block."""
        if self._lost:
            yield
            return
        with held(Path(f'{self.path}.lock'), self._lose):
            yield

    def _lose(self, error: Exception) -> None:
        self._lost = True
        self.say(f'{self.path} is changed without a lock ({getattr(error, "strerror", None) or error}); '
                 f'do not let two commands write to it at once')


def take(descriptor: int, folder: Path) -> bool:
    """Whether this process has the lock of an open file in `folder` now, without waiting, until the file is closed.
    Where the file system has no locks, the answer is yes, and a line says so once. OSError for any other fault."""
    try:
        return filelock.lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        complain_once(f'the file system of {folder} has no locks: nothing keeps a second run out of it')
        return True
