"""How memory and time grow: bytes and operations of training as formulas of a size, and the sizes that are compared.

docs/memory.md writes the formulas out; core/bench/scaling_run.py measures what can be measured. They hold for
masked diffusion without dropout, biases and compilation.

Letters: L layers, D channels, T tokens a row, V ids with the four special ones, C neighbours and W channels of the
sampler head, B rows of a micro-step, N predicted positions, P weights, R ranks.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from core.batches import CAPACITIES
from core.bench.cases import SPECIAL, Shape, model_config
from core.objective import most_logits
from core.optimizer import iterates_squares
from model import GPTConfig

FLOAT = 4  # bytes of a float32 value; weights, gradients, moments and averages are such


@dataclass(frozen=True)
class Size:
    """A model, its batch and its ranks. rows: of a micro-step. micro_steps: of a rank in an iteration. sampler: the
    head's sampler_output; None: no head. steps: how many are measured; the first one only warms up."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    rows: int
    micro_steps: int = 2
    ranks: int = 1
    sampler: str | None = None
    sampler_n_embd: int | None = None
    critic: bool = False
    critic_row_stride: int = 4
    optimizer: str = 'muon'
    sharded: bool = False
    recompute: bool = False
    bfloat16: bool = False
    device: str = 'cpu'
    steps: int = 4

    @property
    def config(self) -> GPTConfig:
        """The model. Its heads train from the first iteration on."""
        heads = {} if self.sampler is None else {'add_sampler_head': True, 'sampler_n_embd': self.sampler_n_embd}
        heads |= {'add_critic_head': True, 'critic_row_stride': self.critic_row_stride} if self.critic else {}
        return model_config(Shape(self.n_layer, self.n_head, self.n_embd, self.block_size, self.rows,
                                  self.vocab_size - SPECIAL, self.sampler or 'own'), **heads)

    @property
    def positions(self) -> int:
        """N of a usual micro-step."""
        return int(CAPACITIES[0] * self.rows * self.block_size)

    @property
    def critic_rows(self) -> int:
        """Rows of a micro-step that the critic is trained on."""
        return math.ceil(self.rows / self.critic_row_stride) if self.critic else 0

    def described(self) -> dict[str, Any]:
        """The fields in built-in types; `Size(**described)` is the same size."""
        return asdict(self)


CHARACTERS = {'vocab_size': 69, 'sampler': 'own', 'critic': True}  # heads as in config/train_char_diffusion_sampler.py
WORDS = {'vocab_size': 50_261, 'sampler': 'shared_detached'}  # as in config/train_gpt2_diffusion.py
_WIDE = Size(6, 6, 384, 256, rows=16, sampler_n_embd=3 * 384, **CHARACTERS)
_PAIR = replace(_WIDE, rows=2, critic=False, ranks=2, optimizer='adamw')
SIZES = {  # to be measured
    'small': Size(4, 4, 128, 128, rows=64, sampler_n_embd=3 * 128, steps=6, **CHARACTERS),
    'large': _WIDE,
    'long': replace(_WIDE, block_size=1024, rows=4, steps=3),
    'long-recomputed': replace(_WIDE, block_size=1024, rows=4, recompute=True, steps=3),
    'vocabulary': Size(4, 4, 128, 256, rows=8, **WORDS),
    'gpt2': Size(12, 12, 768, 1024, rows=1, steps=3, **WORDS),
    'small-2-ranks': Size(4, 4, 128, 128, rows=32, ranks=2, sampler_n_embd=3 * 128, steps=6, **CHARACTERS),
    'large-2-ranks': _PAIR,
    'large-2-ranks-sharded': replace(_PAIR, sharded=True),
}
_GPT2 = Size(12, 12, 768, 1024, rows=12, micro_steps=40, bfloat16=True, **WORDS)
_BILLIONS = Size(48, 25, 1600, 1024, rows=12, micro_steps=5, ranks=8, optimizer='adamw', sharded=True, bfloat16=True,
                 **WORDS)
PLANNED = {  # to be computed only
    'GPT-2, 1 GPU': _GPT2,
    'GPT-2, 8 GPUs': replace(_GPT2, micro_steps=5, ranks=8),
    '1.6 billion, 8 GPUs, sharded': _BILLIONS,
    '1.6 billion, 8 GPUs, sharded, recomputed': replace(_BILLIONS, recompute=True),
}


# Weights ------------------------------------------------------------------------------------------------------------

def parameters(config: GPTConfig) -> int:
    """P of a language model without biases; the tied matrix counts once."""
    L, D, V = config.n_layer, config.n_embd, config.vocab_size
    count = V * D + D + layer_parameters(config) * L + (config.block_size * D if _is_absolute(config) else 0)
    if config.add_sampler_head:
        W = _head_width(config)
        count += (config.sampler_window.size + 1) * D * W + W * W + 6 * W
        count += V * W if config.sampler_output == 'own' else 0
    return count + (D + 1 if config.add_critic_head else 0)


def layer_parameters(config: GPTConfig) -> int:
    """Weights of one layer: four kinds of matrices, two gains of the stream and two of a head's queries and keys."""
    D = config.n_embd
    return 12 * D * D + 2 * D + 2 * (D // config.n_head)


def matrices(config: GPTConfig) -> Iterator[tuple[int, int, int]]:
    """(how many, longer side, shorter side) of the matrices that Muon updates together: those of the same shape."""
    L, D = config.n_layer, config.n_embd
    yield from ((L, 3 * D, D), (L, D, D), (L, 4 * D, D), (L, 4 * D, D))
    if config.add_sampler_head:
        W, inputs = _head_width(config), (config.sampler_window.size + 1) * D
        yield from ((1, max(W, inputs), min(W, inputs)), (1, W, W))


def _is_absolute(config: GPTConfig) -> bool:
    return config.position_encoding == 'absolute'


def _head_width(config: GPTConfig) -> int:
    return config.sampler_n_embd or config.n_embd


# Bytes --------------------------------------------------------------------------------------------------------------

class Kept(NamedTuple):
    """Bytes for each channel and position that stay for the backward pass. layer: of a layer. attention: of the last
    layer, before it continues with the predicted positions only. picked: of that layer, for these positions. final: of
    the final norm. square: what the backward pass of a layer's wider part takes, minus what it has already released."""

    layer: int
    attention: int
    picked: int
    final: int
    square: int


KEPT = {False: Kept(88, 44, 48, 12, 52), True: Kept(64, 38, 28, 10, 28)}  # by whether products are in bfloat16


def staying_bytes(size: Size) -> int:
    """Bytes of a rank that outlast a micro-step: weights, gradients, averages and moments, the weights cast to
    bfloat16, the buckets in which ranks add gradients. If sharded, they are cut over the ranks, except gathered ones.
    """
    config = size.config
    P, M = parameters(config), sum(count * one * other for count, one, other in matrices(config))
    moments = P if size.optimizer == 'muon' else 2 * P
    held = FLOAT * (3 * P + moments + (P - M if size.optimizer == 'muon' else 0)) + (2 * P if size.bfloat16 else 0)
    if size.sharded:
        rest = P - size.n_layer * layer_parameters(config)
        return FLOAT * 5 * P // size.ranks + (FLOAT + (2 if size.bfloat16 else 0)) * (
            min(2, size.n_layer) * layer_parameters(config) + rest)
    return held + (FLOAT * P if size.ranks > 1 else 0)


def micro_step_bytes(size: Size, positions: int) -> int:
    """Bytes that a micro-step with N = `positions` adds to `staying_bytes` at its peak. The peak comes when the losses
    are computed, or when the backward pass begins: the trunk's, or the critic's."""
    config = size.config
    D, V, tokens = size.n_embd, size.vocab_size, size.rows * size.block_size
    head, copies = 0, 3  # a position's bytes in the sampler head; copies of a chunk's logits
    if config.add_sampler_head:
        W = _head_width(config)
        head, copies = FLOAT * (6 * W + (config.sampler_window.size + 1) * D), 4
    chunk = chunk_positions(size, positions)
    tables = config.add_sampler_head + (chunk < positions)  # normalised embeddings; the sum of the chunks' gradients
    trunk = kept_bytes(size, tokens, positions)
    losses = chunk * (head + FLOAT * copies * V) + FLOAT * V * D * tables
    if chunk < positions:  # a chunk's gradient, the earlier sum, and the new sum
        losses = max(losses, FLOAT * V * D * (tables + 2))
    worst = trunk + max(losses, opening_bytes(size, tokens, positions))
    if size.critic:
        judged = size.critic_rows * size.block_size
        waiting = positions * (head + FLOAT * (copies - 2) * V) if chunk == positions else 0
        worst = max(worst, trunk + waiting + kept_bytes(size, judged, judged) + opening_bytes(size, judged, judged))
    return worst


def kept_bytes(size: Size, tokens: int, positions: int) -> int:
    """Bytes that a trunk call on `tokens` keeps for the backward pass, if its last layer continues with `positions` of
    them only. With recompute it keeps only the layers' inputs."""
    kept, D, L = KEPT[size.bfloat16], size.n_embd, size.n_layer
    if size.recompute:
        return D * (tokens * FLOAT * (L + 1) + positions * kept.final)
    return D * (tokens * (kept.layer * (L - 1) + kept.attention + FLOAT) + positions * (kept.picked + kept.final))


def opening_bytes(size: Size, tokens: int, positions: int) -> int:
    """Bytes that the backward pass of such a call adds to these at its peak: in the wider part of the last layer, or
    with recompute in the wider part of a layer that was computed again."""
    kept = KEPT[size.bfloat16]
    if size.recompute:
        return size.n_embd * (tokens * (kept.layer + kept.square - 2 * FLOAT) - positions * kept.final)
    return size.n_embd * positions * (kept.square - kept.final)


def chunk_positions(size: Size, positions: int) -> int:
    """How many positions' logits exist at once."""
    chunks = math.ceil(positions / max(1, most_logits(torch.device(size.device)) // size.vocab_size))
    return math.ceil(positions / chunks)


def update_bytes(size: Size) -> int:
    """Bytes that the optimizer holds at its peak. Of all matrices of one shape Muon holds five copies and two products
    of each with itself. If it iterates these products (`iterates_squares`), four copies and four products."""
    if size.optimizer != 'muon':
        return 0
    return FLOAT * max(count * ((4 * one + 4 * other) * other if _squares(size, one, other)
                                else (5 * one + 2 * other) * other) for count, one, other in matrices(size.config))


def _squares(size: Size, one: int, other: int) -> bool:
    return iterates_squares(other, one, torch.bfloat16 if size.bfloat16 else torch.float32,
                            torch.device(size.device))


def peak_bytes(size: Size, positions: int) -> int:
    """The most bytes that a rank holds in an iteration of several micro-steps. positions: of the largest micro-step."""
    return staying_bytes(size) + max(micro_step_bytes(size, positions), update_bytes(size))


# Operations ---------------------------------------------------------------------------------------------------------

def iteration_operations(size: Size, positions: float) -> float:
    """Floating-point operations of the matrix products of an iteration on all ranks, two per multiply-add, without the
    optimizer's. positions: how many are predicted. Of the critic's text half the positions count as drawn."""
    config = size.config
    D, V, T, L = size.n_embd, size.vocab_size, size.block_size, size.n_layer
    tokens, micro_steps = size.rows * size.micro_steps * size.ranks * T, size.micro_steps * size.ranks
    layer = 24 * D * D + 4 * T * D
    chunk = chunk_positions(size, math.ceil(positions / micro_steps))
    p = 3 if chunk * micro_steps >= positions else 4  # passes over the logits; chunks compute them again
    found = 3 * (tokens * (layer * (L - 1) + 6 * D * D + 4 * T * D) + positions * 18 * D * D)
    if size.recompute:  # once more, except a layer's last product, which no backward pass reads
        found += tokens * ((layer - 8 * D * D) * (L - 1) + 6 * D * D + 4 * T * D) + positions * 10 * D * D
    found += p * 2 * V * D * positions
    W, neighbours = _head_width(config), config.sampler_window.size
    if config.add_sampler_head:  # its input gets no gradient, nor does an output matrix of the trunk's
        found += 2 * positions * ((p - 1) * (neighbours + 1) * D * W + p * W * W +
                                  (p if size.sampler == 'own' else p - 1) * V * W)
    if size.critic:
        judged = size.critic_rows * micro_steps * T
        found += judged * ((3 * layer + (layer - 8 * D * D if size.recompute else 0)) * L + 6 * D)
        found += judged / 2 * 2 * (V * D + ((D + W) * W + V * W if config.add_sampler_head else 0))
    return float(found)


def update_operations(size: Size) -> float:
    """Operations of Muon's matrix products; every rank computes all of them. AdamW has none."""
    if size.optimizer != 'muon':
        return 0.0
    return float(sum(count * (4 * one * other ** 2 + 34 * other ** 3 if _squares(size, one, other)
                              else 10 * (2 * one * other ** 2 + other ** 3))
                     for count, one, other in matrices(size.config)))


def rank_operations(size: Size, positions: float) -> float:
    """Operations of one rank in an iteration. positions: how many all ranks together predict."""
    return iteration_operations(size, positions) / size.ranks + update_operations(size)


def link_bytes(size: Size) -> float:
    """Bytes that a rank sends in an iteration. It adds up gradients once. If sharded, it gathers weights twice and adds
    up gradients once in every micro-step."""
    P, share = parameters(size.config), (size.ranks - 1) / size.ranks
    return FLOAT * P * share * (3 * size.micro_steps if size.sharded else 2)
