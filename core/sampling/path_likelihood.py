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
from core.sampling.generation import Window, windows
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


class Path(NamedTuple):
    """What is known of each token of a text when it is revealed; 0 at protected positions. log_probabilities float64
    [B, T]: under the rule that draws; confidence float64 [B, T]: under the model itself, without a gradient."""

    log_probabilities: Tensor
    confidence: Tensor


def log_likelihood(network: Network, tokens: Tensor, scorer: Scorer, generator: RowRandom) -> Tensor:
    """float64 [B]: log p in nats of the texts tokens int64 [B, T] of base tokens.

    Random orders follow from `generator`, one row of it for each text, as in generation, so a text's number does not
    depend on its batch. The trunk calls are counted in `network`.
    """
    return path_of_text(network, Layout(tokens, torch.zeros_like(tokens, dtype=torch.bool)), scorer,
                        generator).log_probabilities.sum(1)


def path_of_text(network: Network, text: Layout, scorer: Scorer, generator: RowRandom,
                 rule: DrawRule | None = None) -> Path:
    """`Path` of texts [B, L] of any length, as `generate` would write them around what is protected: in windows, each
    after the first with half a window of context, or in blocks with a cache. rule: None draws at temperature 1.

    With temperature 0 the log-probabilities are 0 where the most probable token stands and minus infinity elsewhere.
    """
    assert scorer.policy.remask is None, 'a text has no likelihood under a policy that masks again'
    rule, (tokens, protected) = rule or DrawRule(scorer.allowed), text
    L, length = tokens.size(1), scorer.block_length
    blocks = None if length is None else BlockNetwork(network, length, len(tokens))
    parts = windows(L, network.model.config.block_size) if length is None else [
        Window(start, min(L, start + length), start) for start in range(0, L, length)]
    found = torch.zeros(2, *tokens.shape, dtype=torch.float64, device=tokens.device)
    with network.precision():
        for number, (start, stop, first_new) in enumerate(parts):
            part = Layout(tokens[:, start:stop],
                          protected[:, start:stop] | (torch.arange(start, stop, device=tokens.device) < first_new))
            if part.protected.all():
                continue
            if blocks is not None:
                blocks.begin(tokens, start, stop)
            first = number * scorer.policy.limit(length or stop - start)  # as generation numbers its steps
            found[:, :, start:stop] += torch.stack(_follow(blocks or network, part, scorer, (generator, first), rule))
    return Path(*found)


def path_log_probabilities(network: Network, text: Layout, scorer: Scorer, generator: RowRandom) -> Tensor:
    """float64 [B, T]: the log-probability of each token of a window [B, T] when it is revealed; 0 at protected
    positions. With gradients enabled it keeps the graph of every trunk call and of the sampler head."""
    return _follow(network, text, scorer, (generator, 0), DrawRule(scorer.allowed)).log_probabilities


def _follow(network: Network, text: Layout, scorer: Scorer, numbers: tuple[RowRandom, int], rule: DrawRule) -> Path:
    """`Path` of a window [B, T], or of a block given what `network` holds before it; numbers: of the rows, and which
    number the first step has."""
    policy, mask_token_id, (generator, first) = scorer.policy, network.model.config.mask_token_id, numbers
    tokens, protected = text
    current = torch.where(protected, tokens, mask_token_id)  # [B, T]
    found = Path(*torch.zeros(2, *tokens.shape, dtype=torch.float64, device=tokens.device))
    sizes = (~protected).sum(1).tolist()
    counts, masks = Counts(policy, sizes, tokens.device), sum(sizes)
    for step in range(counts.limit):
        here = generator.at(first + step)
        prediction = Prediction(network, Open(current, current == mask_token_id, masks), rule, here, scorer.head)
        view = PolicyView(step=step, tokens=current, protected=protected, mask_token_id=mask_token_id,
                          left=counts.view(step), generator=here, prediction=prediction,
                          revealed=torch.zeros_like(protected), confidence=found.confidence, critic=None)
        masks = sum(counts.after(step))
        fill = prediction.fill(policy.reveal(view) & view.masked, truth=tokens)
        current = fill.tokens
        found = Path(found.log_probabilities + fill.log_probabilities, found.confidence + fill.confidence)
    assert current.equal(tokens), 'the policy left masks'
    return found
