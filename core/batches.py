"""What one optimizer step trains on, made on the host before the step begins.

Every number comes from (seed, iteration, global row), so a row is the same whichever micro-step or rank holds it.

Letters: B rows of a micro-step, G rows of the global batch, T sequence length, C sampler_context, N predicted
positions.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.corruption import apply_mask, draw_mask, low_discrepancy_times, shown_neighbours
from core.data import gather_windows
from core.randomness import Purpose, RowRandom, keyed

# N is padded to one of these shares of B * T, so that compiled steps see the same shape again and again: the number of
# masked positions of a batch with low-discrepancy times stays within a few per cent of one half.
CAPACITIES = (0.5625, 0.75, 1.0)


class Batch(NamedTuple):
    """One micro-step. The N predicted positions are flat indices into [B * T]; padding slots have weight 0."""

    inputs: Tensor        # int64 [B, T], what the trunk reads
    targets: Tensor       # int64 [B, T], the truth
    positions: Tensor     # int64 [N]
    main_weights: Tensor  # float32 [N], weight of each position's cross-entropy in the main loss
    mean_weights: Tensor  # float32 [N], 1 / number of predicted positions in the global batch
    neighbours: Tensor    # int64 [N, 2C], tokens that the sampler head is shown, -1 for none
    rows: Tensor          # int64 [B], global row indices
    critic_share: Tensor  # float32 scalar, 1 / number of positions that the critic is trained on in the global batch

    def to(self, device: torch.device) -> 'Batch':
        """The same batch on `device`; from pinned memory, without waiting, where that is a GPU."""
        if device.type != 'cuda':
            return self
        return Batch(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in self))


class BatchPlan(NamedTuple):
    """What batches are made of. global_batch G = batch_size * micro_steps * world_size rows an iteration."""

    tokens: np.ndarray  # the training split
    seed: int
    block_size: int
    batch_size: int
    micro_steps: int  # of this rank
    rank: int
    world_size: int
    mask_token_id: int
    loss_weighting: str  # 'elbo' or 'masked_mean'
    sampler_context: int  # 0: no neighbours are needed
    critic_row_stride: int
    critic_scope: str  # 'masked_only' or 'masked_and_ignore'

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.micro_steps * self.world_size


def draw_windows(plan: BatchPlan, generator: RowRandom, length: int) -> Tensor:
    """int64 [B, length]: a window of the corpus for each row, every start equally likely."""
    starts = generator.uniform(Purpose.DATA, 1)[:, 0] * (len(plan.tokens) - length + 1)  # [B]
    return gather_windows(plan.tokens, starts.long(), length)


def unmasking_batches(plan: BatchPlan, iteration: int, total: Callable[[int], int]) -> list[Batch]:
    """The micro-steps of one iteration of masked diffusion.

    `total` adds a count over all ranks. Weights for 'elbo': 1 / t over G * T (Sahoo et al. 2024, eq. 11, with the
    linear schedule); for 'masked_mean': 1 / number of masked positions of the global batch.
    """
    T = plan.block_size
    drawn = []
    for micro_step in range(plan.micro_steps):
        first_row = (micro_step * plan.world_size + plan.rank) * plan.batch_size
        generator = keyed(plan.seed, iteration, first_row, plan.batch_size)
        times = low_discrepancy_times(generator, plan.global_batch)  # [B]
        drawn.append((generator, draw_windows(plan, generator, T), times, draw_mask(generator, times, T)))
    masked = total(sum(int(mask.sum()) for *_, mask in drawn))
    stride = plan.critic_row_stride
    judged = total(sum(int(mask[::stride].sum()) if plan.critic_scope == 'masked_only' else mask[::stride].numel()
                       for *_, mask in drawn))
    batches = []
    for generator, targets, times, mask in drawn:
        positions = mask.flatten().nonzero().squeeze(1)  # [N]
        mean = torch.full((len(positions),), 1 / max(1, masked))
        main = (1 / times / (plan.global_batch * T)).float()[positions // T] if plan.loss_weighting == 'elbo' else mean
        neighbours = neighbours_shown(generator, targets, mask, plan.sampler_context).flatten(0, 1)[positions]
        capacity = next(size for size in (int(B_T * targets.numel()) for B_T in CAPACITIES) if size >= len(positions))
        padding = (0, capacity - len(positions))
        batches.append(Batch(apply_mask(targets, mask, plan.mask_token_id), targets, F.pad(positions, padding),
                             F.pad(main, padding), F.pad(mean, padding), F.pad(neighbours, (0, 0, *padding), value=-1),
                             generator.rows, torch.tensor(1 / max(1, judged))))
    return batches


def neighbours_shown(generator: RowRandom, targets: Tensor, mask: Tensor, context: int) -> Tensor:
    """int64 [B, T, 2C]: the true token of each neighbour that the sampler head is shown, -1 of the others."""
    if context == 0:
        return targets.new_empty(*targets.shape, 0)
    offsets = torch.tensor([*range(-context, 0), *range(1, context + 1)])
    places = (torch.arange(targets.size(1))[:, None] + offsets).clamp(0, targets.size(1) - 1)  # [T, 2C]
    return torch.where(shown_neighbours(generator, mask, context), targets[:, places], -1)


def causal_batches(plan: BatchPlan, iteration: int, total: Callable[[int], int]) -> list[Batch]:
    """The micro-steps of one iteration of next-token prediction: every position predicts the token after it."""
    T, batches = plan.block_size, []
    for micro_step in range(plan.micro_steps):
        first_row = (micro_step * plan.world_size + plan.rank) * plan.batch_size
        generator = keyed(plan.seed, iteration, first_row, plan.batch_size)
        window = draw_windows(plan, generator, T + 1)  # [B, T + 1]
        weights = torch.full((plan.batch_size * T,), 1 / (plan.global_batch * T))
        batches.append(Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous(),
                             torch.arange(plan.batch_size * T), weights, weights,
                             window.new_empty(plan.batch_size * T, 0), generator.rows, torch.tensor(0.0)))
    return batches


BATCH_MAKERS = {'unmasking': unmasking_batches, 'causal': causal_batches}  # by the kind of model that is trained
