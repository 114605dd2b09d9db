"""Choices by score that rounding cannot turn.

A network's scores carry an error that depends on the batch around a row: other shapes are added up in another order.
Scores that are equal in theory come out a little apart, and all those of a fully masked row are equal in theory where
positions are rotary. Whoever takes the highest of such scores as they are lets the rounding error choose.

The rule here: with c the score of rank `count`, whatever lies above c + tolerance is taken, whatever lies below
c - tolerance is not, and the scores in between fill up the count by an order that knows no score. Where each score
moves by at most d, so does c (a rank's score never moves further than the scores do), hence a choice can change only
where a score lies within 2 d of c + tolerance or of c - tolerance. With the tolerance far above d, equal scores are all
in between. What is left is chance: a score that happens to lie at the very border. Its probability is 2 d times the
density of scores there, some 1e-6 a choice in float32, and no rule has a smaller one: between two different choices
there always is a border. A grid has borders everywhere, where this rule has two. Groups made of neighbours closer
than the tolerance have none inside, but they grow into one another where scores are many: in bfloat16 all positions of
a row would count as equal.

Thresholds follow the same thought: a score within the tolerance of a threshold counts as equal to it.
"""

import math

import torch
from torch import Tensor


def tie_tolerance(dtype: torch.dtype) -> float:
    """Scores of a network that computes in `dtype` count as equal when they are no further apart: the square root of
    the type's precision, far more than the rounding error and far less than a difference that matters: 3.5e-4 in
    float32, 0.09 in bfloat16, whose logits are that coarse. A score may follow the logits with a slope of about 1."""
    return math.sqrt(torch.finfo(dtype).eps)


def computing_tolerance(tensor: Tensor) -> float:
    """`tie_tolerance` of what is computed from `tensor`, a weight or a hidden state, autocast included."""
    device = tensor.device.type
    return tie_tolerance(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype)


def up_to_cut(score: Tensor, cut: Tensor, count: Tensor | int, tolerance: float) -> Tensor:
    """bool [..., N]: the `count` (an int, or int64 [..., 1]) highest of score [..., N], whose rank `count` has the
    score cut [..., 1]. Of the scores within `tolerance` of the cut the first in the row are taken."""
    above = score > cut + tolerance
    near = (score >= cut - tolerance) & ~above
    return above | near & (near.cumsum(-1) <= count - above.sum(-1, keepdim=True))


def highest(score: Tensor, count: Tensor, tolerance: float) -> Tensor:
    """bool [..., N]: `up_to_cut` at the score of rank count int64 [..., 1]; all where count is N or more, none at 0."""
    ordered = score.sort(dim=-1, descending=True).values
    cut = ordered.gather(-1, (count - 1).clamp(0, score.size(-1) - 1))  # [..., 1]
    return up_to_cut(score, cut, count, tolerance)


def highest_positions(score: Tensor, tie_key: Tensor, eligible: Tensor, count: Tensor, tolerance: float) -> Tensor:
    """bool [B, T]: the count [B, 1] eligible positions of highest score in each row; of scores that count as equal
    those of lowest tie_key [B, T]. Scores that are not numbers count as the highest; tolerance 0 is for random numbers
    and others that are exact."""
    shuffled = tie_key.argsort(1)  # [B, T]
    score = score.double().nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    chosen = highest(score.masked_fill(~eligible, -math.inf).gather(1, shuffled), count, tolerance)
    return torch.zeros_like(eligible).scatter(1, shuffled, chosen) & eligible
