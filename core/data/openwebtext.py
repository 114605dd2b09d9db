"""The corpus `openwebtext`: more text than memory holds, streamed into GPT-2's BPE.

Documents come from the package `datasets` or from the user's text files. The number of a passage decides to which split
the whole passage goes. So memory holds only a few passages at a time.
"""

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.common.errors import UserError, raise_problems
from core.common.expressions import excerpt, shown_name
from core.common.printing import say
from core.common.progress import ProgressBar
from core.data.command_line import read_arguments, summary
from core.data.corpus import SPLITS, is_own_meta, load_corpus
from core.data.folders import Say, data_folder, preparation_command
from core.data.gpt2_bpe import gpt2_vocabulary
from core.data.text_files import require_encoding, text_blocks, text_paths
from core.data.vocabulary import DOCUMENT_END, Vocabulary
from core.data.writing import Part, new_corpus, require_replaceable

NAME = 'openwebtext'
DATASET = 'Skylion007/openwebtext'
REVISION = 'refs/convert/parquet'  # the whole data set as plain tables, so that none of its own code runs
DATASET_BYTES = 40 * 10**9  # of text, about; for the progress bar
PASSAGE = 2**14  # characters; longer documents of a text file are cut into such passages
TOGETHER = 256  # passages that are encoded in parallel
REPORT_SECONDS = 60  # between lines of progress without a terminal
_BEFORE_A_WORD = re.compile(r'(?s).+[ \n](?=\S)')


class Passage(NamedTuple):
    """A document or a part of one; `ends_document` asks for the token DOCUMENT_END after it."""

    text: str
    ends_document: bool


def split_of(number: int) -> str:
    """The split of passage `number`: of every hundred 95 go to train, 4 to ref and 1 to val, evenly spread."""
    if number % 100 == 50:
        return 'val'
    return 'ref' if number % 25 == 12 else 'train'


# --- where passages come from ---------------------------------------------------------------------------------------

def dataset_passages() -> Iterator[Passage]:
    """The documents of OpenWebText, streamed over the network. UserError without `datasets` or a connection."""
    otherwise = 'or give text at hand with --input FILE ...'
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError('openwebtext comes through the package datasets, which is not installed: run '
                        f'"pip install datasets" (it then fetches tens of gigabytes), {otherwise}') from None
    try:
        for row in load_dataset(DATASET, revision=REVISION, split='train', streaming=True):
            if row['text'].strip():
                yield Passage(row['text'], True)
    except Exception as error:  # network, server and package raise their own exceptions
        raise UserError(f'{DATASET} cannot be read through datasets ({type(error).__name__}: {excerpt(str(error))}); '
                        f'try again later, {otherwise}') from None


def file_passages(paths: Sequence[Path], encoding: str | None = None) -> Iterator[Passage]:
    """The documents of text files. Long ones come in pieces that GPT-2's BPE encodes as it encodes the whole.

    A document ends at each DOCUMENT_END in the text and at the end of each file. UserError if a file is no plain text.
    """
    for path in paths:
        rest, begun = '', False  # the document that is not complete yet, and whether a part of it was yielded
        for block in text_blocks(path, encoding):
            *documents, rest = (rest + block).split(DOCUMENT_END)
            for document in documents:
                yield from _pieces(document, begun)
                begun = False
            while len(rest) >= 2 * PASSAGE:  # the cut stays away from a half-read DOCUMENT_END
                cut = _cut(rest)
                yield Passage(rest[:cut], False)
                rest, begun = rest[cut:], True
        yield from _pieces(rest, begun)


def _pieces(document: str, begun: bool) -> Iterator[Passage]:
    """The passages of a document, or of its last part if it has `begun`. A blank document has none."""
    if not begun and not document.strip():
        return
    while len(document) > PASSAGE:
        cut = _cut(document)
        yield Passage(document[:cut], False)
        document = document[cut:]
    yield Passage(document, True)


def _cut(text: str) -> int:
    """How many characters the first passage of `text` has, at most PASSAGE.

    The cut is before the last blank or newline that precedes a word. GPT-2's pattern cuts there too, and it cuts the
    text before this place as it does at the end of a text. Only a word as long as a passage is cut anywhere.
    """
    found = _BEFORE_A_WORD.match(text, 0, PASSAGE)
    return found.end() - 1 if found else PASSAGE


def reported(passages: Iterable[Passage], total: int, say: Say) -> Iterator[Passage]:
    """Yield `passages` unchanged, and show how many of `total` bytes are done, by a bar or a line each minute."""
    done, start = 0, time.monotonic()
    said = start
    with ProgressBar(total, unit='B', unit_scale=True, dynamic_ncols=True) as bar:
        for passage in passages:
            yield passage
            length = len(passage.text.encode('utf-8'))
            done += length
            bar.move(length)
            now = time.monotonic()
            if not bar.shown and now - said >= REPORT_SECONDS:
                said, left = now, (now - start) * max(total - done, 0) / done
                say(f'{done / 1e9:.2f} GB of about {total / 1e9:.2f} GB encoded, about {left / 60:.0f} min left')


# --- writing --------------------------------------------------------------------------------------------------------

def write_passages(folder: Path, vocabulary: Vocabulary, passages: Iterable[Passage], source: str,
                   overwrite: bool = False) -> None:
    """Encode `passages`, spread them over the splits and write the corpus folder, whole or not at all.

    `vocabulary` must have a `document_end_id`, which counts as a token without text. Memory does not grow with the
    number of passages. UserError if a split stays empty or the folder cannot be written.
    """
    assert vocabulary.document_end_id is not None
    with new_corpus(folder, vocabulary, SPLITS, source, overwrite) as parts:
        _encode_into(parts, vocabulary, passages)
        empty = [split for split, part in parts.items() if not part.tokens]
        if empty:
            raise UserError(f'the text of {source} is too short: nothing is left for {", ".join(empty)}; give at least '
                            f'a million characters, or use {preparation_command("custom")}')


def _encode_into(parts: Mapping[str, Part], vocabulary: Vocabulary, passages: Iterable[Passage]) -> None:
    """Encode `passages` on all cores (tiktoken releases the GIL), and add them to `parts` in their order."""
    def encode(passage: Passage) -> np.ndarray:
        ids = vocabulary.encode_array(passage.text)
        return (np.append(ids, vocabulary.document_end_id) if passage.ends_document else ids).astype(vocabulary.dtype)

    remaining = iter(passages)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        first = 0
        while together := list(islice(remaining, TOGETHER)):
            for number, (passage, ids) in enumerate(zip(together, pool.map(encode, together), strict=True), first):
                parts[split_of(number)].add(ids, passage.text)
            first += len(together)


# --- the command line of data/openwebtext/prepare.py ----------------------------------------------------------------

def prepare_openwebtext(arguments: list[str], usage: str, say: Say = say) -> None:
    """`prepare.py [--input FILE or FOLDER ...] [--encoding=NAME] [--data_dir=FOLDER] [--overwrite]`: OpenWebText
    itself, or these text files in its place."""
    given = read_arguments(arguments, {'input': None, 'encoding': None, 'data_dir': None}, usage, plain=None,
                           flags=('overwrite',))
    names = [given.options['input'], *given.plain] if given.options['input'] else given.plain
    problems = []
    if given.plain and not given.options['input']:
        problems.append(f'{shown_name(" ".join(given.plain))} needs --input before it: --input FILE ...')
    if given.options['encoding'] and not names:
        problems.append('--encoding applies to --input only: add that or leave it out')
    raise_problems(problems)
    if given.options['encoding']:
        require_encoding(given.options['encoding'])
    paths, root = text_paths(names), data_folder(given.options['data_dir'])
    folder = root / NAME
    require_replaceable(folder, given.has('overwrite'))
    if is_own_meta(folder / 'meta.pkl') and not given.has('overwrite'):  # before hours of work, not after them
        raise UserError(f'{folder} holds a prepared corpus already: add --overwrite to prepare it again')
    vocabulary = gpt2_vocabulary(folder, say)
    if paths:
        passages, total = file_passages(paths, given.options['encoding']), sum(path.stat().st_size for path in paths)
        source = paths[0].name + (f' and {len(paths) - 1} more' if len(paths) > 1 else '')
    else:
        passages, total, source = dataset_passages(), DATASET_BYTES, DATASET
    write_passages(folder, vocabulary, reported(passages, total, say), source, given.has('overwrite'))
    say(summary(load_corpus(NAME, root)))
