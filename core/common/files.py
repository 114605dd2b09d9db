"""The one way in which the program writes files: whole or not at all, whatever fails.

    write_whole(path, text_or_bytes)                         one file at once
    with atomic_writer(path) as file: ...                    one file in parts
    with atomic_files([first, second]) as (one, two): ...    several that get their names together, in this order

A new file is written under a temporary name in the same folder and synced to the disk. Then it is renamed, and replaces
a regular file or nothing. A symbolic link stays, and its target is replaced. Devices, pipes and the process's own
output streams are written to directly. A killed process leaves `<name>.<token>.saving.tmp`.
"""

import errno
import os
import stat
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from core.common.errors import UserError
from core.common.printing import complain_once

TEMPORARY_SUFFIX = '.saving.tmp'  # what a save that was killed leaves
LONGEST_STEM = 120  # bytes of a name that its temporary name begins with; a whole name may have 255
# Files that an output of the user's must not replace: checkpoints, corpora, programs and configs, files of a run.
OTHERS_SUFFIXES = frozenset({'.pt', '.safetensors', '.bin', '.pkl', '.py', '.lock', '.damaged'})
OTHERS_NAMES = frozenset({'config.json', 'environment.json', 'metrics.jsonl', 'run.lock', 'evaluation.json',
                          'calibration.json',
                          'loss.png'})
PROGRAM = Path(__file__).resolve().parents[2]
PROGRAM_PARTS = ('.git', 'config', 'core', 'tests', 'LICENSE', 'README.md', 'pyproject.toml', 'requirements.txt')
NOT_OFFERED = frozenset(getattr(errno, name)
                        for name in ('EINVAL', 'ENOSYS', 'ENOTSUP', 'EOPNOTSUPP', 'ENOLCK', 'EBADF')
                        if hasattr(errno, name))  # errors of an fsync or a lock that the file system lacks


class NewFile:
    """A file that will be `path`: `file` takes its bytes, `finish` syncs them to the disk, `settle` gives it the name.

    Until `settle` an earlier `path` is unchanged; `discard` gives up. If `path` is a device, a pipe or a stream of this
    process, nothing is renamed, and the bytes go there at once.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError if `path` cannot be written."""
        self.path, self.temporary = path, None
        stream = own_stream(path)
        if stream is not None:
            getattr(sys, ('stdin', 'stdout', 'stderr')[stream]).flush()
            self.file: BinaryIO = os.fdopen(os.dup(stream), 'wb')  # shares the stream's position
            return
        mode = _mode(path)
        if mode is not None and not stat.S_ISREG(mode):
            self.file = open(path, 'wb')  # raises for a folder
            return
        if mode is not None and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, 'it is write-protected', str(path))
        self.target = Path(os.path.realpath(path))
        self.temporary = temporary_name(self.target)
        self.file = open(self.temporary, 'xb')
        if mode is not None:
            with suppress(OSError):
                os.chmod(self.temporary, stat.S_IMODE(mode))

    def finish(self, verify: Callable[[Path], object] | None = None) -> None:
        """Sync everything to the disk and let `verify` read it back. After this nothing can be written."""
        self.file.flush()
        if self.temporary is not None:
            _sync(self.file.fileno(), self.target.parent)
        self.file.close()
        if verify is not None and self.temporary is not None:
            verify(self.temporary)

    def settle(self) -> None:
        """Give the finished file its name."""
        if self.temporary is not None:
            os.replace(self.temporary, self.target)
            self.temporary = None
            sync_folder(self.target.parent)

    def discard(self) -> None:
        """Remove the file unless it has settled; never raises."""
        with suppress(OSError):
            self.file.close()
        if self.temporary is not None:
            with suppress(OSError):  # a folder that fails now has raised already
                self.temporary.unlink()


@contextmanager
def atomic_writer(path: Path, verify: Callable[[Path], object] | None = None) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` only when all of it is on the disk and `verify` has not objected.

    Whatever fails, an earlier `path` stays unchanged. Raises UserError if the disk is full or the folder is not
    writable.
    """
    with atomic_files([path], verify) as (file,):
        yield file


@contextmanager
def atomic_files(paths: Sequence[Path], verify: Callable[[Path], object] | None = None) -> Iterator[list[BinaryIO]]:
    """Binary files that become `paths`, in this order, only when all of them are on the disk and `verify` has not
    objected to any. If something fails before, earlier files stay unchanged. Otherwise as `atomic_writer`.
    """
    with ExitStack() as cleaning:
        at = Path(paths[0])
        try:
            files = []
            for at in map(Path, paths):
                files.append(NewFile(at))
                cleaning.callback(files[-1].discard)
            yield [one.file for one in files]
            for step in (lambda one: one.finish(verify), NewFile.settle):
                for one in files:
                    at = one.path
                    step(one)
        except BrokenPipeError:
            raise  # the reader of a pipe has gone, which is no fault of the file
        except OSError as error:
            raise unwritable(at, error) from error


def write_whole(path: Path, data: bytes | str) -> None:
    """Let `path` hold `data`, text as UTF-8; as `atomic_writer`."""
    with atomic_writer(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def temporary_name(path: Path) -> Path:
    """A new name in the folder of `path`, for the file that will become `path`."""
    stem = os.fsdecode(os.fsencode(path.name)[:LONGEST_STEM])
    return path.with_name(f'{stem}.{uuid.uuid4().hex[:12]}{TEMPORARY_SUFFIX}')


def sync_folder(folder: Path) -> None:
    """Sync renames in `folder` to the disk, if the system can. Windows and some network drives cannot."""
    if os.name != 'posix':
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # a folder that is writable but not readable cannot be opened
    try:
        _sync(descriptor, folder)
    finally:
        os.close(descriptor)


def unwritable(path: Path, error: OSError) -> UserError:
    """The words for a file that could not be written."""
    return UserError(f'cannot write {path}: {_reason(error)}; what was saved before is unchanged')


def belongs_elsewhere(path: Path) -> bool:
    """Whether the name of the file `path` is that of another command's output, or of a file of the program."""
    marker = path.name == 'run.json' and path.with_name('run.lock').exists()  # in a run folder; else any name
    return marker or path.suffix.lower() in OTHERS_SUFFIXES or path.name in OTHERS_NAMES or _is_of_the_program(path)


def _is_of_the_program(path: Path) -> bool:
    if not path.is_relative_to(PROGRAM):
        return False
    first, *inner = path.relative_to(PROGRAM).parts
    return first in PROGRAM_PARTS or (first == 'docs' and bool(inner) and path.suffix == '.md')


def why_unwritable(path: str) -> str | None:
    """Why a file `path` could not be written, with a cure; None if it could. An existing file stays unchanged."""
    if not path:
        return 'a file needs a name; is a variable of the shell empty? Leave the option out to write none'
    try:
        place = Path(path)
        mode = _mode(place)
        if mode is None and not place.absolute().parent.exists():
            return f'the folder {place.parent} does not exist; create it first'
        if mode is not None and stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if mode is not None and stat.S_ISREG(mode) and belongs_elsewhere(Path(os.path.realpath(place))):
            return ('that is a checkpoint, a corpus, a program, a config or a file of a run, which stays; choose '
                    'another name')
        if mode is None or stat.S_ISREG(mode):
            NewFile(place).discard()
        elif not os.access(place, os.W_OK):  # a pipe is not opened: that could wait for a reader
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        return f'it cannot be written: {_reason(error)}'
    return None


def _reason(error: OSError) -> str:
    return f'{error.strerror or error}; {_CURES.get(error.errno, "choose a folder you may write to")}'


_CURES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), 'free some space'),
    errno.EFBIG: 'free some space, or raise the limit on the size of files',
    errno.ENOENT: 'create its folder first',
    errno.ENOTDIR: 'what should be its folder is a file; choose another place',
    errno.EISDIR: 'it is a folder; name a file',
    errno.EEXIST: 'a file of that name is in the way; choose another name',
    errno.ENAMETOOLONG: 'shorten the name',
    errno.ELOOP: 'a symbolic link leads to itself; remove it',
    errno.EIO: 'the disk or its connection fails; choose another one',
    errno.EMFILE: 'too many files are open; raise the limit (ulimit -n)',
}


def _mode(path: Path) -> int | None:
    """The kind and permissions of what `path` leads to; None if there is nothing."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def own_stream(path: Path) -> int | None:
    """The number of the output stream of this process that `path` names, such as /dev/stdout; None if it names none."""
    for stream, opened in ((1, sys.stdout), (2, sys.stderr)):
        with suppress(OSError):
            if opened is not None and os.path.samestat(os.fstat(stream), os.stat(path)):
                return stream
    return None


def _sync(descriptor: int, folder: Path) -> None:
    """fsync. If the file system has none, a line says so and the file is written without it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        complain_once(f'the file system of {folder} cannot be told to keep what is written; a power cut may lose the '
                      f'last files')
