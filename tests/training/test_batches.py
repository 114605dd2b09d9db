"""What a step trains on: windows, shares of the global batch, weights and padding."""

import numpy as np
import pytest
import torch

from core.batches import RowShare, causal_batches, draw_windows, position_weights, unmasking_batches
from core.common.randomness import keyed
from helpers.toys import V0, toy_plan


def one(count):
    """A count over a single rank."""
    return count


def test_windows_are_of_the_corpus_and_every_start_occurs():
    plan = toy_plan(tokens=np.arange(10, dtype=np.uint16))
    windows = draw_windows(plan, keyed(3, 1, 0, 2000), 4)
    assert (windows.diff(dim=1) == 1).all()
    counts = torch.bincount(windows[:, 0], minlength=7).double()
    assert len(counts) == 7 and (counts / 2000 - 1 / 7).abs().max() < 0.04


@pytest.mark.parametrize('maker', [unmasking_batches, causal_batches])
def test_micro_steps_and_ranks_hold_the_rows_of_one_batch_in_turn(maker):
    whole, = maker(toy_plan(batch_size=8), 4, one)
    assert whole.rows.tolist() == [*range(8)] and RowShare(2, 2, 0, 2).global_batch == 8
    parts = [maker(toy_plan(batch_size=2, micro_steps=2, rank=rank, world_size=2), 4, one) for rank in (0, 1)]
    assert [part.rows.tolist() for rank in parts for part in rank] == [[0, 1], [4, 5], [2, 3], [6, 7]]
    for part in (part for rank in parts for part in rank):
        assert torch.equal(part.inputs, whole.inputs[part.rows]) and torch.equal(part.targets, whole.targets[part.rows])


def test_weights_are_shares_of_the_global_batch_and_padding_weighs_nothing():
    """The ranks tell each other how many positions are masked: here the other one has as many."""
    plan = toy_plan(batch_size=16, micro_steps=2, world_size=2, loss_weighting='masked_mean')
    batches = unmasking_batches(plan, 2, lambda count: 2 * count)
    masked = sum(int((batch.inputs == V0).sum()) for batch in batches)
    for batch in batches:
        real = int((batch.inputs == V0).sum())
        assert len(batch.positions) in [int(share * 64) for share in (0.5625, 0.75, 1.0)]
        assert len(batch.positions) >= real
        assert (batch.inputs.flatten()[batch.positions[:real]] == V0).all()
        assert (batch.mean_weights[:real] == torch.tensor(1 / (2 * masked))).all()
        assert batch.mean_weights[real:].eq(0).all()
        assert torch.equal(batch.main_weights, batch.mean_weights) and (batch.neighbours[real:] == -1).all()
        assert batch.critic_share.item() == pytest.approx(1 / (2 * masked))


@pytest.mark.parametrize('scope, share', [('masked_only', None), ('masked_and_ignore', 1 / 16)])
def test_the_critics_share_counts_its_rows_alone(scope, share):
    batch, = unmasking_batches(toy_plan(batch_size=8, critic_row_stride=2, critic_scope=scope), 1, one)
    judged = int((batch.inputs[::2] == V0).sum())
    assert batch.critic_share.item() == pytest.approx(share or 1 / judged)


def test_position_weights_add_up_to_one_over_what_counts():
    for loss_type, expected in (('corrupted_only', (0, 1 / 5)), ('all_positions', (1 / 20, 1 / 20)),
                                ('balanced', (1 / 30, 1 / 10))):
        assert position_weights(loss_type, 15, 5).tolist() == pytest.approx(expected)
    assert position_weights('balanced', 7, 0).isfinite().all()


def test_with_a_stride_windows_are_whole_lines_and_every_line_occurs():
    plan = toy_plan(tokens=np.arange(21, dtype=np.uint16))._replace(stride=3)
    windows = draw_windows(plan, keyed(3, 1, 0, 2000), 3)
    assert (windows.diff(dim=1) == 1).all() and (windows[:, 0] % 3 == 0).all()
    counts = torch.bincount(windows[:, 0] // 3, minlength=7).double()
    assert len(counts) == 7 and (counts / 2000 - 1 / 7).abs().max() < 0.04
