"""Choices by score that do not depend on rounding.

A network's scores have rounding errors. These depend on the other rows of the batch, because the order of a sum depends
on the shape. So scores that are equal in theory differ a little. In a fully masked row with rotary positions all scores
are equal in theory. If we simply took the highest scores, rounding errors would decide.

The rule here: let c be the score of rank `count`. Scores above c + tolerance are taken; scores below c - tolerance are
not. Scores between these two borders fill up the count, in an order that does not depend on scores.

How safe is this? Let d be the largest rounding error. It moves each score by at most d, so it moves c and the borders
by at most d too. A choice changes only if a score crosses a border. Such a score is within 2 d of the border. The
tolerance is far above d, so scores that are equal in theory always lie between the borders. Only another score may
happen to lie at a border. Its probability is 2 d times the density of scores there: about 1e-6 for a choice in float32.

Other rules are worse. A grid of scores would have many borders; this rule has two. Groups of scores that are closer
than the tolerance would have no borders inside. But with many scores the groups merge: in bfloat16 all positions of a
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
    """`tie_tolerance` of the dtype in which a network computes with `tensor`, a weight or a hidden state: autocast's,
    if that is on."""
    device = tensor.device.type
    return tie_tolerance(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype)


def up_to_cut(score: Tensor, cut: Tensor, count: Tensor | int, tolerance: float) -> Tensor:
    """bool [..., N]: the `count` highest of score [..., N]. count: an int, or int64 [..., 1]. cut [..., 1]: the score
    of rank `count`. Of the scores within `tolerance` of the cut, those that come first in the row are taken."""
    above = score > cut + tolerance
    near = (score >= cut - tolerance) & ~above
    return above | near & (near.cumsum(-1) <= count - above.sum(-1, keepdim=True))


def highest(score: Tensor, count: Tensor, tolerance: float) -> Tensor:
    """bool [..., N]: the count int64 [..., 1] highest scores, by `up_to_cut`; all if count is N or more, none if 0."""
    ordered = score.sort(dim=-1, descending=True).values
    cut = ordered.gather(-1, (count - 1).clamp(0, score.size(-1) - 1))  # [..., 1]
    return up_to_cut(score, cut, count, tolerance)


def highest_positions(score: Tensor, tie_key: Tensor, eligible: Tensor, count: Tensor, tolerance: float) -> Tensor:
    """bool [B, T]: the count [B, 1] eligible positions with the highest scores in each row. Among scores that count as
    equal, the lowest tie_key [B, T] wins. NaN counts as the highest score. Use tolerance 0 for random numbers and other
    exact scores."""
    shuffled = tie_key.argsort(1)  # [B, T]
    score = score.double().nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    chosen = highest(score.masked_fill(~eligible, -math.inf).gather(1, shuffled), count, tolerance)
    return torch.zeros_like(eligible).scatter(1, shuffled, chosen) & eligible
