"""The user's text file in the tokens of a pretrained model, for evaluation and for training a head.

Letters: W windows, T window length.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.common.errors import UserError
from core.data.corpus import Corpus
from core.data.text_files import text_blocks, text_paths
from core.pretrained.vocabulary import TokenizerVocabulary

LONGEST_TEXT = 100_000_000  # characters
USUAL_WINDOW = 128  # tokens of a window of running text if no length is given


class TextTokens(NamedTuple):
    """A text in tokens. ids int64 [tokens]. stride: windows of `length` tokens begin at its multiples. It is 1 in
    running text, and `length` if each line is a separate text. said: lines to print about the text."""

    ids: np.ndarray
    length: int
    stride: int
    said: list[str]

    @property
    def windows(self) -> int:
        """The number of windows. Overlapping windows of running text count too."""
        return (len(self.ids) - self.length) // self.stride + 1

    def spread(self, count: int) -> np.ndarray:
        """int64 [W, T]: `count` windows spread evenly over the text."""
        starts = np.linspace(0, self.windows - 1, count).astype(np.int64) * self.stride
        return self.ids[starts[:, None] + np.arange(self.length)]

    def parted(self, share: float) -> tuple['TextTokens', 'TextTokens']:
        """The text without its last part, and that part: `share` of the tokens, but at least one window."""
        last = max(self.length, int(len(self.ids) * share) // self.stride * self.stride)
        return self._replace(ids=self.ids[:-last]), self._replace(ids=self.ids[-last:])


def read_text(name: str, vocabulary: TokenizerVocabulary, longest: int, length: int | None) -> TextTokens:
    """The tokens of the text file `name` for a model that reads `longest` tokens at once, in windows of `length`.

    If the vocabulary has no line break, as in protein models, each line is a separate text. Its first `length` tokens
    are used, and shorter lines are left out. Without `length` the shortest line sets it. UserError if the model cannot
    read the text.
    """
    path, = text_paths([name])
    text = ''.join(text_blocks(path))
    if len(text) > LONGEST_TEXT:
        raise UserError(f'text_file {name} has {len(text):,} characters, but at most {LONGEST_TEXT:,} are read; give a '
                        f'part of it')
    if length is not None and length > longest:
        raise UserError(f'window_length is {length}, but the model reads at most {longest} tokens at once; lower it')
    if vocabulary.has_line_breaks:
        ids, length = vocabulary.encode_array(text), length or min(USUAL_WINDOW, longest)
        if len(ids) < length:
            raise UserError(f'text_file {name} has {len(ids)} tokens, but a window has {length}; give a longer text or '
                            f'a smaller window_length')
        return TextTokens(ids, length, 1, [f'{name}: {len(ids)} tokens, windows of {length}'])
    lines = [line for line in text.splitlines() if line]
    if not lines:
        raise UserError(f'text_file {name} has no lines; give a text a line')
    length = length or min(longest, min(map(len, lines)))
    rows = [vocabulary.encode_array(line)[:length] for line in lines if len(line) >= length]
    if not rows:
        raise UserError(f'text_file {name} has no line of {length} characters; lower window_length')
    short = len(lines) - len(rows)
    return TextTokens(np.concatenate(rows), length, length, [
        f'{name}: {len(rows)} lines, each a text of its own, cut to {length} tokens'
        + (f'; {short} shorter ones are left out' if short else '')])


def text_corpus(name: str, tokens: np.ndarray, vocabulary: TokenizerVocabulary) -> Corpus:
    """Windows int64 [W, T] of a text file as a corpus. Each of its splits holds all windows."""
    text = [vocabulary.decode(row) for row in tokens.tolist()]
    ids = tokens.astype(np.uint32).flatten()
    ids.flags.writeable = False
    counts = {'sizes': ids.size, 'characters': sum(map(len, text)),
              'utf8_bytes': sum(len(one.encode()) for one in text)}
    path = Path(name)
    return Corpus(name=path.name, folder=path.parent, vocabulary=vocabulary, dtype='uint32', source=name,
                  data_hash=hashlib.sha256(ids.tobytes()).hexdigest(), opened={'train': ids, 'val': ids},
                  **{key: {'train': count, 'val': count} for key, count in counts.items()})
