"""Policies that reveal as many positions as the network is sure of, at least one per row and trunk call."""

import torch
from torch import Tensor

from core.sampling.policies.interface import Policy, PolicyView
from core.sampling.policies.ordered import entropy_of


def _sorted(score: Tensor, masked: Tensor) -> Tensor:
    """float64 [B, T]: the scores of masked positions in falling order, minus infinity after them."""
    return score.masked_fill(~masked, -torch.inf).sort(dim=1, descending=True).values


def entropy_bounded(*, entropy_bound: float) -> Policy:
    """EB-sampler (Ben-Hamu et al. 2025): positions by rising entropy, the largest group U with
    sum of H(l) over U - max of H(l) over U <= gamma. This bounds how much the group's tokens can depend on each other.
    gamma in nats is `entropy_bound`."""
    def reveal(view: PolicyView) -> Tensor:
        certainty = -view.prediction.measure(entropy_of)  # [B, T]
        entropies = -_sorted(certainty, view.masked)
        bound = entropy_bound + view.prediction.tolerance  # a sum that exceeds it by rounding only counts as equal
        fits = (entropies.cumsum(1).roll(1, 1) <= bound) & entropies.isfinite()  # all before it: sum - max
        return view.highest(certainty, view.masked, fits[:, 1:].sum(1, keepdim=True) + 1)

    return Policy(lambda most: most, reveal, asks=True)


def fast_dllm_threshold(*, confidence_threshold: float) -> Policy:
    """Confidence-aware parallel decoding (Fast-dLLM, Wu et al. 2025): every position whose drawn token has at least the
    probability `confidence_threshold`, and the most probable one in any case."""
    def reveal(view: PolicyView) -> Tensor:
        confidence = view.prediction.candidates.confidence  # [B, T]
        best = view.highest(confidence, view.masked, torch.ones_like(view.size))
        return best | view.masked & (confidence.exp() >= confidence_threshold - view.prediction.tolerance)

    return Policy(lambda most: most, reveal, asks=True)


def fast_dllm_factor(*, parallel_factor: float) -> Policy:
    """Factor-based parallel decoding (Fast-dLLM, Wu et al. 2025): with the probabilities c_(1) >= c_(2) >= ... of the
    drawn tokens, the largest n with (n + 1) (1 - c_(n)) < f, and at least one; f is `parallel_factor`."""
    def reveal(view: PolicyView) -> Tensor:
        confidence = view.prediction.candidates.confidence  # [B, T]
        ordered = _sorted(confidence, view.masked).exp()
        group = torch.arange(2, ordered.size(1) + 2, device=ordered.device)  # n + 1
        least = 1 - parallel_factor / group + view.prediction.tolerance  # an equal probability does not fit
        fits = (ordered > least) & (ordered > 0)
        largest = torch.where(fits, group - 1, 1).amax(1, keepdim=True)
        return view.highest(confidence, view.masked, largest)

    return Policy(lambda most: most, reveal, asks=True)
