"""Draws of tokens: distributions after temperature and cuts, exactness of the draw, and what is told about it."""

import math

import pytest
import torch

from core.common.drawing import (DrawRule, allowed_ids, allowed_log_probabilities, draw, draw_tokens, nucleus,
                                 penalise_repetition, revealed_ids)

ALLOWED = allowed_ids(6, 4)
LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 9.0, 9.0]], dtype=torch.float64)


def softmax(values):
    total = sum(map(math.exp, values))
    return [math.exp(value) / total for value in values]


@pytest.mark.parametrize('temperature, top_k, top_p, kept', [
    (1.0, None, 1.0, 4), (0.5, None, 1.0, 4), (1.0, 2, 1.0, 2), (2.0, 3, 1.0, 3), (1.0, None, 0.7, 2),
    (0.25, None, 0.7, 1)])
def test_the_distribution_is_that_of_the_formula(temperature, top_k, top_p, kept):
    """Of the four allowed ids; special ids never come out though their logits are the highest."""
    found = allowed_log_probabilities(LOGITS, ALLOWED, temperature, top_k, top_p)[0].exp().tolist()
    expected = softmax([value / temperature for value in (2, 1, 0, -1)][:kept])
    assert found == pytest.approx([*expected, *[0.0] * (6 - kept)])


def test_temperature_zero_takes_the_best_and_the_lowest_of_equal_ids():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 9.0, 9.0]])
    drawn = draw(logits, DrawRule(ALLOWED, temperature=0.0), torch.tensor([0.999], dtype=torch.float64))
    assert drawn.tokens.tolist() == [1] and drawn.log_probabilities.tolist() == [0.0]
    assert drawn.confidence.item() == pytest.approx(math.log(softmax([3, 1, 3, 0])[0]))


def test_a_draw_is_the_inverse_of_the_distribution_function():
    chances = allowed_log_probabilities(LOGITS, ALLOWED)[0].exp()
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    tokens = draw_tokens(chances.log().expand(10_000, 6), uniform)
    assert (tokens.diff() >= 0).all()
    assert (torch.bincount(tokens, minlength=6) / 10_000 - chances).abs().max() < 1.01e-4
    assert draw_tokens(torch.tensor([[-math.inf, 0.0, -math.inf]]).double(), torch.tensor([1e-12]).double()).item() == 1


def test_confidence_is_the_models_own_whatever_the_rule():
    rule, uniform = DrawRule(ALLOWED, temperature=0.5, top_k=2), torch.tensor([0.01, 0.99], dtype=torch.float64)
    drawn = draw(LOGITS.expand(2, 6), rule, uniform)
    assert drawn.tokens.tolist() == [0, 1]
    assert drawn.log_probabilities.exp().tolist() == pytest.approx(softmax([4, 2]))
    assert drawn.confidence.exp().tolist() == pytest.approx(softmax([2, 1, 0, -1])[:2])


def test_the_nucleus_is_the_smallest_set_that_holds_the_share():
    chances = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    for top_p, kept in ((0.3, [1]), (0.41, [1, 3]), (0.71, [1, 2, 3]), (0.95, [0, 1, 2, 3])):
        found = nucleus(chances.log()[None], top_p, 1e-9)[0].exp()
        assert found.nonzero().squeeze(1).tolist() == kept and found.sum().item() == pytest.approx(1)


def test_repetition_makes_seen_ids_less_likely_whatever_their_sign():
    seen = revealed_ids(torch.tensor([[0, 3, 5, 0]]), 6, 5)
    assert seen.tolist() == [[True, False, False, True, False, False]]
    assert penalise_repetition(LOGITS, seen, 2.0)[0, :4].tolist() == [1.0, 1.0, 0.0, -2.0]
