"""Locks: only one process at a time changes a shared file. They also work on file systems that have no locks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from core.common.files import NOT_OFFERED
from core.common.printing import complain_once

PATIENCE = 60.0  # seconds; a process that holds a lock only reads and writes small files


@contextmanager
def held(path: Path, refused: Callable[[Exception], object]) -> Iterator[None]:
    """Hold the lock of the file `path` inside the `with` block; waits for other processes.

    If locking fails, `refused` gets the error: `filelock.Timeout` if another process keeps the lock, or the error of a
    file system that has no locks. Unless `refused` raises, the block runs without a lock.
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
    """Take the lock of an open file in `folder`, without waiting, until the file is closed. Returns whether that
    worked. If the file system has no locks, the answer is yes, and a line says so once. OSError for any other fault."""
    try:
        return filelock.lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        complain_once(f'the file system of {folder} has no locks: nothing keeps a second run out of it')
        return True
