"""Exact likelihood of text under deterministic reveal policies (DUEL, arXiv 2603.01367).

If a policy chooses positions from revealed tokens and probabilities only, its path through a text is fixed. Run it on
the text itself, place the true tokens where it reveals them, and add up their log-probabilities given the tokens placed
before:

    log p(x) = sum over steps k of log q(x at the positions of step k | x at the positions of steps 0 .. k - 1)

Each factor is a distribution over the tokens of its step, so p is a distribution over all texts of a length. -log p is
the exact negative log-likelihood of the sampler that draws by this policy at temperature 1. Without the sampler head a
factor is a product of the trunk's marginals; with it, a product of the head's conditionals, wave by wave. The path uses
the sampler's own policies, random keys and fill, with tokens placed instead of drawn. The likelihood of a block model
is the product over its blocks, each given the text before it.

Letters: B rows of a batch, T window length, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from core.common.drawing import DrawRule
from core.common.randomness import RowRandom
from core.sampling.block_network import BlockNetwork
from core.sampling.network import Network
from core.sampling.policies import Counts, Open, Policy, PolicyView, Prediction
from core.sampling.prompt import Layout
from sample_utils import Head


class Scorer(NamedTuple):
    """How text is scored. policy: of a deterministic row of POLICIES; head: what fills; allowed bool [V]: the ids of
    the softmax; block_length: of a block model that writes in blocks, None for whole windows."""

    policy: Policy
    head: Head
    allowed: Tensor
    block_length: int | None = None


def log_likelihood(network: Network, tokens: Tensor, scorer: Scorer, generator: RowRandom) -> Tensor:
    """float64 [B]: log p in nats of the texts tokens int64 [B, T] of base tokens.

    Random orders follow from `generator`, one row of it for each text, as in generation, so a text's number does not
    depend on its batch. The trunk calls are counted in `network`.
    """
    assert scorer.policy.remask is None, 'a text has no likelihood under a policy that masks again'
    with network.precision():
        if scorer.block_length is None:
            return path_log_probabilities(network, _unprotected(tokens), scorer, generator).sum(1)
        total, blocks = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device), \
            BlockNetwork(network, scorer.block_length, len(tokens))
        for number, start in enumerate(range(0, tokens.size(1), scorer.block_length)):
            block = tokens[:, start:start + scorer.block_length]
            blocks.begin(tokens, start, start + block.size(1))
            first = number * scorer.policy.limit(scorer.block_length)  # as `write_blocks` numbers its steps
            total = total + path_log_probabilities(blocks, _unprotected(block), scorer, generator, first).sum(1)
        return total


def _unprotected(tokens: Tensor) -> Layout:
    return Layout(tokens, torch.zeros_like(tokens, dtype=torch.bool))


def path_log_probabilities(network: Network, text: Layout, scorer: Scorer, generator: RowRandom,
                           first: int = 0) -> Tensor:
    """float64 [B, T]: the log-probability of each token of a window [B, T] when it is revealed; 0 at protected
    positions. Of a block too, given the text that `network` holds before it.

    With gradients enabled, the result keeps the graph of every trunk call and of the sampler head. Steps are numbered
    from `first`.
    """
    policy, mask_token_id, rule = scorer.policy, network.model.config.mask_token_id, DrawRule(scorer.allowed)
    tokens, protected = text
    current = torch.where(protected, tokens, mask_token_id)  # [B, T]
    found = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
    sizes = (~protected).sum(1).tolist()
    counts, masks = Counts(policy, sizes, tokens.device), sum(sizes)
    for step in range(counts.limit):
        numbers = generator.at(first + step)
        prediction = Prediction(network, Open(current, current == mask_token_id, masks), rule, numbers, scorer.head)
        view = PolicyView(step=step, tokens=current, protected=protected, mask_token_id=mask_token_id,
                          left=counts.view(step), generator=numbers, prediction=prediction,
                          revealed=torch.zeros_like(protected), confidence=found.detach(), critic=None)
        masks = sum(counts.after(step))
        fill = prediction.fill(policy.reveal(view) & view.masked, truth=tokens)
        current, found = fill.tokens, found + fill.log_probabilities
    assert current.equal(tokens), 'the policy left masks'
    return found
