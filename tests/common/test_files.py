"""The writer of files: whole or as before, links and devices as they were, and words that fit the fault."""

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.common.errors import UserError
from core.common.files import TEMPORARY_SUFFIX, atomic_files, atomic_writer, why_unwritable, write_whole

ROOT = Path(__file__).parent.parent.parent
needs_root = pytest.mark.skipif(os.name != 'posix' or os.geteuid() != 0, reason='needs a superuser')


def test_text_and_bytes(tmp_path: Path) -> None:
    write_whole(tmp_path / 'ä.txt', 'größer\n')
    assert (tmp_path / 'ä.txt').read_bytes() == 'größer\n'.encode()
    write_whole(tmp_path / 'ä.txt', b'\x00\xff')
    assert (tmp_path / 'ä.txt').read_bytes() == b'\x00\xff' and os.listdir(tmp_path) == ['ä.txt']


@pytest.mark.parametrize('fails', [0, 1, 2])
def test_files_get_their_names_together_or_not_at_all(tmp_path: Path, fails: int) -> None:
    paths = [tmp_path / name for name in 'abc']
    paths[1].write_text('old')
    with pytest.raises(KeyError), atomic_files(paths) as opened:
        for index, file in enumerate(opened):
            file.write(b'new')
            if index == fails:
                raise KeyError
    assert os.listdir(tmp_path) == ['b'] and paths[1].read_text() == 'old'
    with atomic_files(paths) as opened:
        for file in opened:
            file.write(b'new')
        assert paths[1].read_text() == 'old' and not paths[0].exists()
    assert [path.read_text() for path in paths] == ['new'] * 3 and sorted(os.listdir(tmp_path)) == ['a', 'b', 'c']


@pytest.mark.parametrize('relative', [True, False])
def test_links_stay_and_their_targets_are_replaced(tmp_path: Path, relative: bool) -> None:
    (tmp_path / 'far').mkdir()
    target = tmp_path / 'far' / 'target.txt'
    target.write_text('old')
    first, second, dangling = (tmp_path / name for name in ('first', 'second', 'dangling'))
    first.symlink_to(Path('far/target.txt') if relative else target)
    second.symlink_to(first)
    dangling.symlink_to(tmp_path / 'far' / 'later.txt')
    write_whole(second, 'new')
    write_whole(dangling, 'made')
    assert first.is_symlink() and second.is_symlink() and dangling.is_symlink()
    assert target.read_text() == 'new' and (tmp_path / 'far' / 'later.txt').read_text() == 'made'


def test_pipes_are_written_to(tmp_path: Path) -> None:
    pipe, heard = tmp_path / 'pipe', []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: heard.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, b'through')
    reader.join(10)
    assert heard == [b'through'] and stat.S_ISFIFO(pipe.lstat().st_mode) and os.listdir(tmp_path) == ['pipe']


@needs_root
def test_device_nodes_are_written_to(tmp_path: Path) -> None:
    device = tmp_path / 'null'
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.write_bytes(b'can it be opened here?')
    except OSError:
        pytest.skip('no device nodes here')
    write_whole(device, b'gone')
    assert stat.S_ISCHR(device.lstat().st_mode)


@pytest.mark.parametrize('name', ['/dev/stdout', '/dev/stderr', '/proc/self/fd/1'])
@pytest.mark.parametrize('kind', ['pipe', 'file'])
def test_own_streams_are_written_to_in_order(tmp_path: Path, name: str, kind: str) -> None:
    words = f"""
import sys
from pathlib import Path
from core.common.files import write_whole
stream = sys.stderr if 'err' in {name!r} else sys.stdout
print('before', file=stream)
write_whole(Path({name!r}), 'written\\n')
print('after', file=stream)
"""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    if kind == 'pipe':
        found = subprocess.run([sys.executable, '-c', words], env=environment, capture_output=True, text=True,
                               cwd=tmp_path)
        said = found.stderr if 'err' in name else found.stdout
    else:
        with open(tmp_path / 'log', 'wb') as log:
            subprocess.run([sys.executable, '-c', words], env=environment, stdout=log, stderr=log, cwd=tmp_path,
                           check=True)
        said = (tmp_path / 'log').read_text()
        assert os.listdir(tmp_path) == ['log']
    assert said == 'before\nwritten\nafter\n'


def test_permissions_stay(tmp_path: Path) -> None:
    path = tmp_path / 'secret'
    path.write_text('old')
    path.chmod(0o600)
    write_whole(path, 'new')
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.read_text() == 'new'


def test_a_write_protected_file_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'kept'
    path.write_text('old')
    monkeypatch.setattr(os, 'access', lambda where, mode: False)  # a superuser may write to every file
    with pytest.raises(UserError, match='kept: it is write-protected; choose'):
        write_whole(path, 'new')
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['kept']


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 255), st.sampled_from('aä字'))
def test_names_up_to_the_longest(tmp_path_factory: pytest.TempPathFactory, length: int, letter: str) -> None:
    folder = tmp_path_factory.mktemp('names')
    path = folder / (letter * max(1, length // len(letter.encode())))
    write_whole(path, b'x')
    assert path.read_bytes() == b'x' and os.listdir(folder) == [path.name]


@pytest.mark.parametrize(('number', 'cure'), [
    (errno.ENOSPC, 'free some space'), (errno.EDQUOT, 'free some space'),
    (errno.EROFS, 'choose a folder you may write to'),
    (errno.EACCES, 'choose a folder you may write to'), (errno.EIO, 'the disk or its connection fails'),
    (errno.EMFILE, 'too many files are open')])
@pytest.mark.parametrize('call', ['fsync', 'replace'])
def test_the_error_number_decides_the_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, cure: str,
                                            call: str) -> None:
    path = tmp_path / 'file'
    path.write_text('old')

    def failing(*given: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(UserError, match=f'cannot write .*file: {os.strerror(number)}; {cure}'):
            write_whole(path, 'new')
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['file']


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('old')
    (tmp_path / 'loop').symlink_to('loop')
    for path, cure in ((tmp_path, 'it is a folder; name a file'), (tmp_path / 'none' / 'x', 'create its folder first'),
                       (tmp_path / 'file' / 'x', 'what should be its folder is a file'),
                       (tmp_path / ('n' * 256), 'shorten the name'), (tmp_path / 'loop', 'leads to itself')):
        with pytest.raises(UserError, match=cure):
            write_whole(path, 'new')
    assert sorted(os.listdir(tmp_path)) == ['file', 'loop'] and (tmp_path / 'file').read_text() == 'old'


@pytest.mark.parametrize('number', [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
@pytest.mark.parametrize('folders_alone', [True, False])
def test_a_file_system_without_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, folders_alone: bool,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    sync = os.fsync

    def missing(descriptor: int) -> None:
        if folders_alone and stat.S_ISREG(os.fstat(descriptor).st_mode):
            sync(descriptor)
        else:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, 'fsync', missing)
    monkeypatch.setattr('core.common.printing._said', set())
    for text in ('one', 'two'):
        write_whole(tmp_path / 'file', text)
        assert (tmp_path / 'file').read_text() == text
    assert capsys.readouterr().err.count('a power cut may lose the last files') == 1


def test_a_folder_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opening = os.open
    monkeypatch.setattr(os, 'open', lambda path, *given, **named: (_ for _ in ()).throw(PermissionError(13, 'no'))
                        if Path(path).is_dir() else opening(path, *given, **named))
    write_whole(tmp_path / 'file', 'new')
    assert (tmp_path / 'file').read_text() == 'new'


def test_cleaning_up_never_hides_the_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder becomes read-only while the file is written: the message names the first fault, not the second."""
    def refusing(*given: object, **named: object) -> None:
        raise OSError(errno.EROFS, 'Read-only file system')

    with pytest.raises(UserError, match='No space left'), atomic_writer(tmp_path / 'file') as file:
        monkeypatch.setattr(Path, 'unlink', refusing)
        file.write(b'half')
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.undo()
    assert [path.name.endswith(TEMPORARY_SUFFIX) for path in tmp_path.iterdir()] == [True]


@pytest.mark.parametrize('name', ['out/ckpt_best.pt', 'model.safetensors', 'data/train.bin', 'meta.pkl', 'train.py',
                                  'config/my.PY', 'out/config.json', 'run.json', 'metrics.jsonl', 'evaluation.json',
                                  'calibration.json', 'ckpt.pt.damaged', 'prepare.lock'])
@pytest.mark.parametrize('link', [True, False])
def test_files_of_other_commands_are_no_outputs(tmp_path: Path, name: str, link: bool) -> None:
    path = tmp_path / name
    assert why_unwritable(str(tmp_path / path.name)) is None  # a new name is free
    path.parent.mkdir(exist_ok=True)
    path.write_text('old')
    path.with_name('run.lock').touch()
    asked = path
    if link:
        asked = tmp_path / 'harmless.txt'
        asked.symlink_to(path)
    assert 'which stays; choose another name' in why_unwritable(str(asked)) and path.read_text() == 'old'
    (tmp_path / 'texts.txt').write_text('old')
    assert why_unwritable(str(tmp_path / 'texts.txt')) is None


@pytest.mark.parametrize('name', ['README.md', 'LICENSE', 'pyproject.toml', '.git/config', 'docs/data.md',
                                  'tests/data/notes.txt', 'core/common/notes.txt'])
def test_files_of_the_program_are_no_outputs(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('core.common.files.PROGRAM', tmp_path)
    for there in (name, 'mine.md', 'docs/results/performance.json', 'out/texts.md'):
        (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / there).write_text('old')
        reason = why_unwritable(str(tmp_path / there))
        assert (reason is not None) == (there == name), there
