"""Verified drafts: the sampler head drafts the rest of a block, and one call of the same trunk at blocks of one checks
the draft (speculative sampling, Leviathan et al. 2023, Chen et al. 2023).

From left to right, a draft x_i from q is kept with probability min(1, p(x_i) / q(x_i)). The first refused token is
drawn again from the normalised positive part of p - q, and the tokens after it are drafted again, from the hidden states of
the block's first draft. So a block costs one call to draft and one for each check, and the text has exactly the
distribution of the model at blocks of one, however good the drafts are. Better drafts only save calls.

Letters: B rows, W positions of the block in work, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from core.common.drawing import draw_tokens, surplus
from core.common.precision import to_exact
from core.common.randomness import Purpose, RowRandom
from core.sampling.block_network import BlockNetwork
from core.sampling.generation import Generation, GenerationSettings, WindowRun
from core.sampling.network import LOGITS, Network, Soundness
from core.sampling.prompt import Layout
from core.sampling.trace import Watch
from model import GPT
from sample_utils import FillTask, logits_in_turn, neighbour_tokens, prepare_sampler_inputs

ROUNDS = 1 << 10  # steps that the random numbers of a block are numbered within; a block has fewer positions


class Checked(NamedTuple):
    """tokens int64 [B, W]: the block with the kept drafts and the token that replaced the first refused one. kept int64
    [B]: how many of its positions are final now. confidence float64 [B, W]: under the model at blocks of one."""

    tokens: Tensor
    kept: Tensor
    confidence: Tensor


def write_verified(network: Network, layout: Layout, settings: GenerationSettings, generator: RowRandom,
                   watch: Watch | None) -> Generation:
    """Write the masked positions of `layout` [B, L] with the distribution of the model at blocks of one. The sampler
    head drafts them in blocks of `settings.block_length`, then they are verified. Prompts must be prefixes."""
    with network.precision():
        return _write(network, Layout(*map(to_exact, layout)), settings, generator, watch)


def _write(network: Network, layout: Layout, settings: GenerationSettings, generator: RowRandom,
           watch: Watch | None) -> Generation:
    whole, b, (rows, length) = Generation.of(layout), settings.block_length, layout.tokens.shape
    drafting, checking = BlockNetwork(network, b, rows), BlockNetwork(network, 1, rows, spare=2 * b)
    for number, start in enumerate(range(0, length, b)):
        stop = min(length, start + b)
        protected = layout.protected[:, start:stop]
        window = WindowRun(number, start, protected, generator, watch, Soundness(protected.device))
        made = whole.part(start, stop)
        window.tell(0, ROUNDS, 'start', made)
        if bool(protected.all()):
            continue
        for one in (drafting, checking):
            one.begin(whole.tokens, start, stop)
        whole = whole.with_part(start, _write_block(drafting, checking, settings, window, made))
    return whole


def _write_block(drafting: BlockNetwork, checking: BlockNetwork, settings: GenerationSettings, window: WindowRun,
                 made: Generation) -> Generation:
    """Draft and check until every row has settled the block."""
    W, settled, hidden = made.tokens.size(1), window.fixed.sum(1), None  # settled [B], a prompt is a prefix
    place, mask = torch.arange(W, device=made.tokens.device), drafting.model.config.mask_token_id
    for number in range(W):
        if int(settled.min()) == W:  # the host must know when to end
            break
        numbers, open = window.numbers(number, ROUNDS), place >= settled[:, None]  # [B, W]
        noisy = made.tokens.masked_fill(open, mask)
        drafts, draft_scores = noisy.masked_fill(open, 0), None
        if int(settled.min()) < W - 1:  # the last position needs no draft
            hidden = drafting.encode(noisy) if hidden is None else hidden  # [B, W, D]
            task = FillTask(noisy, hidden, settings.rule, numbers, open, left_context=drafting.left_context)
            fill = drafting.filler('left_to_right').fill(task)
            drafts, made = fill.tokens, made._replace(waves=made.waves + fill.statistics.waves)
            draft_scores = draft_log_probabilities(drafting.model, task, drafts)
        logits = to_exact(checking.model.lm_head(checking.predict_each(drafts)))  # [B, W, V]
        window.soundness.look_at(LOGITS, logits)
        window.soundness.require()
        checked = check(settings.rule.log_probabilities(logits), draft_scores, drafts, settled, numbers)
        changed = open & (place < checked.kept[:, None])
        made = made._replace(tokens=torch.where(changed, checked.tokens, noisy),
                             confidence=torch.where(changed, checked.confidence, made.confidence))
        settled = checked.kept
        window.tell(number, ROUNDS, 'predict', made, changed)
    return made


def draft_log_probabilities(model: GPT, task: FillTask, drafts: Tensor) -> Tensor:
    """float64 [B, W, V]: the head's distribution of each of the drafts int64 [B, W] of `task`, given the drafts on its
    left. If the head reads rows, at the task's positions only."""
    if model.config.reads_row:
        scores = torch.zeros(drafts.numel(), task.rule.allowed.numel(), dtype=torch.float64, device=drafts.device)
        for part, logits in logits_in_turn(model, task, drafts, task.positions):
            scores[part] = task.rule.log_probabilities(logits)
        return scores.view(*drafts.shape, -1)
    (B, W), window, mask = drafts.shape, model.config.sampler_window, model.config.mask_token_id
    wide, before = (FillTask(tokens, task.hidden_states, task.rule, task.generator, left_context=task.left_context)
                    .padded(window, mask) for tokens in (drafts, task.tokens))
    wide, before = wide[:, :window.left + W], before[:, :window.left + W]  # nothing on the right is drafted before
    rows = torch.arange(B, device=drafts.device)[:, None] * wide.size(1)
    flat = (rows + window.left + torch.arange(W, device=drafts.device)).flatten()
    shown, known = (neighbour_tokens(one, flat, window, mask) for one in (wide, before))
    right = torch.arange(window.size, device=drafts.device) >= window.left
    shown = torch.where(right, known, shown)  # on the right only what the block held already
    inputs = prepare_sampler_inputs(task.hidden_states.flatten(0, 1), shown.to(task.hidden_states.device),
                                    model.neighbour_embedding(), window.left).sampler_input
    new = ((shown >= 0) & (known < 0)).sum(1).to(inputs.device)
    logits = model.sampler_head(inputs, model.lm_head(task.hidden_states).flatten(0, 1), model.lm_head.weight, new)
    return task.rule.log_probabilities(logits).view(B, W, -1)


def check(target: Tensor, draft: Tensor | None, drafts: Tensor, settled: Tensor, numbers: RowRandom) -> Checked:
    """Keep drafts int64 [B, W] from position `settled` int64 [B] of each row until the first refused one, and draw that
    again. target, draft: log-probabilities float64 [B, W, V].

    A row that lacks only its last position draws it from the target and ignores the draft. If all rows do, draft is
    None.
    """
    W, last = target.size(1), settled >= target.size(1) - 1  # [B]
    place = torch.arange(W, device=drafts.device)
    refused = last[:, None] & (place >= settled[:, None])  # [B, W]
    if draft is not None:
        ratio = (target - draft).gather(2, drafts[..., None]).squeeze(2)
        refused = refused | (numbers.uniform(Purpose.VERIFY, W).log() >= ratio) & (place >= settled[:, None])
    first = torch.where(refused, place, W).amin(1)  # [B], W where all are kept
    at = first.clamp(max=W - 1)[:, None, None].expand(-1, 1, target.size(2))
    law = target.gather(1, at).squeeze(1)  # [B, V]
    rest = law.exp() if draft is None else torch.where(last[:, None], law.exp(), surplus(
        law, draft.gather(1, at).squeeze(1)))
    again = draw_tokens(rest.log(), numbers.uniform(Purpose.VERIFY, 1, stream=1)[:, 0])  # [B]
    tokens = torch.where(place == first[:, None], again[:, None], drafts)
    confidence = target.gather(2, tokens[..., None]).squeeze(2)
    return Checked(tokens, (first + 1).clamp(max=W), confidence)
