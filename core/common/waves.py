"""The order in which a fill goes: waves, groups and what follows on, from the pattern of masks alone.

Letters: B batch (rows), T sequence length.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
Order = Literal['wave', 'left_to_right']


def distance_to_last(flags: Tensor, missing: int) -> Tensor:
    """int64 [B, T]: steps back to the last True of flags [B, T]; `missing` or more where there is none on the left."""
    position = torch.arange(flags.size(1), device=flags.device)
    return position - torch.where(flags, position, -missing).cummax(1).values


def distance_to_next(flags: Tensor, missing: int) -> Tensor:
    """int64 [B, T]: steps ahead to the next True of flags [B, T]; `missing` or more where there is none."""
    return distance_to_last(flags.flip(1), missing).flip(1)


def wave_schedule(masked: Tensor, order: Order = 'wave') -> Tensor:
    """int64 [B, T]: the wave that fills each position of masked bool [B, T], from 1 on; 0 where nothing is masked.

    'wave': the distance to the nearest revealed token; where two fronts meet at two adjacent positions of equal
    distance, the right one waits one wave. 'left_to_right': the distance from the last revealed token on the left; a
    gap at the row's start has none and is filled from its right end towards the left, so that every position still has
    a filled neighbour. Either way no two adjacent positions share a wave. Every row needs a revealed token.
    """
    T = masked.size(1)
    left = distance_to_last(~masked, missing=2 * T)  # [B, T]
    right = distance_to_next(~masked, missing=2 * T)  # [B, T]
    if order == 'wave':
        return torch.minimum(left, right + (right == left - 1)) * masked
    return torch.where(left < 2 * T, left, right) * masked


def group_schedule(positions: Tensor, order: Order = 'wave') -> Tensor:
    """int64 [B, T]: the stage that fills each position of a group, positions bool [B, T]; 0 outside the group.

    In each run of adjacent positions one, its middle ('wave') or its left end ('left_to_right'), comes in stage 1 and
    the others follow by their distance from it. No two adjacent positions share a stage.
    """
    T = positions.size(1)
    position = torch.arange(T, device=positions.device)
    start = position - distance_to_last(~positions, missing=1) + 1  # [B, T], first position of the run
    end = position + distance_to_next(~positions, missing=1) - 1
    first = (start + end) // 2 if order == 'wave' else start
    return ((position - first).abs() + 1) * positions


def follow_on_schedule(masked: Tensor, positions: Tensor, left: int) -> Tensor:
    """int64 [B, T]: the stage that fills each position of a group through a head that was trained from left to right
    and sees `left` neighbours there; 0 outside the group, 1 from `lm_head`, 2 and above by the head in that order.

    masked, positions: bool [B, T]. The head draws a position unless its left neighbour stays masked; a boundary is what
    it has seen in training. It waits for every position that it sees on its left, so positions farther apart than that
    share a stage.
    """
    stays = F.pad(masked & ~positions, (1, 0))[:, :-1]  # [B, T], the left neighbour is masked and no part of the group
    by_head = positions & ~stays
    since = F.pad(distance_to_last(by_head, missing=2 * left) + 1, (1, 0), value=2 * left)[:, :-1]  # to the last before
    number = by_head.cumsum(1)
    first = torch.where(by_head & (since > left), number, 0).cummax(1).values  # of those that wait for each other
    return torch.where(by_head, number - first + 2, positions.long())


def stage_schedule(masked: Tensor, positions: Tensor, seeds: Tensor, order: Order) -> Tensor:
    """int64 [B, T]: 0 stays, 1 is drawn from `lm_head`, 2 and above by the head in that order.

    A row that is to be filled completely runs in waves from its revealed tokens, or from bootstrapped ones (`seeds`).
    In a row of which only a group is filled, the hidden states know every revealed token already, so the head serves
    only where a neighbour was filled since.
    """
    remaining = masked & ~seeds
    waves = wave_schedule(remaining, order)
    whole = torch.where(seeds, 1, torch.where(remaining, waves + 1, 0))
    complete = (positions == masked).all(1, keepdim=True)  # [B, 1]
    return torch.where(complete, whole, group_schedule(positions, order))
