"""Policies that follow a diffusion process in time: what befalls a position depends on the time, not on its token.

Time t runs from 1 to 0 in K equal steps and s is the next t; alpha_t is the share of revealed positions, 1 - t where
nothing else is said. The networks here read no time (RADD, Ou et al. 2024).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from core.sampling.policies.interface import Policy, PolicyView


def mdlm(*, iterations: int, idle_cache: bool) -> Policy:
    """Ancestral sampling (MDLM, Sahoo et al. 2024): a masked position is revealed with probability
    (alpha_s - alpha_t) / (1 - alpha_t), which is 1 / (K - i) at step i of K = `iterations`.

    A step that reveals nothing changes nothing, so with `idle_cache` it needs no trunk call.
    """
    def reveal(view: PolicyView) -> Tensor:
        return view.masked & (view.keys() < 1 / (iterations - view.step))

    return Policy(lambda most: iterations, reveal, idles=idle_cache)


def first_hitting() -> Policy:
    """First-hitting sampler (Zheng et al. 2024): each trunk call reveals one uniformly chosen position of every row.

    Of n masked positions the first is unmasked at time tau_(n-1) = tau_n u^(1/n), and each is as likely to be it; so
    this is ancestral sampling in continuous time without its idle steps. A network that reads no time needs no tau.
    """
    def reveal(view: PolicyView) -> Tensor:
        return view.drawn_by_lot(view.share)

    return Policy(lambda most: most, reveal, left=lambda step, size: max(0, size - step - 1))


def _remdm(iterations: int, idle_cache: bool, alpha: Callable[[float], float],
           sigma: Callable[[PolicyView, float, float], float | Tensor]) -> Policy:
    """Remasking diffusion (ReMDM, Wang et al. 2025) with x drawn by the network and m the mask token:

        z_s = x or m with (1 - sigma), sigma                                          where z_t is revealed (and so x)
        z_s = x with (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), otherwise m     where z_t is masked

    sigma: of the view, t and sigma_max = min(1, (1 - alpha_s) / alpha_t); one number, or [B, T] and 0 where masked.
    """
    def times(view: PolicyView) -> tuple[float, float, float, float]:
        t, last = 1 - view.step / iterations, view.step == iterations - 1
        alpha_t, alpha_s = alpha(t), 1.0 if last else alpha(1 - (view.step + 1) / iterations)
        return t, alpha_t, alpha_s, min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0

    def reveal(view: PolicyView) -> Tensor:
        t, alpha_t, alpha_s, largest = times(view)
        chance = (alpha_s - (1 - sigma(view, t, largest)) * alpha_t) / (1 - alpha_t)
        return view.masked & ((view.keys() < chance) | (alpha_s == 1))  # the last step leaves nothing to rounding

    def remask(view: PolicyView) -> Tensor:
        t, _, _, largest = times(view)
        return view.settled & (view.remasking_keys() < sigma(view, t, largest))

    return Policy(lambda most: iterations, reveal, remask, idles=idle_cache)


def remdm_cap(*, iterations: int, idle_cache: bool, remdm_eta: float | None) -> Policy:
    """ReMDM-cap (Wang et al. 2025): sigma = min(eta, sigma_max); eta 0.008 unless given."""
    eta = 0.008 if remdm_eta is None else remdm_eta
    return _remdm(iterations, idle_cache, lambda t: 1 - t, lambda view, t, largest: min(eta, largest))


def remdm_rescale(*, iterations: int, idle_cache: bool, remdm_eta: float | None) -> Policy:
    """ReMDM-rescale (Wang et al. 2025): sigma = eta sigma_max; eta 0.015 unless given."""
    eta = 0.015 if remdm_eta is None else remdm_eta
    return _remdm(iterations, idle_cache, lambda t: 1 - t, lambda view, t, largest: eta * largest)


def remdm_conf(*, iterations: int, idle_cache: bool) -> Policy:
    """ReMDM-conf (Wang et al. 2025): sigma of position l = sigma_max exp(-psi_l) / sum of exp(-psi).

    psi is the probability that a revealed token had when it was drawn; a masked position has psi infinite, so sigma 0.
    """
    def sigma(view: PolicyView, t: float, largest: float) -> Tensor:
        weight = torch.where(view.settled, (-view.confidence.exp()).exp(), 0.0)  # [B, T]
        return largest * weight / weight.sum(1, keepdim=True).clamp(min=1e-300)

    return _remdm(iterations, idle_cache, lambda t: 1 - t, sigma)


def remdm_loop(*, iterations: int, idle_cache: bool, remdm_eta: float | None, loop_on: float, loop_off: float,
               loop_alpha: float) -> Policy:
    """ReMDM-loop (Wang et al. 2025): reveal up to the share loop_alpha by t = loop_on, hold that share
    until t = loop_off while sigma = min(eta, sigma_max) renews the tokens, then reveal the rest; eta 0.02 unless given.

    alpha_t = loop_alpha (1 - t) / (1 - loop_on), then loop_alpha, then 1 - t (1 - loop_alpha) / loop_off; sigma is 0
    outside the loop.
    """
    eta = 0.02 if remdm_eta is None else remdm_eta

    def alpha(t: float) -> float:
        if t < loop_off:
            return 1 - t * (1 - loop_alpha) / loop_off
        return min(loop_alpha, loop_alpha * (1 - t) / (1 - loop_on))

    return _remdm(iterations, idle_cache, alpha,
                  lambda view, t, largest: min(eta, largest) if loop_off < t <= loop_on else 0.0)
