"""Files that are whole or absent, whatever fails while they are written."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from core.common.errors import UserError

TEMPORARY_SUFFIX = '.saving.tmp'  # what a save that was killed leaves behind


@contextmanager
def atomic_writer(path: Path, verify: Callable[[Path], object] | None = None) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` only when all of it is on the disk and `verify` has not objected.

    Whatever fails, the earlier `path` stays as it was and the temporary file beside it is removed; a process that is
    killed leaves one named *.saving.tmp. Raises UserError where the disk is full or the folder is not writable.
    """
    temporary = path.with_name(f'{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}')
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if verify is not None:
            verify(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        _remove_quietly(temporary)


def unwritable(path: Path, error: OSError) -> UserError:
    """The words for a file that could not be written."""
    cure = 'free some space' if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else \
        'choose a folder you may write to (--out_dir=...)'
    return UserError(f'cannot write {path}: {error.strerror or error}; {cure}; what was saved before is unchanged')


def _remove_quietly(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        pass  # it was renamed, or never made; a folder that fails now has raised already


def _sync_folder(folder: Path) -> None:
    """Put a rename on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
