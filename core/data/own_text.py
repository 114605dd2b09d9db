"""Corpora of the user's own texts, in bounded memory: one pass surveys the text, others learn from it and encode it.

Several files are documents in their order. With a BPE each ends with the token DOCUMENT_END. With characters a blank
line separates them.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from core.common.errors import UserError, raise_problems
from core.common.expressions import excerpt
from core.common.printing import say
from core.data.command_line import read_arguments, summary
from core.data.corpus import SPLITS, load_corpus
from core.data.folders import Say, data_folder, preparation_command, require_new_name
from core.data.learning import BPE_SIZE, LARGEST_BPE, learn_bpe, whole_pieces
from core.data.nanogpt import convert_nanogpt
from core.data.splitting import REF_END, TRAIN_END, cut_near
from core.data.text_files import require_encoding, text_blocks, text_paths
from core.data.vocabulary import DOCUMENT_END, Vocabulary
from core.data.writing import Part, new_corpus

_LARGEST_REACH = 2**20  # characters that a border may move to reach a blank line
_LONGEST_PIECE = 2**24  # characters without a place to cut; a longer one is cut anywhere


class _End:
    """The end of a document in a stream of text."""


END = _End()
Stream = Iterable[str | _End]


@dataclass(frozen=True)
class OwnText:
    """Text files as one text. marked: documents end with END in the stream; otherwise blank lines separate them."""

    paths: tuple[Path, ...]
    encoding: str | None
    marked: bool

    def stream(self) -> Iterator[str | _End]:
        """The text in blocks. Among several documents, blank ones are left out."""
        if len(self.paths) == 1:
            yield from text_blocks(self.paths[0], self.encoding)
            return
        newlines = 2  # at the end of what was yielded
        for number, path in enumerate(self.paths):
            if not any(block.strip() for block in text_blocks(path, self.encoding)):
                continue
            if not self.marked and newlines < 2:
                yield '\n' * (2 - newlines)
            for block in text_blocks(path, self.encoding):
                newlines = min(2, len(block) - len(block.rstrip('\n')) + newlines * (not block.strip('\n')))
                yield block
            if self.marked:
                yield END


@dataclass(frozen=True)
class Survey:
    """What one pass over a text finds: its length, its characters and its SHA-256."""

    length: int
    characters: frozenset[str]
    digest: str

    @classmethod
    def of(cls, stream: Stream) -> 'Survey':
        length, characters, sha256 = 0, set(), hashlib.sha256()
        for text in stream:
            if isinstance(text, str):
                length += len(text)
                characters |= set(text)
            sha256.update(_signature(text))
        return cls(length, frozenset(characters), sha256.hexdigest())


def find_borders(stream: Stream, length: int) -> tuple[int, int]:
    """Where train and ref end in a text of `length` characters, as `split_text` cuts it."""
    reach = min(length // 50, _LARGEST_REACH)
    positions = [int(share * length) for share in (TRAIN_END, REF_END)]
    starts = [max(0, position - reach) for position in positions]
    windows, place = ['', ''], 0
    for text in stream:
        if isinstance(text, str):
            for number, (start, position) in enumerate(zip(starts, positions, strict=True)):
                windows[number] += text[max(0, start - place):max(0, position + reach - place)]
            place += len(text)
    first, second = (start + cut_near(window, position - start, reach)
                     for window, start, position in zip(windows, starts, positions, strict=True))
    return first, second


def by_split(stream: Stream, borders: tuple[int, int]) -> Iterator[tuple[str, str | _End]]:
    """The stream, cut at the borders, with the split of each piece. An END goes with the text that it ends."""
    place, last = 0, SPLITS[0]
    for text in stream:
        if not isinstance(text, str):
            yield last, text
            continue
        while text:
            number = sum(place >= border for border in borders)
            last = SPLITS[number]
            here = text[:borders[number] - place] if number < len(borders) else text
            yield last, here
            place, text = place + len(here), text[len(here):]


def encode_into(parts: Mapping[str, Part], vocabulary: Vocabulary, stream: Stream, borders: tuple[int, int]) -> str:
    """Encode a text into its splits, each with the ids of encoding it as a whole. Returns the SHA-256 of the stream."""
    sha256 = hashlib.sha256()

    def hashed() -> Iterator[str | _End]:
        for text in stream:
            sha256.update(_signature(text))
            yield text

    for split, texts in _stretches(by_split(hashed(), borders)):
        pieces = texts if vocabulary.kind == 'characters' else whole_pieces(texts, _LONGEST_PIECE)
        for text in pieces:
            parts[split].add(vocabulary.encode_array(text).astype(vocabulary.dtype), text)
        if texts.ended:
            parts[split].add(np.array([vocabulary.document_end_id], dtype=vocabulary.dtype), '')
    return sha256.hexdigest()


class _Stretch:
    """The texts of one split up to its border or the end of a document. ended: whether it was the latter."""

    def __init__(self, rest: Iterator[tuple[str, str | _End]], split: str, text: str | _End) -> None:
        self.rest, self.split, self.text = rest, split, text
        self.ended = False
        self.following: tuple[str, str | _End] | None = None

    def __iter__(self) -> Iterator[str]:
        for split, text in chain([(self.split, self.text)], self.rest):
            if split != self.split:
                self.following = split, text
                return
            if not isinstance(text, str):
                self.ended = True
                return
            yield text


def _stretches(pieces: Iterator[tuple[str, str | _End]]) -> Iterator[tuple[str, _Stretch]]:
    following = next(pieces, None)
    while following is not None:
        stretch = _Stretch(pieces, *following)
        yield stretch.split, stretch
        following = stretch.following or next(pieces, None)


def _signature(text: str | _End) -> bytes:
    return text.encode('utf-8', 'surrogatepass') if isinstance(text, str) else b'\xff'


def prepare_texts(folder: Path, text: OwnText, tokens: str, vocab_size: int, overwrite: bool, say: Say) -> None:
    """Write a user's text to `folder` as a corpus. tokens: 'characters' or 'bpe'. vocab_size: most tokens of a BPE."""
    source = text.paths[0].name + (f' and {len(text.paths) - 1} more' if len(text.paths) > 1 else '')
    survey = Survey.of(text.stream())
    if not survey.length:
        raise UserError(f'the text of {source} is too short: it is empty; give at least a few thousand characters')
    borders = find_borders(text.stream(), survey.length)
    if tokens == 'characters':
        vocabulary = Vocabulary('characters', tuple(sorted(survey.characters)))
    else:
        say(f'learning at most {vocab_size} tokens from {borders[0]:,} characters')
        train = (piece for split, piece in by_split(text.stream(), borders) if split == 'train')
        end = (DOCUMENT_END.encode(),) if text.marked else ()
        vocabulary = learn_bpe(_texts_of(train), vocab_size - len(end), end)
    with new_corpus(folder, vocabulary, SPLITS, source, overwrite) as parts:
        if encode_into(parts, vocabulary, text.stream(), borders) != survey.digest:
            raise UserError(f'the text of {source} has changed while it was being prepared: prepare it again')


def _texts_of(stream: Stream) -> Iterator[str]:
    """The texts, with a blank line instead of each END, so that no token is learnt across it."""
    return (text if isinstance(text, str) else '\n\n' for text in stream)


# --- the command line of data/custom/prepare.py -----------------------------------------------------------------------

def prepare_own_text(arguments: list[str], usage: str, say: Say = say) -> None:
    """`prepare.py FILE or FOLDER ... [--name=NAME] [--tokens=characters|bpe] [--vocab_size=1024] [--encoding=NAME]
    [--data_dir=FOLDER] [--overwrite]`, or `prepare.py --nanogpt FOLDER --name=NAME`."""
    given = read_arguments(arguments, {'name': 'custom', 'tokens': 'characters', 'vocab_size': None, 'encoding': None,
                                       'nanogpt': None, 'data_dir': None}, usage, plain=None, flags=('overwrite',))
    options, problems = given.options, []
    if not given.plain and options['nanogpt'] is None:
        problems.append(f'no text is given: {preparation_command("custom")}')
    if options['tokens'] not in ('characters', 'bpe'):
        problems.append(f"--tokens={excerpt(options['tokens'])} is unknown: choose characters or bpe")
    size = BPE_SIZE if options['vocab_size'] is None else _whole_number(options['vocab_size'])
    if not 256 <= size <= LARGEST_BPE:
        problems.append(f"--vocab_size={excerpt(options['vocab_size'])} is not a whole number from 256 (the bytes) to "
                        f'{LARGEST_BPE}')
    if options['vocab_size'] is not None and options['tokens'] == 'characters':
        problems.append('--vocab_size applies to --tokens=bpe only: add that or leave it out')
    if options['nanogpt'] is not None and (given.plain or given.named & {'tokens', 'vocab_size', 'encoding'}):
        problems.append('--nanogpt converts token files as they are: leave out texts, --tokens, --vocab_size and '
                        '--encoding')
    raise_problems(problems)
    root = data_folder(options['data_dir'])
    require_new_name(options['name'], root)
    folder = root / options['name']
    if options['nanogpt'] is not None:
        convert_nanogpt(Path(options['nanogpt']), folder, root, given.has('overwrite'), say)
    else:
        if options['encoding'] is not None:
            require_encoding(options['encoding'])
        paths = tuple(text_paths(given.plain))
        text = OwnText(paths, options['encoding'], options['tokens'] == 'bpe' and len(paths) > 1)
        prepare_texts(folder, text, options['tokens'], size, given.has('overwrite'), say)
    say(summary(load_corpus(options['name'], root)))
    say(f'train on it with --dataset={options["name"]}')


def _whole_number(text: str) -> int:
    """`text` as a whole number; -1 if it is none."""
    return int(text) if re.fullmatch('[0-9]{1,9}', text) else -1
