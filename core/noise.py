"""Noise: schedules, times, masks and replaced tokens, as pure functions of a `RowRandom` generator.

Absorbing-state diffusion: at time t each position is masked independently with the probability that the schedule gives
(Sahoo et al. 2024, MDLM; Shi et al. 2024, MD4). Rows are numbered over the whole global batch of an iteration.

Letters: B rows held here, G rows of the global batch, T sequence length.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core.common.precision import to_exact
from core.common.randomness import Purpose, RowRandom
from core.common.waves import Order, Turns, fill_turns
from core.sampler_head import SAMPLER_KINDS, SamplerWindow

NEARBY = 8  # a nearby token comes from at most this many places away
MINIMUM_TIME = 1e-3  # epsilon: times below it are never drawn, so the weight 1 / t of the linear schedule stays bounded


@dataclass(frozen=True)
class NoiseSchedule:
    """How much is masked at time t in [0, 1] (Shi et al. 2024, MD4, section 4; Lou et al. 2024, SEDD). All functions
    map float64 tensors to float64 tensors of the same shape.

    mask_probability: 1 - alpha(t), which rises from about 0 to about 1. time_of: its inverse. elbo_weight:
    -alpha'(t) / (1 - alpha(t)), the weight of the cross-entropy at masked positions in the NELBO (Sahoo et al. 2024,
    eq. 11). The NELBO does not depend on the schedule; its estimator does.
    """

    mask_probability: Callable[[Tensor], Tensor]
    time_of: Callable[[Tensor], Tensor]
    elbo_weight: Callable[[Tensor], Tensor]

    def alpha(self, times: Tensor) -> Tensor:
        """The probability that a position is not masked at `times`."""
        return 1 - self.mask_probability(times)

    def inverse(self, alpha: Tensor) -> Tensor:
        """The times at which a position is not masked with probability `alpha`."""
        return self.time_of(1 - alpha)


_GEOMETRIC = 1e-5, 20.0  # the total noise at t = 0 and t = 1, as in MD4 and SEDD: alpha falls from e^-1e-5 to e^-20
_GROWTH = math.log(_GEOMETRIC[1] / _GEOMETRIC[0])


def _total_noise(times: Tensor) -> Tensor:
    """The total noise of the geometric schedule, smallest^(1 - t) largest^t; alpha(t) = exp(-total noise)."""
    return _GEOMETRIC[0] * torch.exp(_GROWTH * times)


SCHEDULES = {
    'linear': NoiseSchedule(lambda t: t, lambda masked: masked, lambda t: 1 / t),  # alpha(t) = 1 - t
    'cosine': NoiseSchedule(  # alpha(t) = 1 - cos(pi / 2 (1 - t)); at each time more masks than linear
        lambda t: torch.sin(math.pi / 2 * t), lambda masked: 2 / math.pi * torch.asin(masked),
        lambda t: math.pi / 2 / torch.tan(math.pi / 2 * t)),
    'geometric': NoiseSchedule(
        lambda t: -torch.expm1(-_total_noise(t)),
        lambda masked: torch.log(-torch.log1p(-masked) / _GEOMETRIC[0]) / _GROWTH,
        lambda t: _GROWTH * _total_noise(t) / torch.expm1(_total_noise(t))),
}  # by the value of --noise_schedule
LINEAR = SCHEDULES['linear']


def low_discrepancy_times(generator: RowRandom, global_batch: int) -> Tensor:
    """Times t_b = eps + (1 - eps) * ((u + b / G) mod 1), float64 [B], with one u for the global batch.

    Each t is uniform on [eps, 1). Each of G equal cells holds one of the G times of a batch (Kingma et al. 2021,
    variational diffusion models, appendix I.1). No time is below eps. This changes the mean m1 of the 1 / t loss by
    eps * (m1 - m0), where m0 is the integrand at t = 0: at most about a thousandth of the loss. The same holds under
    every schedule.
    """
    shared = RowRandom(generator.seed, generator.iteration, torch.zeros_like(generator.rows[:1]))
    offset = shared.uniform(Purpose.TIME, 1)[:, 0]  # [1]
    phase = (offset + to_exact(generator.rows).double() / global_batch) % 1.0  # [B]
    return MINIMUM_TIME + (1 - MINIMUM_TIME) * phase


def draw_mask(generator: RowRandom, probability: Tensor, length: int) -> Tensor:
    """bool [B, T], True where masked: each position independently with its row's `probability` [B]."""
    return generator.uniform(Purpose.MASK, length) < probability[:, None]


def apply_mask(tokens: Tensor, mask: Tensor, mask_token_id: int) -> Tensor:
    """`tokens` [B, T] with the mask token where `mask` [B, T] is True; a new tensor."""
    return tokens.masked_fill(mask, mask_token_id)


def replace_tokens(generator: RowRandom, tokens: Tensor, mask: Tensor, base_size: int) -> Tensor:
    """A copy of `tokens` int64 [B, T] with another token of the base vocabulary where `mask` [B, T] is True. All other
    tokens are equally likely."""
    assert base_size >= 2, 'a vocabulary of one token has no other'
    uniform = generator.uniform(Purpose.MASK, tokens.size(1), stream=1)  # [B, T]
    step = 1 + (uniform * (base_size - 1)).long()  # 1 .. V0 - 1: the sum modulo V0 can be any other token
    return torch.where(mask, (tokens + step) % base_size, tokens)


def nearby_tokens(generator: RowRandom, tokens: Tensor, mask: Tensor) -> Tensor:
    """A copy of `tokens` int64 [B, T] with the token of another place of the row where `mask` [B, T] is True.

    All places at most `NEARBY` away are equally likely. Tokens come from the unchanged row, so the new token may equal
    the old one. A row of one token has no other place, so it stays."""
    T, places = tokens.size(1), torch.arange(tokens.size(1), device=tokens.device)
    left, right = places.clamp(max=NEARBY), (T - 1 - places).clamp(max=NEARBY)  # [T], places on each side
    step = (generator.uniform(Purpose.MASK, T, stream=3) * (left + right)).long() - left  # [B, T], below 0: to the left
    step = step + (step >= 0)  # no position is its own source
    return torch.where(mask, tokens.gather(1, (places + step).clamp(max=T - 1)), tokens)


def stratified_mask_counts(generator: RowRandom, total_rows: int, length: int) -> Tensor:
    """Numbers n of masked positions, int64 [B], uniform in 1 .. T and stratified over `total_rows` rows.

    A fixed random order assigns the cells to the rows, so that n does not rise along the corpus.
    """
    shared = RowRandom(generator.seed, generator.iteration, torch.zeros_like(generator.rows[:1]))
    offset = shared.uniform(Purpose.VALIDATION, 1, stream=1)[:, 0]  # [1]
    every_row = RowRandom(generator.seed, generator.iteration, torch.arange(total_rows, device=generator.rows.device))
    cells = every_row.uniform(Purpose.VALIDATION, 1, stream=2)[:, 0].argsort()  # [total_rows]
    phase = (offset + cells[generator.rows].double() / total_rows) % 1.0  # [B]
    return (phase * length).long().clamp(max=length - 1) + 1


def draw_exact_mask(generator: RowRandom, counts: Tensor, length: int) -> Tensor:
    """bool [B, T] with exactly `counts` [B] positions masked in each row, every subset equally likely."""
    ranks = generator.uniform(Purpose.VALIDATION, length).argsort(dim=1).argsort(dim=1)  # [B, T]
    return ranks < counts[:, None]


class SeenNeighbours(NamedTuple):
    """What the sampler head sees. window: how far; order: that of a fill; reads_row: it sees the whole row, in this
    order."""

    window: SamplerWindow
    order: Order = 'wave'
    reads_row: bool = False


def seen_neighbours(config: object) -> SeenNeighbours | None:
    """What the model's sampler head sees; None without a head. config: a `GPTConfig`, or options with its fields."""
    asked = vars(config)
    if not asked['add_sampler_head']:
        return None
    kind = SAMPLER_KINDS[asked['sampler_kind']]
    window = SamplerWindow.of(asked['sampler_context'], asked['sampler_context_left'], asked['sampler_context_right'])
    return SeenNeighbours(window if kind.window else SamplerWindow(0, 0), asked['sampler_order'], kind.reads_row)


class BlockNoise(NamedTuple):
    """Blocks that are masked independently (core/block_noise.py). lengths: block lengths that a row may have. begins:
    the first iteration of each length. whole_share: the share of rows that are masked entirely. shares: smallest and
    largest probability of a mask in the other rows."""

    lengths: tuple[int, ...]
    begins: tuple[int, ...] = ()
    whole_share: float = 0.0
    shares: tuple[float, float] = (0.0, 1.0)

    def lengths_at(self, iteration: int) -> tuple[int, ...]:
        """The lengths that rows may have at `iteration`: the first one, and the others that have begun."""
        begins = self.begins or (0,) * len(self.lengths)
        return self.lengths[:1] + tuple(length for length, begin in zip(self.lengths[1:], begins[1:])
                                        if iteration >= begin)


def shown_neighbours(generator: RowRandom, mask: Tensor, seen: SeenNeighbours, block: Tensor | None = None,
                     probability: float = 0.5) -> Tensor:
    """Which neighbours the sampler head sees in training: bool [B, T, C], slots left_L .. left_1, right_1 .. right_R.

    At inference some neighbours were revealed before the trunk call, some are filled after it, and some still wait.
    In the order 'wave' each masked position sees each of its two sides with `probability`, independently. So left only,
    right only, both and none all occur, as in the waves of a fill. In the order 'left_to_right' it always sees the left
    side, which a fill has passed, and never the right side, which a fill has not reached. Revealed tokens are visible
    on both sides. Positions beyond the sequence are never visible.

    block int64 [B, T]: the number of each position's block in a block model. Earlier blocks are known; later ones are
    not written yet.
    """
    (rows, length), (left, right) = mask.shape, seen.window
    if seen.order == 'left_to_right':
        side_shown = torch.tensor([True, False], device=mask.device).expand(rows, length, 2)
    else:
        side_shown = generator.uniform(Purpose.NEIGHBOUR, 2 * length).view(rows, length, 2) < probability  # [B, T, 2]
    neighbours = torch.arange(length, device=mask.device)[:, None] + seen.window.offsets(mask.device)  # [T, C]
    inside = (neighbours >= 0) & (neighbours < length)
    neighbours = neighbours.clamp(0, length - 1)
    revealed = ~mask[:, neighbours]  # [B, T, C]
    if block is not None:
        own = block[..., None]
        revealed, inside = revealed | (block[:, neighbours] < own), inside & (block[:, neighbours] <= own)
    side_of_slot = torch.tensor([0] * left + [1] * right, device=mask.device)  # [C]
    return (side_shown[..., side_of_slot] | revealed) & inside


class Masking(NamedTuple):
    """How masked diffusion hides text, and what a batch of it holds.

    loss_weighting: of the main loss (docs/training.md). neighbours: what the sampler head sees; None without a head.
    critic_row_stride: the critic trains on every n-th row. critic_scope: it judges the masked positions, or all.
    blocks: for a block model. schedule: the share of masks at each time, for other models.
    """

    mask_token_id: int
    loss_weighting: Literal['elbo', 'masked_mean'] = 'masked_mean'
    neighbours: SeenNeighbours | None = None
    critic_row_stride: int = 1
    critic_scope: Literal['masked_only', 'masked_and_ignore'] = 'masked_only'
    blocks: BlockNoise | None = None
    schedule: NoiseSchedule = LINEAR


class Corruption(NamedTuple):
    """How wrong tokens get into the text that a remasking model or a judge reads.

    loss_type: which positions a remasking model learns from (`position_weights`). fill: takes true tokens [B, T], mask
    [B, T] and random numbers, and returns the tokens with the masked positions filled by a trained generator; None
    without one. sources: what writes a remasking model's wrong tokens: one name of `SOURCES`, or all in their order.
    """

    base_size: int
    cls_token_id: int
    loss_type: Literal['corrupted_only', 'all_positions', 'balanced'] = 'all_positions'
    fill: Callable[[Tensor, Tensor, RowRandom], Tensor] | None = None
    sources: tuple[str, ...] = ('random',)


class Shown(NamedTuple):
    """What the sampler head sees in training. neighbours int64 [B, T, C]: the true tokens next to a position; -1 for
    those that it does not see. new int64 [B, T]: how many of the visible ones the trunk does not know. turns int64
    [B, T, 2]: the `Turns` of a head that reads the row; [0] for other heads."""

    neighbours: Tensor
    new: Tensor
    turns: Tensor


def what_is_shown(generator: RowRandom, targets: Tensor, mask: Tensor, seen: SeenNeighbours | None,
                  block: Tensor | None = None, groups: Tensor | None = None) -> Shown:
    """`Shown` for targets int64 [B, T] under mask bool [B, T]; block int64 [B, T]: see `shown_neighbours`.

    A head that reads the row sees what it would see when a fill reveals groups: the revealed tokens, and the earlier
    tokens of the position's own group. groups int64 [B, T]: see `Turns`; None: `drawn_groups`.
    """
    if seen is None or not seen.reads_row:
        return Shown(*neighbours_shown(generator, targets, mask, seen, block), targets.new_empty(0))
    turns = fill_turns(drawn_groups(generator, mask, block) if groups is None else groups, seen.order)
    return Shown(*neighbours_in_turn(targets, mask, seen.window, turns, block), torch.stack(turns, dim=2))


def drawn_groups(generator: RowRandom, mask: Tensor, block: Tensor | None = None) -> Tensor:
    """int64 [B, T]: the group of each masked position; -1 where nothing is masked. A fill may reveal such a group from
    one trunk call.

    The size of a row's groups is log-uniform from 1 to T, since a text may take few trunk calls or many. Three kinds of
    groups are equally likely: random positions, runs of masked positions, and every k-th masked position. The policies
    `random`, `left_to_right` and `strided` reveal such groups. In a block model a group lies inside one block.
    """
    (rows, T), uniform = mask.shape, generator.uniform(Purpose.NEIGHBOUR, 2, stream=1)
    block = torch.zeros_like(mask, dtype=torch.int64) if block is None else block
    size = (T ** uniform[:, :1]).floor().clamp(min=1)  # [B, 1]
    place = torch.arange(T).expand(rows, T)
    by_lot = generator.uniform(Purpose.NEIGHBOUR, T, stream=2)  # [B, T]
    way = (uniform[:, 1:] * 3).long()  # [B, 1]
    key = torch.where(way == 0, by_lot, place / T)
    order = torch.where(mask, block + key, math.inf).argsort(1).argsort(1)  # by block, then by key
    counts = torch.zeros_like(block).scatter_add(1, block, mask.long())  # [B, T], masked positions of each block
    rank = order - (counts.cumsum(1) - counts).gather(1, block)  # in its block
    count = counts.gather(1, block)
    groups = (count / size).ceil().clamp(min=1)
    number = torch.where(way == 2, rank % groups, (rank / size).floor()).long()
    return torch.where(mask, block * T + number, -1)


def neighbours_in_turn(targets: Tensor, mask: Tensor, window: SamplerWindow, turns: Turns,
                       block: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `neighbours_shown`, with the neighbours that are revealed or that the same group has drawn before."""
    places = torch.arange(targets.size(1), device=mask.device)[:, None] + window.offsets(mask.device)  # [T, C]
    inside, places = (places >= 0) & (places < targets.size(1)), places.clamp(0, targets.size(1) - 1)
    unknown = mask[:, places]  # [B, T, C]
    if block is not None:
        unknown = unknown & (block[:, places] == block[..., None])
        inside = inside & (block[:, places] <= block[..., None])
    group, turn = turns
    drawn = (group[:, places] == group[..., None]) & (turn[:, places] < turn[..., None])
    shown = inside & (~unknown | drawn)
    return torch.where(shown, targets[:, places], -1), (shown & unknown).sum(2)


def neighbours_shown(generator: RowRandom, targets: Tensor, mask: Tensor, seen: SeenNeighbours | None,
                     block: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(int64 [B, T, C]: the true tokens of the neighbours that the sampler head sees, -1 for the others; int64 [B, T]:
    how many of the visible ones the trunk does not know). block: see `shown_neighbours`."""
    if seen is None:
        return targets.new_empty(*targets.shape, 0), torch.zeros_like(targets)
    places = torch.arange(targets.size(1), device=mask.device)[:, None] + seen.window.offsets(mask.device)
    places = places.clamp(0, targets.size(1) - 1)  # [T, C]
    shown = shown_neighbours(generator, mask, seen, block)
    unknown = mask[:, places] if block is None else mask[:, places] & (block[:, places] == block[..., None])
    return torch.where(shown, targets[:, places], -1), (shown & unknown).sum(2)


# What can write wrong tokens: each function returns tokens [B, T] with other tokens where mask [B, T] is True. Tokens
# from nearby places or from a trained generator may be right by chance.
SOURCES: dict[str, Callable[[Corruption, RowRandom, Tensor, Tensor], Tensor]] = {
    'random': lambda corruption, generator, tokens, mask: replace_tokens(generator, tokens, mask, corruption.base_size),
    'shuffled': lambda corruption, generator, tokens, mask: nearby_tokens(generator, tokens, mask),
    'model': lambda corruption, generator, tokens, mask: corruption.fill(tokens, mask, generator),
}


class Corrupted(NamedTuple):
    """tokens int64 [B, T]; sources int64 [B, T]: 0 where a token is right, else 1 + the place of its source in
    `SOURCES`; [0] if there is only one source."""

    tokens: Tensor
    sources: Tensor


def corrupt(corruption: Corruption, generator: RowRandom, tokens: Tensor, mask: Tensor) -> Corrupted:
    """Tokens [B, T] with wrong ones where mask [B, T] is True. Each source writes at all these positions. If there are
    several, each position draws one of them, all equally likely, and takes what that source wrote there."""
    written = [SOURCES[name](corruption, generator, tokens, mask) for name in corruption.sources]
    if len(written) == 1:
        return Corrupted(written[0], tokens.new_empty(0))
    drawn = (generator.uniform(Purpose.MASK, tokens.size(1), stream=4) * len(written)).long()  # [B, T]
    mixed = torch.stack(written).gather(0, drawn[None])[0]
    return Corrupted(mixed, torch.where(mixed != tokens, drawn + 1, 0))


def judged_text(corruption: Corruption, generator: RowRandom, text: Tensor, mask: Tensor) -> Tensor:
    """int64 [B, T]: each row of `text` in one of several equally likely ways: unchanged; with random other tokens where
    mask [B, T] is True; or, if there is a trained generator, with its tokens there."""
    ways = 2 if corruption.fill is None else 3
    way = (generator.uniform(Purpose.MASK, 1, stream=2) * ways).long()  # [B, 1]
    judged = torch.where(way == 1, replace_tokens(generator, text, mask, corruption.base_size), text)
    rows = (way[:, 0] == 2).nonzero().squeeze(1)
    if len(rows):
        chosen = RowRandom(generator.seed, generator.iteration, generator.rows[rows])
        judged = judged.index_copy(0, rows, corruption.fill(text[rows], mask[rows], chosen))
    return judged


def behind_cls(corruption: Corruption, text: Tensor) -> Tensor:
    """int64 [B, 1 + T]: the CLS token before each row of text [B, T]."""
    return F.pad(text, (1, 0), value=corruption.cls_token_id)
