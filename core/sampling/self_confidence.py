"""How sure a model is of a text: masked pseudo-likelihood, or the exact likelihood of a causal model.

Letters: B batch (rows), T sequence length, V vocabulary with the special ids, D = n_embd, N positions picked out of a
batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from core.common.drawing import allowed_log_probabilities
from core.common.randomness import Purpose, RowRandom
from model import GPT


class SelfConfidence(NamedTuple):
    """total float64 [B]: summed log-probability in nats; count int64 [B]: tokens scored; network_calls spent."""

    total: Tensor
    count: Tensor
    network_calls: int


@torch.no_grad()
def pseudo_log_likelihood(model: GPT, tokens: Tensor, scored: Tensor, allowed: Tensor, generator: RowRandom,
                          groups: int, block_length: int | None = None) -> Tensor:
    """float64 [B, T]: masked pseudo-likelihood of tokens int64 [B, T] at positions scored bool [B, T] (Salazar et al.
    2020, in groups), 0 elsewhere: `groups` network calls.

    The positions of a row are dealt at random into `groups`; each group is masked at once and its tokens are read from
    the trunk, at temperature 1, given everything else. So no token is judged while the model can see it. block_length:
    of a block model, in which a token is read given the rest of its block and the blocks before it.
    """
    rank = torch.where(scored, generator.uniform(Purpose.ORDER, tokens.size(1)), 2.0).argsort(1).argsort(1)  # [B, T]
    group = torch.where(scored, rank % groups, -1)
    found = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
    for index in range(groups):
        picked = group == index  # [B, T]
        masked = tokens.masked_fill(picked, model.config.mask_token_id)
        hidden = model.encode(masked) if block_length is None else model.encode_streams(masked, tokens, block_length)
        hidden = hidden[picked]  # [N, D]
        log_probabilities = allowed_log_probabilities(model.lm_head(hidden), allowed)  # [N, V]
        found[picked] = log_probabilities.gather(1, tokens[picked][:, None]).squeeze(1)  # [N]
    return found


def self_confidence(model: GPT, tokens: Tensor, scored: Tensor, allowed: Tensor, generator: RowRandom,
                    groups: int, block_length: int | None = None) -> SelfConfidence:
    """Summed `pseudo_log_likelihood` of each row."""
    values = pseudo_log_likelihood(model, tokens, scored, allowed, generator, groups, block_length)
    return SelfConfidence(values.sum(1), scored.sum(1), groups)


def causal_confidence(model: GPT, tokens: Tensor, scored: Tensor, allowed: Tensor) -> SelfConfidence:
    """Exact log-likelihood of a causal model at positions scored bool [B, T], each given the tokens before it.

    Position 0 has nothing before it and is not scored.
    """
    with torch.no_grad():
        log_probabilities = allowed_log_probabilities(model(tokens).logits[:, :-1], allowed)  # [B, T - 1, V]
    values = log_probabilities.gather(2, tokens[:, 1:, None]).squeeze(2)  # [B, T - 1]
    return SelfConfidence(torch.where(scored[:, 1:], values, 0.0).sum(1), scored[:, 1:].sum(1), 1)
