"""Choices by score that do not depend on rounding.

A network's scores carry a rounding error that depends on the other rows of the batch, because other shapes are summed
in another order. So scores that are equal in theory differ a little. In a fully masked row with rotary positions all
scores are equal in theory. A plain choice of the highest scores would then be a choice by rounding error.

The rule here: let c be the score of rank `count`. Scores above c + tolerance are taken, scores below c - tolerance are
not. Those in between fill up the count, in an order that does not depend on scores. If each score moves by at most d,
so does c. Hence a choice can change only if a score lies within 2 d of c + tolerance or of c - tolerance. The tolerance
is far above d, so equal scores always lie in between. What remains is a score that happens to lie at one of the two
borders. Its probability is 2 d times the density of scores there, about 1e-6 a choice in float32. Some such border is
needed between any two different choices. A grid would have many borders; this rule has two. Groups of neighbours
closer than the tolerance would have none inside, but with many scores such groups merge: in bfloat16 all positions of a
row would count as equal.

Thresholds follow the same idea: a score within the tolerance of a threshold counts as equal to it.
"""

import math

import torch
from torch import Tensor


def tie_tolerance(dtype: torch.dtype) -> float:
    """Scores of a network that computes in `dtype` count as equal if they differ by at most this. It is the square root
    of the type's precision: 3.5e-4 in float32, 0.09 in bfloat16. That is far above the rounding error, and far below a
    difference that matters. A score's slope in the logits should be at most about 1."""
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
    those of lowest tie_key [B, T]. NaN counts as the highest score. Use tolerance 0 for random numbers and other
    exact scores."""
    shuffled = tie_key.argsort(1)  # [B, T]
    score = score.double().nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    chosen = highest(score.masked_fill(~eligible, -math.inf).gather(1, shuffled), count, tolerance)
    return torch.zeros_like(eligible).scatter(1, shuffled, chosen) & eligible
