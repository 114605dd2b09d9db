"""Noise of block models: the block length of each row, and the probability of a mask in each block.

A block model (Arriola et al. 2025, BD3-LM, arXiv 2503.09573) factors a text into blocks. It runs masked diffusion
inside each block, given the clean text before it. Its bound is the sum of the blocks' bounds, so each block draws its
own probability. All numbers depend only on (seed, iteration, global row).

Letters: B rows held here, G rows of the global batch, T sequence length, M blocks of the global batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from core.common.precision import to_exact
from core.common.randomness import Purpose, RowRandom
from core.noise import MINIMUM_TIME, BlockNoise


def every_row(generator: RowRandom, global_batch: int) -> RowRandom:
    """The random numbers of all rows of the global batch. `generator` may hold any of these rows."""
    return RowRandom(generator.seed, generator.iteration, torch.arange(global_batch, device=generator.rows.device))


def row_block_lengths(generator: RowRandom, rows: Tensor, block_lengths: Sequence[int]) -> Tensor:
    """int64 [B]: the block length of each of the global `rows` int64 [B]. Rows take the lengths in turn. Each iteration
    draws the length that comes first."""
    shared = RowRandom(generator.seed, generator.iteration, torch.zeros_like(rows[:1]))
    first = (shared.uniform(Purpose.TIME, 1, stream=1)[:, 0] * len(block_lengths)).long()  # [1]
    return torch.tensor(block_lengths, device=rows.device)[(first + rows) % len(block_lengths)]


def block_probabilities(generator: RowRandom, block_lengths: Sequence[int], length: int, global_batch: int,
                        noise: BlockNoise) -> Tensor:
    """The probability of a mask at each position, float64 [B, T]. All positions of a block have the same one.

    As in `low_discrepancy_times`, [eps, 1) is cut into M equal cells. Each of the M blocks of a global batch gets the
    probability of one cell, in random order. If `noise.shares` [a, b) is not [0, 1), the probabilities are scaled to
    that range (clipped schedules, Arriola et al. 2025, section 5.2); then 'elbo' is no longer a bound. In a share
    `noise.whole_share` of the rows every block has probability 1, because generation begins each block with masks only.
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


_GOLDEN = 0.6180339887498949  # its multiples modulo 1 fill [0, 1) evenly (Weyl), for the rows of any micro-step
