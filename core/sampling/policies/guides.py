"""The guides of the policy remask, which say which tokens are wrong: a row of `GUIDES` each.

A guide gives each token a score; a higher one is remasked first. `apply_remasking_step` (sample_utils.py) does the
rest, for ratios and thresholds, and applies randomness_strength.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from core.sampling.policies.interface import PolicyView

Wrongness = Callable[[PolicyView], Tensor]  # after the step's draws -> float [B, T], in 0..1 where thresholds are to serve


class GuideRow(NamedTuple):
    """wrongness: of a view's tokens; None for a guide without a score, so that chance decides. thresholds: the defaults
    of the first and the last threshold of schedule_mode=threshold. asks_critic: it calls `view.critic`, a network call
    of the critic head or of a remasking model."""

    wrongness: Wrongness | None
    thresholds: tuple[float, float] = (0.3, 0.7)
    asks_critic: bool = False


def by_critic(view: PolicyView) -> Tensor:
    """P(wrong) by the remasking model if one is named, else by the critic head."""
    return view.critic()


def by_confidence(view: PolicyView) -> Tensor:
    """1 - the probability that a token had when it was drawn: one scale for old and new tokens."""
    return 1.0 - view.confidence.exp()


def by_critic_or_confidence(view: PolicyView) -> Tensor:
    """The critic's score if the view has a critic, else the confidence's."""
    return by_confidence(view) if view.critic is None else by_critic(view)


# Thresholds: wrongness that about 95 % of the first fill's tokens exceed, and about 5 % of those of a revised text; in
# ratio mode these are start_ratio and end_ratio. Measured on the main recipe (docs/LOG.md); a critic or a model is less
# sure.
GUIDES: dict[str, GuideRow] = {  # by the value of --guidance
    'critic': GuideRow(by_critic, (0.45, 0.85), asks_critic=True),
    'model': GuideRow(by_critic, (0.45, 0.85), asks_critic=True),
    'self': GuideRow(by_confidence),
    'random': GuideRow(None),
}
