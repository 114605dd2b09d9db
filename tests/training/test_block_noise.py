"""Noise of block models: times by block, stratified over the batch, and the same for whichever micro-step asks."""

import pytest
import torch

from core.block_noise import block_probabilities, row_block_lengths
from core.common.randomness import keyed
from core.noise import MINIMUM_TIME, BlockNoise

G, T = 16, 24


@pytest.mark.parametrize('lengths', [[4], [1, 4, 24], [24, 3]])
def test_the_times_of_all_blocks_fall_one_into_each_cell(lengths):
    generator = keyed(7, 3, 0, G)
    times = block_probabilities(generator, lengths, T, G, BlockNoise(tuple(lengths), whole_share=0.0))
    rows = row_block_lengths(generator, generator.rows, lengths)
    found = torch.cat([times[row, ::int(b)] for row, b in enumerate(rows)])
    cells = ((found - MINIMUM_TIME) / (1 - MINIMUM_TIME) * len(found)).floor().long()
    distance = torch.arange(len(found)) - cells.sort().values
    assert len(found) == int((T // rows).sum()) and len(cells.unique()) == len(cells), distance
    order = torch.cat([times[row, ::int(b)] for row, b in enumerate(rows)]).argsort()
    assert not torch.equal(order, order.sort().values), 'times must not rise along the batch'


@pytest.mark.parametrize('lengths', [[4], [1, 4, 24]])
def test_all_positions_of_a_block_have_its_time(lengths):
    generator = keyed(7, 4, 0, G)
    times = block_probabilities(generator, lengths, T, G, BlockNoise(tuple(lengths), whole_share=0.0))
    rows = row_block_lengths(generator, generator.rows, lengths)
    for row, b in enumerate(rows.tolist()):
        blocks = times[row].view(-1, b)
        assert (blocks == blocks[:, :1]).all() and len(blocks[:, 0].unique()) == len(blocks)


def test_rows_take_the_lengths_in_turn_and_iterations_begin_differently():
    found = [row_block_lengths(keyed(1, iteration, 0, 9), torch.arange(9), [1, 4, 24]) for iteration in range(40)]
    assert all((lengths == b).sum() == 3 for lengths in found for b in (1, 4, 24))
    assert {int(lengths[0]) for lengths in found} == {1, 4, 24}


def test_a_row_is_the_same_in_every_micro_step():
    whole = block_probabilities(keyed(7, 5, 0, G), [1, 4, 24], T, G, BlockNoise(tuple([1, 4, 24]), whole_share=0.5))
    part = block_probabilities(keyed(7, 5, 6, 5), [1, 4, 24], T, G, BlockNoise(tuple([1, 4, 24]), whole_share=0.5))
    assert torch.equal(part, whole[6:11])


@pytest.mark.parametrize('share', [0.0, 0.25, 0.5, 1.0])
def test_a_share_of_the_rows_is_masked_whole(share):
    found = [(block_probabilities(keyed(7, iteration, 0, G), [4], T, G,
                                  BlockNoise(tuple([4]), whole_share=share)) == 1).all(1).double()
             for iteration in range(200)]
    assert torch.stack(found).mean() == pytest.approx(share, abs=0.01)
    assert all(abs(rows.sum() - share * G) <= 2 for rows in found)
    assert share in (0.0, 1.0) or ((torch.stack(found).mean(0) - share).abs() < 0.15).all(), 'every row has its turn'


def test_shares_stretch_the_range():
    found = block_probabilities(keyed(7, 5, 0, G), [4], T, G, BlockNoise((4,), shares=(0.3, 0.8)))
    assert 0.3 <= found.min() < 0.32 and 0.78 < found.max() < 0.8


def test_lengths_begin_when_they_are_told_to():
    noise = BlockNoise((1, 4, 24), begins=(0, 10, 20))
    assert [noise.lengths_at(iteration) for iteration in (0, 9, 10, 19, 20)] == [
        (1,), (1,), (1, 4), (1, 4), (1, 4, 24)]
