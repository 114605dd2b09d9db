"""Policies that reveal a fixed number of positions per trunk call. They differ in which positions come first."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from core.sampling.policies.interface import ROUNDING, Policy, PolicyView, equal_shares, gumbel


def _best_first(iterations: int, score: Callable[[PolicyView], Tensor]) -> Policy:
    """Reveal an equal share of the positions at each step, those of highest score [B, T] first."""
    def reveal(view: PolicyView) -> Tensor:
        return view.highest(score(view), view.masked, view.share)

    return Policy(lambda most: min(iterations, most), reveal, left=equal_shares(iterations))


def random(*, iterations: int) -> Policy:
    """Uniformly random order, k = n / iterations positions at a time (LLaDA's random remasking, Nie et al. 2025; the
    parallel form of the first-hitting sampler, Zheng et al. 2024)."""
    return Policy(lambda most: min(iterations, most), lambda view: view.drawn_by_lot(view.share),
                  left=equal_shares(iterations))


def left_to_right(*, iterations: int) -> Policy:
    """The first k = n / iterations masked positions of each row."""
    def reveal(view: PolicyView) -> Tensor:
        return view.masked & (view.masked.cumsum(1) <= view.share)

    return Policy(lambda most: min(iterations, most), reveal, left=equal_shares(iterations))


def llada(*, iterations: int) -> Policy:
    """Low-confidence remasking (LLaDA, Nie et al. 2025): a token is drawn for every masked position. The k most
    probable of these tokens stay; the others are masked again."""
    return _best_first(iterations, lambda view: view.prediction.candidates.confidence)


def top_probability(*, iterations: int) -> Policy:
    """Highest maximum probability first (an order of Kim et al. 2025): the k positions of largest p(first token). It is
    `llada` with the most probable token instead of a drawn one, so the order depends on no draw."""
    return _best_first(iterations, lambda view: view.prediction.measure(lambda found: found.amax(-1)))


def margin(*, iterations: int) -> Policy:
    """Top probability margin (Kim et al. 2025): the k positions of largest p(first token) - p(second token)."""
    def gap(log_probabilities: Tensor) -> Tensor:
        first, second = log_probabilities.topk(2, dim=-1).values.exp().unbind(-1)  # [N]
        return first - second

    return _best_first(iterations, lambda view: view.prediction.measure(gap))


def entropy_of(log_probabilities: Tensor) -> Tensor:
    """Entropies [N] in nats of log-probabilities [N, V], some of them minus infinity."""
    return torch.special.entr(log_probabilities.exp()).sum(-1)


def entropy(*, iterations: int) -> Policy:
    """Lowest entropy first (Dream, Ye et al. 2025; an order of Kim et al. 2025): the k positions of least H(p)."""
    return _best_first(iterations, lambda view: -view.prediction.measure(entropy_of))


def maskgit(*, iterations: int, choice_temperature: float) -> Policy:
    """MaskGIT (Chang et al. 2022): of n positions floor(n cos(pi r / 2)) stay masked after step i, r = (i + 1) / K.

    The positions of highest log p + c (1 - r) g are revealed, where p is the probability of the token drawn there, g is
    Gumbel noise and c the choice temperature. Each of the K = min(iterations, n) steps reveals at least one position.
    """
    def left(step: int, size: int) -> int:
        steps, stay = min(iterations, size), size
        for turn in range(min(step + 1, steps)):
            wanted = math.floor(size * math.cos(math.pi / 2 * (turn + 1) / steps) + ROUNDING)
            stay = max(min(wanted, stay - 1), steps - 1 - turn)
        return stay if step < steps else 0

    def reveal(view: PolicyView) -> Tensor:
        ratio = (view.step + 1) / view.size.clamp(min=1, max=iterations).double()  # [B, 1]
        noise = choice_temperature * (1 - ratio) * gumbel(view.keys())
        return view.highest(view.prediction.candidates.confidence + noise, view.masked, view.share)

    return Policy(lambda most: min(iterations, most), reveal, left=left)


def strided(*, iterations: int) -> Policy:
    """Dilated groups for any number of trunk calls (after DUS, Luxembourg et al. 2025). There are K = min(iterations,
    n) groups; group r holds the positions whose rank is r modulo K. So for K >= 2 no two positions of a group are
    adjacent.

    Groups come in the order of the bit-reversed r (van der Corput), so each is far from those before it. For K = 2, 4,
    8 ... the distances between revealed positions halve, as those of `dilated` do.
    """
    def left(step: int, size: int) -> int:
        groups = min(iterations, size)
        order = sorted(range(groups), key=lambda number: f'{number:b}'[::-1].ljust(groups.bit_length(), '0'))
        return size - sum(len(range(group, size, groups)) for group in order[:step + 1])

    def reveal(view: PolicyView) -> Tensor:
        rank = (~view.protected).cumsum(1) - 1  # [B, T], among the positions to fill
        groups = view.size.clamp(min=1, max=iterations)  # [B, 1]
        number = torch.arange(min(iterations, view.tokens.size(1)), device=rank.device)  # [K]
        reversed_bits = sum((number >> bit & 1) / 2 ** (bit + 1) for bit in range(view.tokens.size(1).bit_length()))
        turn = torch.where(number < groups, reversed_bits, 1.0).argsort(1).argsort(1)  # [B, K], 1 comes after all
        return view.masked & (turn.gather(1, rank % groups) == view.step)

    return Policy(lambda most: min(iterations, most), reveal, left=left)


def dilated() -> Policy:
    """Dilated groups (DUS, Luxembourg et al. 2025): of n positions, trunk call t of R = ceil(log2 n) reveals those
    whose rank is a multiple of the stride 2^(R - t) and that are still masked; no two of a group are adjacent.

    For n a power of 2 the stride is the paper's n / 2^t with base 2.
    """
    def rounds(most: int) -> int:
        return max(1, (most - 1).bit_length())

    def left(step: int, size: int) -> int:
        return size - len(range(0, size, 2 ** max(0, rounds(size) - 1 - step)))

    def reveal(view: PolicyView) -> Tensor:
        rank = (~view.protected).cumsum(1) - 1  # [B, T], among the positions to fill
        total = sum((view.size > 2 ** power).long() for power in range(view.tokens.size(1).bit_length())).clamp(min=1)
        stride = 2 ** (total - 1 - view.step).clamp(min=0)  # [B, 1]
        return view.masked & (rank % stride == 0)

    return Policy(rounds, reveal, left=left)
