"""Sampling policies: which masked positions a step reveals and which positions it masks again.

The loop in core/generation.py owns the network, calls it and counts the calls. A policy is a pair of pure functions of
what the loop shows it; a new one is a function that builds the pair and a row in `POLICIES`.

Letters: B rows, T window length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from core.randomness import RowRandom
from model import GPT
from sample_utils import apply_remasking_step


@dataclass(frozen=True)
class PolicyView:
    """What a policy sees at one step.

    step 0 .. predictions - 1; tokens int64 [B, T] and protected bool [B, T]; mask_token_id; generator: the rows'
    random numbers of this step; model and hidden_states [B, T, D]: the last trunk call's, for policies that read
    probabilities; confidence float64 [B, T]: each token's log-probability when it was drawn; critic: a call that gives
    the wrongness [B, T] of `tokens` and counts itself, None without a critic.
    """

    step: int
    tokens: Tensor
    protected: Tensor
    mask_token_id: int
    generator: RowRandom
    model: GPT
    hidden_states: Tensor
    confidence: Tensor
    critic: Callable[[], Tensor] | None

    @property
    def masked(self) -> Tensor:
        """bool [B, T]."""
        return self.tokens == self.mask_token_id


class Policy(NamedTuple):
    """predictions: the most trunk calls per window. reveal: the positions to fill after the trunk call, bool [B, T],
    None for every masked one. remask: the positions to mask again, bool [B, T]; it is not asked after the last step,
    and a row without masks after it is finished."""

    predictions: int
    reveal: Callable[[PolicyView], Tensor | None]
    remask: Callable[[PolicyView], Tensor]


def remask_policy(levels: Sequence[float], mode: Literal['ratio', 'threshold'], randomness_strength: float,
                  intelligent: bool) -> Policy:
    """Fill everything, then remask by schedule: `levels` gives one remasking each, and one prediction follows the last.

    Guidance in this order of preference: the critic, self-confidence (1 - the probability that a token had when it was
    drawn, one scale for old and new tokens), none.
    """
    def remask(view: PolicyView) -> Tensor:
        wrongness = None
        if view.critic is not None:
            wrongness = view.critic()
        elif intelligent:
            wrongness = 1.0 - view.confidence.exp()
        return apply_remasking_step(view.protected, wrongness, levels[view.step], view.generator, mode=mode,
                                    randomness_strength=randomness_strength)

    return Policy(len(levels) + 1, lambda view: None, remask)


POLICIES: dict[str, Callable[..., Policy]] = {'remask': remask_policy}
