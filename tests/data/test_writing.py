"""Replacing a corpus: at every instant a reader finds the earlier one or the new one, and nothing is replaced
unsaid."""

import errno
import os
import pickle
import shutil
from pathlib import Path

import filelock
import numpy as np
import pytest

from core.common.errors import UserError
from core.data import corpus as reading, writing
from core.data.corpus import Corpus, load_corpus
from core.data.learning import character_vocabulary
from core.data.splitting import split_text
from core.data.writing import new_corpus, write_corpus

TEXT = ''.join(f'NAME {i % 7}:\nThis is speech {i}, and a line\nbelow it.\n\n' for i in range(60))
OTHER = TEXT.replace('speech', 'speach')  # as long, of the same characters
LONGER = TEXT + 'One more word: xylophone.\n\n' * 9


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / 'small', character_vocabulary(TEXT), split_text(TEXT), 'a test')
    return tmp_path / 'small'


def prepare(folder: Path, text: str, overwrite: bool = True) -> None:
    write_corpus(folder, character_vocabulary(text), split_text(text), 'a test', overwrite)


def text_of(corpus: Corpus) -> str:
    return ''.join(corpus.vocabulary.decode(corpus.tokens(split)) for split in corpus.sizes)


def read(folder: Path) -> str:
    return text_of(load_corpus(folder.name, folder.parent))


def interrupted(monkeypatch, stop_at: int, failure: BaseException, then_done: bool = False) -> list[str]:
    """Let the call number `stop_at` that changes a folder fail with `failure`, before or after it was carried out."""
    calls: list[str] = []

    def failing(name: str, real):
        def call(*arguments, **options):
            calls.append(name)
            if len(calls) == stop_at:
                if then_done:
                    real(*arguments, **options)
                raise failure
            if stop_at < len(calls) and isinstance(failure, Killed):
                raise failure  # a killed process does not clean up
            return real(*arguments, **options)
        return call

    for name in ('replace', 'unlink', 'rmdir', 'fsync', 'mkdir'):
        monkeypatch.setattr(os, name, failing(name, getattr(os, name)))
    return calls


@pytest.mark.parametrize('text', [OTHER, LONGER, TEXT])
@pytest.mark.parametrize('then_done', [False, True])
def test_killed_at_any_step_the_corpus_is_one_of_both(folder: Path, monkeypatch, text: str, then_done: bool) -> None:
    """At every change of the folder, and a reader finds a sound corpus each time; the next preparation mends all."""
    kept = folder.parent / 'kept'
    shutil.copytree(folder, kept)
    seen, finished = set(), False
    for stop_at in range(1, 40):
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        with monkeypatch.context() as patch:
            calls = interrupted(patch, stop_at, Killed(), then_done)
            try:
                prepare(folder, text)
            except Killed:
                pass
            finished = len(calls) < stop_at
        found = read(folder)
        assert found in (TEXT, text)
        seen.add(found)
        for again in (OTHER, text):
            prepare(folder, again)
            assert read(folder) == again
        if finished:
            break
    assert finished and stop_at > 8 and seen == {TEXT, text}


@pytest.mark.parametrize('error', [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_failure_at_any_step_leaves_a_sound_corpus_and_no_rest(folder: Path, monkeypatch, error: int) -> None:
    for stop_at in range(1, 40):
        prepare(folder, TEXT)
        with monkeypatch.context() as patch:
            calls = interrupted(patch, stop_at, OSError(error, os.strerror(error)))
            try:
                prepare(folder, LONGER)
                expected = LONGER
            except UserError as problem:
                assert os.strerror(error) in str(problem)
                expected = None
            if len(calls) < stop_at:
                break
        assert read(folder) in ((TEXT, LONGER) if expected is None else (expected,))
        assert not list(folder.glob('*.tmp'))
    assert stop_at > 8


def test_where_folders_cannot_be_synced_the_corpus_is_replaced_all_the_same(folder: Path, monkeypatch) -> None:
    real = os.fsync

    def no_folders(descriptor: int) -> None:
        if os.path.isdir(f'/proc/self/fd/{descriptor}'):
            raise OSError(errno.EINVAL, 'Invalid argument')
        real(descriptor)

    monkeypatch.setattr(os, 'fsync', no_folders)
    monkeypatch.setattr('core.common.printing._said', set())
    prepare(folder, OTHER)
    assert read(folder) == OTHER


def test_a_file_system_without_locks_or_with_protected_names_is_written_to(folder: Path, monkeypatch) -> None:
    def none(self) -> None:
        raise NotImplementedError

    monkeypatch.setattr('core.common.locks.filelock.FileLock.acquire', none)
    prepare(folder, OTHER)
    assert read(folder) == OTHER


def test_a_preparation_that_another_process_is_at_is_refused(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr('core.common.locks.PATIENCE', 0.1)
    with filelock.FileLock(folder / writing.LOCK_NAME):
        with pytest.raises(UserError, match='is being prepared by another process'):
            prepare(folder, OTHER)
    prepare(folder, OTHER)
    assert read(folder) == OTHER


def test_a_token_file_that_cannot_get_its_usual_name_is_found_by_its_hash(folder: Path, monkeypatch) -> None:
    """As on Windows, where an opened file cannot be replaced, and where train.bin is a link to somewhere."""
    real = os.replace

    def replace(source, target) -> None:
        if Path(target).name == 'train.bin':
            raise PermissionError(errno.EACCES, 'it is in use')
        real(source, target)

    monkeypatch.setattr(os, 'replace', replace)
    elsewhere = folder.parent / 'elsewhere.bin'
    (folder / 'val.bin').rename(elsewhere)
    (folder / 'val.bin').symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    prepare(folder, LONGER)
    assert read(folder) == LONGER and elsewhere.read_bytes() == before and (folder / 'val.bin').is_symlink()
    monkeypatch.undo()
    (folder / 'val.bin').unlink()
    prepare(folder, LONGER)
    assert read(folder) == LONGER and sorted(path.name for path in folder.glob('*.bin')) == [
        'ref.bin', 'train.bin', 'val.bin']


def test_no_copy_of_an_earlier_corpus_stays_under_a_name_with_its_hash(folder: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writing.os, 'replace', lambda source, target: None if Path(target).name in (
            'train.bin', 'val.bin', 'ref.bin') else os.rename(source, target))
        prepare(folder, OTHER)
    assert len(list(folder.glob('*-*.bin'))) == 3
    prepare(folder, LONGER)
    assert read(folder) == LONGER and not list(folder.glob('*-*.bin'))


# --- opened once ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('in_memory', [True, False])
def test_an_opened_corpus_does_not_notice_its_replacement(folder: Path, monkeypatch, in_memory: bool) -> None:
    if not in_memory:
        monkeypatch.setattr(reading, '_IN_MEMORY', 0)
    corpus = load_corpus(folder.name, folder.parent)
    assert isinstance(corpus.tokens('val'), np.memmap) != in_memory
    prepare(folder, LONGER)
    assert text_of(corpus) == TEXT and read(folder) == LONGER
    shutil.rmtree(folder)
    assert text_of(corpus) == TEXT


def test_an_opened_corpus_does_not_notice_that_its_files_are_written_into(folder: Path) -> None:
    corpus = load_corpus(folder.name, folder.parent)
    for path in folder.glob('*.bin'):
        with path.open('r+b') as file:
            file.write(b'\xff' * 100)
            file.truncate(50)
    assert text_of(corpus) == TEXT


def test_what_is_checked_is_what_is_used(folder: Path, monkeypatch) -> None:
    """Replaced between the reading of meta.pkl and that of the token files: the new corpus is read, all of it."""
    real, done = reading._open_tokens, []

    def late(*arguments):
        if not done:
            done.append(True)
            prepare(folder, LONGER)
        return real(*arguments)

    monkeypatch.setattr(reading, '_open_tokens', late)
    assert read(folder) == LONGER


# --- nothing is replaced unsaid -------------------------------------------------------------------------------------

def test_another_corpus_is_not_replaced_without_overwrite(folder: Path) -> None:
    prepare(folder, TEXT, overwrite=False)
    for other in (OTHER, LONGER):
        with pytest.raises(UserError, match=r'small holds another corpus .of a test, .* --name=.* or add --overwrite'):
            prepare(folder, other, overwrite=False)
        assert read(folder) == TEXT
    renamed = ''.join(chr(ord(character) + 0x4000) for character in TEXT)  # the same ids, another vocabulary
    with pytest.raises(UserError, match='holds another corpus'):
        prepare(folder, renamed, overwrite=False)
    assert read(folder) == TEXT and not list(folder.glob('*.tmp'))
    prepare(folder, OTHER)
    assert read(folder) == OTHER


@pytest.mark.parametrize('names', [('train.bin',), ('meta.pkl',), ('train.bin', 'val.bin', 'meta.pkl')])
def test_files_of_others_are_not_replaced_without_overwrite(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = tmp_path / 'c'
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(pickle.dumps({'vocab_size': 65}))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match='c holds .*' + names[-1] + '.* without a meta.pkl of this program'):
        prepare(folder, TEXT, overwrite=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    prepare(folder, TEXT)
    assert read(folder) == TEXT


def test_own_notes_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / 'c'
    folder.mkdir()
    (folder / 'my.txt').write_text(TEXT)
    (folder / 'train-notes.bin').write_text('mine')
    for text in (TEXT, LONGER):
        prepare(folder, text, overwrite=text == LONGER)
    assert (folder / 'my.txt').read_text() == TEXT and (folder / 'train-notes.bin').read_text() == 'mine'


def test_a_failed_first_preparation_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='too short'):
        prepare(tmp_path / 'c', 'ab')
    with pytest.raises(ZeroDivisionError):
        with new_corpus(tmp_path / 'c', character_vocabulary(TEXT), ['train', 'val'], 'a test'):
            raise ZeroDivisionError
    assert not (tmp_path / 'c').exists()
    (tmp_path / 'file').write_text('x')
    with pytest.raises(UserError, match='file/c cannot be written .Not a directory'):
        prepare(tmp_path / 'file' / 'c', TEXT)
