"""Times, masks and shown neighbours."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from core.common.randomness import keyed
from core.noise import (MINIMUM_TIME, SCHEDULES, SeenNeighbours, apply_mask, draw_exact_mask, draw_mask,
                        low_discrepancy_times, neighbours_shown, shown_neighbours, stratified_mask_counts)
from core.sampler_head import SamplerWindow


def closed_form(name: str, t: float) -> float:
    """alpha(t) as MD4's table has it, written a second time."""
    return {'linear': 1 - t, 'cosine': 1 - math.cos(math.pi / 2 * (1 - t)),
            'geometric': math.exp(-(1e-5 ** (1 - t)) * 20 ** t)}[name]


@pytest.mark.parametrize('name', SCHEDULES)
def test_a_schedule_falls_from_one_to_zero_as_its_formula_says_and_can_be_reversed(name):
    schedule, times = SCHEDULES[name], torch.linspace(0, 1, 1001, dtype=torch.float64)
    alpha = schedule.alpha(times)
    assert alpha.tolist() == pytest.approx([closed_form(name, t) for t in times.tolist()], abs=1e-12)
    assert alpha[0] > 1 - 2e-5 and alpha[-1] < 1e-8 and (alpha.diff() < 0).all()
    inside = times[1:-1]
    torch.testing.assert_close(schedule.time_of(schedule.mask_probability(inside)), inside, rtol=1e-9, atol=1e-9)
    steep = inside[(alpha[1:-1] > 1e-4) & (alpha[1:-1] < 1 - 1e-6)]  # where alpha still tells times apart
    torch.testing.assert_close(schedule.inverse(schedule.alpha(steep)), steep, rtol=0, atol=1e-7)


@pytest.mark.parametrize('name', SCHEDULES)
def test_the_weight_of_the_bound_is_the_slope_over_the_masked_share(name):
    schedule, times, h = SCHEDULES[name], torch.linspace(0.01, 0.99, 99, dtype=torch.float64), 1e-6
    slope = (schedule.mask_probability(times + h) - schedule.mask_probability(times - h)) / (2 * h)
    expected = slope / schedule.mask_probability(times)
    torch.testing.assert_close(schedule.elbo_weight(times), expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize('name', SCHEDULES)
def test_the_bound_does_not_depend_on_the_schedule(name):
    """For any cost of every mask: the integral over time of weight times expected cost, in float64, is the any-order
    sum over the numbers of masked positions, which knows no schedule."""
    T, generator = 4, torch.Generator().manual_seed(2)
    masks = torch.tensor(list(itertools.product([False, True], repeat=T)))[1:]
    costs = torch.rand(len(masks), T, generator=generator, dtype=torch.float64)
    cost, counts = (costs * masks).sum(1), masks.sum(1)  # [15]
    order = sum(c / n / (T * math.comb(T, n)) for c, n in zip(cost.tolist(), counts.tolist()))
    times = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    share = SCHEDULES[name].mask_probability(times)[:, None]  # [.., 1]
    chance = share ** counts * (1 - share) ** (T - counts)  # [.., 15]
    integral = (SCHEDULES[name].elbo_weight(times) * (chance * cost).sum(1)).mean().item() / T
    assert integral == pytest.approx(order, rel=1e-4 if name == 'geometric' else 1e-8)  # geometric begins at 1e-5


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), iteration=st.integers(0, 1000), rows=st.integers(1, 40))
def test_every_cell_of_time_holds_one_row(seed, iteration, rows):
    times = low_discrepancy_times(keyed(seed, iteration, 0, rows), rows)
    assert times.min() >= MINIMUM_TIME and times.max() < 1
    phase = ((times - MINIMUM_TIME) / (1 - MINIMUM_TIME)).sort().values
    gaps = torch.diff(phase)
    assert torch.allclose(gaps, torch.full_like(gaps, 1 / rows), atol=1e-9)


def test_micro_steps_and_ranks_share_one_grid_of_times():
    whole = low_discrepancy_times(keyed(1, 7, 0, 12), 12)
    parts = [low_discrepancy_times(keyed(1, 7, first, 4), 12) for first in (0, 4, 8)]
    assert torch.equal(whole, torch.cat(parts))


def test_a_time_is_uniform_over_iterations():
    times = torch.cat([low_discrepancy_times(keyed(3, iteration, 5, 1), 8) for iteration in range(2000)])
    assert abs(times.mean() - (1 + MINIMUM_TIME) / 2) < 4 * 12 ** -0.5 / 2000 ** 0.5
    assert abs(times.var() - 1 / 12) < 0.01


def test_masks_have_their_probability_independently_by_position():
    generator = keyed(2, 0, 0, 4000)
    mask = draw_mask(generator, torch.full((4000,), 0.3, dtype=torch.float64), 16).double()
    assert ((mask.mean(0) - 0.3).abs() < 4 * (0.21 / 4000) ** 0.5).all()
    assert (torch.corrcoef(mask.T) - torch.eye(16)).abs().max() < 0.08
    assert not draw_mask(generator, torch.zeros(4000), 16).any() and draw_mask(generator, torch.ones(4000), 16).all()


def test_masking_makes_a_new_tensor():
    tokens, mask = torch.tensor([[1, 2, 0]]), torch.tensor([[False, True, False]])
    assert apply_mask(tokens, mask, 9).tolist() == [[1, 9, 0]] and tokens.tolist() == [[1, 2, 0]]


def test_validation_counts_cover_every_number_equally():
    counts = stratified_mask_counts(keyed(0, 0, 0, 60), 60, 12)
    assert torch.bincount(counts, minlength=13).tolist() == [0] + [5] * 12
    assert abs(torch.corrcoef(torch.stack((counts.double(), torch.arange(60).double())))[0, 1]) < 0.4  # in no order
    parts = [stratified_mask_counts(keyed(0, 0, first, 20), 60, 12) for first in (0, 20, 40)]
    assert torch.equal(torch.cat(parts), counts)
    mask = draw_exact_mask(keyed(0, 0, 0, 60), counts, 12)
    assert torch.equal(mask.sum(1), counts)
    many = draw_exact_mask(keyed(0, 0, 0, 3000), torch.full((3000,), 5), 12).double()
    assert ((many.mean(0) - 5 / 12).abs() < 0.04).all()


def test_neighbours_are_shown_in_all_four_patterns():
    """Fully masked rows, one neighbour a side: left only, right only, both and none, a quarter each."""
    mask = torch.ones(2000, 6, dtype=torch.bool)
    shown = shown_neighbours(keyed(4, 0, 0, 2000), mask, SeenNeighbours(SamplerWindow(1, 1)))
    assert not shown[:, 0, 0].any() and not shown[:, -1, 1].any()  # nothing lies beyond the sequence
    inner = shown[:, 1:-1].reshape(-1, 2)
    patterns = torch.bincount(inner[:, 0] * 2 + inner[:, 1], minlength=4).double() / len(inner)
    assert (patterns - 0.25).abs().max() < 0.02


def test_revealed_neighbours_are_always_shown():
    mask = torch.tensor([[True, False, True, True, False]]).expand(500, -1)
    shown = shown_neighbours(keyed(4, 0, 0, 500), mask,
                             SeenNeighbours(SamplerWindow(2, 2)))  # slots left 2, left 1, right 1, right 2
    assert shown[:, 0, 2].all() and shown[:, 2, 1].all() and shown[:, 3, 2].all() and shown[:, 2, 3].all()
    assert 0.4 < shown[:, 3, 1].double().mean() < 0.6 and 0.4 < shown[:, 0, 3].double().mean() < 0.6
    assert not shown[:, 4, 2:].any()


def test_from_left_to_right_all_on_the_left_is_shown_and_of_the_right_what_is_revealed():
    mask = torch.tensor([[True, True, False, True, False]])
    seen = SeenNeighbours(SamplerWindow(2, 1), 'left_to_right')
    shown, new = neighbours_shown(keyed(1, 0, 0, 1), torch.tensor([[10, 11, 12, 13, 14]]), mask, seen)
    assert shown.tolist() == [[[-1, -1, -1], [-1, 10, 12], [10, 11, -1], [11, 12, 14], [12, 13, -1]]]
    assert new.tolist() == [[0, 1, 2, 1, 1]]


def test_blocks_before_are_known_and_blocks_after_are_not_written():
    mask, block = torch.tensor([[True, True, True, True, False, False]]), torch.tensor([[0, 0, 1, 1, 2, 2]])
    text = torch.arange(10, 16)[None]
    shown, new = neighbours_shown(keyed(1, 0, 0, 1), text, mask, SeenNeighbours(SamplerWindow(2, 2), 'left_to_right'),
                                  block)
    assert shown.tolist() == [[[-1, -1, -1, -1], [-1, 10, -1, -1], [10, 11, -1, -1], [11, 12, -1, -1],
                               [12, 13, 15, -1], [13, 14, -1, -1]]]
    assert new.tolist() == [[0, 1, 0, 1, 0, 0]]
    for seed in range(20):  # waves show a side by lot, but what is known always
        shown, _ = neighbours_shown(keyed(seed, 0, 0, 1), text, mask, SeenNeighbours(SamplerWindow(1, 1)), block)
        assert shown[0, 2, 0] == 11 and shown[0, 1, 1] == -1 and shown[0, 4, 0] == 13
