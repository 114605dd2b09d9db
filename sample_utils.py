"""Sampling utilities: pure functions that return new tensors and take their random numbers from a `RowRandom`.

The sampler head's wavefront fill, independent draws, remasking and the critic's filled-in text. Exact draws from logits
are in core/common/drawing.py, the order of a fill is in core/common/waves.py; the loop that calls the network again and
again is core/sampling/generation.py.

Letters: B batch (rows), T sequence length, V vocabulary with the special ids, D = n_embd, L and R neighbours of a
position on the left and on the right, C = L + R, W width of the sampler head, N positions picked out of a batch.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from core.common.choosing import computing_tolerance, highest_positions, tie_tolerance
from core.common.drawing import (Chosen, DrawRule, Draws, allowed_ids, allowed_log_probabilities, choose_tokens,
                                 completed, draw_tokens, kept_or_drawn, place_tokens, revealed_ids)
from core.common.errors import UserError
from core.common.precision import to_exact
from core.common.randomness import Purpose, RowRandom, keyed
from core.common.waves import (Order, Turns, distance_to_last, distance_to_next, fill_turns, follow_on_schedule,
                               sees_in_turn, stage_schedule)
from core.noise import Shown, neighbours_in_turn
from core.sampler_head import LaterLayers, RowMemory, SamplerWindow
from model import GPT, GPTConfig, ModelMode

Head = Literal['none', 'wave', 'left_to_right']  # who fills: `lm_head` alone, or the sampler head in that order
_CHUNK = 1 << 24  # most logits held at once


# Draws from logits --------------------------------------------------------------------------------------------------

def nucleus_sample(logits: Tensor, uniform: Tensor, allowed: Tensor, top_p: float, temperature: float = 1.0) -> Tensor:
    """int64 [...]: tokens drawn from the nucleus `top_p` of logits [..., V]."""
    return draw_tokens(allowed_log_probabilities(logits, allowed, temperature, top_p=top_p), uniform)


# What the sampler head reads ----------------------------------------------------------------------------------------

def neighbour_tokens(tokens: Tensor, flat_positions: Tensor, window: SamplerWindow, mask_token_id: int) -> Tensor:
    """int64 [N, C]: the tokens left_L .. left_1, right_1 .. right_R of positions [N], indices into flat tokens [B T].

    A neighbour beyond the sequence's boundary or still masked is -1.
    """
    shown = F.pad(tokens.masked_fill(tokens == mask_token_id, -1), window, value=-1)  # [B, L + T + R]
    places = flat_positions + window.size * (flat_positions // tokens.size(1)) + window.left  # [N]
    return shown.flatten()[places[:, None] + window.offsets(tokens.device)]


class SamplerInputs(NamedTuple):
    """sampler_input [N, (C + 1) D]: what the sampler head reads. sampler_targets int64 [N]: the true tokens, or None.
    num_positions: N."""

    sampler_input: Tensor
    sampler_targets: Tensor | None
    num_positions: int


def prepare_sampler_inputs(hidden: Tensor, neighbour_tokens: Tensor, embedding_weight: Tensor, left: int | None = None,
                           targets: Tensor | None = None) -> SamplerInputs:
    """The sampler head's inputs, from hidden [N, D] and neighbour_tokens int64 [N, C], with targets int64 [N].

    A neighbour of -1 is a zero vector; the others are rows of embedding_weight [V, D]. The first `left` neighbours
    (None: half of them) come before the hidden state, the others after it. Nothing is detached here: a caller that
    trains the head alone passes detached parts.
    """
    left = neighbour_tokens.size(1) // 2 if left is None else left
    embedded = embedding_weight[neighbour_tokens.clamp(min=0)].to(hidden.dtype)  # [N, C, D]
    embedded = embedded * (neighbour_tokens >= 0)[..., None]
    joined = torch.cat((embedded[:, :left], hidden[:, None], embedded[:, left:]), dim=1).flatten(1)  # [N, (C + 1) D]
    return SamplerInputs(joined, targets, len(hidden))


def shown_logits(model: GPT, hidden_states: Tensor, text: Tensor, masked: Tensor, shown: Shown,
                 block: Tensor | None = None) -> Tensor:
    """Logits [N, V] of the sampler head at the positions of masked bool [B, T].

    Each position sees the tokens that `shown` names of text int64 [B, T], which holds true or placed tokens.
    hidden_states [B, T, D]: of the text with masks. block int64 [B, T]: the block of each position, for a block model.
    """
    read = None
    if model.sampler_head.attention is not None:
        read = rows_read(model, hidden_states, (text, model.neighbour_embedding()), masked,
                         Turns(*shown.turns.unbind(2)), block)[masked]
    return _head_logits(model, hidden_states[masked], shown.neighbours[masked], shown.new[masked], read)


def rows_read(model: GPT, hidden_states: Tensor, text: tuple[Tensor, Tensor], masked: Tensor, turns: Turns,
              block: Tensor | None = None) -> Tensor:
    """[B, T, W]: what the attention of a head that reads rows gives each position, in the order of `turns`.

    hidden_states [B, T, D]: of the text with masks, which are where masked bool [B, T] is True. text: the true or
    placed tokens int64 [B, T], and the head's token embeddings [V, D]. block int64 [B, T]: of a block model, whose head
    looks at its own block only.
    """
    (tokens, embedding), within = text, None if block is None else block[:, None] == block[..., None]
    return model.sampler_head.attention(hidden_states, embedding[tokens], embedding[model.config.mask_token_id],
                                        sees_in_turn(masked, turns, within), within)


def _head_logits(model: GPT, hidden: Tensor, neighbours: Tensor, new: Tensor, read: Tensor | None) -> Tensor:
    """Logits [N, V] of the sampler head, of hidden [N, D], neighbours int64 [N, C], new int64 [N] and read [N, W]."""
    head = model.sampler_head
    inputs = prepare_sampler_inputs(hidden, neighbours, model.neighbour_embedding(), head.window.left).sampler_input
    return head(inputs, model.lm_head(hidden), model.lm_head.weight, new, read)


# What is to be filled ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class FillTask:
    """Positions to fill from one trunk call, and how to draw.

    tokens int64 [B, T]. hidden_states [B, T, D]: of these tokens; only those at the positions are read. positions bool
    [B, T]; None: every masked one. count: the number of positions, if known (see
    `flat_positions`). truth int64 [B, T]: these tokens are placed instead of drawn ones, so that log_probabilities are
    their exact likelihood. left_context int64 [B, L]: the tokens before the first position that the sampler head may
    see; None: none.
    """

    tokens: Tensor
    hidden_states: Tensor
    rule: DrawRule
    generator: RowRandom
    positions: Tensor | None = None
    count: int | None = None
    purpose: Purpose = Purpose.TOKEN
    truth: Tensor | None = None
    left_context: Tensor | None = None

    def padded(self, window: SamplerWindow, mask_token_id: int) -> Tensor:
        """int64 [B, L + T + R]: the tokens, and what the window sees to the left and right of them; a mask is no
        neighbour."""
        if self.left_context is None:
            return F.pad(self.tokens, window, value=mask_token_id)
        return torch.cat((self.left_context, F.pad(self.tokens, (0, window.right), value=mask_token_id)), dim=1)

    def choice(self) -> tuple[Callable[..., Chosen], Tensor]:
        """`choose_tokens` with its uniform numbers [B T], or `place_tokens` with the true tokens [B T]."""
        if self.truth is None:
            return choose_tokens, self.generator.uniform(self.purpose, self.tokens.size(1)).flatten()
        return place_tokens, self.truth.flatten()

    def seen(self, config: GPTConfig) -> Tensor | None:
        """bool [B, V]: the ids revealed in each row; None if the rule needs none."""
        if self.rule.repetition_penalty == 1:
            return None
        return revealed_ids(self.tokens, config.vocab_size, config.mask_token_id)


# The wavefront fill -------------------------------------------------------------------------------------------------

class WaveStatistics(NamedTuple):
    """tokens_per_wave: how many tokens of the batch each wave filled; bootstrapped: how many came from `lm_head`."""

    waves: int
    bootstrapped: int
    tokens_per_wave: tuple[int, ...]


class Fill(NamedTuple):
    """tokens int64 [B, T] with the asked positions filled; log_probabilities and confidence float64 [B, T] of the
    tokens just drawn (see `Draws`), 0 elsewhere; drawn bool [B, T]; statistics of the waves, None without them."""

    tokens: Tensor
    log_probabilities: Tensor
    confidence: Tensor
    drawn: Tensor
    statistics: WaveStatistics | None


def _bootstrap_fill_by_confidence(confidence: Tensor, key: Tensor, count: int, tolerance: float) -> Tensor:
    """bool [B, T]: `count` (at most (T + 1) // 2) positions of each row, by highest confidence, never adjacent.

    confidence float [B, T]: the highest allowed log-probability of each position. Values within `tolerance` of the
    highest count as equal (core/common/choosing.py) and the highest key [B, T] wins. A choice that would
    leave too little room for the rest is skipped.
    """
    T = confidence.size(1)
    free = torch.ones_like(confidence, dtype=torch.bool)
    chosen = torch.zeros_like(free)
    for remaining in range(count - 1, -1, -1):
        left = distance_to_last(~free, missing=1) - 1  # [B, T], free positions on the left in the same run
        right = distance_to_next(~free, missing=1) - 1
        room = (free & (left % 2 == 0)).sum(1, keepdim=True)  # most positions that still fit, none adjacent
        lost = (left + right + 2) // 2 - left // 2 - right // 2  # how much of it a choice takes
        score = confidence.masked_fill(~(free & (room - lost >= remaining)), -math.inf)
        best = score >= score.amax(1, keepdim=True) - tolerance
        pick = torch.where(best, key, -1.0).argmax(1, keepdim=True)  # [B, 1]
        chosen = chosen.scatter(1, pick, True)
        free = free & (torch.arange(T, device=free.device) - pick).abs().gt(1)
    return chosen


def _bootstrap_rows(model: GPT, hidden_states: Tensor, rows: Tensor, rule: DrawRule, key: Tensor) -> Tensor:
    """bool [B, T]: the bootstrap positions of `rows` int64 [R], which hold no revealed token."""
    B, T, _ = hidden_states.shape
    seeds = torch.zeros(B, T, dtype=torch.bool, device=rows.device)
    step = max(1, _CHUNK // (T * rule.allowed.numel()))
    count = max(1, math.floor(model.config.sampler_min_neighbors_ratio * T))
    for chunk in rows.split(step):
        logits = model.lm_head(hidden_states[chunk])  # [R, T, V]
        confidence = allowed_log_probabilities(logits, rule.allowed).amax(-1)  # [R, T]
        seeds[chunk] = _bootstrap_fill_by_confidence(confidence, key[chunk], count, computing_tolerance(hidden_states))
    return seeds


@torch.no_grad()
def _fill_stages(model: GPT, task: FillTask, masked: Tensor, positions: Tensor, order: Order) -> \
        tuple[Tensor, list[int]]:
    """`stage_schedule` int64 [B, T] of positions bool [B, T], some of those masked bool [B, T], and how many positions
    each stage has, [T + 3].

    The host needs these counts to end the waves, so it waits for the device here: once, and a second time if there are
    rows without a revealed token.
    """
    if model.config.reads_row:
        stage = _one_by_one(positions, model.config.sampler_order)
        return stage, _counted(stage).tolist()
    if model.config.sampler_order == 'left_to_right':
        stage = follow_on_schedule(masked, positions, model.config.sampler_window.left)
        return stage, _counted(stage).tolist()
    empty = (masked & positions).all(1)  # [B]
    seeds, others = torch.zeros_like(masked), ~empty[:, None]
    stage = stage_schedule(masked & others, positions & others, seeds, order)
    *counts, empty_rows = torch.cat((_counted(stage), empty.sum(0, keepdim=True))).tolist()
    if empty_rows:
        rows, key = flat_positions(empty, empty_rows), task.generator.uniform(Purpose.BOOTSTRAP, masked.size(1))
        seeds = _bootstrap_rows(model, task.hidden_states, rows, task.rule, key)
        stage = stage_schedule(masked, positions, seeds, order)
        counts = _counted(stage).tolist()
    return stage, counts


def _one_by_one(positions: Tensor, order: Order) -> Tensor:
    """int64 [B, T]: 0 outside the group positions bool [B, T], 2 for its first position in each row, 3, 4, ..."""
    turns = fill_turns(positions.long() - 1, order)
    number = torch.where(positions, turns.turn, positions.size(1) ** 2).argsort(1).argsort(1)
    return torch.where(positions, number + 2, 0)


def _counted(stage: Tensor) -> Tensor:
    """int64 [T + 3]: how many positions of stage int64 [B, T] each stage has."""
    zeros = torch.zeros(stage.size(1) + 3, dtype=torch.int64, device=stage.device)
    return zeros.scatter_add(0, stage.flatten(), torch.ones_like(stage).flatten())


class SamplerTables(NamedTuple):
    """neighbours [C V, W]: what a token in each neighbour slot adds to the head's first product; zero for a mask.
    contents [V, 2 A]: what a token adds to keys and values of a head that reads the row; None for other heads. later:
    the weights of the rest of the head.

    They depend on the weights only, so many fills with the same weights can share them.
    """

    neighbours: Tensor
    contents: Tensor | None
    later: LaterLayers


def sampler_tables(model: GPT) -> SamplerTables:
    """The tables of a model's sampler head."""
    embedding, head = model.neighbour_embedding(), model.sampler_head
    tables = head.neighbour_tables(embedding)  # [C, V, W]
    shown = torch.arange(tables.size(1), device=tables.device)[:, None] != model.config.mask_token_id  # [V, 1]
    return SamplerTables((tables * shown).flatten(0, 1),
                         None if head.attention is None else head.attention.token(embedding),
                         head.later_layers(model.lm_head.weight))


class Wave(NamedTuple):
    """The n positions of one wave.

    bags int64 [C n]: rows of the tables; those of position i begin at starts[i]. projected [n, W]: what the hidden
    state and the rest of the row add to the head's first product. logits [n, V]: the trunk's. new int64 [n]: how many
    neighbours were filled since the trunk call; None if the head does not use it. choice [n]: uniform numbers to draw
    with, or the tokens to place. seen bool [n, V]: revealed ids; None if the rule needs none.
    """

    bags: Tensor
    starts: Tensor
    projected: Tensor
    logits: Tensor
    new: Tensor | None
    choice: Tensor
    seen: Tensor | None


def draw_wave(choose: Callable[..., Chosen], tables: SamplerTables, rule: DrawRule, wave: Wave) -> Chosen:
    """The tokens of one wave, by `choose` (`choose_tokens` or `place_tokens`). Nothing here waits for the device, and
    torch.compile makes a few kernels of it."""
    projected = wave.projected
    if len(tables.neighbours):
        projected = projected + F.embedding_bag(wave.bags, tables.neighbours, wave.starts, mode='sum')  # [n, W]
    return choose(tables.later.logits(projected, wave.logits, wave.new), rule, wave.choice, wave.seen)


class Waves(NamedTuple):
    """N positions to fill wave by wave, and what their waves read. sizes: the number of positions of each wave.

    padded int64: the flat tokens, with what a window sees beyond each row. positions int64 [N], neighbours int64
    [N, C]: indices into it. logits [N, V], projected [N, W], new [N], choices [N]: see `Wave`. room: the most positions
    that a fill of this shape may have.
    """

    padded: Tensor
    positions: Tensor
    neighbours: Tensor
    logits: Tensor
    projected: Tensor
    new: Tensor | None
    choices: Tensor
    sizes: list[int]
    room: int


class WaveRecorder(Protocol):
    """Draws all waves of a fill in a faster way (core/sampling/recorded_waves.py)."""

    def run(self, choose: Callable[..., Chosen], model: GPT, tables: SamplerTables, rule: DrawRule,
            waves: Waves) -> Chosen | None:
        """The tokens of all positions, or None if it cannot draw these waves."""


def sampler_wavefront_fill(model: GPT, task: FillTask, order: Order = 'wave', tables: SamplerTables | None = None,
                           wave: Callable[..., Chosen] = draw_wave, recorder: WaveRecorder | None = None) -> Fill:
    """Fill masked positions wave by wave through the sampler head, from one trunk call (docs/sampler.md).

    The task's positions limit the fill to a group; visible ones among them stay. Each token is drawn given the hidden
    state and the neighbours revealed so far; neighbours missing or masked contribute nothing. With gradients enabled
    the log-probabilities keep the graph of head and trunk. tables: `sampler_tables` of the model, made here if None;
    wave: `draw_wave`, or the same compiled; recorder: draws all waves where it can.

    A head that reads the row draws one token of a row at a time, given all before it, in the order of its training
    (`fill_turns`). If tokens are placed instead of drawn, all of them are known, and one pass is enough.
    """
    masked = task.tokens == model.config.mask_token_id
    positions = masked if task.positions is None else task.positions & masked
    if task.truth is not None and model.config.reads_row and task.rule.repetition_penalty == 1:
        return _fill_with_truth(model, task, positions)
    stage, counts = _fill_stages(model, task, masked, positions, order)
    picked = stage.flatten().argsort(stable=True)[counts[0]:]  # [N], in the order of filling
    found = _run_waves(model, task, (stage, picked, counts[1:]), sampler_tables(model) if tables is None else tables,
                       wave, recorder)
    waves = tuple(counts[2:counts.index(0, 2)]) if 0 in counts[2:] else tuple(counts[2:])
    statistics = WaveStatistics(len(waves), counts[1], waves)
    return _scatter_draws(task.tokens, picked, _in_parts(found), positions, statistics)


def logits_in_turn(model: GPT, task: FillTask, text: Tensor, positions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of a head that reads rows at `positions` bool [B, T]: one pass for all of them, in parts.

    Each position sees the tokens of text int64 [B, T] at the positions that a fill draws before it. Yields pairs of
    flat positions [n] and their logits [n, V].
    """
    config, hidden_states = model.config, task.hidden_states
    mask_token_id, window, T = config.mask_token_id, config.sampler_window, positions.size(1)
    turns = fill_turns(positions.long() - 1, config.sampler_order)
    text = torch.where(positions, text, task.tokens)
    wide = Turns(F.pad(turns.group, window, value=-1), F.pad(turns.turn, window))
    neighbours, new = (found[:, window.left:window.left + T].flatten(0, 1) for found in neighbours_in_turn(
        replace(task, tokens=text).padded(window, mask_token_id), task.padded(window, mask_token_id) == mask_token_id,
        window, wide))
    device, picked = hidden_states.device, flat_positions(positions, task.count)
    masked, turns = (task.tokens == mask_token_id).to(device), Turns(*(one.to(device) for one in turns))
    read = rows_read(model, hidden_states, (text.to(device), model.neighbour_embedding()), masked,
                     turns).flatten(0, 1)  # [B T, W]
    for part in picked.split(max(1, _CHUNK // config.vocab_size)) if len(picked) else ():
        hidden, near, of_these, found = (one[part.to(one.device)] for one in (
            hidden_states.flatten(0, 1), neighbours, new, read))
        yield part, _head_logits(model, hidden, near.to(device), of_these.to(device), found)


def _fill_with_truth(model: GPT, task: FillTask, positions: Tensor) -> Fill:
    """The true tokens at `positions` bool [B, T], each scored by a head that reads rows given those before it."""
    parts, draws = [], []
    for part, logits in logits_in_turn(model, task, task.truth, positions):
        parts.append(part)
        draws.append(completed([place_tokens(logits, task.rule, task.truth.flatten()[part], None)]))
    return _scatter_draws(task.tokens, torch.cat(parts) if parts else None, draws, positions, None)


@torch.no_grad()
def verified_fill(model: GPT, task: FillTask) -> Fill:
    """Fill the task's positions by a head that reads rows: all tokens are drafted at once, then verified (speculative
    sampling, Leviathan et al. 2023, Chen et al. 2023). This gives the distribution of one draw after another, in fewer
    calls of the head.

    A draft x_i comes from the trunk's marginal q_i. Let p_i be the head's conditional given the tokens before it. The
    draft is kept with probability min(1, p_i(x_i) / q_i(x_i)); otherwise the token is drawn again, so that its
    distribution is p_i (`kept_or_drawn`). Once the random numbers of a position are fixed, its token is a function of
    the tokens before it. One call of the head evaluates this function at all positions, on the tokens guessed so far.
    Calls repeat until no token changes. Then each token is the function's value at the final tokens before it. After k
    calls at least the first k positions are final, mostly many more.

    statistics.waves counts the calls of the head. The result has no gradient.
    """
    assert task.rule.repetition_penalty == 1, 'a penalty would depend on the order of the draws'
    masked, rule = task.tokens == model.config.mask_token_id, task.rule
    positions, T = masked if task.positions is None else task.positions & masked, masked.size(1)
    first, keep, again = (task.generator.uniform(purpose, T, stream).flatten() for purpose, stream in (
        (task.purpose, 0), (Purpose.VERIFY, 0), (Purpose.VERIFY, 1)))  # [B T] each
    picked = flat_positions(positions, task.count)  # [N]
    guess = drafts = task.tokens.flatten().index_copy(0, picked, torch.cat([picked[:0], *(
        draw_tokens(rule.log_probabilities(trunk), first[part])
        for part, trunk in logits_in_parts(model, task.hidden_states, picked))]))  # [B T]
    for calls in range(1, T + 2):
        found, scores = [picked[:0]], []
        for (part, logits), (_, trunk) in zip(logits_in_turn(model, task, guess.view_as(masked), positions),
                                              logits_in_parts(model, task.hidden_states, picked)):
            found.append(kept_or_drawn(rule.log_probabilities(logits), rule.log_probabilities(trunk), drafts[part],
                                       (keep[part], again[part])))
            scores.append(completed([place_tokens(logits, rule, guess[part], None)]))
        before, guess = guess, guess.index_copy(0, picked, torch.cat(found))
        if torch.equal(before, guess):  # the host must know when to end
            break
    return _scatter_draws(task.tokens, picked, scores, positions, WaveStatistics(calls, 0, ()))


def _run_waves(model: GPT, task: FillTask, schedule: tuple[Tensor, Tensor, Sequence[int]], tables: SamplerTables,
               wave: Callable[..., Chosen], recorder: WaveRecorder | None) -> Iterator[Chosen]:
    """The tokens of the flat positions picked int64 [N], wave by wave: the first counts[0] come from `lm_head`, the
    next counts[1], counts[2], ... from the head, each given the tokens of the waves before. schedule: the stage of each
    position int64 [B, T], picked, and counts.

    A wave has few positions, so the time it takes is the number of its operations. Whatever does not depend on the
    tokens of earlier waves is computed here for all waves at once.
    """
    (stage, picked, counts), (B, T, D) = schedule, task.hidden_states.shape
    head, mask_token_id, window, device = model.sampler_head, model.config.mask_token_id, model.sampler_head.window, \
        picked.device
    sizes, begin = [size for size in counts if size], counts[0]
    slot = torch.arange(window.size, device=device) * model.config.vocab_size  # [C]
    starts = torch.arange(len(picked), device=tables.neighbours.device) * window.size  # [N], of a position's rows
    padded = task.padded(window, mask_token_id).flatten()  # [B (L + T + R)]
    places = picked + window.size * (picked // T) + window.left  # [N]
    neighbours = places[:, None] + window.offsets(device)  # [N, C]
    new = None if head.gate is None else _new_neighbours(F.pad(stage, window).flatten(), places, neighbours).to(
        starts.device)
    hidden = task.hidden_states.reshape(B * T, D)[picked]  # [N, D]
    seen = task.seen(model.config)
    memory = None if tables.contents is None else RowMemory(head.attention, task.tokens, task.hidden_states,
                                                           (tables.contents, mask_token_id))
    choose, choices = task.choice()
    choices, projection = choices[picked], head.hidden_projection(hidden)  # [N], [N, W]
    if memory is not None or seen is not None or len(picked) * model.config.vocab_size > _CHUNK:
        recorder = None
    parts = zip(_trunk_logits(model, hidden, sizes), repeat(None) if new is None else new.split(sizes), *(
        part.split(sizes) for part in (choices, picked, places, neighbours, hidden, projection)))
    for number, (logits, new_here, choice, flat, place, neighbour, mine, projected) in enumerate(parts):
        seen_here = None if seen is None else seen[flat // T]
        if number == 0 and begin > 0:  # bootstrapped, or the first of a group
            found = choose(logits, task.rule, choice, seen_here)
        else:
            if recorder is not None and number == int(begin > 0):
                rest = recorder.run(choose, model, tables, task.rule, Waves(
                    padded, places[begin:], neighbours[begin:], model.lm_head(hidden[begin:]), projection[begin:],
                    None if new is None else new[begin:], choices[begin:], sizes[number:], B * T))
                if rest is not None:
                    yield rest
                    return
            if memory is not None:
                projected = projected + memory.read(mine, flat // T, flat % T)
            bags = (padded.take(neighbour) + slot).flatten().to(starts.device)  # [C n]
            found = wave(choose, tables, task.rule, Wave(bags, starts[:sizes[number]], projected, logits, new_here,
                                                         choice, seen_here))
        padded.index_put_((place,), found.tokens)
        if memory is not None:
            memory.add(flat // T, flat % T, found.tokens)
        if seen is not None:
            seen[flat // T, found.tokens] = True
        yield found


def _new_neighbours(stage: Tensor, places: Tensor, neighbours: Tensor) -> Tensor:
    """int64 [N]: how many neighbours of each place were filled before it. stage int64: of all padded positions, flat, 0
    where nothing is filled; places int64 [N] and neighbours int64 [N, C]: indices into it."""
    earlier = stage.take(neighbours)  # [N, C]
    return ((earlier > 0) & (earlier < stage.take(places)[:, None])).sum(1)


def _in_parts(found: Iterable[Chosen]) -> list[Draws]:
    """`completed` for all of `found`, in parts of about `_CHUNK` scores."""
    draws, waiting, held = [], [], 0
    for one in found:
        waiting.append(one)
        held += one.scores.numel()
        if held >= _CHUNK:
            draws.append(completed(waiting))
            waiting, held = [], 0
    return draws + ([completed(waiting)] if waiting else [])


def _trunk_logits(model: GPT, hidden: Tensor, sizes: Sequence[int]) -> Iterator[Tensor]:
    """Logits [n, V] of each part of hidden [N, D]; `sizes` are the lengths of the parts. The trunk's logits do not
    depend on the waves, so one product serves as many parts as `_CHUNK` holds."""
    most = _CHUNK // model.config.vocab_size
    first = 0
    while first < len(sizes):
        last, count = first + 1, sizes[first]
        while last < len(sizes) and count + sizes[last] <= most:
            last, count = last + 1, count + sizes[last]
        part, hidden = hidden[:count], hidden[count:]
        yield from model.lm_head(part).split(sizes[first:last])
        first = last


def _scatter_draws(tokens: Tensor, picked: Tensor, draws: Sequence[Draws], drawn: Tensor,
                   statistics: WaveStatistics | None) -> Fill:
    """`Fill` with draws put back to the flat positions `picked` of tokens [B, T]."""
    if not draws:
        zeros = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
        return Fill(tokens.clone(), zeros, zeros.clone(), drawn, statistics)
    values = Draws(*(torch.cat(parts) for parts in zip(*draws)))
    zeros = torch.zeros(tokens.numel(), dtype=torch.float64, device=tokens.device)
    return Fill(tokens.flatten().index_put((picked,), values.tokens).view_as(tokens),
                zeros.index_put((picked,), values.log_probabilities).view_as(tokens),
                zeros.index_put((picked,), values.confidence).view_as(tokens), drawn, statistics)


def flat_positions(flags: Tensor, count: int | None) -> Tensor:
    """int64 [N]: where flags bool [B, T] are True, as indices into flat flags. count: how many there are; with None the
    host waits for the device to count them."""
    if count is None:
        return flags.flatten().nonzero().squeeze(1)
    return flags.flatten().nonzero_static(size=count).squeeze(1)


def logits_in_parts(model: GPT, hidden_states: Tensor, picked: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """`lm_head` logits at the flat positions picked int64 [N] of hidden_states [B, T, D], at most `_CHUNK` at once.
    Yields pairs: a part of `picked` [n], and its logits [n, V]."""
    hidden = hidden_states.flatten(0, 1)
    for part in picked.split(max(1, _CHUNK // model.config.vocab_size)) if len(picked) else ():
        yield part, model.lm_head(hidden[part])


def independent_fill(model: GPT, task: FillTask) -> Fill:
    """Draw the task's positions from `lm_head` alone, independently of each other.

    Visible positions among them are redrawn. Logits are computed for these positions only.
    """
    tokens, T = task.tokens, task.tokens.size(1)
    positions = tokens == model.config.mask_token_id if task.positions is None else task.positions
    picked = flat_positions(positions, task.count)  # [N]
    (choose, choices), seen, draws = task.choice(), task.seen(model.config), []
    for part, logits in logits_in_parts(model, task.hidden_states, picked):
        draws.append(completed([choose(logits, task.rule, choices[part], None if seen is None else seen[part // T])]))
    return _scatter_draws(tokens, picked, draws, positions, None)


# The one way from hidden states to tokens -----------------------------------------------------------------------------

class Filler:
    """How a model turns hidden states into tokens, in sampling, training and evaluation.

    head: a row of `FILLS`. wave: `draw_wave`, or the same compiled. recorder: draws all waves of a fill where it can.
    verified: a head that reads rows verifies drafts of the trunk. The weights must not change while a filler is in use,
    because it computes tables from them once.
    """

    def __init__(self, model: GPT, head: Head, wave: Callable[..., Chosen] = draw_wave,
                 recorder: WaveRecorder | None = None, verified: bool = False) -> None:
        self.model, self.head, self.wave, self.recorder, self.verified = model, head, wave, recorder, verified

    @cached_property
    def tables(self) -> SamplerTables:
        """`sampler_tables` of the model."""
        return sampler_tables(self.model)

    def fill(self, task: FillTask) -> Fill:
        """The task's positions filled."""
        return FILLS[self.head](self, task)


def _fill_in_waves(filler: Filler, task: FillTask) -> Fill:
    if filler.verified and task.truth is None:
        return verified_fill(filler.model, task)
    return sampler_wavefront_fill(filler.model, task, filler.head, filler.tables, filler.wave, filler.recorder)


FILLS: dict[Head, Callable[[Filler, FillTask], Fill]] = {
    'none': lambda filler, task: independent_fill(filler.model, task),
    'wave': _fill_in_waves,
    'left_to_right': _fill_in_waves,
}


def predict_and_sample_tokens(model: GPT, tokens: Tensor, rule: DrawRule | None = None,
                              generator: RowRandom | None = None, *, use_sampler_head: bool | None = None,
                              positions: Tensor | None = None, order: Order = 'wave', no_grad: bool = True) -> Fill:
    """One trunk call on tokens int64 [B, T], then a `Fill` of its masked positions.

    rule: None draws from the base vocabulary at temperature 1. generator: None takes a seed from torch's own generator,
    so each call draws other tokens, and `torch.manual_seed` repeats them. use_sampler_head: None uses the head if the
    model has one. no_grad=False keeps the graph of the drawn tokens' log-probabilities, which policy gradients (GRPO)
    need.
    """
    config = model.config
    if rule is None:
        rule = DrawRule(allowed_ids(config.vocab_size, config.mask_token_id, tokens.device))
    if generator is None:
        generator = keyed(int(torch.randint(2 ** 62, ())), 0, 0, len(tokens), tokens.device)
    if use_sampler_head is None:
        use_sampler_head = config.add_sampler_head
    with torch.set_grad_enabled(not no_grad):
        tokens = to_exact(tokens)
        hidden_states = model.encode(tokens)  # [B, T, D]
        return Filler(model, order if use_sampler_head else 'none').fill(
            FillTask(tokens, hidden_states, rule, generator, positions))


# The critic's filled-in text ----------------------------------------------------------------------------------------

class CriticArtifacts(NamedTuple):
    """tokens int64 [B, T] without masks; labels float32 [B, T], 1 where a token differs from the truth; labelled bool
    [B, T], the positions that carry a label."""

    tokens: Tensor
    labels: Tensor
    labelled: Tensor


@torch.no_grad()
def build_critic_artifacts_from_logits(model: GPT, tokens: Tensor, targets: Tensor, hidden_states: Tensor,
                                       rule: DrawRule, generator: RowRandom, *, use_sampler_head: bool,
                                       recorder: WaveRecorder | None = None,
                                       block_length: Tensor | None = None) -> CriticArtifacts:
    """Text and labels that train the critic (Lezama et al. 2022), from the trunk call that the main loss made.

    tokens int64 [B, T] with masks, targets int64 [B, T] the true tokens or ignore_index where the truth is unknown,
    hidden_states [B, T, D] of tokens. The masks are filled as inference fills them, under `rule`. critic_target_scope
    'masked_only' labels the filled positions, 'masked_and_ignore' also the visible ones. Padding and unknown truth
    never carry a label. With critic_fill 'revised' the filled text is then revised under the critic's guidance
    (`revised_text`). recorder: of a `Filler`, for the first fill. block_length int64 [B]: of a block model, whose
    targets are all known.
    """
    config, tokens, targets = model.config, to_exact(tokens), to_exact(targets)
    filler = Filler(model, config.sampler_order if use_sampler_head else 'none', recorder=recorder)
    task = FillTask(tokens, hidden_states, rule, generator, purpose=Purpose.CRITIC_FILL)
    if block_length is None:
        fill = filler.fill(task)
        text, drawn = fill.tokens, fill.drawn
        if config.critic_fill == 'revised':
            text = revised_text(Filler(model, filler.head), fill, rule, generator)
    else:
        text, drawn = blocks_filled(filler, task, targets, to_exact(block_length)), tokens == config.mask_token_id
    labelled = targets != config.ignore_index
    if config.pad_token_id is not None:
        labelled = labelled & (targets != config.pad_token_id) & (tokens != config.pad_token_id)
    if config.critic_target_scope == 'masked_only':
        labelled = labelled & drawn
    made = text, ((text != targets) & labelled).float(), labelled
    return CriticArtifacts(*(part.to(hidden_states.device) for part in made))


def blocks_filled(filler: Filler, task: FillTask, clean: Tensor, block_length: Tensor) -> Tensor:
    """The tokens int64 [B, T] of `task` with every mask filled. Each block of a row is filled by itself, after the true
    text before it, as a block model writes it. clean int64 [B, T], block_length int64 [B]."""
    config, T, numbers = filler.model.config, task.tokens.size(1), task.generator
    left = config.sampler_window.left if config.add_sampler_head else 0
    before = F.pad(clean, (left, 0), value=config.mask_token_id)  # [B, L + T]
    text = task.tokens.clone()
    for b in block_length.unique().tolist():
        which = (block_length == b).nonzero().squeeze(1)  # [n]
        at, first = which.to(task.hidden_states.device), torch.arange(0, T, b, device=numbers.rows.device)
        block_rows = (numbers.rows[which.to(first.device)][:, None] * T + first).flatten()  # [n T / b], all different
        part = FillTask(task.tokens[which].view(-1, b), task.hidden_states[at].view(len(block_rows), b, -1), task.rule,
                        RowRandom(numbers.seed, numbers.iteration, block_rows), purpose=task.purpose,
                        left_context=before[which].unfold(1, left + b, b)[..., :left].flatten(0, 1))
        text[which] = filler.fill(part).tokens.view(-1, T)
    return text


REVISIONS = 3  # of a text that the critic learns from; each costs two trunk calls
REVISED_BY_CHANCE = 0.4  # share of the positions taken back that chance chooses


def revised_text(filler: Filler, fill: Fill, rule: DrawRule, generator: RowRandom) -> Tensor:
    """The filled text int64 [B, T] after `REVISIONS` revisions under the critic's guidance.

    Each revision masks what the critic finds wrong and fills it again, as the policy remask does. The share of filled
    positions that is masked falls in equal steps. Each row draws the first share, so some rows change little.
    """
    model, text, first = filler.model, fill.tokens, generator.uniform(Purpose.REMASK, 1)  # [B, T], [B, 1]
    for revision in range(REVISIONS):
        numbers = generator.apart(1 + revision)
        remasked = apply_remasking_step(~fill.drawn, to_exact(model.critic_scores(text)),
                                        first * (1 - revision / REVISIONS), numbers,
                                        randomness_strength=REVISED_BY_CHANCE,
                                        tolerance=computing_tolerance(model.lm_head.weight))
        open = text.masked_fill(remasked, model.config.mask_token_id)
        text = filler.fill(FillTask(open, model.encode(open), rule, numbers, purpose=Purpose.CRITIC_FILL)).tokens
    return text


# Remasking ----------------------------------------------------------------------------------------------------------

def linear_remasking_schedule(count: int, start: float, end: float) -> list[float]:
    """`count` levels in equal steps, the first `start`, the last `end`."""
    return [start + (end - start) * index / max(1, count - 1) for index in range(count)]


def cosine_remasking_schedule(count: int, start: float, end: float) -> list[float]:
    """`count` levels on a quarter of a cosine: slow at `start`, fast towards `end` (Chang et al. 2022)."""
    return [end + (start - end) * math.cos(math.pi / 2 * index / max(1, count - 1)) if index < max(1, count - 1) or
            count == 1 else end for index in range(count)]


REMASKING_SCHEDULES: dict[str, Callable[[int, float, float], list[float]]] = {
    'linear': linear_remasking_schedule, 'cosine': cosine_remasking_schedule}  # by the value of --schedule_type


def apply_remasking_step(protected: Tensor, wrongness: Tensor | None, level: float | Tensor, generator: RowRandom, *,
                         mode: Literal['ratio', 'threshold'] = 'ratio', randomness_strength: float = 0.0,
                         tolerance: float = tie_tolerance(torch.float32)) -> Tensor:
    """bool [B, T]: the positions to remask now; never one of protected bool [B, T].

    wrongness float [B, T]: higher is remasked first (None: no guidance, all positions alike).
    mode 'ratio': `level` (one number, or [B, 1]) is the share of each row's unprotected positions to remask, rounded to
    the nearest count. Most of them are the most wrong positions; the share randomness_strength of them is drawn
    uniformly from the remaining positions.
    mode 'threshold': every unprotected position whose wrongness exceeds `level`; nothing is random.
    Values of wrongness that differ by at most `tolerance` count as equal, to each other and to `level`
    (core/common/choosing.py).
    """
    free = ~protected  # [B, T]
    if mode == 'threshold':
        if wrongness is None:
            raise UserError("schedule_mode is 'threshold', but nothing tells how wrong a token is; "
                            'use intelligent_remasking=True, a critic or schedule_mode=ratio')
        return free & (wrongness > level + tolerance)
    keys = generator.uniform(Purpose.REMASK, protected.size(1) * 2)  # [B, 2 T]
    uniform_key, tie_key = keys.chunk(2, dim=1)
    count = _rounded(free.sum(1, keepdim=True).double() * level)  # [B, 1]
    if wrongness is None:
        return highest_positions(uniform_key, tie_key, free, count, 0)
    sure = count - _rounded(count.double() * randomness_strength)  # [B, 1]
    guided = highest_positions(wrongness, tie_key, free, sure, tolerance)
    return guided | highest_positions(uniform_key, tie_key, free & ~guided, count - guided.sum(1, keepdim=True), 0)


def _rounded(counts: Tensor) -> Tensor:
    """int64, the nearest whole number to float64 counts; halves go up."""
    return (counts + 0.5).floor().long()


@torch.no_grad()
def wrong_probabilities(remasking_model: GPT, tokens: Tensor) -> Tensor:
    """P(wrong) of each of tokens int64 [B, T], float64 [B, T]: one call of a remasking model of any kind."""
    return wrong_from_logits(remasking_model(tokens).logits, remasking_model.config)


def wrong_from_logits(logits: Tensor, config: GPTConfig) -> Tensor:
    """P(wrong) float64 [...] from a remasking model's logits [..., V], or [..., classes] of a classifier.

    For a language model it is the share of wrong_token_id in the softmax over that id and the base vocabulary (the ids
    below mask_token_id). For a classifier it is the probability of all classes but 0, which means *right*. It is
    float64, so that a model that finds nearly everything wrong still orders the positions.
    """
    logits = to_exact(logits)
    if config.mode is ModelMode.TOKEN_CLASSIFIER:
        return logits.double().softmax(-1)[..., 1:].sum(-1)
    rest = logits[..., :config.mask_token_id].float().logsumexp(-1)
    return torch.sigmoid((logits[..., config.wrong_token_id] - rest).double())


def intelligent_remask(tokens: Tensor, remasking_model: GPT, num_to_remask: int,
                       protected: Tensor | None = None) -> Tensor:
    """bool [B, T]: in each row of tokens int64 [B, T], the `num_to_remask` positions that a remasking model most
    believes wrong. Masked positions and those of protected bool [B, T] are never among them. Of equal ones the first
    counts."""
    eligible = tokens != remasking_model.config.mask_token_id
    if protected is not None:
        eligible = eligible & ~protected
    order = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    count = torch.full_like(tokens[:, :1], num_to_remask)  # [B, 1]
    tolerance = computing_tolerance(next(remasking_model.parameters()))
    return highest_positions(wrong_probabilities(remasking_model, tokens), order, eligible, count, tolerance)


# The judge ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def judge_scores(judge: GPT, tokens: Tensor) -> Tensor:
    """float32 [B]: 1 - evaluation by a judge of texts, tokens int64 [B, L]; 1 means real text: one network call.

    The CLS token is put before each text, so the judge's block must hold L + 1 tokens.
    """
    cls = torch.full_like(tokens[:, :1], judge.config.cls_token_id)
    return 1 - judge.sequence_scores(torch.cat((cls, tokens), dim=1))
