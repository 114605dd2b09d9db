"""What one optimizer step trains on, made on the host before the step begins.

Every number depends only on (seed, iteration, global row), so any micro-step or rank would draw the same row.

Letters: B rows of a micro-step, G rows of the global batch, T sequence length, C neighbours, N predicted
positions.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.block_noise import block_probabilities, row_block_lengths
from core.common.randomness import Purpose, RowRandom, keyed
from core.common.runtime import moved
from core.data.corpus import gather_windows
from core.noise import (Corruption, Masking, apply_mask, behind_cls, corrupt, draw_mask, judged_text,
                        low_discrepancy_times, what_is_shown)

# N is padded to one of these shares of B * T, so that compiled steps see few shapes. A batch has low-discrepancy times,
# so its share of masked positions is within a few per cent of the schedule's mean. The mean of the linear schedule is
# one half.
CAPACITIES = (0.5625, 0.75, 1.0)


class Batch(NamedTuple):
    """One micro-step. The N predicted positions are flat indices into [B * T]; padding slots have weight 0."""

    inputs: Tensor        # int64 [B, T], what the trunk reads
    targets: Tensor       # int64 [B, T], the truth
    positions: Tensor     # int64 [N]
    main_weights: Tensor  # float32 [N], weight of each position in the main loss; [B], of each row, for a judge
    mean_weights: Tensor  # float32 [N], 1 / number of predicted positions in the global batch
    neighbours: Tensor    # int64 [N, C], tokens that the sampler head is shown, -1 for none
    new: Tensor           # int64 [N], how many of these are masked in `inputs`
    turns: Tensor         # int64 [B, T, 2], `Turns` for a sampler head that reads the row; [0] for all others
    block_length: Tensor  # int64 [B], of each row of a block model; [0] for all others
    sources: Tensor       # int64 [B, T], see `Corrupted`; [0] unless a remasking model's text has several
    rows: Tensor          # int64 [B], global row indices
    critic_share: Tensor  # float32 scalar, 1 / number of positions that the critic is trained on in the global batch

    def to(self, device: torch.device) -> 'Batch':
        """The same batch on `device`."""
        return Batch(*(moved(tensor, device) for tensor in self))


class RowShare(NamedTuple):
    """The rows of an iteration that this rank holds: `micro_steps` times `batch_size`. The ranks take turns."""

    batch_size: int
    micro_steps: int = 1  # of this rank
    rank: int = 0
    world_size: int = 1

    @property
    def global_batch(self) -> int:
        """G, the rows of an iteration over all micro-steps and ranks."""
        return self.batch_size * self.micro_steps * self.world_size


class BatchPlan(NamedTuple):
    """What batches are made of. noise: `Masking` for a diffusion model, `Corruption` for a remasking model or a judge,
    None for a causal model. stride: windows begin at multiples of it."""

    tokens: np.ndarray  # the training split
    seed: int
    block_size: int
    rows: RowShare
    noise: Masking | Corruption | None
    stride: int = 1


def micro_steps(plan: BatchPlan, iteration: int) -> list[RowRandom]:
    """The rows of each micro-step of this rank."""
    rows = plan.rows
    return [keyed(plan.seed, iteration, (number * rows.world_size + rows.rank) * rows.batch_size, rows.batch_size)
            for number in range(rows.micro_steps)]


def draw_windows(plan: BatchPlan, generator: RowRandom, length: int) -> Tensor:
    """int64 [B, length]: a window of the corpus for each row, every start equally likely."""
    count = (len(plan.tokens) - length) // plan.stride + 1
    starts = generator.uniform(Purpose.DATA, 1)[:, 0] * count  # [B]
    return gather_windows(plan.tokens, starts.long() * plan.stride, length)


def unmasking_batches(plan: BatchPlan, iteration: int, total: Callable[[int], int]) -> list[Batch]:
    """The micro-steps of one iteration of masked diffusion.

    `total` adds a count over all ranks. Weights for 'elbo': those of the schedule, divided by G * T (Sahoo et al. 2024,
    eq. 11). For 'masked_mean': 1 / number of masked positions of the global batch.
    """
    T, masking = plan.block_size, plan.noise
    drawn = [(generator, draw_windows(plan, generator, T), draw_masked(plan, iteration, generator))
             for generator in micro_steps(plan, iteration)]
    masked = total(sum(int(one.mask.sum()) for *_, one in drawn))
    stride = masking.critic_row_stride
    judged = total(sum(int(one.mask[::stride].sum()) if masking.critic_scope == 'masked_only' else
                       one.mask[::stride].numel() for *_, one in drawn))
    batches = []
    for generator, targets, (mask, weights, block_length) in drawn:
        positions = mask.flatten().nonzero().squeeze(1)  # [N]
        mean = torch.full((len(positions),), 1 / max(1, masked))
        main = mean if masking.loss_weighting == 'masked_mean' else \
            (weights / (plan.rows.global_batch * T)).float().expand_as(mask).flatten()[positions]
        block = torch.arange(T) // block_length[:, None] if len(block_length) else None  # [B, T]
        neighbours, new, turns = what_is_shown(generator, targets, mask, masking.neighbours, block)
        capacity = next(size for size in (int(B_T * targets.numel()) for B_T in CAPACITIES) if size >= len(positions))
        padding = (0, capacity - len(positions))
        batches.append(Batch(
            apply_mask(targets, mask, masking.mask_token_id), targets, F.pad(positions, padding),
            F.pad(main, padding), F.pad(mean, padding),
            F.pad(neighbours.flatten(0, 1)[positions], (0, 0, *padding), value=-1),
            F.pad(new.flatten()[positions], padding), turns, block_length, targets.new_empty(0), generator.rows,
            torch.tensor(1 / max(1, judged))))
    return batches


class Masked(NamedTuple):
    """mask bool [B, T]. weights: of each position in the NELBO, float64 [B, 1], or [B, T] if each block has its own
    time. block_length int64 [B]; [0] without blocks."""

    mask: Tensor
    weights: Tensor
    block_length: Tensor


def draw_masked(plan: BatchPlan, iteration: int, generator: RowRandom) -> Masked:
    """The masks of the rows of `generator`, with one time for each row, or for each block (core/block_noise.py)."""
    T, G, masking = plan.block_size, plan.rows.global_batch, plan.noise
    if masking.blocks is None:
        times = low_discrepancy_times(generator, G)  # [B]
        mask = draw_mask(generator, masking.schedule.mask_probability(times), T)
        return Masked(mask, masking.schedule.elbo_weight(times)[:, None], generator.rows[:0])
    lengths = masking.blocks.lengths_at(iteration)
    probability = block_probabilities(generator, lengths, T, G, masking.blocks)  # [B, T]
    return Masked(generator.uniform(Purpose.MASK, T) < probability, 1 / probability,
                  row_block_lengths(generator, generator.rows, lengths))


def causal_batches(plan: BatchPlan, iteration: int, total: Callable[[int], int]) -> list[Batch]:
    """The micro-steps of one iteration of next-token prediction: every position predicts the token after it."""
    T, batches = plan.block_size, []
    for generator in micro_steps(plan, iteration):
        window = draw_windows(plan, generator, T + 1)  # [B, T + 1]
        weights = torch.full((plan.rows.batch_size * T,), 1 / (plan.rows.global_batch * T))
        batches.append(whole_batch(generator, window[:, :-1].contiguous(), window[:, 1:].contiguous(), weights))
    return batches


def position_weights(loss_type: str, clean: int, corrupted: int) -> Tensor:
    """float32 [2]: the weight of a clean and of a corrupted position in the loss, given their numbers.

    'corrupted_only' is the mean over the corrupted positions, 'all_positions' the mean over all. 'balanced' gives each
    of the two kinds half of the weight.
    """
    clean, corrupted = max(1, clean), max(1, corrupted)
    return torch.tensor({'corrupted_only': (0.0, 1 / corrupted), 'all_positions': (1 / (clean + corrupted),) * 2,
                         'balanced': (0.5 / clean, 0.5 / corrupted)}[loss_type])


def remasking_batches(plan: BatchPlan, iteration: int, total: Callable[[int], int]) -> list[Batch]:
    """The micro-steps of one iteration of a remasking model. Targets are the truth; inputs differ where they are wrong.

    Positions are chosen as masked diffusion masks them: each with probability t, t uniform. `corrupt` writes there.
    """
    T, drawn = plan.block_size, []
    for generator in micro_steps(plan, iteration):
        targets = draw_windows(plan, generator, T)
        mask = draw_mask(generator, low_discrepancy_times(generator, plan.rows.global_batch), T)
        drawn.append((generator, targets, corrupt(plan.noise, generator, targets, mask)))
    corrupted = total(sum(int((text.tokens != targets).sum()) for _, targets, text in drawn))
    weights = position_weights(plan.noise.loss_type, plan.rows.global_batch * T - corrupted, corrupted)
    return [whole_batch(generator, text.tokens, targets, weights[(text.tokens != targets).flatten().long()])
            ._replace(sources=text.sources) for generator, targets, text in drawn]


def judge_batches(plan: BatchPlan, iteration: int, total: Callable[[int], int]) -> list[Batch]:
    """The micro-steps of one iteration of a judge: CLS, then text. Targets are the truth; a share of the inputs
    differs from them."""
    batches = []
    for generator in micro_steps(plan, iteration):
        text = draw_windows(plan, generator, plan.block_size - 1)
        mask = draw_mask(generator, low_discrepancy_times(generator, plan.rows.global_batch), plan.block_size - 1)
        inputs = behind_cls(plan.noise, judged_text(plan.noise, generator, text, mask))
        weights = torch.full((plan.rows.batch_size,), 1 / plan.rows.global_batch)
        batches.append(whole_batch(generator, inputs, behind_cls(plan.noise, text), weights))
    return batches


def whole_batch(generator: RowRandom, inputs: Tensor, targets: Tensor, weights: Tensor) -> Batch:
    """A batch that uses every position. No sampler head and no critic trains on it."""
    return Batch(inputs, targets, torch.arange(targets.numel()), weights, weights,
                 targets.new_empty(targets.numel(), 0), targets.new_zeros(targets.numel()), targets.new_empty(0),
                 generator.rows[:0], targets.new_empty(0), generator.rows, torch.tensor(0.0))
