"""The longest span that a text copies from another text, exactly, by a suffix array.

Letters: n characters of the indexed text, Q query positions, L characters of a query.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_CHUNK = 1 << 22  # most characters compared at once
_END = -1  # after the end of the indexed text; a query has another end sign, so that the two never match
_QUERY_END = -2


def code_points(text: str) -> np.ndarray:
    """int32 [characters]: the Unicode code points of `text`."""
    return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype=np.int32)


def suffix_array(codes: np.ndarray) -> np.ndarray:
    """int64 [n]: the starts of the suffixes of `codes` in lexicographic order; a prefix of another suffix comes first.

    Prefix doubling: each pass sorts only the suffixes that are still tied (Larsson and Sadakane 2007). The first pass
    compares as many characters as fit into 63 bits. This separates nearly all suffixes of ordinary text.
    """
    n = len(codes)
    kinds, dense = np.unique(codes, return_inverse=True)
    base, width = len(kinds) + 1, 1
    keys = dense.astype(np.int64) + 1  # 0 means: after the end
    while width < n and base ** (width * 2) < 2 ** 63:
        keys = keys * base ** width + np.append(keys[width:], np.zeros(min(width, n), dtype=np.int64))
        width *= 2
    order = np.argsort(keys, kind='stable')
    rank, tied = _ranked(keys[order], np.arange(n))
    ranks = np.empty(n, dtype=np.int64)
    ranks[order] = rank
    while len(tied):
        starts = order[tied]
        after = starts + width
        following = np.where(after < n, ranks[np.minimum(after, n - 1)] + 1, 0)
        keys = ranks[starts] * (n + 1) + following
        inner = np.argsort(keys, kind='stable')
        order[tied] = starts[inner]
        rank, still_tied = _ranked(keys[inner], tied)
        ranks[order[tied]] = rank
        tied, width = still_tied, width * 2
    return order


def _ranked(keys: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks and tied slots of sorted keys at `slots` of the array. A key's rank is the first slot of its group."""
    first = np.append(True, keys[1:] != keys[:-1])
    rank = slots[np.maximum.accumulate(np.where(first, np.arange(len(keys)), 0))]
    alone = first & np.append(first[1:], True)
    return rank, slots[~alone]


@dataclass(frozen=True)
class CopyIndex:
    """A text in which spans can be looked up."""

    text: str

    @cached_property
    def _codes(self) -> np.ndarray:
        return code_points(self.text)

    @cached_property
    def _order(self) -> np.ndarray:
        return suffix_array(self._codes)

    def longest(self, texts: Sequence[str]) -> np.ndarray:
        """int64 [texts]: the length in characters of the longest span that each text shares with the indexed text."""
        found = np.zeros(len(texts), dtype=np.int64)
        for index, text in enumerate(texts):
            codes = code_points(text)
            step = max(1, _CHUNK // max(1, len(codes)))
            for first in range(0, len(codes) if len(self._codes) else 0, step):
                found[index] = max(found[index], self._matches(codes, first, min(first + step, len(codes))).max())
        return found

    def _matches(self, codes: np.ndarray, first: int, stop: int) -> np.ndarray:
        """int64 [Q]: length of the longest span that starts at each position first .. stop - 1 of `codes` and occurs in
        the indexed text."""
        L = len(codes) - first
        queries = np.lib.stride_tricks.sliding_window_view(
            np.append(codes[first:], np.full(L, _QUERY_END, dtype=codes.dtype)), L)[:stop - first]  # [Q, L]
        low = np.zeros(len(queries), dtype=np.int64)
        high = np.full(len(queries), len(self._order))
        best = np.zeros(len(queries), dtype=np.int64)
        while (low < high).any():  # bisects to the place of each query in the order; its neighbours share most with it
            middle = np.minimum((low + high) // 2, len(self._order) - 1)
            agreed, smaller = self._compare(queries, middle)
            open_ = low < high
            best = np.maximum(best, np.where(open_, agreed, 0))
            low, high = np.where(open_ & smaller, middle + 1, low), np.where(open_ & ~smaller, middle, high)
        return best

    def _compare(self, queries: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Characters that each query [Q, L] shares with the suffix at its slot [Q]; whether the suffix is smaller."""
        places = self._order[slots][:, None] + np.arange(queries.shape[1])  # [Q, L]
        inside = places < len(self._codes)
        suffixes = np.where(inside, self._codes[np.minimum(places, len(self._codes) - 1)], _END)
        differs = suffixes != queries
        agreed = np.where(differs.any(1), differs.argmax(1), queries.shape[1])
        column = np.minimum(agreed, queries.shape[1] - 1)[:, None]
        smaller = np.take_along_axis(suffixes, column, 1) < np.take_along_axis(queries, column, 1)
        return agreed, smaller[:, 0]
