"""The losses of one micro-step: main, sampler head and critic.

One trunk call serves all of them, the critic's filled-in text apart. Losses are sums of weighted cross-entropies whose
weights are shares of the global batch, so the losses of micro-steps and ranks add up.

Letters: B rows, T sequence length, V vocabulary, D width, N predicted positions, C sampler_context.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.batches import Batch
from core.randomness import RowRandom
from core.schedule import Stage
from model import GPT
from sample_utils import DrawRule, build_critic_artifacts_from_logits, prepare_sampler_inputs


class Losses(NamedTuple):
    """Scalars in nats. total = main + sampler + alpha * critic; a part that is not active is None."""

    total: Tensor
    main: Tensor
    sampler: Tensor | None
    critic: Tensor | None


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, allowed: Tensor) -> Tensor:
    """Sum over N of weights * CE, the softmax taken over `allowed` ids only, in float32; exactly 0 for zero weights.

    logits [N, V], targets int64 [N], weights float32 [N], allowed bool [V].
    """
    logits = logits.float().masked_fill(~allowed, -torch.inf)  # [N, V]
    return (F.cross_entropy(logits, targets, reduction='none') * weights).sum()


class Objective(nn.Module):
    """The losses of a model; `allowed` bool [V] are the ids that text consists of (the base vocabulary)."""

    def __init__(self, model: GPT, allowed: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer('allowed', allowed, persistent=False)
        self.trunk_and_sampler_losses = self._trunk_and_sampler_losses
        self.critic_loss = self._critic_loss

    def compile_parts(self) -> None:
        """Replace the two network passes by compiled ones; what lies between them (drawing tokens) stays eager."""
        self.trunk_and_sampler_losses = torch.compile(self._trunk_and_sampler_losses, dynamic=False)
        self.critic_loss = torch.compile(self._critic_loss, dynamic=False)

    def forward(self, batch: Batch, stage: Stage, alpha: float, generator: RowRandom) -> Losses:
        """Losses of one micro-step. `generator` draws the tokens that the critic judges."""
        main, sampler, hidden_states = self.trunk_and_sampler_losses(batch, stage.sampler)
        total = main if sampler is None else main + sampler
        if not stage.critic:
            return Losses(total, main, sampler, None)
        rows = slice(None, None, self.model.config.critic_row_stride)
        artifacts = build_critic_artifacts_from_logits(
            self.model, batch.inputs[rows], batch.targets[rows], hidden_states.detach()[rows], DrawRule(self.allowed),
            RowRandom(generator.seed, generator.iteration, generator.rows[rows]), use_sampler_head=stage.sampler)
        critic = self.critic_loss(artifacts.tokens, artifacts.labels, artifacts.labelled * batch.critic_share)
        return Losses(total + alpha * critic, main, sampler, critic)

    def _trunk_and_sampler_losses(self, batch: Batch, with_sampler: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """(main loss, sampler loss or None, hidden states [B, T, D]) from one trunk call."""
        hidden_states = self.model.encode(batch.inputs)  # [B, T, D]
        hidden = hidden_states.flatten(0, 1).index_select(0, batch.positions)  # [N, D]
        targets = batch.targets.flatten().index_select(0, batch.positions)  # [N]
        logits = self.model.lm_head(hidden)  # [N, V]
        main = weighted_cross_entropy(logits, targets, batch.main_weights, self.allowed)
        if not with_sampler:
            return main, None, hidden_states
        sampler_input = prepare_sampler_inputs(hidden, batch.neighbours, self.model.neighbour_embedding())
        logits = self.model.sampler_head(sampler_input, logits, self.model.lm_head.weight)  # [N, V]
        return main, weighted_cross_entropy(logits, targets, batch.mean_weights, self.allowed), hidden_states

    def _critic_loss(self, tokens: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Binary cross-entropy of the wrongness of tokens [B, T], weighted per position: a second trunk call."""
        logits = self.model.critic_logits(self.model.encode(tokens)).float()  # [B, T]
        return (F.binary_cross_entropy_with_logits(logits, labels, reduction='none') * weights).sum()
