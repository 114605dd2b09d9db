"""How varied text is, window by window, so that any number of samples can be compared with their corpus.

A window has two figures. The entropy of its bigrams, in nats, rises if the temperature is too high. The share of its
4-grams that occur earlier in the window rises if the text repeats itself. core/evaluation/text_metrics.py measures all
texts together, so its figures compare only samples of equal size.

Letters: N windows, L tokens of a window.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from core.data.corpus import Corpus

WINDOWS = 256  # of the corpus
BIGRAM, REPEATED = 2, 4  # characters


class Spread(NamedTuple):
    """Mean and standard deviation over windows."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class TextFigures:
    """Figures of windows of `length` tokens. entropy: in nats. repetition: in 0 .. 1."""

    length: int
    entropy: Spread
    repetition: Spread

    def to_builtins(self) -> dict[str, object]:
        """Built-in values, for a checkpoint."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_builtins(cls, kept: object) -> 'TextFigures | None':
        """The figures from the values of `to_builtins`; None for any other value."""
        match kept:
            case {'length': int(length), 'entropy': [float(a), float(b)], 'repetition': [float(c), float(d)]} if \
                    length > 0 and all(map(math.isfinite, (a, b, c, d))):
                return cls(length, Spread(a, b), Spread(c, d))
        return None


def _grams(text: str, size: int) -> list[str]:
    return [text[start:start + size] for start in range(len(text) - size + 1)]


def bigram_entropy(text: str) -> float:
    """Plug-in entropy in nats, - sum of p ln p, of the pairs of characters in `text`; 0 if there are none."""
    counts = Counter(_grams(text, BIGRAM))
    return -sum(count / counts.total() * math.log(count / counts.total()) for count in counts.values())


def repeated_share(text: str) -> float:
    """Share of the 4-grams of `text` that occur earlier in it; 0 if there are none."""
    grams = _grams(text, REPEATED)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def figures_of(windows: Sequence[str], length: int) -> TextFigures:
    """Figures of the texts of N windows of `length` tokens, N at least 1."""
    columns = ([measure(window) for window in windows] for measure in (bigram_entropy, repeated_share))
    return TextFigures(length, *(Spread(float(np.mean(column)), float(np.std(column))) for column in columns))


def corpus_figures(corpus: Corpus, length: int, split: str = 'train') -> TextFigures | None:
    """Figures of windows of `length` tokens, spread evenly over a split. None if it is shorter than two windows."""
    tokens = corpus.tokens(split)
    count = min(WINDOWS, len(tokens) // length)
    if count < 2:
        return None
    starts = np.linspace(0, len(tokens) - length, count).astype(np.int64)
    return figures_of([corpus.vocabulary.decode(tokens[start:start + length].tolist()) for start in starts], length)


def windows_of(rows: Sequence[Sequence[int]], length: int, decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The texts of the whole windows of `length` tokens in each of `rows`."""
    return [decode(row[start:start + length]) for row in rows for start in range(0, len(row) - length + 1, length)]
