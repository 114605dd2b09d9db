"""Policies that follow a diffusion process in time: whether a position changes depends on the time, not on its token.

Time t runs from 1 to 0 in K equal steps and s is the next t; alpha_t is the share of revealed positions by the noise
schedule that the model was trained with. The networks here read no time (RADD, Ou et al. 2024).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from core.noise import LINEAR, NoiseSchedule
from core.sampling.policies.interface import Policy, PolicyView


class _Step(NamedTuple):
    """One of K steps: its time, alpha at this time and at the next (1 after the last step), and the largest probability
    with which a revealed position may be masked again, sigma_max = min(1, (1 - alpha_s) / alpha_t)."""

    t: float
    alpha_t: float
    alpha_s: float
    largest: float


def _steps(iterations: int, alpha: Callable[[Tensor], Tensor]) -> list[_Step]:
    times = 1 - torch.arange(iterations + 1, dtype=torch.float64) / iterations  # [K + 1], from 1 to 0
    shares = [*alpha(times[:-1]).tolist(), 1.0]
    return [_Step(t, alpha_t, alpha_s, min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0)
            for t, alpha_t, alpha_s in zip(times.tolist(), shares, shares[1:])]


def mdlm(*, iterations: int, idle_cache: bool, schedule: NoiseSchedule = LINEAR) -> Policy:
    """Ancestral sampling (MDLM, Sahoo et al. 2024): a masked position is revealed with probability
    (alpha_s - alpha_t) / (1 - alpha_t), which is 1 / (K - i) at step i of K = `iterations` of the linear schedule.

    A step that reveals nothing changes nothing, so with `idle_cache` it needs no trunk call.
    """
    steps = _steps(iterations, schedule.alpha)

    def reveal(view: PolicyView) -> Tensor:
        step = steps[view.step]
        return view.masked & (view.keys() < (step.alpha_s - step.alpha_t) / (1 - step.alpha_t))

    return Policy(lambda most: iterations, reveal, idles=idle_cache)


def first_hitting() -> Policy:
    """First-hitting sampler (Zheng et al. 2024): each trunk call reveals one uniformly chosen position of every row.

    Of n masked positions the first is unmasked at time tau_(n-1) = tau_n u^(1/n), and each is as likely to be it; so
    this is ancestral sampling in continuous time without its idle steps. A network that reads no time needs no tau.
    """
    def reveal(view: PolicyView) -> Tensor:
        return view.drawn_by_lot(view.share)

    return Policy(lambda most: most, reveal, left=lambda step, size: max(0, size - step - 1))


def _remdm(iterations: int, idle_cache: bool, alpha: Callable[[Tensor], Tensor],
           sigma: Callable[[PolicyView, float, float], float | Tensor]) -> Policy:
    """Remasking diffusion (ReMDM, Wang et al. 2025) with x drawn by the network and m the mask token:

        z_s = x or m with (1 - sigma), sigma                                          where z_t is revealed (and so x)
        z_s = x with (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), otherwise m     where z_t is masked

    sigma: of the view, t and sigma_max = min(1, (1 - alpha_s) / alpha_t); one number, or [B, T] and 0 where masked.
    """
    steps = _steps(iterations, alpha)

    def reveal(view: PolicyView) -> Tensor:
        t, alpha_t, alpha_s, largest = steps[view.step]
        chance = (alpha_s - (1 - sigma(view, t, largest)) * alpha_t) / (1 - alpha_t)
        return view.masked & ((view.keys() < chance) | (alpha_s == 1))  # all of it in the last step, despite rounding

    def remask(view: PolicyView) -> Tensor:
        step = steps[view.step]
        return view.settled & (view.remasking_keys() < sigma(view, step.t, step.largest))

    return Policy(lambda most: iterations, reveal, remask, idles=idle_cache)


def remdm_cap(*, iterations: int, idle_cache: bool, remdm_eta: float | None,
              schedule: NoiseSchedule = LINEAR) -> Policy:
    """ReMDM-cap (Wang et al. 2025): sigma = min(eta, sigma_max); eta 0.008 unless given."""
    eta = 0.008 if remdm_eta is None else remdm_eta
    return _remdm(iterations, idle_cache, schedule.alpha, lambda view, t, largest: min(eta, largest))


def remdm_rescale(*, iterations: int, idle_cache: bool, remdm_eta: float | None,
                  schedule: NoiseSchedule = LINEAR) -> Policy:
    """ReMDM-rescale (Wang et al. 2025): sigma = eta sigma_max; eta 0.015 unless given."""
    eta = 0.015 if remdm_eta is None else remdm_eta
    return _remdm(iterations, idle_cache, schedule.alpha, lambda view, t, largest: eta * largest)


def remdm_conf(*, iterations: int, idle_cache: bool, schedule: NoiseSchedule = LINEAR) -> Policy:
    """ReMDM-conf (Wang et al. 2025): sigma of position l = sigma_max exp(-psi_l) / sum of exp(-psi).

    psi is the probability that a revealed token had when it was drawn; a masked position has psi infinite, so sigma 0.
    """
    def sigma(view: PolicyView, t: float, largest: float) -> Tensor:
        weight = torch.where(view.settled, (-view.confidence.exp()).exp(), 0.0)  # [B, T]
        return largest * weight / weight.sum(1, keepdim=True).clamp(min=1e-300)

    return _remdm(iterations, idle_cache, schedule.alpha, sigma)


def remdm_loop(*, iterations: int, idle_cache: bool, remdm_eta: float | None, loop_on: float, loop_off: float,
               loop_alpha: float, schedule: NoiseSchedule = LINEAR) -> Policy:
    """ReMDM-loop (Wang et al. 2025): reveal up to the share loop_alpha by t = loop_on, hold that share until
    t = loop_off while sigma = min(eta, sigma_max) renews the tokens, then reveal the rest; eta 0.02 unless given.

    With t* the time at which the schedule has revealed loop_alpha, the process runs from 1 to t* until loop_on, waits
    there, and runs from t* to 0 from loop_off on; sigma is 0 outside the loop.
    """
    eta = 0.02 if remdm_eta is None else remdm_eta

    def alpha(times: Tensor) -> Tensor:
        held = schedule.inverse(times.new_tensor(loop_alpha))
        before, after = 1 - (1 - times) / (1 - loop_on) * (1 - held), times / loop_off * held
        return schedule.alpha(torch.where(times > loop_on, before, torch.where(times < loop_off, after, held)))

    return _remdm(iterations, idle_cache, alpha,
                  lambda view, t, largest: min(eta, largest) if loop_off < t <= loop_on else 0.0)
