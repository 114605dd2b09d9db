"""Exact draws of tokens from logits: which tokens can come out, how probable each was, one uniform number for each.

Letters: B batch (rows), T sequence length, V vocabulary with the special ids, N positions picked out of a batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core.common.choosing import tie_tolerance, up_to_cut
from core.common.precision import to_exact

TOKEN_TOLERANCE = tie_tolerance(torch.float32)  # a network of lower precision gives many ids exactly the same logit


@dataclass(frozen=True)
class DrawRule:
    """How tokens are drawn from logits.

    allowed: bool [V], False for ids that never come out. temperature 0 takes the most probable token. top_k None and
    top_p 1 leave the distribution whole. repetition_penalty: see `penalise_repetition`; 1 is off.
    """

    allowed: Tensor
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    @cached_property
    def forbidden(self) -> Tensor:
        """float64 [V]: 0 for allowed ids, minus infinity for the others."""
        return torch.where(to_exact(self.allowed), 0.0, -math.inf).double()

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """`allowed_log_probabilities` float64 [..., V] of logits [..., V], without the penalty on repetition."""
        return allowed_log_probabilities(to_exact(logits), self.allowed, self.temperature, self.top_k, self.top_p)


class Draws(NamedTuple):
    """tokens int64 [...]. log_probabilities float64 [...]: under the distribution that they were drawn from. confidence
    float64 [...]: under the model itself (temperature 1, nothing cut), so that all draws have one scale."""

    tokens: Tensor
    log_probabilities: Tensor
    confidence: Tensor


def allowed_ids(vocab_size: int, base_size: int, device: torch.device | str = 'cpu') -> Tensor:
    """bool [V]: the base vocabulary is allowed, the special ids after it are not."""
    return torch.arange(vocab_size, device=device) < base_size


def allowed_log_probabilities(logits: Tensor, allowed: Tensor, temperature: float = 1.0, top_k: int | None = None,
                              top_p: float = 1.0, tolerance: float = TOKEN_TOLERANCE) -> Tensor:
    """Normalised log-probabilities, float64 [..., V], of logits [..., V]; minus infinity for ids that cannot come out.

    First the temperature, then top_k, then top_p (each renormalised). Temperature 0 gives the most probable id all
    the weight. Logits that differ by at most `tolerance` count as equal; then the lowest ids come first
    (core/common/choosing.py). NaN stays NaN, so the log-probabilities of draws show that a network is broken.
    """
    log_probabilities = torch.where(to_exact(allowed), to_exact(logits), -math.inf).double()  # [..., V]
    if temperature == 0:
        best = log_probabilities.amax(-1, keepdim=True)  # [..., 1]
        return torch.where(up_to_cut(log_probabilities, best, 1, tolerance), 0.0, -math.inf) + (best - best)
    if temperature != 1:
        log_probabilities = log_probabilities / temperature
    log_probabilities = F.log_softmax(log_probabilities, dim=-1)
    if top_k is not None and top_k < logits.size(-1):
        cut = log_probabilities.topk(top_k, dim=-1).values[..., -1:]
        kept = up_to_cut(log_probabilities, cut, top_k, tolerance)
        log_probabilities = F.log_softmax(log_probabilities.masked_fill(~kept, -math.inf), dim=-1)
    return nucleus(log_probabilities, top_p, tolerance) if top_p < 1 else log_probabilities


def nucleus(log_probabilities: Tensor, top_p: float, tolerance: float) -> Tensor:
    """Log-probabilities [..., V] cut to the smallest set of ids that holds at least `top_p` (Holtzman et al. 2020), up
    to `tolerance`."""
    ordered = log_probabilities.sort(dim=-1, descending=True).values
    before = ordered.exp().cumsum(-1) - ordered.exp()  # weight of all more probable ids
    count = (before < top_p - tolerance).sum(-1, keepdim=True).clamp(min=1)  # [..., 1], the most probable id stays
    kept = up_to_cut(log_probabilities, ordered.gather(-1, count - 1), count, tolerance)
    return F.log_softmax(log_probabilities.masked_fill(~kept, -math.inf), dim=-1)


def draw_tokens(log_probabilities: Tensor, uniform: Tensor) -> Tensor:
    """int64 [...]: exact draws by inverse distribution function, one number of `uniform` [...] in (0, 1) per draw.

    Gumbel noise is not used: its rounding lowers the temperature (Zheng et al. 2024).
    """
    cumulative = log_probabilities.detach().exp().cumsum(-1)
    return _first_beyond(cumulative, cumulative[..., -1:], uniform)


def surplus(target: Tensor, draft: Tensor) -> Tensor:
    """[..., V]: the positive part of p - q, not normalised; target and draft [..., V] are log p and log q. If nothing
    is left, as with equal distributions, it is p."""
    rest = (target.exp() - draft.exp()).clamp(min=0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, target.exp())


def kept_or_drawn(target: Tensor, draft: Tensor, drafts: Tensor, uniform: tuple[Tensor, Tensor]) -> Tensor:
    """int64 [N]: tokens distributed as `target` p, made from drafts int64 [N] that were drawn from `draft` q.

    A draft x is kept with probability min(1, p(x) / q(x)). Otherwise a token is drawn from the surplus of p over q
    (Leviathan et al. 2023, Chen et al. 2023). Log-probabilities [N, V]; two uniform numbers [N] for each position.
    """
    ratio = (target - draft).gather(-1, drafts[:, None]).squeeze(-1)
    return torch.where(uniform[0].log() < ratio, drafts, draw_tokens(surplus(target, draft).log(), uniform[1]))


def _first_beyond(cumulative: Tensor, total: Tensor, uniform: Tensor) -> Tensor:
    """int64 [...]: the first id whose cumulative weight [..., V] exceeds `uniform` [...] times the total [..., 1].

    The cumulative weight rises at this id. So an id of weight zero never comes out, even with rounding. NaN: id 0.
    """
    wanted = uniform.unsqueeze(-1) * total  # [..., 1]
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(-1).remainder_(cumulative.size(-1))


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [N, V] of ids in `seen` bool [N, V] divided by `penalty` where positive, multiplied where negative
    (Keskar et al. 2019, section 4.1)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def revealed_ids(tokens: Tensor, vocab_size: int, mask_token_id: int | None) -> Tensor:
    """bool [B, V]: which ids occur among the revealed tokens of each row of tokens [B, T]."""
    seen = torch.zeros(tokens.size(0), vocab_size, dtype=torch.bool, device=tokens.device).scatter(1, tokens, True)
    if mask_token_id is not None:
        seen[:, mask_token_id] = False
    return seen


class Chosen(NamedTuple):
    """Tokens int64 [N], and what `completed` needs to find how probable they were. scores float64 [N, V]:
    log-probabilities up to a constant of each row. total [N, 1]: the sum of scores.exp(). model_scores [N, V]: the
    scores under the model itself; None if they are the same."""

    tokens: Tensor
    scores: Tensor
    total: Tensor
    model_scores: Tensor | None


def choose_tokens(logits: Tensor, rule: DrawRule, uniform: Tensor, seen: Tensor | None) -> Chosen:
    """Tokens drawn from logits [N, V] under `rule` with uniform [N]; seen [N, V] is read when repetition is
    penalised."""
    scores, model_scores = _scores(logits, rule, seen)  # [N, V]
    cumulative = scores.exp().cumsum(-1)
    total = cumulative[:, -1:]
    return Chosen(_first_beyond(cumulative, total, uniform), scores, total, model_scores)


def place_tokens(logits: Tensor, rule: DrawRule, tokens: Tensor, seen: Tensor | None) -> Chosen:
    """As `choose_tokens`, with the given tokens int64 [N] instead of drawn ones."""
    scores, model_scores = _scores(logits, rule, seen)  # [N, V]
    return Chosen(tokens, scores, scores.exp().sum(-1, keepdim=True), model_scores)


def completed(parts: Sequence[Chosen]) -> Draws:
    """The tokens of all `parts` (at least one) with their log-probabilities. While drawing, nothing waits for these."""
    tokens, scores, total = (torch.cat(columns) for columns in zip(*(part[:3] for part in parts)))
    found = scores.gather(-1, tokens[:, None]) - total.log()  # [N, 1]
    confidence = found.detach()
    if parts[0].model_scores is not None:
        model_scores = torch.cat([part.model_scores for part in parts]).detach()
        confidence = model_scores.gather(-1, tokens[:, None]) - model_scores.exp().sum(-1, keepdim=True).log()
    return Draws(tokens, found.squeeze(-1), confidence.squeeze(-1))


def draw(logits: Tensor, rule: DrawRule, uniform: Tensor, seen: Tensor | None = None) -> Draws:
    """`Draws` of logits [N, V] under `rule` with uniform [N]; seen [N, V] is read when repetition is penalised."""
    return completed([choose_tokens(logits, rule, uniform, seen)])


def _scores(logits: Tensor, rule: DrawRule, seen: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities float64 [N, V] under `rule`, and under the model itself. Each row is shifted so that its
    highest is 0. The second is None if the rule changes nothing."""
    logits = to_exact(logits)
    model_scores = logits + rule.forbidden
    model_scores = model_scores - model_scores.amax(-1, keepdim=True)
    if rule.repetition_penalty == 1 and rule.top_k is None and rule.top_p == 1 and rule.temperature != 0:
        return (model_scores, None) if rule.temperature == 1 else (model_scores / rule.temperature, model_scores)
    tolerance = min(TOKEN_TOLERANCE, tie_tolerance(logits.dtype))
    if rule.repetition_penalty != 1:
        logits = penalise_repetition(logits, seen, rule.repetition_penalty)
        scores = allowed_log_probabilities(logits, rule.allowed, rule.temperature, rule.top_k, rule.top_p, tolerance)
        return scores - scores.amax(-1, keepdim=True), model_scores
    scores = allowed_log_probabilities(model_scores, rule.allowed, rule.temperature, rule.top_k, rule.top_p, tolerance)
    return scores - scores.amax(-1, keepdim=True), model_scores
