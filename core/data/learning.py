"""Vocabularies that are learnt from a text: its characters, or a byte-level BPE."""

from collections.abc import Iterable, Iterator

import regex

from core.common.errors import UserError
from core.common.expressions import excerpt
from core.data.vocabulary import Vocabulary, is_panic

BPE_SIZE = 1024
LARGEST_BPE = 2**16  # tokens; learning more takes long, and few texts have so many
# Merging stays in these pieces: an elided ending ('s, 'd, 'll); letters, digits or other signs with the space before
# them, signs also with line ends after them; a run of white space without its last space, which the next word gets.
BPE_PATTERN = r"'(?:[sdmt]|ll|re|ve)\b| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+\n*|\s+(?!\S)|\s+"
_LONGEST_LEARNT = 2**19  # characters; a million of white space in a row overflow the stack of rustbpe's matcher
_BLOCK = 2**17
# The last place that no piece of BPE_PATTERN or of GPT-2's can cross, whatever comes before and after: before a single
# blank, or else between a letter or digit and punctuation (but not _ and the like, which \b counts as part of a word).
_CUTS = (regex.compile(r'(?s).*\S(?= \S)'), regex.compile(r'(?s).*[\p{L}\p{N}](?=\p{P})(?!\p{Pc})'))


def character_vocabulary(text: str) -> Vocabulary:
    """All characters of `text`, in the order of their code points."""
    return Vocabulary(kind='characters', tokens=tuple(sorted(set(text))))


def train_bpe(text: str, size: int) -> Vocabulary:
    """Byte-level BPE of at most `size` tokens (Sennrich et al. 2016) learnt from `text`; a short text gives fewer."""
    return learn_bpe((text[start:start + _BLOCK] for start in range(0, len(text), _BLOCK)), size)


def learn_bpe(texts: Iterable[str], size: int, special: tuple[bytes, ...] = ()) -> Vocabulary:
    """Learn the BPE of a text that comes in blocks. The tokens `special` follow the learnt ones.

    Memory grows with the number of different pieces, not with the text.
    """
    import rustbpe  # only preparation needs it

    tokenizer = rustbpe.Tokenizer()
    try:
        tokenizer.train_from_iterator(whole_pieces(texts, _LONGEST_LEARNT), size, pattern=BPE_PATTERN)
    except BaseException as error:
        if not is_panic(error):
            raise
        raise UserError(f'no BPE can be learnt from this text ({excerpt(str(error))}): take --tokens=characters, or '
                        f'leave out what repeats without end') from None
    ranks = sorted(tokenizer.get_mergeable_ranks(), key=lambda pair: pair[1])
    return Vocabulary(kind='bpe', tokens=(*(bytes(token) for token, _ in ranks), *special), pattern=BPE_PATTERN)


def whole_pieces(blocks: Iterable[str], most: int) -> Iterator[str]:
    """The text of `blocks`, cut where encoding the parts gives the same ids as encoding the whole.

    If `most` characters have no such place, the text is cut anywhere. Usual text always has one.
    """
    rest = ''
    for block in blocks:
        rest += block
        cut = next((found.end() for pattern in _CUTS if (found := pattern.match(rest))), 0)
        if not cut and len(rest) >= most:
            cut = len(rest)
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest
