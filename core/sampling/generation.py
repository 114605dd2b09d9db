"""Generation: the loop that calls the network and counts the calls, blocks beyond the block size, and the trace.

    diffusion    predict, then remask, as a policy of core/sampling/policies says; through the sampler head if there is one
    sampler      the same, but the head is required
    multinomial  every unprotected position is redrawn at each iteration from the network's own softmax
    standard     left to right; a causal model reads with a key-value cache

Row i of a run with seed s gets the same random numbers whatever batch it is in. A step waits for the device only where
chance or the network decides how many positions are drawn, which tells whether to stop or to idle too, and where the
sampler head's waves must end.

Letters: B rows, L sequence length, T window length (at most block_size), V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from core.common.drawing import Chosen, DrawRule, draw, revealed_ids
from core.common.errors import UserError
from core.common.randomness import Purpose, RowRandom
from core.common.timing import TimingAccumulator
from core.sampling.policies import Counts, Policy, PolicyView, Prediction
from core.sampling.prompt import Layout
from model import GPT, KeyValueCache
from sample_utils import (Fill, SelfConfidence, causal_confidence, draw_wave, independent_fill, neighbour_tables,
                          sampler_wavefront_fill, self_confidence, wrong_probabilities)

Method = Literal['diffusion', 'sampler', 'multinomial', 'standard']


class TraceStep(NamedTuple):
    """What one step did to a window of some rows.

    window: number of the block; start: its first position; step: of the window, from 0; steps: the most it can have;
    event: 'start', 'predict' or 'remask'; rows int64 [B]: the samples' numbers; tokens int64 [B, T] after the event;
    changed bool [B, T]: drawn by a prediction, or remasked; confidence float64 [B, T]: log-probability of each token
    when it was drawn. On the CPU.
    """

    window: int
    start: int
    step: int
    steps: int
    event: Literal['start', 'predict', 'remask']
    rows: Tensor
    tokens: Tensor
    changed: Tensor
    confidence: Tensor


Watch = Callable[[TraceStep], None]


@dataclass
class Trace:
    """A sampling run step by step: the one record that the terminal, the JSON file and the statistics read.

    protected bool [samples, L]; settings: the run's options in built-in types.
    """

    settings: dict[str, Any]
    protected: Tensor
    steps: list[TraceStep] = field(default_factory=list)

    def add(self, step: TraceStep) -> None:
        """Append a step; a `Watch`."""
        self.steps.append(step)

    def to_builtins(self, decode: Callable[[list[int]], str]) -> dict[str, Any]:
        """The run in built-in types for JSON; changed positions are indices into the window, confidence is in nats."""
        return {'settings': self.settings, 'protected': [row.nonzero().squeeze(1).tolist() for row in self.protected],
                'steps': [{'window': step.window, 'start': step.start, 'step': step.step, 'event': step.event,
                           'samples': [{'sample': row, 'text': decode(tokens), 'tokens': tokens,
                                        'changed': changed.nonzero().squeeze(1).tolist(),
                                        'confidence': [round(value, 4) for value in confidence]}
                                       for row, tokens, changed, confidence in zip(
                                           step.rows.tolist(), step.tokens.tolist(), step.changed,
                                           step.confidence.tolist())]}
                          for step in self.steps]}


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate. policy: of 'diffusion' and 'sampler'; iterations: of 'multinomial'; start_token: what a causal
    model reads before an empty prompt; block_length: the policy completes this many positions after one another
    (semi-autoregressive, Arriola et al. 2025; Nie et al. 2025), None for all at once; use_critic: the policy may ask
    how wrong tokens are, of the network's remasking model or critic head."""

    method: Method
    rule: DrawRule
    policy: Policy | None = None
    iterations: int = 1
    use_sampler_head: bool = False
    use_critic: bool = False
    start_token: int = 0
    block_length: int | None = None


class Network:
    """A model whose calls are counted and timed.

    trunk_calls: evaluations of the generator's trunk for predictions; network_calls: these and every helper's, the
    critic's among them. One call serves a whole batch. autocast: a lower precision for the calls, or None; encode and
    wave: the trunk call and `draw_wave` where they are not the plain ones but compiled; remasking_model: judges tokens
    in place of the model's own critic head. The weights stay as they are while it serves.
    """

    def __init__(self, model: GPT, timer: TimingAccumulator, autocast: torch.dtype | None = None,
                 encode: Callable[..., Tensor] | None = None, remasking_model: GPT | None = None,
                 wave: Callable[..., Chosen] = draw_wave) -> None:
        self.model, self.timer, self.autocast, self.remasking_model = model, timer, autocast, remasking_model
        self._encode, self._wave = encode or model.encode, wave
        self.compiled = encode is not None  # then every call is to have the same shape
        self.trunk_calls = self.network_calls = 0

    @contextmanager
    def precision(self) -> Iterator[None]:
        """The precision that the network computes in, without gradients."""
        device = next(self.model.parameters()).device.type
        with torch.no_grad(), torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
            yield

    def encode(self, tokens: Tensor, cache: KeyValueCache | None = None, positions: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D], or [N, D] of positions: one trunk call, as `GPT.encode` describes it. A cache and
        positions take the uncompiled way, since their lengths change."""
        self.trunk_calls += 1
        self.network_calls += 1
        with self.timer.measure('trunk'):
            if cache is None and positions is None:
                return self._encode(tokens)
            return self.model.encode(tokens, cache=cache, positions=positions)

    @cached_property
    def _tables(self) -> Tensor:
        return neighbour_tables(self.model)

    def fill(self, tokens: Tensor, hidden_states: Tensor, rule: DrawRule, generator: RowRandom,
             positions: Tensor | None = None) -> Fill:
        """Masked positions, or those in positions bool [B, T], through the sampler head (`sampler_wavefront_fill`)."""
        return sampler_wavefront_fill(self.model, tokens, hidden_states, rule, generator, positions=positions,
                                      tables=self._tables, wave=self._wave)

    def critic(self, tokens: Tensor) -> Tensor:
        """Probability [B, T] that each token is wrong, by the remasking model or else the critic head: one network
        call, and none of the trunk."""
        self.network_calls += 1
        if self.remasking_model is not None:
            with self.timer.measure('remasking model'):
                return wrong_probabilities(self.remasking_model, tokens)
        with self.timer.measure('critic'):
            return self.model.critic_scores(tokens)


class Generation(NamedTuple):
    """tokens int64 [B, L] without masks; confidence float64 [B, L]: each token's log-probability when it was drawn,
    0 for protected ones; waves: of all wavefront fills together."""

    tokens: Tensor
    confidence: Tensor
    waves: int


class Window(NamedTuple):
    """Positions start .. stop - 1 of a sequence, of which those before first_new are context already written."""

    start: int
    stop: int
    first_new: int


def windows(length: int, block_size: int) -> list[Window]:
    """The windows that write `length` positions: each after the first carries half a block of protected context.

    The last one is moved left to end with the sequence, so it carries more where little is left to write.
    """
    found = [Window(0, min(length, block_size), 0)]
    while found[-1].stop < length:
        written = found[-1].stop
        stop = min(length, written - block_size // 2 + block_size)
        found.append(Window(stop - block_size, stop, written))
    return found


def generate(network: Network, layout: Layout, settings: GenerationSettings, generator: RowRandom,
             watch: Watch | None = None) -> Generation:
    """Write the masked positions of `layout` [B, L], one row per row of `generator`; protected ones never change."""
    tokens, protected = layout
    assert len(tokens) == len(generator.rows)
    confidence, waves = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device), 0
    with network.precision():
        if settings.method == 'standard' and network.model.config.attention_type == 'causal':
            return _read_on(network, layout, settings, generator, watch)
        for index, (start, stop, first_new) in enumerate(windows(tokens.size(1), network.model.config.block_size)):
            fixed = protected[:, start:stop] | (torch.arange(start, stop, device=tokens.device) < first_new)
            part = _WindowRun(network, settings, fixed, generator, index, start, watch, _Soundness(tokens.device))
            if settings.method == 'multinomial':
                result = part.resample(tokens[:, start:stop], confidence[:, start:stop])
            elif settings.method == 'standard':
                result = part.reveal_left_to_right(tokens[:, start:stop], confidence[:, start:stop])
            else:
                result = part.run_policy(tokens[:, start:stop], confidence[:, start:stop])
            part.soundness.require()
            assert not (result.tokens == network.model.config.mask_token_id).any(), 'masks were left behind'
            tokens = torch.cat((tokens[:, :start], result.tokens, tokens[:, stop:]), dim=1)
            confidence = torch.cat((confidence[:, :start], result.confidence, confidence[:, stop:]), dim=1)
            waves += result.waves
    return Generation(tokens, confidence, waves)


def rows_to_read(masks: list[int] | None, device: torch.device) -> Tensor | None:
    """int64 [R]: the rows of a batch that have masks, masks [B] of each; None for all of them: where none is without or
    none has any, and where masks are not known."""
    rows = [] if masks is None else [row for row, count in enumerate(masks) if count]
    return torch.tensor(rows, device=device) if 0 < len(rows) < len(masks or ()) else None


class _Soundness:
    """Whether every drawn token had a number for a log-probability: a network without numbers must not print letters.

    Each step adds what it saw to `broken`, a bool on the device; the host asks once a window, or when somebody watches.
    """

    def __init__(self, device: torch.device) -> None:
        self.broken = torch.zeros((), dtype=torch.bool, device=device)

    def look_at(self, log_probabilities: Tensor) -> None:
        self.broken = self.broken | log_probabilities.isnan().any()

    def require(self) -> None:
        """UserError if anything was not a number."""
        if bool(self.broken):
            raise UserError("the network's logits are not numbers (NaN or infinite); the checkpoint is damaged or its "
                            'training diverged: take an earlier one (checkpoint_name), or dtype=float32')


@dataclass(frozen=True)
class _WindowRun:
    """One window of one batch: what its steps have in common. fixed bool [B, T]: prompt and carried context."""

    network: Network
    settings: GenerationSettings
    fixed: Tensor
    generator: RowRandom
    window: int
    start: int
    watch: Watch | None
    soundness: _Soundness

    def numbers(self, step: int, steps: int) -> RowRandom:
        """The rows' random numbers of a step, apart from those of all other windows."""
        return self.generator.at(self.window * steps + step)

    def tell(self, step: int, steps: int, event: Literal['start', 'predict', 'remask'], tokens: Tensor,
             changed: Tensor, confidence: Tensor) -> None:
        """Show a step to whoever watches."""
        if self.watch is not None:
            self.soundness.require()
            self.watch(TraceStep(self.window, self.start, step, steps, event, *(part.detach().cpu() for part in (
                self.generator.rows, tokens, changed, confidence))))

    def run_policy(self, tokens: Tensor, confidence: Tensor) -> Generation:
        """The diffusion loop, over the whole window or over one block of it after another."""
        T = tokens.size(1)
        width = min(T, self.settings.block_length or T)
        steps = self.settings.policy.limit(width)  # of a block; the same for every batch
        blocks = -(-T // width)
        self.tell(0, blocks * steps, 'start', tokens, torch.zeros_like(self.fixed), confidence)
        position, waves = torch.arange(T, device=tokens.device), 0
        for block in range(blocks):
            protected = self.fixed | (position // width != block)
            sizes = (~protected).sum(1).tolist()  # how many positions each row has to fill
            if not any(sizes):
                continue
            tokens, confidence, filled = self.run_block(tokens, confidence, protected, sizes, block * steps,
                                                        blocks * steps)
            waves += filled
        return Generation(tokens, confidence, waves)

    def run_block(self, tokens: Tensor, confidence: Tensor, protected: Tensor, sizes: list[int], first: int,
                  steps: int) -> Generation:
        """Trunk call, reveal, remask, as often as the policy says, or until no mask is left where it asks for that.

        sizes [B]: how many positions of each row are not protected; first: the number of the block's first step among
        the window's `steps`. `masks` is how many positions each row has masked, None where the host would have to ask;
        where it knows, the network reads no row without any.
        """
        policy, mask_token_id, waves = self.settings.policy, self.network.model.config.mask_token_id, 0
        counts, masks = Counts(policy, sizes, tokens.device), sizes
        finished = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)  # [B, 1]
        for step in range(counts.limit):
            last, numbers = step == counts.limit - 1, self.numbers(first + step, steps)
            open = (tokens == mask_token_id) & ~protected
            prediction = Prediction(self.network.model, self.network.encode, tokens, open,
                                    None if masks is None else sum(masks), self.settings.rule, numbers,
                                    rows=rows_to_read(masks, tokens.device), whole=self.network.compiled)
            view, drawn, filled = self._reveal(PolicyView(
                step, tokens, protected, mask_token_id, counts.view(step), numbers, prediction,
                torch.zeros_like(protected), confidence, None), masks, counts.after(step))
            tokens, confidence, waves = view.tokens, view.confidence, waves + filled
            self.tell(first + step, steps, 'predict', tokens, view.revealed, confidence)
            masks = None if masks is None else [before - count for before, count in zip(masks, drawn)]
            if policy.remask is not None and not last:
                with self.network.timer.measure('remask'):
                    remasked = policy.remask(view) & ~protected & ~finished
                    tokens, masks = tokens.masked_fill(remasked, mask_token_id), counts.after(step)
            if policy.asks:
                open = (tokens == mask_token_id) & ~protected
                finished = finished | ~open.any(1, keepdim=True)
                masks = open.sum(1).tolist() if masks is None else masks
                if not any(masks):
                    break
            if policy.remask is not None and not last:
                self.tell(first + step, steps, 'remask', tokens, remasked, confidence)
        return Generation(tokens, confidence, waves)

    def _reveal(self, view: PolicyView, masks: list[int] | None,
                left: list[int] | None) -> tuple[PolicyView, list[int] | None, int]:
        """The step's draws: what the policy sees after them, how many each row has, and the number of waves.

        masks: how many positions of each row are masked, left: how many will be after the step, where the host knows.
        """
        network, settings = self.network, self.settings
        with network.timer.measure('reveal'):
            positions = settings.policy.reveal(view)
            if positions is None:
                positions, drawn = view.masked, masks
            else:
                positions = positions & view.masked
                drawn = positions.sum(1).tolist() if left is None else [
                    before - after for before, after in zip(masks, left)]
        if settings.policy.idles and drawn is not None and not any(drawn):  # so no trunk call
            fill, waves = Fill(view.tokens, view.confidence, view.confidence, positions, None), 0
        else:
            hidden_states = view.prediction.hidden_states
            with network.timer.measure('draw'):
                count = None if drawn is None else sum(drawn)
                fill = network.fill(view.tokens, hidden_states, settings.rule, view.generator, positions) \
                    if settings.use_sampler_head else view.prediction.reveal(positions, count)
            self.soundness.look_at(fill.log_probabilities)
            waves = fill.statistics.waves if fill.statistics is not None else 0
        critic = (lambda: network.critic(fill.tokens)) if settings.use_critic else None
        return replace(view, tokens=fill.tokens, confidence=torch.where(fill.drawn, fill.confidence, view.confidence),
                       revealed=fill.drawn, critic=critic), drawn, waves

    def resample(self, tokens: Tensor, confidence: Tensor) -> Generation:
        """Multinomial: at every iteration all unprotected positions are redrawn, visible ones too."""
        steps = self.settings.iterations
        self.tell(0, steps, 'start', tokens, torch.zeros_like(self.fixed), confidence)
        count = int((~self.fixed).sum())
        for step in range(steps):
            tokens, confidence = self._predict(tokens, confidence, ~self.fixed, count, step, steps)
        return Generation(tokens, confidence, 0)

    def reveal_left_to_right(self, tokens: Tensor, confidence: Tensor) -> Generation:
        """A bidirectional model from left to right: each trunk call reveals the first masked position of every row."""
        mask_token_id = self.network.model.config.mask_token_id
        sizes = (tokens == mask_token_id).sum(1).tolist()
        steps = max(sizes)
        self.tell(0, steps, 'start', tokens, torch.zeros_like(self.fixed), confidence)
        for step in range(steps):
            masked = tokens == mask_token_id
            first = masked & (masked.cumsum(1) == 1)
            # one number per position serves all steps: each position is drawn once
            count = sum(size > step for size in sizes)
            tokens, confidence = self._predict(tokens, confidence, first, count, step, steps, self.numbers(0, 1))
        return Generation(tokens, confidence, 0)

    def _predict(self, tokens: Tensor, confidence: Tensor, positions: Tensor, count: int, step: int, steps: int,
                 generator: RowRandom | None = None) -> tuple[Tensor, Tensor]:
        """A trunk call and independent draws of the `count` positions; tokens and confidence afterwards."""
        hidden_states = self.network.encode(tokens)
        with self.network.timer.measure('draw'):
            fill = independent_fill(self.network.model, tokens, hidden_states, self.settings.rule,
                                    generator or self.numbers(step, steps), positions=positions, count=count)
        self.soundness.look_at(fill.log_probabilities)
        confidence = torch.where(positions, fill.confidence, confidence)
        self.tell(step, steps, 'predict', fill.tokens, positions, confidence)
        return fill.tokens, confidence


def _read_on(network: Network, layout: Layout, settings: GenerationSettings, generator: RowRandom,
             watch: Watch | None) -> Generation:
    """A causal model left to right with a key-value cache; the prompt is a prefix of the same length in every row.

    A full cache is begun again with the last half block as context. An empty prompt is read as `start_token`, which is
    not part of the text.
    """
    model, rule, block_size = network.model, settings.rule, network.model.config.block_size
    B, L = layout.tokens.shape
    known = int(layout.protected[0].sum())
    before = torch.full((B, 1), settings.start_token, device=layout.tokens.device) if known == 0 else \
        layout.tokens[:, :0]
    text = torch.cat((before, layout.tokens), dim=1)  # [B, L] or [B, 1 + L]
    confidence = torch.zeros(B, L, dtype=torch.float64, device=text.device)
    uniform = generator.uniform(Purpose.TOKEN, L)  # [B, L]
    # with no mask among the ids (a corpus of the same special ids has one all the same) the unread part is hidden here
    seen = revealed_ids(text[:, :before.size(1) + known], model.config.vocab_size, None)
    cache, pending = model.new_cache(B), text[:, :before.size(1) + known]
    for position in range(known, L):
        end = position + before.size(1)
        if cache.length + pending.size(1) > block_size:
            cache, pending = model.new_cache(B), text[:, max(0, end - max(1, block_size // 2)):end]
        hidden = network.encode(pending, cache)[:, -1]  # [B, D]
        with network.timer.measure('draw'):
            drawn = draw(model.lm_head(hidden), rule, uniform[:, position], seen)
            text[:, end], confidence[:, position] = drawn.tokens, drawn.confidence
            seen = seen.scatter(1, drawn.tokens[:, None], True)
        pending = text[:, end:end + 1]
        if watch is not None:
            changed = torch.zeros(B, L, dtype=torch.bool)
            changed[:, position] = True
            watch(TraceStep(0, 0, position - known, L - known, 'predict', generator.rows.cpu(),
                            text[:, before.size(1):].cpu().clone(), changed, confidence.cpu().clone()))
    soundness = _Soundness(text.device)
    soundness.look_at(confidence)
    soundness.require()
    return Generation(text[:, before.size(1):], confidence, 0)


def score_confidence(network: Network, tokens: Tensor, protected: Tensor, allowed: Tensor, generator: RowRandom,
                     groups: int) -> SelfConfidence:
    """Self-confidence of the generated tokens of whole sequences [B, L], window by window, each token scored once.

    A bidirectional model scores by masked pseudo-likelihood in `groups` groups, a causal one by its own likelihood.
    """
    model = network.model
    total = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    count, calls = torch.zeros_like(total, dtype=torch.int64), 0
    with network.precision(), network.timer.measure('self-confidence'):
        for index, (start, stop, first_new) in enumerate(windows(tokens.size(1), model.config.block_size)):
            scored = ~protected[:, start:stop] & (torch.arange(start, stop, device=tokens.device) >= first_new)
            part = causal_confidence(model, tokens[:, start:stop], scored, allowed) \
                if model.config.attention_type == 'causal' else \
                self_confidence(model, tokens[:, start:stop], scored, allowed, generator.at(index), groups)
            total, count, calls = total + part.total, count + part.count, calls + part.network_calls
    return SelfConfidence(total, count, calls)
