"""Encoding what tiktoken and rustbpe cannot bear, exactly; and vocabularies with absurd contents."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.common.errors import UserError
from core.data import vocabulary as module
from core.data.gpt2_bpe import PATTERN, tokens_of
from core.data.learning import BPE_PATTERN, learn_bpe, train_bpe, whole_pieces
from core.data.vocabulary import DOCUMENT_END, Vocabulary

TEXT = ("it's to be or not, 12 34 \n\n\n!!! \n\n  x    yy aaaa _a_ é漢字 " + ' ' * 40 + '\n' * 20 + 'a' * 30) * 20
MILLION = 1_100_000  # beyond what the matchers of tiktoken and rustbpe bear
BYTES = tuple(bytes([value]) for value in range(256))


@pytest.fixture(scope='module')
def bpes() -> list[Vocabulary]:
    """One of each pattern that the program knows."""
    merges = tokens_of('#version: 0.2\nt h\nth e\nĠ the\nĊ Ċ\nĠ Ġ\nĠĠ ĠĠ\nĠ Ċ\nĊ Ġ\na a\naa aa\n')
    return [train_bpe(TEXT, 400), Vocabulary('bpe', (*merges, DOCUMENT_END.encode()), PATTERN)]


@pytest.mark.parametrize('text', [
    ' ' * MILLION, ' ' * MILLION + 'x', '!' + '\n' * MILLION, '\u3000\t' * (MILLION // 2), 'a' * MILLION,
    '!' * MILLION],
    ids=lambda text: ascii(text[:3]))
def test_texts_that_make_the_libraries_panic_are_encoded(bpes: list[Vocabulary], text: str) -> None:
    for bpe in bpes:
        assert bpe.decode(bpe.encode(text)) == text


def test_a_bpe_is_learnt_from_a_text_that_makes_the_library_panic() -> None:
    learnt = train_bpe(TEXT + ' ' * MILLION + 'x' * MILLION + '\n' * MILLION, 280)
    assert 256 < learnt.base_size <= 280 and learnt.decode(learnt.encode(TEXT)) == TEXT


pieces = st.sampled_from(['a', 'é', '漢', '!', "'s", "'", '\n', ' ', '  ', '\t', '\u3000', '1', '\x1c', '\x85', ' ' * 6,
                          '\n' * 7, '_', '\u0301', '\U0001f600', '!\n', ' x'])


@given(st.lists(pieces, max_size=40).map(''.join))
@settings(deadline=None, max_examples=400)
def test_pieces_cut_here_are_those_of_tiktoken(bpes: list[Vocabulary], text: str) -> None:
    """Where runs of white space count as long that tiktoken bears."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'LONGEST_RUN', 3)
        for bpe in bpes:
            expected = bpe._encoding.encode_ordinary(text)
            assert bpe.encode(text) == expected


@given(text=st.lists(pieces, max_size=60).map(''.join), size=st.integers(1, 9))
@settings(deadline=None, max_examples=400)
def test_a_text_cut_into_whole_pieces_is_encoded_as_the_whole(bpes: list[Vocabulary], text: str, size: int) -> None:
    blocks = [text[start:start + size] for start in range(0, len(text), size)]
    parts = list(whole_pieces(blocks, 10**6))
    assert ''.join(parts) == text and all(parts)
    for bpe in bpes:
        assert [token for part in parts for token in bpe.encode(part)] == bpe.encode(text)


def test_whole_pieces_are_small_where_the_text_lets_them() -> None:
    text = 'to be or not to be ' * 1000
    parts = list(whole_pieces((text[start:start + 50] for start in range(0, len(text), 50)), 10**6))
    assert ''.join(parts) == text and max(map(len, parts)) < 100
    assert [len(part) for part in whole_pieces(['a' * 50] * 10, 100)] == [100] * 5
    chinese = '天地玄黃，宇宙洪荒。' * 100
    assert len(list(whole_pieces((chinese[start:start + 50] for start in range(0, 1000, 50)), 10**6))) > 10


def test_a_bpe_learnt_in_blocks_is_that_of_the_whole_text() -> None:
    import rustbpe

    text = TEXT * 40
    whole = rustbpe.Tokenizer()
    whole.train_from_iterator(iter([text]), 350, pattern=BPE_PATTERN)
    ranks = sorted(whole.get_mergeable_ranks(), key=lambda pair: pair[1])
    for size in (100, 7001):
        learnt = learn_bpe((text[start:start + size] for start in range(0, len(text), size)), 350)
        assert learnt.tokens == tuple(bytes(token) for token, _ in ranks)


@pytest.mark.parametrize(('pattern', 'words'), [
    (r'\w+', 'leaves out parts of a text'), ('', 'cannot be cut'), (r'(a|aa)+$|.', 'leaves out parts'),
    ('(' * 9000, 'tiktoken refuses it'), ('x' * 20_000, 'at most 10000'), (r'[\s\S]{2}', 'leaves out parts'),
])
def test_a_pattern_that_loses_text_or_is_absurd_is_refused(pattern: str, words: str) -> None:
    with pytest.raises(UserError, match=f'vocabulary is not usable: .*({words})'):
        Vocabulary('bpe', BYTES, pattern)


class PanicException(BaseException):
    """Named as the errors of libraries written in Rust."""


def test_a_panic_is_one_sentence_and_other_ends_pass(bpes: list[Vocabulary], monkeypatch) -> None:
    for failure, expected in ((PanicException('stack\noverflow'), UserError), (KeyboardInterrupt(), KeyboardInterrupt)):
        def encode(self, text: str, failure=failure):
            raise failure

        with monkeypatch.context() as patch, pytest.raises(expected) as raised:
            patch.setattr(module.tiktoken.Encoding, 'encode_ordinary', encode)
            bpes[0].encode('to be')
        if expected is UserError:
            assert str(raised.value).startswith('a text of 5 characters cannot be cut by the pattern of this '
                                                'vocabulary (stack overflow)')
