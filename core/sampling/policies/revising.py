"""Policies that fill every mask at each step and take back the worst tokens, also old ones."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from core.sampling.policies.guides import Wrongness
from core.sampling.policies.interface import ROUNDING, Policy, PolicyView
from sample_utils import apply_remasking_step


def remask_policy(levels: Sequence[float], mode: Literal['ratio', 'threshold'], randomness_strength: float,
                  wrongness: Wrongness | None, calibrate: Callable[[Tensor], Tensor] | None = None) -> Policy:
    """Fill everything, then remask by schedule: `levels` gives one remasking each, and one prediction follows the last.

    wrongness: the guide's (core/sampling/policies/guides.py), None for chance. calibrate: maps wrongness to error
    rates; for thresholds only, since it may make unequal values equal. If chance chooses all positions, no guide is
    asked.
    """
    assert calibrate is None or mode == 'threshold'
    by_lot = mode == 'ratio' and randomness_strength == 1

    def remask(view: PolicyView) -> Tensor:
        found = None if by_lot or wrongness is None else wrongness(view)
        if found is not None and calibrate is not None:
            found = calibrate(found)
        return apply_remasking_step(view.protected, found, levels[view.step], view.generator, mode=mode,
                                    randomness_strength=randomness_strength, tolerance=view.prediction.tolerance)

    def left(step: int, size: int) -> int:
        counts = [math.floor(size * level + 0.5) for level in levels[:step + 1]]
        return counts[-1] if step < len(levels) and all(counts) else 0  # a row once without masks is finished

    return Policy(lambda most: len(levels) + 1, lambda view: None, remask, left if mode == 'ratio' else None, asks=True)


def _path_planning(iterations: int, planner_eta: float, with_critic: bool) -> Policy:
    """Path planning (P2, Peng et al. 2025): after step i the floor(n (1 - kappa)) worst of n tokens are masked again,
    with kappa = (i + 1) / K. The number is rounded down, as in the authors' program, so that the first step keeps a
    token.

    A new token's score is its log-probability under the denoiser. An old token's score is eta times the planner's. With
    eta 0 no old token is taken back; above 1, old tokens are taken back more readily than new ones.
    """
    scale = max(1.0, planner_eta)  # of scores that follow the logits with a slope of at most 1

    def remask(view: PolicyView) -> Tensor:
        score = view.confidence  # [B, T]
        if with_critic:
            right = (1 - view.critic()).clamp(min=1e-300).log()
            score = torch.where(view.settled, right, score)
        score = torch.where(view.settled, planner_eta * score, score)
        mine = ~view.protected if planner_eta > 0 else view.revealed
        return view.highest(-score / scale, mine, view.left)

    return Policy(lambda most: iterations, lambda view: None, remask,
                  left=lambda step, size: size * (iterations - 1 - step) // iterations)


def p2_self(*, iterations: int, planner_eta: float) -> Policy:
    """P2 with the denoiser as planner (Peng et al. 2025, self-planning). An old token's score is the log-probability
    that it had when it was drawn, since a denoiser that copies revealed tokens cannot judge them afterwards."""
    return _path_planning(iterations, planner_eta, with_critic=False)


def p2_critic(*, iterations: int, planner_eta: float) -> Policy:
    """P2 with the critic as planner (Peng et al. 2025, trained planning): score log(1 - wrongness) for old
    tokens."""
    return _path_planning(iterations, planner_eta, with_critic=True)


def token_critic(*, iterations: int, selection_noise: float) -> Policy:
    """Token-Critic (Lezama et al. 2022): after step i the ceil(n cos(pi r / 2)) most wrong of n tokens are masked
    again, r = (i + 1) / K; wrong is the critic's probability + noise c (1 - r) u, u uniform on (-1/2, 1/2)."""
    def left(step: int, size: int) -> int:
        return max(0, math.ceil(size * math.cos(math.pi / 2 * (step + 1) / iterations) - ROUNDING))

    def remask(view: PolicyView) -> Tensor:
        noise = selection_noise * (1 - (view.step + 1) / iterations) * (view.remasking_keys() - 0.5)
        return view.highest(view.critic() + noise, ~view.protected, view.left)

    return Policy(lambda most: iterations, lambda view: None, remask, left=left)
