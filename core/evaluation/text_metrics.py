"""How good generated text is: metrics of texts alone, each with an interval over the texts.

No single figure is enough. A text that repeats common phrases has few bits under a reference model. Noise has a high
entropy. So both are reported together, with repetition, copies from the training text, and controls
(core/evaluation/written_samples.py).

    reference_bits           bits per character under a causal model that shares no data with the generator
    entropy_1 .. entropy_5   entropy in nats of the texts' n-grams of 1 to 5 characters (plug-in estimate)
    divergence_1 .. _5       Jensen-Shannon divergence in nats (0 to ln 2) of these n-grams from held-out text
    distinct_1 .. _5         number of different n-grams, divided by the number of all n-grams
    known_words              share of words that occur in the training text
    copied_span              length in characters of the longest span from the training text, mean over the texts
    repetition               share of 4-grams that occur earlier in the same text

Plug-in entropy and distinct n-grams depend on the amount of text: a small sample cannot show rare n-grams. Divergence
is above 0 even for real text. So compare figures only between samples of equal number and length, and with real text of
the same size.

Letters: N texts, P n-grams of all texts, K kinds of n-gram, R half-samples.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from core.common.drawing import allowed_ids
from core.common.errors import UserError
from core.common.randomness import keyed
from core.common.timing import TimingAccumulator
from core.data.corpus import Corpus
from core.data.vocabulary import Vocabulary
from core.evaluation.copied_spans import CopyIndex, code_points
from core.sampling.generation import score_confidence
from core.sampling.network import Network
from model import GPT

SIZES = (1, 2, 3, 4, 5)  # characters of the n-grams
REPEATED = 4  # characters of the n-grams whose repetition is counted
FEWEST_TEXTS = 8  # an interval over fewer says nothing
REPLICATES = 400
_INDEXED = 2**25  # words and copies are looked up in at most so many training tokens
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_ROWS = 64  # texts that the reference model reads at once


# Estimates and their intervals --------------------------------------------------------------------------------------

class Estimate(NamedTuple):
    """A figure and its 95 % interval over the texts."""

    value: float
    low: float
    high: float


Statistic = Callable[[np.ndarray], np.ndarray]  # how often each text counts, int64 [R, N] -> the figure, float64 [R]


def bootstrap(statistic: Statistic, texts: int, seed: int, replicates: int = REPLICATES) -> Estimate:
    """The figure of all N `texts`, and its interval from `replicates` half-samples. UserError for fewer than 8 texts.

    A resample with replacement holds some texts twice, and their number varies. Entropies and distinct n-grams then
    vary several times as much as from sample to sample. So each half-sample takes r = N // 2 texts without replacement.
    The interval is the figure plus deviations from the half-samples' mean, times sqrt(r / (N - r)) (delete-d jackknife,
    Shao and Wu 1989, eq. 2.2, with quantiles instead of a normal distribution).
    """
    if texts < FEWEST_TEXTS:
        raise UserError(f'{texts} texts are too few for an interval: give at least {FEWEST_TEXTS} (num_samples)')
    half = texts // 2
    weights = (np.random.default_rng(seed).random((replicates, texts)).argsort(1) < half).astype(np.int64)  # [R, N]
    value, values = float(statistic(np.ones((1, texts), dtype=np.int64))[0]), statistic(weights)
    values = values[np.isfinite(values)]
    if not len(values):
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(values - values.mean(), (0.025, 0.975)) * math.sqrt(half / (texts - half))
    return Estimate(value, value + float(low), value + float(high))


def ratio_of_sums(numerators: np.ndarray, denominators: np.ndarray) -> Statistic:
    """Sum of `numerators` [N] divided by sum of `denominators` [N]; NaN if the latter is 0."""
    def statistic(weights: np.ndarray) -> np.ndarray:
        below = (weights @ denominators).astype(np.float64)
        return np.divide(weights @ numerators, below, out=np.full(len(weights), np.nan), where=below > 0)

    return statistic


# n-grams ------------------------------------------------------------------------------------------------------------

class Grams(NamedTuple):
    """All n-grams that lie within one text. kind int64 [P]: in 0 .. K - 1. text int64 [P]: the index of its text.
    first int64 [K]: a place of each kind in the characters of all texts joined."""

    kind: np.ndarray
    text: np.ndarray
    first: np.ndarray

    def counts(self, weights: np.ndarray) -> np.ndarray:
        """float64 [K]: how often each kind occurs when text i counts weights[i] times."""
        return np.bincount(self.kind, weights=weights[self.text], minlength=len(self.first))


class Texts:
    """Texts, and what several metrics need of them."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = list(texts)
        self.codes = code_points(''.join(self.texts))  # [characters]
        self.lengths = np.array([len(text) for text in self.texts], dtype=np.int64)  # [N]

    @cached_property
    def grams(self) -> dict[int, Grams]:
        """The n-grams of every size in `SIZES`."""
        text = np.repeat(np.arange(len(self.texts)), self.lengths)
        left = np.repeat(self.lengths.cumsum(), self.lengths) - np.arange(len(text))  # characters to the text's end
        letters, letter = np.unique(self.codes, return_inverse=True)
        named, found = letter, {}  # a number for the n-gram at each place
        for size in SIZES:
            if size > 1:
                named = np.unique(named[:-1] * len(letters) + letter[size - 1:], return_inverse=True)[1]
            places = np.flatnonzero(left[:len(named)] >= size)
            _, first, kind = np.unique(named[places], return_index=True, return_inverse=True)
            found[size] = Grams(kind, text[places], places[first])
        return found


class GramTable:
    """How often each n-gram of a long text occurs in it."""

    def __init__(self, text: str) -> None:
        self._letters, letter, counts = np.unique(code_points(text), return_inverse=True, return_counts=True)
        self._keys, self._counts, named = {}, {1: counts}, letter
        for size in SIZES[1:]:
            keys = named[:-1] * len(self._letters) + letter[size - 1:]
            self._keys[size], named, self._counts[size] = np.unique(keys, return_inverse=True, return_counts=True)

    def shares(self, texts: Texts, size: int) -> np.ndarray:
        """float64 [K]: the share of each kind of n-gram of `texts` among all n-grams of the table's text."""
        codes, first = texts.codes, texts.grams[size].first
        name = _find(self._letters, codes[first])
        for length in range(2, size + 1):
            letter = _find(self._letters, codes[first + length - 1])
            key = np.where((name >= 0) & (letter >= 0), name * len(self._letters) + letter, -1)
            name = _find(self._keys[length], key)
        counts = np.append(self._counts[size], 0)  # place -1: n-grams that the text does not have
        return counts[name] / max(1, counts.sum())


def _find(table: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int64: the place of each wanted value in a sorted table; -1 if the table lacks it."""
    if not len(table):
        return np.full(len(wanted), -1)
    place = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return np.where(table[place] == wanted, place, -1)


def _per_resample(figure: Callable[[np.ndarray], float]) -> Statistic:
    """The statistic that computes `figure` for each vector of weights [N]."""
    return lambda weights: np.array([figure(row) for row in weights])


def entropy(texts: Texts, size: int) -> Statistic:
    """Plug-in entropy in nats of the texts' n-grams, H = - sum of p ln p."""
    grams = texts.grams[size]

    def figure(weights: np.ndarray) -> float:
        counts = grams.counts(weights)
        p = counts[counts > 0] / max(1, counts.sum())
        return float(-(p * np.log(p)).sum())

    return _per_resample(figure)


def divergence(texts: Texts, size: int, held_out: GramTable) -> Statistic:
    """Jensen-Shannon divergence in nats between the texts' n-grams p and the held-out ones q (Lin 1991, eq. 4.1 with
    equal weights): (KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2. n-grams that only q has add q ln 2 / 2 each."""
    grams, q = texts.grams[size], held_out.shares(texts, size)

    def figure(weights: np.ndarray) -> float:
        counts = grams.counts(weights)
        p = counts / max(1, counts.sum())
        m = (p + q) / 2
        parts = np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(m > 0, m, 1)), 0.0)
        parts += np.where(q > 0, q * np.log(np.where(q > 0, q, 1) / np.where(m > 0, m, 1)), 0.0)
        return float(parts.sum() + (1 - q.sum()) * math.log(2)) / 2

    return _per_resample(figure)


def distinct(texts: Texts, size: int) -> Statistic:
    """Number of different n-grams, divided by the number of all n-grams (distinct-n, Li et al. 2016)."""
    grams = texts.grams[size]
    return _per_resample(lambda weights: float((counts := grams.counts(weights)).astype(bool).sum()
                                               / max(1, counts.sum())))


def repetition(texts: Texts) -> Statistic:
    """Share of 4-grams that occur earlier in the same text."""
    grams = texts.grams[REPEATED]
    own = np.unique(grams.text * max(1, len(grams.first)) + grams.kind) // max(1, len(grams.first))
    total = np.bincount(grams.text, minlength=len(texts.texts))
    return ratio_of_sums(total - np.bincount(own, minlength=len(texts.texts)), total)


# Words and copies ---------------------------------------------------------------------------------------------------

def words_of(text: str) -> list[str]:
    """Words in lower case: letters, with apostrophes inside."""
    return [word.lower() for word in _WORD.findall(text)]


def whole_words_of(text: str) -> list[str]:
    """Words that do not touch either end of `text`, where a window may have cut them."""
    return [found.group().lower() for found in _WORD.finditer(text) if found.start() > 0 and found.end() < len(text)]


def known_words(texts: Texts, vocabulary: frozenset[str]) -> Statistic:
    """Share of whole words that are in `vocabulary`."""
    found = [whole_words_of(text) for text in texts.texts]
    known = np.array([sum(word in vocabulary for word in words) for words in found])
    return ratio_of_sums(known, np.array([len(words) for words in found]))


def copied_span(texts: Texts, copies: CopyIndex) -> Statistic:
    """Length in characters of each text's longest span that occurs in the training text; the mean over the texts."""
    return ratio_of_sums(copies.longest(texts.texts), np.ones(len(texts.texts), dtype=np.int64))


# The reference model ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Reference:
    """A causal model that scores any text. It encodes the text with its own vocabulary."""

    model: GPT
    vocabulary: Vocabulary

    def nats(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Negative log-likelihood in nats and number of characters scored, float64 and int64 [N].

        Each token except the first of a text is scored once, given the tokens before it: at most a block, and at least
        half a block if there are so many. UserError if the vocabulary lacks a character.
        """
        ids = [self.vocabulary.encode_array(text) for text in texts]
        nats = np.zeros(len(texts))
        order = sorted(range(len(texts)), key=lambda index: len(ids[index]))  # texts of similar length go together
        device = next(self.model.parameters()).device
        allowed = allowed_ids(self.model.config.vocab_size, self.vocabulary.base_size, device)
        network = Network(self.model, TimingAccumulator(device))
        for start in range(0, len(order), _ROWS):
            rows = order[start:start + _ROWS]
            length = max(len(ids[row]) for row in rows)
            tokens = torch.zeros(len(rows), length, dtype=torch.int64)
            for index, row in enumerate(rows):
                tokens[index, :len(ids[row])] = torch.from_numpy(ids[row])
            beyond = torch.arange(length) >= torch.tensor([len(ids[row]) for row in rows])[:, None]  # [B, L]
            if length > 1:
                scored = score_confidence(network, tokens.to(device), beyond.to(device), allowed,
                                          keyed(0, 0, 0, len(rows), device), 1)
                nats[rows] = -scored.total.cpu().numpy()
        first = [len(self.vocabulary.decode(one[:1].tolist())) for one in ids]
        return nats, np.array([max(0, len(text) - skipped) for text, skipped in zip(texts, first)], dtype=np.int64)


def reference_bits(texts: Texts, reference: Reference) -> Statistic:
    """Bits per character under the reference model. The first token of each text is not scored."""
    nats, characters = reference.nats(texts.texts)
    return ratio_of_sums(nats / math.log(2), characters)


def reference_doubts(texts: Sequence[str], reference_text: CopyIndex) -> list[str]:
    """A warning if the reference model was trained on the texts themselves, so that it knows them by heart."""
    lengths = np.array([len(text) for text in texts])
    copied = reference_text.longest(texts) * 2 > lengths
    if not copied.any():
        return []
    return [f'the reference model was trained on more than half of the length of {copied.sum()} of {len(texts)} '
            f'texts, so its bits are too low for them; score other text, or train the '
            f'reference model on a split that they do not come from']


# All metrics --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Yardstick:
    """What texts are compared with. Without a reference model there are no reference bits."""

    held_out: GramTable
    words: frozenset[str]
    copies: CopyIndex
    reference: Reference | None = None


def make_yardstick(corpus: Corpus, held_out: str = 'val', reference: Reference | None = None) -> Yardstick:
    """N-grams from the split `held_out`, words and copies from the training text; at most 2^25 tokens of each."""
    def text_of(split: str) -> str:
        return corpus.vocabulary.decode(corpus.tokens(split)[:_INDEXED].tolist())

    train = text_of('train')
    return Yardstick(GramTable(text_of(held_out)), frozenset(words_of(train)), CopyIndex(train), reference)


class TextMetric(NamedTuple):
    """unit: of the figure; make: the statistic of texts against a yardstick."""

    unit: str
    make: Callable[[Texts, Yardstick], Statistic]


METRICS: dict[str, TextMetric] = {
    'reference_bits': TextMetric('bits/character', lambda texts, yardstick: reference_bits(
        texts, yardstick.reference)),
    **{f'entropy_{size}': TextMetric('nats', lambda texts, _, size=size: entropy(texts, size)) for size in SIZES},
    **{f'divergence_{size}': TextMetric('nats', lambda texts, yardstick, size=size: divergence(
        texts, size, yardstick.held_out)) for size in SIZES},
    **{f'distinct_{size}': TextMetric('share', lambda texts, _, size=size: distinct(texts, size))
       for size in SIZES},
    'known_words': TextMetric('share', lambda texts, yardstick: known_words(texts, yardstick.words)),
    'copied_span': TextMetric('characters', lambda texts, yardstick: copied_span(texts, yardstick.copies)),
    'repetition': TextMetric('share', lambda texts, _: repetition(texts)),
}


def measure_texts(texts: Sequence[str], yardstick: Yardstick, seed: int,
                  replicates: int = REPLICATES) -> dict[str, Estimate]:
    """Every metric of `METRICS` with its interval. UserError if a text has fewer than 5 characters."""
    if not texts or min(map(len, texts)) < max(SIZES):
        raise UserError(f'the shortest of {len(texts)} texts has {min(map(len, texts), default=0)} characters, but '
                        f'metrics need at least {max(SIZES)}: generate longer texts (sequence_length)')
    held = Texts(texts)
    return {name: bootstrap(metric.make(held, yardstick), len(texts), seed, replicates)
            for name, metric in METRICS.items() if name != 'reference_bits' or yardstick.reference is not None}
