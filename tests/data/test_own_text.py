"""Texts of the user's: streamed as if read whole, several joined, of any encoding, under names of their own."""

import os
import pickle
import random
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.common.errors import UserError
from core.data import nanogpt, own_text, text_files
from core.data.corpus import load_corpus
from core.data.folders import DATA_VARIABLE, data_folder
from core.data.gpt2_bpe import PATTERN
from core.data.learning import character_vocabulary, train_bpe
from core.data.own_text import by_split, find_borders, prepare_own_text
from core.data.prepare import ensure_corpus
from core.data.splitting import split_text
from core.data.text_files import text_blocks
from core.data.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parents[2]
TEXT = ''.join(f'NAME {i % 7}:\nThis is speech {i}, and a line\nbelow it.\n\n' for i in range(60))


def prepare(*arguments: str) -> list[str]:
    """What the command says."""
    said: list[str] = []
    prepare_own_text(list(arguments), 'usage', said.append)
    return said


def text_of(name: str) -> str:
    corpus = load_corpus(name)
    return ''.join(corpus.vocabulary.decode(corpus.tokens(split)) for split in corpus.sizes)


# --- streamed -------------------------------------------------------------------------------------------------------

@given(text=st.text(alphabet='ab \n', max_size=600), size=st.integers(1, 50))
@settings(deadline=None)
def test_a_streamed_text_is_split_as_the_whole(text: str, size: int) -> None:
    blocks = [text[start:start + size] for start in range(0, len(text), size)]
    borders = find_borders(blocks, len(text))
    found = dict.fromkeys(('train', 'ref', 'val'), '')
    for split, part in by_split(blocks, borders):
        found[split] += part
    assert found == split_text(text)


@pytest.mark.parametrize('read', [7, 64, 10**6])
@pytest.mark.parametrize('options', [[], ['--tokens=bpe', '--vocab_size', '280']])
def test_a_streamed_corpus_is_that_of_the_whole_text(data_here: Path, monkeypatch, options: list[str],
                                                     read: int) -> None:
    Path('my.txt').write_text(TEXT, encoding='utf-8')
    monkeypatch.setattr(text_files, 'READ', read)
    said = prepare('my.txt', *options)
    assert str(data_here / 'custom') in said[-2] and said[-1].endswith('--dataset=custom')
    corpus, splits = load_corpus('custom'), split_text(TEXT)
    vocabulary = train_bpe(splits['train'], 280) if options else character_vocabulary(TEXT)
    assert corpus.vocabulary == vocabulary
    for split, text in splits.items():
        assert corpus.tokens(split).tolist() == vocabulary.encode(text)
        assert (corpus.characters[split], corpus.utf8_bytes[split]) == (len(text), len(text.encode()))


MEASURED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from core.data.own_text import OwnText, prepare_texts
text = OwnText((Path(sys.argv[2]),), None, marked=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
prepare_texts(Path(sys.argv[3]), text, 'characters', 0, overwrite=False, say=print)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """12 MB of text; all of its ids in memory would be 94 MB."""
    (tmp_path / 'my.txt').write_text(TEXT * 4000)
    done = subprocess.run([sys.executable, '-c', MEASURED, str(ROOT), str(tmp_path / 'my.txt'), str(tmp_path / 'c')],
                          capture_output=True, text=True, check=True)
    before, after = (int(line) * (1 if sys.platform == 'darwin' else 1024) for line in done.stdout.split())
    assert (tmp_path / 'my.txt').stat().st_size > 11e6 and after - before < 20e6, (before, after)


def test_a_text_that_changes_meanwhile_is_refused(data_here: Path, monkeypatch) -> None:
    Path('my.txt').write_text(TEXT)
    real = own_text.find_borders

    def borders(*arguments):
        found = real(*arguments)
        Path('my.txt').write_text(TEXT.replace('speech 7', 'speech 8'))
        return found

    monkeypatch.setattr(own_text, 'find_borders', borders)
    with pytest.raises(UserError, match='my.txt has changed while it was being prepared'):
        prepare('my.txt')
    assert not list(data_here.iterdir())


# --- several --------------------------------------------------------------------------------------------------------

@pytest.fixture
def texts(data_here: Path) -> dict[str, str]:
    """Files in the working folder: one.txt, and in folder/ more, one of them blank and one hidden."""
    found = {'one.txt': TEXT, 'folder/b.txt': 'Ends in a line.\n', 'folder/a/z.txt': TEXT + 'no line end',
             'folder/blank.txt': ' \n', 'folder/.hidden': 'unseen'}
    for name, text in found.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    return found


@pytest.mark.parametrize('read', [5, 10**6])
def test_files_and_folders_are_joined_in_order(texts: dict[str, str], monkeypatch, read: int) -> None:
    """A blank line between documents of characters, the end's token after each document of a BPE."""
    monkeypatch.setattr(text_files, 'READ', read)
    prepare('folder', 'one.txt', 'folder/b.txt')
    assert text_of('custom') == TEXT + 'no line end\n\nEnds in a line.\n\n' + TEXT + 'Ends in a line.\n'
    assert load_corpus('custom').source == 'z.txt and 4 more'
    prepare('folder', 'one.txt', '--name=bpe', '--tokens=bpe', '--vocab_size=300')
    corpus = load_corpus('bpe')
    end, vocabulary = corpus.vocabulary.document_end_id, corpus.vocabulary
    assert end == 299 and vocabulary.base_size == 300
    ids = np.concatenate([corpus.tokens(split) for split in corpus.sizes])
    documents = [vocabulary.decode(part) for part in np.split(ids, np.flatnonzero(ids == end) + 1)]
    assert [document.removesuffix('<|endoftext|>') for document in documents] == [
        TEXT + 'no line end', 'Ends in a line.\n', TEXT, '']
    assert sum(corpus.characters.values()) == len(TEXT) * 2 + 11 + 16
    for split, size in corpus.sizes.items():  # each split is encoded as if it were whole
        again = [vocabulary.encode(text) for text in vocabulary.decode(corpus.tokens(split)).split('<|endoftext|>')]
        assert sum(map(len, again)) + len(again) - 1 == size


def test_what_is_no_text_is_listed_together(data_here: Path) -> None:
    Path('empty').mkdir()
    os.mkfifo('pipe')
    with pytest.raises(UserError) as refused:
        prepare('missing.txt', 'empty', 'pipe', 'x' * 300, 'a\nb')
    lines = str(refused.value).splitlines()
    assert len(lines) == 5
    for line, words in zip(lines, ('missing.txt', 'without files', 'a pipe or a device', 'cannot be read', 'not there'),
                           strict=True):
        assert words in line


# --- encodings ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32'])
def test_marked_encodings_are_read(tmp_path: Path, monkeypatch, encoding: str) -> None:
    monkeypatch.setattr(text_files, 'READ', 4)
    path = tmp_path / 'my text é.txt'
    path.write_bytes('one\r\ntwo\rthree é\U0001f600\r\n'.encode(encoding))
    assert ''.join(text_blocks(path)) == 'one\ntwo\nthree é\U0001f600\n'
    if encoding == 'utf-16':
        path.write_bytes(b'\xfe\xff' + 'one é'.encode('utf-16-be'))
        assert ''.join(text_blocks(path)) == 'one é'
        path.write_bytes(b'\xff\xfea')
        with pytest.raises(UserError, match='cut off'):
            list(text_blocks(path))


@pytest.mark.parametrize(('encoding', 'text'), [
    ('cp1252', 'It’s “quoted” – café ' * 20), ('latin-1', 'café à la crème ' * 20), ('utf-16-le', 'café, plain ' * 20),
    ('utf-16-be', 'café, plain ' * 20)])
def test_other_encodings_are_recognised_and_the_cure_works(data_here: Path, encoding: str, text: str) -> None:
    Path('my.txt').write_bytes(('plain\n' * 30_000 * (encoding == 'cp1252') + text).encode(encoding))
    with pytest.raises(UserError, match=f'my.txt .*it seems to be .*: add --encoding={encoding}, or save it as UTF-8'):
        prepare('my.txt')
    prepare('my.txt', f'--encoding={encoding}')
    assert text_of('custom').endswith(text)


@pytest.mark.parametrize(('encoding', 'text'), [('utf-8', 'é' * 9), ('utf-8', 'wörter ' * 40_000 + 'é'), ('utf-16', 'ab'),
                                                ('utf-32', 'ab'), ('utf-16', 'a😀')])
def test_a_file_that_was_cut_off_is_said_to_be(data_here: Path, encoding: str, text: str) -> None:
    Path('my.txt').write_bytes(text.encode(encoding)[:-1])
    with pytest.raises(UserError, match='my.txt ends in the middle of a character, so it was cut off') as caught:
        prepare('my.txt')
    assert 'encoding' not in str(caught.value)


@pytest.mark.parametrize(('encoding', 'text'), [('koi8-r', 'Привет, мир\n' * 50), ('shift_jis', '日本語のテキスト。\n' * 50),
                                                ('gbk', '很久很久以前\n' * 50), ('cp1253', 'Μια φορά κι έναν καιρό\n' * 50)])
def test_no_western_encoding_is_offered_for_other_letters(data_here: Path, encoding: str, text: str) -> None:
    Path('my.txt').write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match='add --encoding=NAME of the encoding that it was saved in'):
        prepare('my.txt')
    prepare('my.txt', f'--encoding={encoding}')
    assert text_of('custom').endswith(text)


@pytest.mark.parametrize(('data', 'words'), [
    (b'\x1f\x8b\x08\0rest', 'compressed with gzip'), (b'PK\x03\x04\0', 'zip archive'), (b'%PDF-1.5\n\xff\0', 'a PDF'),
    (b'a\0b', 'zero byte, so it is no plain text: give a UTF-8'), (b'abc\xc3', 'is not UTF-8'),
])
def test_what_is_no_text_is_named(data_here: Path, data: bytes, words: str) -> None:
    Path('my.txt').write_bytes(data)
    with pytest.raises(UserError, match=words):
        prepare('my.txt')
    assert not list(data_here.iterdir())


def test_any_bytes_are_text_or_one_sentence(tmp_path: Path) -> None:
    chance = random.Random(1)
    path = tmp_path / 'my.txt'
    for _ in range(500):
        path.write_bytes(chance.choice([b'', b'\xff\xfe', b'\xfe\xff', b'\xff\xfe\0\0', b'\xef\xbb\xbf'])
                         + chance.randbytes(chance.randrange(40)))
        for encoding in (None, 'cp1252', 'utf-16', 'ascii', 'shift_jis'):
            try:
                list(text_blocks(path, encoding))
            except UserError as error:
                assert '\n' not in str(error)


# --- names and options ----------------------------------------------------------------------------------------------

def test_several_own_corpora_exist_side_by_side(data_here: Path) -> None:
    Path('one.txt').write_text(TEXT)
    Path('two.txt').write_text(TEXT.replace('speech', 'speach'))
    prepare('one.txt')
    prepare('two.txt', '--name=novels')
    prepare('one.txt')
    with pytest.raises(UserError, match=r'custom holds another corpus .of one.txt.*--name=\.\.\., or add --overwrite'):
        prepare('two.txt')
    assert text_of('custom') == TEXT and 'speach' in text_of('novels')
    prepare('two.txt', '--overwrite')
    assert 'speach' in text_of('custom')


@pytest.mark.parametrize('name', [
    '../x', '/tmp/x', 'a/b', 'a\\b', '.', '..', '.git', 'a b', 'é', 'x' * 101, 'a\nb', '-x', 'shakespeare_char',
    'Shakespeare_Char', 'openwebtext', 'tinyshakespeare_char', 'shakespeare_bpe', '\x1b[2J', '~'])
def test_names_that_are_no_free_names_are_refused(data_here: Path, name: str) -> None:
    Path('my.txt').write_text(TEXT)
    with pytest.raises(UserError) as refused:
        prepare('my.txt', f'--name={name}')
    assert str(refused.value).isprintable() and len(str(refused.value)) < 500 and '--name=' in str(refused.value)
    assert not list(data_here.iterdir())


@pytest.mark.parametrize('name', ['core', 'config', 'data', 'docs', 'tests'])
def test_folders_of_the_program_are_no_corpora(data_here: Path, name: str) -> None:
    Path('my.txt').write_text(TEXT)
    with pytest.raises(UserError, match='is a folder of the program'):
        prepare('my.txt', f'--name={name}', f'--data_dir={ROOT}')
    assert not (ROOT / name / 'meta.pkl').exists()


@pytest.mark.parametrize(('arguments', 'words'), [
    ([], ['no text is given: python ']),
    (['my.txt', '--tokens=words', '--vocab_size=many'], ['choose characters', '256']),
    (['my.txt', '--vocab_size=300'], ['applies to --tokens=bpe only']),
    (['my.txt', '--vocab=3'], ['mean --vocab_size?']),
    (['my.txt', '--tokens=bpe', '--vocab_size=' + '9' * 5000], ['not a whole number']),
    (['my.txt', '--tokens=bpe', '--vocab_size=-1'], ['not a whole number']), (['my.txt', '--name='], ['needs a value']),
    (['my.txt', '--tokens=bpe', '--vocab_size=1e3'], ['not a whole number']), ([''], ['an empty name']),
    (['my.txt', '--name'], ['needs a value']), (['my.txt', '--name=a', '--name=b'], ['more than once']),
    (['my.txt', '--encoding=rot13'], ['--encoding=rot13 is unknown']), (['my.txt', '--encoding=base64'], ['unknown']),
    (['my.txt', '--encoding=\0'], ['is unknown']), (['my.txt', '--overwrite=maybe'], ['given alone']),
    (['my.txt', '--nanogpt=x'], ['leave out texts']), (['my.txt', '-x'], ['-x is unknown: the options are --name']),
    (['my.txt', '--token=bpe'], ['--token=bpe is unknown; did you mean --tokens? The options are --name']),
    (['my.txt', '--data_dir=my.txt'], ['my.txt is a file']), (['my.txt', '--data_dir=' + 'x/' * 3000], ['no possible']),
    (['my.txt', '--data_dir=' + 'x' * 300], ['cannot be']),
])
def test_wrong_arguments_are_one_sentence_each(data_here: Path, arguments: list[str], words: list[str]) -> None:
    Path('my.txt').write_text(TEXT)
    with pytest.raises(UserError) as refused:
        prepare(*arguments)
    lines = str(refused.value).splitlines()
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True)), lines
    assert all(len(line) < 600 for line in lines) and not list(data_here.iterdir())


@pytest.mark.parametrize('script', sorted((ROOT / 'data').glob('*/prepare.py')), ids=lambda path: path.parent.name)
def test_help_names_every_option(script: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, 'argv', [str(script), '--help'])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(script), run_name='__main__')
    out, err = capsys.readouterr()
    assert done.value.code == 0 and not err
    for option in ('--data_dir', '--overwrite', f'python data/{script.parent.name}/prepare.py'):
        assert option in out


# --- where corpora live ---------------------------------------------------------------------------------------------

def test_the_working_directory_never_decides(tmp_path: Path, monkeypatch) -> None:
    """The option, else the environment, else data/ of the program, and each message has the full path."""
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert data_folder() == ROOT / 'data' and data_folder('mine') == tmp_path / 'mine'
    with pytest.raises(UserError, match=re.escape(str(ROOT / 'data'))) as refused:
        ensure_corpus('novel-of-nobody')
    assert f'python {ROOT}/data/custom/prepare.py my.txt --name=novel-of-nobody' in str(refused.value)
    monkeypatch.setenv(DATA_VARIABLE, 'environment')
    assert data_folder() == tmp_path / 'environment' and data_folder('~/x') == Path.home() / 'x'
    monkeypatch.setenv(DATA_VARIABLE, '')
    assert data_folder() == ROOT / 'data'
    for wrong in ('', ' ', 'x' * 5000, 'a\0b'):
        with pytest.raises(UserError, match='--data_dir'):
            data_folder(wrong)


@pytest.mark.parametrize('root', [None, 'else where'])
def test_the_cure_that_is_named_works_when_typed(data_here: Path, root: str | None) -> None:
    Path('my.txt').write_text(TEXT)
    where = Path.cwd() / root if root else None
    with pytest.raises(UserError) as refused:
        ensure_corpus('novels', root=where)
    words = shlex.split(re.split(' run (?=python )', str(refused.value))[-1])
    assert words[:2] == ['python', str(ROOT / 'data' / 'custom' / 'prepare.py')]
    prepare(*words[2:])
    assert ensure_corpus('novels', root=where).folder == (where or data_here) / 'novels'
    (ensure_corpus('novels', root=where).folder / 'val.bin').write_bytes(b'damaged')
    with pytest.raises(UserError) as refused:
        ensure_corpus('novels', root=where)
    prepare(*shlex.split(re.split(' run (?=python )', str(refused.value))[-1])[2:])
    assert ensure_corpus('novels', root=where).name == 'novels'


@pytest.mark.parametrize('name', ['../novels', '/etc', '', '.', '..', 'a\\b', 'x' * 300, 'a\0b', 'é' * 200])
def test_a_dataset_is_the_name_of_one_folder(data_here: Path, name: str) -> None:
    for read in (load_corpus, ensure_corpus):
        with pytest.raises(UserError, match='is not the name of one folder .1 to 255 bytes') as refused:
            read(name)
        assert str(refused.value).isprintable()


# --- nanoGPT's folders ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('protocol', range(2, 6))
def test_a_folder_of_nanogpt_is_converted(data_here: Path, protocol: int) -> None:
    letters = sorted(set(TEXT))
    ids = np.array([letters.index(letter) for letter in TEXT], dtype=np.uint16)
    Path('nano').mkdir()
    ids[:-500].tofile('nano/train.bin')
    ids[-500:].tofile('nano/val.bin')
    meta = {'vocab_size': len(letters), 'itos': dict(enumerate(letters)), 'stoi': {c: i for i, c in enumerate(letters)}}
    Path('nano/meta.pkl').write_bytes(pickle.dumps(meta, protocol=protocol))
    prepare('--nanogpt', 'nano', '--name=mine')
    corpus = load_corpus('mine')
    assert list(corpus.sizes) == ['train', 'val'] and text_of('mine') == TEXT
    assert corpus.characters == corpus.utf8_bytes == {'train': len(TEXT) - 500, 'val': 500}
    with pytest.raises(UserError, match="it is nanoGPT's; convert"):
        load_corpus('nano', Path.cwd())
    for change, words in (({'itos': {0: 'a', 2: 'b'}}, 'itos'), ({'itos': {0: 'a'}}, r'holds token id \d+'),
                          ({'itos': {0: 3}}, 'non-empty str'), ({'itos': print}, 'not a plain dict')):
        Path('nano/meta.pkl').write_bytes(pickle.dumps(meta | change, protocol=protocol))
        with pytest.raises(UserError, match=words):
            prepare('--nanogpt', 'nano', '--name=other')
    assert not (data_here / 'other').exists()


def test_a_folder_of_nanogpt_without_meta_is_of_gpt2s_tokens(data_here: Path, monkeypatch) -> None:
    tokens = (*(bytes([value]) for value in range(256)), b'the', '<|endoftext|>'.encode())
    monkeypatch.setattr(nanogpt, 'gpt2_vocabulary', lambda folder, say: Vocabulary('bpe', tokens, PATTERN))
    Path('nano').mkdir()
    np.array([256, 0xc3, 0xa9, 257, 33], dtype=np.uint16).tofile('nano/train.bin')
    np.array([256, 257], dtype=np.uint16).tofile('nano/val.bin')
    assert "taken for GPT-2's" in prepare('--nanogpt=nano')[0]
    corpus = load_corpus('custom')
    assert corpus.characters == {'train': 5, 'val': 3} and corpus.utf8_bytes == {'train': 6, 'val': 3}
    assert corpus.vocabulary.decode(corpus.tokens('train')) == 'theé<|endoftext|>!'
    Path('nano/val.bin').write_bytes(b'abc')
    with pytest.raises(UserError, match='no file of 16-bit tokens'):
        prepare('--nanogpt=nano', '--name=other')
    Path('nano/val.bin').unlink()
    with pytest.raises(UserError, match='nano has no val.bin'):
        prepare('--nanogpt=nano', '--name=other')


def test_pip_installs_what_is_needed_and_no_module() -> None:
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    assert project['tool']['setuptools'] == {'py-modules': [], 'packages': []}
    needed = {re.split('[=><]', line)[0] for line in (ROOT / 'requirements.txt').read_text().split()}
    assert {re.split('[=><]', line)[0] for line in project['project']['dependencies']} <= needed


@pytest.mark.parametrize('content', ['', 'ab'])
def test_texts_too_short_for_three_parts(data_here: Path, content: str) -> None:
    Path('my.txt').write_text(content)
    for options in ([], ['--tokens=bpe']):
        with pytest.raises(UserError, match='too short'):
            prepare('my.txt', *options)
    assert not list(data_here.iterdir())
