"""Generation: the loop that calls the network, window by window, step by step.

    diffusion    predict, then remask, as a policy of core/sampling/policies says; through the sampler head if there is
                 one
    sampler      the same, but the head is required
    multinomial  every unprotected position is redrawn at each iteration from the network's own softmax
    standard     left to right; a causal model reads with a key-value cache

Row i of a run with seed s gets the same random numbers in any batch. A step waits for the device in two cases only: if
chance or the network decides how many positions are drawn, and at the end of the sampler head's waves.

Letters: B rows, L sequence length, T window length (at most block_size), V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from core.common.drawing import DrawRule, draw, revealed_ids
from core.common.precision import to_exact
from core.common.randomness import Purpose, RowRandom
from core.sampling.block_network import BlockNetwork
from core.sampling.network import LOGITS, Network, Soundness
from core.sampling.policies import Counts, Open, Policy, PolicyView, Prediction
from core.sampling.prompt import Layout
from core.sampling.self_confidence import SelfConfidence, causal_confidence, self_confidence
from core.sampling.trace import Event, TraceStep, Watch
from model import GPTConfig
from sample_utils import Fill, FillTask, Head

Method = Literal['diffusion', 'sampler', 'multinomial', 'standard']


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate.

    policy, head: of 'diffusion' and 'sampler'; the head says what fills. iterations: of 'multinomial'. start_token:
    what a causal model reads before an empty prompt. block_length: the policy finishes this many positions before the
    next ones (semi-autoregressive, Arriola et al. 2025; Nie et al. 2025); None: all at once. For a block model it is
    the length of its blocks. verify_drafts: core/sampling/verified.py writes. use_critic: the policy may ask the
    network's remasking model or critic head how wrong tokens are.
    """

    method: Method
    rule: DrawRule
    policy: Policy | None = None
    iterations: int = 1
    head: Head = 'none'
    use_critic: bool = False
    start_token: int = 0
    block_length: int | None = None
    verify_drafts: bool = False


class Generation(NamedTuple):
    """tokens int64 [B, L] without masks; confidence float64 [B, L]: each token's log-probability when it was drawn,
    0 for protected ones; waves: of all wavefront fills together."""

    tokens: Tensor
    confidence: Tensor
    waves: int

    @classmethod
    def of(cls, layout: Layout) -> 'Generation':
        """Nothing drawn yet."""
        zeros = torch.zeros(layout.tokens.shape, dtype=torch.float64, device=layout.tokens.device)
        return cls(layout.tokens, zeros, 0)

    def part(self, start: int, stop: int) -> 'Generation':
        """Positions start .. stop - 1."""
        return self._replace(tokens=self.tokens[:, start:stop], confidence=self.confidence[:, start:stop])

    def with_part(self, start: int, made: 'Generation') -> 'Generation':
        """The whole, with `made` from position `start` on."""
        stop = start + made.tokens.size(1)
        tokens, confidence = (torch.cat((whole[:, :start], part, whole[:, stop:]), dim=1) for whole, part in (
            (self.tokens, made.tokens), (self.confidence, made.confidence)))
        return Generation(tokens, confidence, made.waves)


# Windows --------------------------------------------------------------------------------------------------------------

class Window(NamedTuple):
    """Positions start .. stop - 1 of a sequence. Those before first_new are context that is already written."""

    start: int
    stop: int
    first_new: int


def windows(length: int, block_size: int) -> list[Window]:
    """The windows that write `length` positions: each after the first carries half a block of protected context.

    The last window ends with the sequence, so it carries more context if little is left to write.
    """
    found = [Window(0, min(length, block_size), 0)]
    while found[-1].stop < length:
        written = found[-1].stop
        stop = min(length, written - block_size // 2 + block_size)
        found.append(Window(stop - block_size, stop, written))
    return found


@dataclass(frozen=True)
class WindowRun:
    """What the steps of one window of one batch have in common.

    number and start: of the window; fixed bool [B, T]: prompt and carried context; generator: the batch's rows.
    """

    number: int
    start: int
    fixed: Tensor
    generator: RowRandom
    watch: Watch | None
    soundness: Soundness

    def numbers(self, step: int, steps: int) -> RowRandom:
        """The rows' random numbers of one of `steps` steps, apart from those of all other windows."""
        return self.generator.at(self.number * steps + step)

    def tell(self, step: int, steps: int, event: Event, made: Generation, changed: Tensor | None = None) -> None:
        """Tell `watch` what one of `steps` steps did; changed bool [B, T], None for nothing."""
        if self.watch is None:
            return
        self.soundness.require()
        rows, tokens, changed, confidence = (part.detach().cpu() for part in (
            self.generator.rows, made.tokens, torch.zeros_like(self.fixed) if changed is None else changed,
            made.confidence))
        self.watch(TraceStep(window=self.number, start=self.start, step=step, steps=steps, event=event, rows=rows,
                             tokens=tokens, changed=changed, confidence=confidence))


# The loop -------------------------------------------------------------------------------------------------------------

def generate(network: Network, layout: Layout, settings: GenerationSettings, generator: RowRandom,
             watch: Watch | None = None) -> Generation:
    """Write the masked positions of `layout` [B, L], one row per row of `generator`; protected ones never change."""
    tokens, protected = layout = Layout(*map(to_exact, layout))
    assert len(tokens) == len(generator.rows)
    whole = Generation.of(layout)
    with network.precision():
        if settings.method == 'standard' and network.model.config.attention_type == 'causal':
            return _read_on(network, layout, settings, generator, watch)
        if reads_blocks(network.model.config, settings.block_length):
            return write_blocks(network, layout, settings, generator, watch)
        for number, (start, stop, first_new) in enumerate(windows(tokens.size(1), network.model.config.block_size)):
            fixed = protected[:, start:stop] | (torch.arange(start, stop, device=tokens.device) < first_new)
            window = WindowRun(number, start, fixed, generator, watch, Soundness(tokens.device))
            made = WRITERS[settings.method](network, settings, window, whole.part(start, stop))
            window.soundness.require()
            assert not (made.tokens == network.model.config.mask_token_id).any(), 'masks were left'
            whole = whole.with_part(start, made)
    return whole


def follow_policy(network: Network, settings: GenerationSettings, window: WindowRun, made: Generation) -> Generation:
    """The diffusion loop, over the whole window or block by block."""
    T = made.tokens.size(1)
    width = min(T, settings.block_length or T)
    limit = settings.policy.limit(width)  # steps of a block; the same for every batch
    blocks = -(-T // width)
    window.tell(0, blocks * limit, 'start', made)
    position = torch.arange(T, device=made.tokens.device)
    for number in range(blocks):
        protected = window.fixed | (position // width != number)
        block = Block(protected, (~protected).sum(1).tolist(), number * limit, blocks * limit)
        if any(block.sizes):
            made = run_block(network, settings, window, block, made)
    return made


class Block(NamedTuple):
    """A part of a window that is completed before the next begins.

    protected bool [B, T]: prompt, context, and all positions outside the block. sizes [B]: how many positions each row
    has to fill. first: the number of the block's first step among the window's `steps`.
    """

    protected: Tensor
    sizes: list[int]
    first: int
    steps: int


def run_block(network: Network, settings: GenerationSettings, window: WindowRun, block: Block,
              made: Generation) -> Generation:
    """Trunk call, reveal, remask: as often as the policy says, or until no mask is left if the policy asks for that.

    `masks`: how many masked positions each row has; None: the host does not know. If it knows, the network skips rows
    without masks.
    """
    policy, mask_token_id = settings.policy, network.model.config.mask_token_id
    counts, masks = Counts(policy, block.sizes, made.tokens.device), block.sizes
    finished = torch.zeros(len(made.tokens), 1, dtype=torch.bool, device=made.tokens.device)  # [B, 1]
    for step in range(counts.limit):
        number, remasks = block.first + step, policy.remask is not None and step < counts.limit - 1
        numbers = window.numbers(number, block.steps)
        prediction = Prediction(network, _open(made.tokens, block, mask_token_id, masks), settings.rule, numbers,
                                settings.head)
        view = PolicyView(step=step, tokens=made.tokens, protected=block.protected, mask_token_id=mask_token_id,
                          left=counts.view(step), generator=numbers, prediction=prediction,
                          revealed=torch.zeros_like(block.protected), confidence=made.confidence, critic=None)
        view, drawn, waves = _reveal(network, settings, window, view, masks, counts.after(step))
        made = Generation(view.tokens, view.confidence, made.waves + waves)
        window.tell(number, block.steps, 'predict', made, view.revealed)
        masks = None if masks is None else [before - count for before, count in zip(masks, drawn)]
        if remasks:
            with network.timer.measure('remask'):
                remasked = policy.remask(view) & ~block.protected & ~finished
                made = made._replace(tokens=made.tokens.masked_fill(remasked, mask_token_id))
                masks = counts.after(step)
        if policy.asks:
            open = (made.tokens == mask_token_id) & ~block.protected
            finished = finished | ~open.any(1, keepdim=True)
            masks = open.sum(1).tolist() if masks is None else masks
            if not any(masks):
                break
        if remasks:
            window.tell(number, block.steps, 'remask', made, remasked)
    return made


def _open(tokens: Tensor, block: Block, mask_token_id: int, masks: list[int] | None) -> Open:
    """The block's masked positions; masks [B]: how many each row has, if the host knows."""
    count = None if masks is None else sum(masks)
    return Open(tokens, (tokens == mask_token_id) & ~block.protected, count, rows_to_read(masks, tokens.device))


def rows_to_read(masks: list[int] | None, device: torch.device) -> Tensor | None:
    """int64 [R]: the rows of a batch that have masks, given the number of masks of each row. None means all rows: if
    every row has masks, if no row has any, or if the numbers are not known."""
    rows = [] if masks is None else [row for row, count in enumerate(masks) if count]
    return torch.tensor(rows, device=device) if 0 < len(rows) < len(masks or ()) else None


def _reveal(network: Network, settings: GenerationSettings, window: WindowRun, view: PolicyView,
            masks: list[int] | None, left: list[int] | None) -> tuple[PolicyView, list[int] | None, int]:
    """Draw the tokens of a step. Returns what the policy sees then, how many tokens each row got, and the waves.

    masks, left: how many positions of each row are masked before and after the step, if the host knows.
    """
    with network.timer.measure('reveal'):
        positions = settings.policy.reveal(view)
        if positions is None:
            positions, drawn = view.masked, masks
        else:
            positions = positions & view.masked
            drawn = positions.sum(1).tolist() if left is None else [
                before - after for before, after in zip(masks, left)]
    if settings.policy.idles and drawn is not None and not any(drawn):  # so no trunk call
        fill = Fill(view.tokens, view.confidence, view.confidence, positions, None)
    else:
        view.prediction.hidden_states  # so that the trunk call is timed separately
        with network.timer.measure('draw'):
            fill = view.prediction.fill(positions, None if drawn is None else sum(drawn))
        window.soundness.look_at(LOGITS, fill.log_probabilities)
    waves = fill.statistics.waves if fill.statistics is not None else 0
    critic = (lambda: window.soundness.look_at(network.judging, network.critic(fill.tokens))) \
        if settings.use_critic else None
    return replace(view, tokens=fill.tokens, confidence=torch.where(fill.drawn, fill.confidence, view.confidence),
                   revealed=fill.drawn, critic=critic), drawn, waves


def reads_blocks(config: GPTConfig, block_length: int | None) -> bool:
    """Whether a model writes in blocks with a cache: a block model does, unless one block is its whole window."""
    return config.attention_type == 'block' and block_length != config.block_size


def parts_of(length: int, config: GPTConfig, block_length: int | None) -> int:
    """In how many windows or blocks a text of `length` positions is written."""
    return -(-length // block_length) if reads_blocks(config, block_length) else len(windows(length, config.block_size))


def write_blocks(network: Network, layout: Layout, settings: GenerationSettings, generator: RowRandom,
                 watch: Watch | None) -> Generation:
    """Write the masked positions of `layout` [B, L] with a block model, from left to right, by the policy in each
    block.

    Blocks without masks are only read. A text may have any length: when the cache is full, it drops the oldest text.
    """
    whole, b, (rows, length) = Generation.of(layout), settings.block_length, layout.tokens.shape
    blocks, limit = BlockNetwork(network, b, rows), settings.policy.limit(b)
    for number, start in enumerate(range(0, length, b)):
        stop = min(length, start + b)
        protected = layout.protected[:, start:stop]
        window = WindowRun(number, start, protected, generator, watch, Soundness(protected.device))
        made, sizes = whole.part(start, stop), (~protected).sum(1).tolist()
        window.tell(0, limit, 'start', made)  # also for a prompt, which `watch` learns from it
        if not any(sizes):
            continue
        blocks.begin(whole.tokens, start, stop)
        made = run_block(blocks, settings, window, Block(protected, sizes, 0, limit), made)
        window.soundness.require()
        assert not (made.tokens == network.model.config.mask_token_id).any(), 'masks were left'
        whole = whole.with_part(start, made)
    return whole


def redraw(network: Network, settings: GenerationSettings, window: WindowRun, made: Generation) -> Generation:
    """Multinomial: at every iteration all unprotected positions are redrawn, visible ones too."""
    steps, open = settings.iterations, ~window.fixed
    window.tell(0, steps, 'start', made)
    count = int(open.sum())
    for step in range(steps):
        made = _redrawn(network, settings, window, made, open, count, window.numbers(step, steps))
        window.tell(step, steps, 'predict', made, open)
    return made


def reveal_left_to_right(network: Network, settings: GenerationSettings, window: WindowRun,
                         made: Generation) -> Generation:
    """A bidirectional model from left to right: each trunk call reveals the first masked position of every row."""
    mask_token_id = network.model.config.mask_token_id
    sizes = (made.tokens == mask_token_id).sum(1).tolist()
    steps, numbers = max(sizes), window.numbers(0, 1)  # of all steps: each position is drawn once
    window.tell(0, steps, 'start', made)
    for step in range(steps):
        masked = made.tokens == mask_token_id
        first = masked & (masked.cumsum(1) == 1)
        count = sum(size > step for size in sizes)
        made = _redrawn(network, settings, window, made, first, count, numbers)
        window.tell(step, steps, 'predict', made, first)
    return made


def _redrawn(network: Network, settings: GenerationSettings, window: WindowRun, made: Generation, positions: Tensor,
             count: int, numbers: RowRandom) -> Generation:
    """A trunk call, then independent draws of the `count` positions bool [B, T]."""
    hidden_states = network.encode(made.tokens)
    with network.timer.measure('draw'):
        fill = network.filler('none').fill(FillTask(made.tokens, hidden_states, settings.rule, numbers, positions,
                                                    count))
    window.soundness.look_at(LOGITS, fill.log_probabilities)
    return Generation(fill.tokens, torch.where(positions, fill.confidence, made.confidence), made.waves)


Writer = Callable[[Network, GenerationSettings, WindowRun, Generation], Generation]
WRITERS: dict[Method, Writer] = {'diffusion': follow_policy, 'sampler': follow_policy, 'multinomial': redraw,
                                 'standard': reveal_left_to_right}


# Causal models --------------------------------------------------------------------------------------------------------

def _read_on(network: Network, layout: Layout, settings: GenerationSettings, generator: RowRandom,
             watch: Watch | None) -> Generation:
    """A causal model left to right with a key-value cache; the prompt is a prefix of the same length in every row.

    A full cache starts again with the last half block as context. An empty prompt is read as `start_token`, which is
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
            watch(TraceStep(window=0, start=0, step=position - known, steps=L - known, event='predict',
                            rows=generator.rows.cpu(), tokens=text[:, before.size(1):].cpu().clone(),
                            changed=changed, confidence=confidence.cpu().clone()))
    soundness = Soundness(text.device)
    soundness.look_at(LOGITS, confidence)
    soundness.require()
    return Generation(text[:, before.size(1):], confidence, 0)


# Self-confidence ------------------------------------------------------------------------------------------------------

def score_confidence(network: Network, tokens: Tensor, protected: Tensor, allowed: Tensor, generator: RowRandom,
                     groups: int, block_length: int | None = None) -> SelfConfidence:
    """Self-confidence of the generated tokens of whole sequences [B, L], window by window, each token scored once.

    A bidirectional model scores by masked pseudo-likelihood in `groups` groups. A block model does the same inside its
    blocks of `block_length`. A causal model scores by its own likelihood.
    """
    model, tokens, protected = network.model, to_exact(tokens), to_exact(protected)
    length = block_length if reads_blocks(model.config, block_length) else None
    total = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    count, calls = torch.zeros_like(total, dtype=torch.int64), 0
    with network.precision(), network.timer.measure('self-confidence'):
        for index, (start, stop, first_new) in enumerate(windows(tokens.size(1), model.config.block_size)):
            scored = ~protected[:, start:stop] & (torch.arange(start, stop, device=tokens.device) >= first_new)
            part = causal_confidence(model, tokens[:, start:stop], scored, allowed) \
                if model.config.attention_type == 'causal' else \
                self_confidence(model, tokens[:, start:stop], scored, allowed, generator.at(index), groups, length)
            total, count, calls = total + part.total, count + part.count, calls + part.network_calls
    return SelfConfidence(total, count, calls)
