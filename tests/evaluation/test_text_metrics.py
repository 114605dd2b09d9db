"""Sample quality against references made by hand: counting with dictionaries, searching with `in`, enumerating."""

import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.common.errors import UserError
from core.data.vocabulary import Vocabulary
from core.evaluation.copied_spans import CopyIndex, code_points, suffix_array
from core.evaluation.text_metrics import (METRICS, SIZES, GramTable, Reference, Texts, Yardstick, bootstrap,
                                          copied_span, distinct, divergence, entropy, known_words, make_yardstick,
                                          measure_texts, ratio_of_sums, reference_bits, reference_doubts, repetition,
                                          whole_words_of, words_of)
from model import GPT, GPTConfig

LETTERS = st.text('abc \n\u00e9', max_size=12)
SOME = st.lists(LETTERS, min_size=1, max_size=4)


def grams(text, size):
    return [text[start:start + size] for start in range(len(text) - size + 1)]


def weights_of(texts):
    """Each text once, and one resample that leaves the first out and takes the last twice."""
    changed = np.ones(len(texts), dtype=np.int64)
    changed[0], changed[-1] = 0, 2
    return np.stack([np.ones(len(texts), dtype=np.int64), changed])


def counted(texts, weights, size):
    counts = Counter()
    for text, weight in zip(texts, weights):
        for gram in grams(text, size):
            counts[gram] += int(weight)
    return +counts


# n-grams ------------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(SOME, st.text('abcd \n', max_size=40), st.sampled_from(SIZES))
@example(['bc'], 'ab', 2)  # a letter that the held-out text lacks
def test_ngram_metrics_equal_those_of_counted_strings(texts, held_out, size):
    held, table = Texts(texts), GramTable(held_out)
    found = {name: statistic(weights_of(texts)) for name, statistic in (
        ('entropy', entropy(held, size)), ('distinct', distinct(held, size)),
        ('divergence', divergence(held, size, table)))}
    other = Counter(grams(held_out, size))
    for index, weights in enumerate(weights_of(texts)):
        counts = counted(texts, weights, size)
        p = {gram: count / counts.total() for gram, count in counts.items()}
        q = {gram: count / other.total() for gram, count in other.items()}
        assert found['entropy'][index] == pytest.approx(-sum(x * math.log(x) for x in p.values()), abs=1e-12)
        assert found['distinct'][index] == pytest.approx(len(counts) / max(1, counts.total()))
        if p and q:
            m = {gram: (p.get(gram, 0) + q.get(gram, 0)) / 2 for gram in p | q}
            expected = sum(x * math.log(x / m[gram]) for part in (p, q) for gram, x in part.items()) / 2
            assert found['divergence'][index] == pytest.approx(expected, abs=1e-12)


def test_divergence_is_nothing_for_the_same_text_and_ln_2_for_a_strange_one():
    table, one = GramTable('to be or not to be'), np.ones((1, 1), dtype=np.int64)
    for size in SIZES:
        assert divergence(Texts(['to be or not to be']), size, table)(one)[0] == pytest.approx(0, abs=1e-12)
        assert divergence(Texts(['XYZXYZXYZ']), size, table)(one)[0] == pytest.approx(math.log(2))


def test_an_ngram_lies_within_one_text():
    assert counted(['ab', 'cd'], [1, 1], 2) == {'ab': 1, 'cd': 1}  # no 'bc'
    assert np.exp(entropy(Texts(['ab', 'cd']), 2)(np.ones((1, 2), dtype=int)))[0] == pytest.approx(2)


@settings(max_examples=40, deadline=None)
@given(SOME)
def test_repetition_counts_what_the_text_already_had(texts):
    repeated = sum(gram in grams(text, 4)[:place] for text in texts for place, gram in enumerate(grams(text, 4)))
    total = sum(len(grams(text, 4)) for text in texts)
    found = repetition(Texts(texts))(np.ones((1, len(texts)), dtype=np.int64))[0]
    assert found == pytest.approx(repeated / total) if total else math.isnan(found)


def test_repetition_does_not_look_into_other_texts():
    assert repetition(Texts(['the king', 'the king']))(np.ones((1, 2), dtype=np.int64))[0] == 0


# Words and copies ---------------------------------------------------------------------------------------------------

def test_words_and_whole_words():
    assert words_of("O'er the King's  h\u00e9ll, 12 'tis") == ["o'er", 'the', "king's", 'h\u00e9ll', 'tis']
    assert whole_words_of('ing and my kin') == ['and', 'my']  # both ends may be cut
    assert whole_words_of('\nand my king.') == ['and', 'my', 'king'] and whole_words_of('abc') == []


def test_known_words_is_a_share_of_all_whole_words():
    texts = Texts([' to be ornot ', ' qu king ', 'x'])
    found = known_words(texts, frozenset({'to', 'be', 'king'}))
    assert found(np.array([[1, 1, 1], [2, 1, 0], [0, 0, 1]]))[:2] == pytest.approx([3 / 5, 5 / 8])
    assert np.isnan(found(np.array([[0, 0, 1]]))[0])


@settings(max_examples=150, deadline=None)
@given(st.text('ab\u00e9', min_size=1, max_size=60))
@example('a' * 200)
@example('abcdefghij' * 12)
@example('\U0001f600ab' * 5)
def test_the_suffix_array_is_sorted(text):
    codes = code_points(text)
    assert suffix_array(codes).tolist() == sorted(range(len(text)), key=lambda start: text[start:])


@settings(max_examples=150, deadline=None)
@given(st.text('abc', max_size=60), st.lists(st.text('abcd', max_size=20), max_size=3))
@example('abcabc', ['abcabc', 'cabcab', 'xx', ''])
@example('aaaa', ['aaaaaaaa'])
def test_the_longest_copied_span_is_exact(text, queries):
    expected = [max((len(span) for size in range(len(query) + 1) for span in grams(query, size) if span in text),
                    default=0) for query in queries]
    assert CopyIndex(text).longest(queries).tolist() == expected


def test_a_long_text_is_looked_up_in_parts(monkeypatch):
    monkeypatch.setattr('core.evaluation.copied_spans._CHUNK', 100)
    generator = np.random.default_rng(3)
    text, query = (''.join(generator.choice(list('ab'), size)) for size in (400, 90))
    best = max(size for size in range(91) if any(span in text for span in grams(query, size)))
    assert CopyIndex(text).longest([query]).tolist() == [best]
    assert copied_span(Texts([query, 'c']), CopyIndex(text))(np.array([[1, 1]]))[0] == best / 2


# Intervals ----------------------------------------------------------------------------------------------------------

def test_an_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = bootstrap(ratio_of_sums(values, np.ones(400)), 400, seed=1, replicates=4000)
    width = 1.96 * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert found.value - found.low == pytest.approx(width, rel=0.08)
    assert found.high - found.value == pytest.approx(width, rel=0.08)


def test_intervals_of_an_entropy_are_as_wide_as_entropies_differ():
    generator = np.random.default_rng(1)
    words = [f'w{number} ' for number in range(60)]
    drawn, widths = [], []
    for _ in range(150):
        texts = Texts([''.join(generator.choice(words, 8)) for _ in range(17)])
        found = bootstrap(entropy(texts, 3), 17, seed=2, replicates=100)
        drawn.append(found.value)
        widths.append((found.high - found.low) / (2 * 1.96))
    assert np.mean(widths) == pytest.approx(np.std(drawn), rel=0.35)  # with replacement it would be twice that


def test_an_interval_needs_enough_texts_and_follows_from_the_seed():
    statistic = ratio_of_sums(np.arange(9.0), np.ones(9))
    assert bootstrap(statistic, 9, 4) == bootstrap(statistic, 9, 4) != bootstrap(statistic, 9, 5)
    with pytest.raises(UserError, match='7 texts are too few.*at least 8'):
        bootstrap(statistic, 7, 4)


# The reference model ------------------------------------------------------------------------------------------------

def reference(tokens='abcdefgh', block_size=8, kind='characters'):
    vocabulary = Vocabulary(kind, tuple(tokens), r'\w+|\W+' if kind == 'bpe' else '')
    config = GPTConfig(block_size=block_size, vocab_size=vocabulary.size, n_layer=1, n_head=2, n_embd=16,
                       attention_type='causal', mask_token_id=vocabulary.mask_token_id)
    model = GPT(config).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return Reference(model, vocabulary)


def log_probability(reference, ids, position, first):
    """ln p of ids[position] given ids[first:position], by one call without a batch."""
    logits = reference.model(torch.tensor([ids[first:position]])).logits[0, -1, :reference.vocabulary.base_size]
    return float(torch.log_softmax(logits, 0)[ids[position]])


def test_the_reference_scores_every_character_but_the_first_given_what_is_before():
    scorer, texts = reference(), ['abc', 'hgfedcba', 'a']
    nats, characters = scorer.nats(texts)
    for text, found in zip(texts, nats):
        ids = scorer.vocabulary.encode(text)
        assert found == pytest.approx(-sum(log_probability(scorer, ids, place, 0) for place in range(1, len(ids))))
    assert characters.tolist() == [2, 7, 0]
    bits = reference_bits(Texts(texts), scorer)(np.array([[1, 1, 1], [0, 2, 0]]))
    assert bits == pytest.approx([nats.sum() / 9 / math.log(2), nats[1] / 7 / math.log(2)])


def test_a_text_beyond_the_block_is_scored_once_with_half_a_block_of_context():
    scorer, text = reference(), 'abcdefghhgfedcbaabca'  # 20 characters: windows 0-8, 4-12, 8-16, 12-20
    ids = scorer.vocabulary.encode(text)
    expected = -sum(log_probability(scorer, ids, place, 0 if place < 8 else place // 4 * 4 - 4)
                    for place in range(1, 20))
    assert scorer.nats([text])[0][0] == pytest.approx(expected)


def test_the_reference_encodes_text_with_its_own_vocabulary():
    tokens = [bytes([value]) for value in range(256)] + [b'ab']
    scorer = reference(tokens, kind='bpe')
    scorer = Reference(scorer.model, Vocabulary('bpe', tuple(tokens), r'\w+|\W+'))
    nats, characters = scorer.nats(['cab', 'abc'])
    assert characters.tolist() == [2, 1]  # 'c' and then 'ab'; 'ab', which is the first token, and then 'c'
    assert nats[0] == pytest.approx(-log_probability(scorer, [99, 256], 1, 0))
    with pytest.raises(UserError, match="2 kinds of character.*'!' 'z'"):
        reference().nats(['abz!'])


def test_the_reference_model_s_own_training_text_warns():
    known = CopyIndex('the quick brown fox jumps over the lazy dog')
    assert reference_doubts(['a quack', 'quick fox the lazy cow'], known) == []
    (doubt,) = reference_doubts(['quick brown fox', 'nothing of this'], known)
    assert '1 of 2 texts' in doubt and 'trained on' in doubt


# All together -------------------------------------------------------------------------------------------------------

def test_all_metrics_of_a_corpus(small_corpus):
    yardstick = make_yardstick(small_corpus)
    text = small_corpus.vocabulary.decode(small_corpus.tokens('val').tolist())
    texts = [text[start:start + 60] for start in range(0, 600, 60)]
    found = measure_texts(texts, yardstick, seed=1, replicates=20)
    assert set(found) == set(METRICS) - {'reference_bits'}
    assert found['known_words'].value == 1 and found['copied_span'].value > 20
    assert all(one.low - 1e-12 <= one.value <= one.high + 1e-12 for one in found.values())
    train = small_corpus.vocabulary.decode(small_corpus.tokens('train').tolist())
    assert yardstick.words == {word.lower() for word in re.findall('[A-Za-z]+', train)}
    scorer = reference(small_corpus.vocabulary.tokens)
    with_bits = Yardstick(yardstick.held_out, yardstick.words, yardstick.copies, scorer)
    assert measure_texts(texts, with_bits, 1, 20)['reference_bits'].value > 0


def test_texts_too_short_for_ngrams_are_refused(small_corpus):
    with pytest.raises(UserError, match='shortest of 8 texts has 4 characters.*at least 5'):
        measure_texts(['to be'] * 7 + ['king'], make_yardstick(small_corpus), 1)
    with pytest.raises(UserError, match='too few'):
        measure_texts(['to be'] * 7, make_yardstick(small_corpus), 1)
