"""Noise of block models: the block length of each row, one probability of a mask for each block.

A block model (Arriola et al. 2025, BD3-LM, arXiv 2503.09573) factors a text into blocks and runs masked diffusion
inside each of them, given the clean text before it. Its bound is the sum of the bounds of its blocks, so every block
draws a probability of its own. All numbers depend on (seed, iteration, global row) alone.

Letters: B rows held here, G rows of the global batch, T sequence length, M blocks of the global batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from core.common.precision import to_exact
from core.common.randomness import Purpose, RowRandom
from core.noise import MINIMUM_TIME, BlockNoise


def every_row(generator: RowRandom, global_batch: int) -> RowRandom:
    """The random numbers of all rows of the global batch, whichever of them `generator` holds."""
    return RowRandom(generator.seed, generator.iteration, torch.arange(global_batch, device=generator.rows.device))


def row_block_lengths(generator: RowRandom, rows: Tensor, block_lengths: Sequence[int]) -> Tensor:
    """int64 [B]: the block length of each of the global `rows` int64 [B]. Rows take the lengths in turn; which one
    comes first is drawn for each iteration."""
    shared = RowRandom(generator.seed, generator.iteration, torch.zeros_like(rows[:1]))
    first = (shared.uniform(Purpose.TIME, 1, stream=1)[:, 0] * len(block_lengths)).long()  # [1]
    return torch.tensor(block_lengths, device=rows.device)[(first + rows) % len(block_lengths)]


def block_probabilities(generator: RowRandom, block_lengths: Sequence[int], length: int, global_batch: int,
                        noise: BlockNoise) -> Tensor:
    """The probability with which each position is masked, float64 [B, T], one for all positions of a block.

    The probabilities of the M blocks of a global batch fall one into each of M equal cells of [eps, 1), as the times of
    `low_discrepancy_times` do for rows; which block gets which cell is a random order. `noise.shares` [a, b) other than
    [0, 1) stretches them to that range (clipped schedules, Arriola et al. 2025, section 5.2); 'elbo' is a bound no more
    then. A share `noise.whole_share` of the rows has probability 1 in every block: generation meets whole blocks at the
    first call of each.
    """
    everyone = every_row(generator, global_batch)
    lengths = row_block_lengths(generator, everyone.rows, block_lengths)  # [G]
    most = length // min(block_lengths)
    counts = length // lengths  # [G], blocks of each row
    order = everyone.uniform(Purpose.TIME, most, stream=2)  # [G, most]
    order = torch.where(torch.arange(most, device=order.device) < counts[:, None], order, 2.0)
    cells = order.flatten().argsort().argsort().view_as(order)[generator.rows]  # [B, most]
    shared = RowRandom(generator.seed, generator.iteration, torch.zeros_like(generator.rows[:1]))
    offset = shared.uniform(Purpose.TIME, 2)  # [1, 2]
    phase = (offset[:, :1] + cells.double() / counts.sum()) % 1.0  # [B, most]
    low, high = max(MINIMUM_TIME, noise.shares[0]), noise.shares[1]
    probability = low + (high - low) * phase
    whole = (offset[0, 1] + to_exact(generator.rows).double() * _GOLDEN) % 1.0 < noise.whole_share  # [B], spread evenly
    probability = torch.where(whole[:, None], 1.0, probability)
    block = torch.arange(length, device=phase.device) // lengths[generator.rows][:, None]  # [B, T]
    return probability.gather(1, block)


_GOLDEN = 0.6180339887498949  # multiples of it fill [0, 1) evenly (Weyl), whichever rows a micro-step holds
