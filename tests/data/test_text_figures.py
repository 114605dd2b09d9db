"""Figures of windows: against counts by hand and against the measures of evaluate.py."""

import math

import numpy as np
import pytest

from core.data.text_figures import (TextFigures, bigram_entropy, corpus_figures, figures_of, repeated_share, windows_of)
from core.evaluation.text_metrics import Texts, entropy, repetition


def test_figures_by_hand():
    assert bigram_entropy('abab') == pytest.approx(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    assert repeated_share('abcdabcd') == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd
    assert bigram_entropy('a') == 0 == repeated_share('abc')


def test_of_one_text_they_are_what_evaluate_measures():
    text = ''.join(np.random.default_rng(0).choice(list('ab cd'), 300))
    one = np.ones((1, 1), dtype=np.int64)
    assert bigram_entropy(text) == pytest.approx(entropy(Texts([text]), 2)(one)[0])
    assert repeated_share(text) == pytest.approx(repetition(Texts([text]))(one)[0])


def test_mean_and_deviation_over_windows():
    found = figures_of(['aaaaa', 'abcde'], 5)  # entropies 0 and ln 4, repetition 1/2 and 0
    assert found.entropy == pytest.approx((math.log(4) / 2, math.log(4) / 2))
    assert found.repetition == pytest.approx((0.25, 0.25)) and found.length == 5


def test_windows_are_whole_and_do_not_overlap():
    assert windows_of([list('abcdefg'), list('hi')], 3, ''.join) == ['abc', 'def']


def test_a_corpus_gives_the_figures_of_its_windows(small_corpus):
    found, tokens = corpus_figures(small_corpus, 32), small_corpus.tokens('train')
    every = figures_of(windows_of([tokens.tolist()], 32, small_corpus.vocabulary.decode), 32)
    assert found.entropy.mean == pytest.approx(every.entropy.mean, rel=0.05)
    assert found.repetition.mean == pytest.approx(every.repetition.mean, rel=0.3, abs=0.02)
    assert corpus_figures(small_corpus, len(tokens) // 2 + 1) is None


def test_what_a_checkpoint_keeps_comes_back_and_anything_else_is_nothing():
    figures = figures_of(['abcde', 'aabbc'], 5)
    assert TextFigures.from_builtins(figures.to_builtins()) == figures
    kept = figures.to_builtins()
    for broken in (None, {}, {**kept, 'length': 0}, {**kept, 'entropy': [1.0]}, {**kept, 'repetition': [math.nan, 1.0]}):
        assert TextFigures.from_builtins(broken) is None
