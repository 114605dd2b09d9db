"""Choices by score: the plain ones where scores differ, by the key where they do not, and none that rounding turns."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from core.common.choosing import computing_tolerance, highest_positions, tie_tolerance
from core.common.drawing import allowed_log_probabilities

TOLERANCE = 1e-3


def choose(scores, keys, eligible, count, tolerance=TOLERANCE):
    """The chosen positions of one row."""
    found = highest_positions(torch.tensor([scores], dtype=torch.float64), torch.tensor([keys]),
                              torch.tensor([eligible]), torch.tensor([[count]]), tolerance)
    return set(found[0].nonzero().squeeze(1).tolist())


def borders_missed_by(scores, eligible, count):
    """How far the nearest score is from the two borders that a choice has."""
    inside = sorted((score for score, may in zip(scores, eligible) if may), reverse=True)
    if not 0 < count <= len(inside):
        return math.inf
    cut = inside[count - 1]
    return min(abs(abs(score - cut) - TOLERANCE) for score in inside)


rows = st.integers(1, 12).flatmap(lambda length: st.tuples(
    st.lists(st.integers(-6, 6), min_size=length, max_size=length),
    st.permutations(range(length)), st.lists(st.booleans(), min_size=length, max_size=length),
    st.integers(0, length + 1), st.integers(0, 2 ** 31)))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows)
def test_scores_far_apart_are_taken_in_their_order_and_equal_ones_by_their_keys(row):
    scores, keys, eligible, count, _ = row
    order = sorted((place for place in range(len(scores)) if eligible[place]),
                   key=lambda place: (-scores[place], keys[place]))
    for tolerance in (0, TOLERANCE):
        assert choose(scores, keys, eligible, count, tolerance) == set(order[:count])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(rows, st.sampled_from([0.0, 0.3, 0.9, 1.0, 40.0]))
def test_noise_changes_a_choice_only_where_a_score_lies_at_a_border(row, spacing):
    """With equal scores, with scores that are almost as far apart as the tolerance, and with others."""
    levels, keys, eligible, count, seed = row
    scores = [spacing * TOLERANCE * level for level in levels]
    noise = TOLERANCE / 50
    shifts = (2 * torch.rand(len(scores), generator=torch.Generator().manual_seed(seed)) - 1) * noise
    moved = [score + shift for score, shift in zip(scores, shifts.tolist())]
    before, after = (choose(values, keys, eligible, count) for values in (scores, moved))
    assert len(after) == min(count, sum(eligible))
    assert before == after or borders_missed_by(scores, eligible, count) <= 2 * noise
    if spacing in (0.0, 0.3, 40.0):  # no difference of these levels is near the tolerance
        assert before == after


def test_the_lowest_key_wins_among_equal_scores_whatever_their_rounding():
    rounding = [3e-8, 0.0, 9e-8, 5e-8]
    assert choose(rounding, [0.4, 0.3, 0.9, 0.1], [True] * 4, 2) == {1, 3}
    assert choose(rounding, [0.4, 0.3, 0.9, 0.1], [True, False, True, False], 1) == {0}
    assert choose([1.0, *rounding], [0.9, 0.4, 0.3, 0.9, 0.1], [True] * 5, 2) == {0, 4}
    assert choose(rounding, [0.4, 0.3, 0.9, 0.1], [True] * 4, 2, 0) == {2, 3}


def test_infinite_scores_and_scores_that_are_no_numbers_leave_the_count_as_it_is():
    for scores in ([math.nan] * 3, [math.inf, math.nan, 0.0], [-math.inf, 0.0, 1.0], [-math.inf] * 3):
        for count in range(4):
            assert len(choose(scores, [2, 0, 1], [True] * 3, count)) == count


def test_the_tolerance_is_that_of_the_computing_type():
    assert tie_tolerance(torch.float32) == pytest.approx(3.45e-4, rel=1e-2)
    assert computing_tolerance(torch.zeros(1, dtype=torch.float64)) == pytest.approx(1.49e-8, rel=1e-2)
    with torch.autocast('cpu', torch.bfloat16):
        assert computing_tolerance(torch.zeros(1)) == pytest.approx(0.0884, rel=1e-2)


@pytest.mark.parametrize('rule, kept', [({'temperature': 0}, [1]), ({'top_k': 2}, [1, 3]), ({'top_p': 0.5}, [1, 3]),
                                        ({'top_p': 0.4, 'temperature': 0.5}, [1, 3]), ({'top_k': 3}, [1, 3, 4])])
def test_of_equally_probable_ids_the_lowest_come_out_whatever_their_rounding(rule, kept):
    """Four ids of a quarter each, and one that is less probable."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.tensor([-20.0, 2, -20, 2, 2, 2]) + 1e-6 * torch.randn(50, 6, generator=generator)
    found = allowed_log_probabilities(logits, torch.ones(6, dtype=torch.bool), **rule)
    assert found.isfinite().equal((torch.arange(6)[:, None] == torch.tensor(kept)).any(1).expand(50, 6))
    torch.testing.assert_close(found[:, kept].exp(), torch.full((50, len(kept)), 1 / len(kept), dtype=torch.float64),
                               rtol=0, atol=1e-5)


def test_a_broken_network_shows_whatever_the_rule():
    broken = torch.tensor([[0.0, math.nan, 1.0]])
    for rule in ({}, {'temperature': 0}, {'top_k': 1}, {'top_p': 0.5}):
        assert allowed_log_probabilities(broken, torch.ones(3, dtype=torch.bool), **rule).isnan().all()
