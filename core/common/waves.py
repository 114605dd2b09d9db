"""The order of a fill: waves, groups, and fills that continue from the left. It depends on the pattern of masks only.

Letters: B batch (rows), T sequence length.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Order = Literal['wave', 'left_to_right']


def distance_to_last(flags: Tensor, missing: int) -> Tensor:
    """int64 [B, T]: steps back to the last True of flags [B, T]; `missing` or more if there is none on the left."""
    position = torch.arange(flags.size(1), device=flags.device)
    return position - torch.where(flags, position, -missing).cummax(1).values


def distance_to_next(flags: Tensor, missing: int) -> Tensor:
    """int64 [B, T]: steps ahead to the next True of flags [B, T]; `missing` or more if there is none."""
    return distance_to_last(flags.flip(1), missing).flip(1)


def wave_schedule(masked: Tensor, order: Order = 'wave') -> Tensor:
    """int64 [B, T]: the wave that fills each position of masked bool [B, T], from 1 on; 0 where nothing is masked.

    'wave': the distance to the nearest revealed token. If two adjacent positions have equal distances, the right one
    waits one wave. 'left_to_right': the distance from the last revealed token on the left. A gap at the row's start has
    no such token, so it is filled from its right end to the left. In both orders every position has a filled neighbour,
    and no two adjacent positions share a wave. Every row needs a revealed token.
    """
    T = masked.size(1)
    left = distance_to_last(~masked, missing=2 * T)  # [B, T]
    right = distance_to_next(~masked, missing=2 * T)  # [B, T]
    if order == 'wave':
        return torch.minimum(left, right + (right == left - 1)) * masked
    return torch.where(left < 2 * T, left, right) * masked


def group_schedule(positions: Tensor, order: Order = 'wave') -> Tensor:
    """int64 [B, T]: the stage that fills each position of a group, positions bool [B, T]; 0 outside the group.

    In each run of adjacent positions, its middle ('wave') or left end ('left_to_right') comes in stage 1. The others
    follow by their distance from it. No two adjacent positions share a stage.
    """
    T = positions.size(1)
    position = torch.arange(T, device=positions.device)
    start = position - distance_to_last(~positions, missing=1) + 1  # [B, T], first position of the run
    end = position + distance_to_next(~positions, missing=1) - 1
    first = (start + end) // 2 if order == 'wave' else start
    return ((position - first).abs() + 1) * positions


def follow_on_schedule(masked: Tensor, positions: Tensor, left: int) -> Tensor:
    """int64 [B, T]: the stage that fills each position of a group, for a head that was trained from left to right and
    sees `left` neighbours on the left. 0: outside the group. 1: drawn from `lm_head`. 2 and above: drawn by the head,
    in this order.

    masked, positions: bool [B, T]. The head draws a position unless its left neighbour stays masked. It also draws at a
    row's start, which it has seen in training. A position waits for all positions that the head sees on its left.
    Positions that are farther apart can share a stage.
    """
    stays = F.pad(masked & ~positions, (1, 0))[:, :-1]  # [B, T], the left neighbour is masked and outside the group
    by_head = positions & ~stays
    since = F.pad(distance_to_last(by_head, missing=2 * left) + 1, (1, 0), value=2 * left)[:, :-1]  # to the last before
    number = by_head.cumsum(1)
    first = torch.where(by_head & (since > left), number, 0).cummax(1).values  # of those that wait for each other
    return torch.where(by_head, number - first + 2, positions.long())


def stage_schedule(masked: Tensor, positions: Tensor, seeds: Tensor, order: Order) -> Tensor:
    """int64 [B, T]: 0 stays, 1 is drawn from `lm_head`, 2 and above by the head in that order.

    A row that is filled completely runs in waves from its revealed tokens, or from bootstrapped ones (`seeds`). If only
    a group of a row is filled, the hidden states already know every revealed token. Then the head draws only positions
    with a neighbour that was filled since the trunk call.
    """
    remaining = masked & ~seeds
    waves = wave_schedule(remaining, order)
    whole = torch.where(seeds, 1, torch.where(remaining, waves + 1, 0))
    complete = (positions == masked).all(1, keepdim=True)  # [B, 1]
    return torch.where(complete, whole, group_schedule(positions, order))


class Turns(NamedTuple):
    """The order of a fill in which every token is drawn given all that its group has drawn before.

    group int64 [B, T]: positions with the same number are filled from one trunk call; -1: not filled.
    turn int64 [B, T]: in each group, the position with the lowest turn comes first. Turns in a group are all different.
    """

    group: Tensor
    turn: Tensor


def fill_turns(group: Tensor, order: Order) -> Turns:
    """`Turns` of groups int64 [B, T]. 'left_to_right': by place. 'wave': by the distance from the middle of a run of
    adjacent positions of one group; positions of equal distance come by place."""
    T = group.size(1)
    place = torch.arange(T, device=group.device)
    if order == 'left_to_right':
        return Turns(group, place.expand_as(group))
    begins = F.pad(group[:, 1:] != group[:, :-1], (1, 0), value=True)
    ends = F.pad(begins[:, 1:], (0, 1), value=True)
    first = place - distance_to_last(begins, missing=T)  # [B, T], of the run
    last = place + distance_to_next(ends, missing=T)
    return Turns(group, (place - (first + last) // 2).abs() * T + place)


def sees_in_turn(masked: Tensor, turns: Turns, within: Tensor | None = None) -> Tensor:
    """bool [B, T, T]: whether a position (second index) knows the token at another position (third index) when it is
    drawn. It knows tokens that are not masked, and tokens that its own group has drawn before.

    masked bool [B, T]. within bool [B, T, T]: where it may look at all; None: everywhere.
    """
    group, turn = turns
    drawn = (group[:, None] == group[..., None]) & (turn[:, None] < turn[..., None]) & (group >= 0)[:, None]
    known = drawn | ~masked[:, None]
    return known if within is None else known & within
