"""The losses of one micro-step: the main loss and those of the heads.

One trunk call serves all of them; only the critic's filled-in text needs a second one. Losses are sums of weighted
cross-entropies. The weights are shares of the global batch, so the losses of micro-steps, ranks and chunks of positions
add up. With a large vocabulary only the logits of one chunk of positions exist at a time.

Letters: B rows, T sequence length, V vocabulary, D width, N predicted positions, C neighbours.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.batches import Batch
from core.checkpoints.heads import CRITIC, SAMPLER
from core.common.drawing import DrawRule
from core.common.randomness import RowRandom
from core.common.stream_attention import StreamTiles, stream_tiles, tiles_pay
from core.common.waves import Turns
from core.noise import SOURCES
from core.stages import Stage
from model import GPT, GPTConfig, ModelMode
from sample_utils import (WaveRecorder, build_critic_artifacts_from_logits, prepare_sampler_inputs, rows_read,
                          wrong_from_logits)

# If there are more logits (N * V), the losses take the positions in chunks. The softmax and its gradient keep about
# four float32 copies of the logits: 0.5 GiB at this limit. A lower limit would be slower. With a vocabulary of 50,000 a
# chunk would hold fewer positions than a trunk is wide. Then adding up the gradient of the [V, D] matrix over chunks
# would cost more passes over memory than the logits. Characters stay far below: 69 ids at 4,608 positions are 0.3
# million.
MOST_LOGITS, GPU_TIMES = 2 ** 25, 8  # on a GPU this many times the limit: it needs large products to be busy


def most_logits(device: torch.device) -> int:
    """The most logits of training that exist at once."""
    return MOST_LOGITS * (GPU_TIMES if device.type == 'cuda' else 1)


class Losses(NamedTuple):
    """Scalars in nats; a judge's is a squared error. total: main, plus the weighted losses of the heads.

    heads: the loss of each head that trains, by the head's name. sums: numbers for the log, added up over micro-steps
    and ranks; `TrainingKind.metrics` reads them. For remasking models float32 [2 or 5, 4], see `position_sums`.
    """

    total: Tensor
    main: Tensor
    heads: Mapping[str, Tensor]
    sums: Tensor | None = None


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, allowed: Tensor) -> Tensor:
    """Sum over N of weights * CE, the softmax taken over `allowed` ids only, in float32; exactly 0 for zero weights.

    logits [N, V], targets int64 [N], weights float32 [N], allowed bool [V].
    """
    logits = logits.float().masked_fill(~allowed, -torch.inf)  # [N, V]
    return (F.cross_entropy(logits, targets, reduction='none') * weights).sum()


class RemaskingTerms(NamedTuple):
    """Per position [B, T].

    wrong bool: whether the input differs from the truth. loss float32: cross-entropy in nats. right bool: whether the
    most probable class is the target; a multiclass model's sources count as one class, *wrong*. named bool: whether the
    most probable base token is the truth, or the most probable source the true one; always False for a binary model.
    probability float64: P(wrong).
    """

    wrong: Tensor
    loss: Tensor
    right: Tensor
    named: Tensor
    probability: Tensor


def remasking_terms(model: GPT, inputs: Tensor, truth: Tensor, allowed: Tensor, sources: Tensor) -> RemaskingTerms:
    """What a remasking model of any kind says about inputs int64 [B, T], one call; truth int64 [B, T]; sources: see
    `Corrupted`.

    A language model's target is wrong_token_id where the input is wrong, and the token itself elsewhere. Its softmax is
    over wrong_token_id and `allowed` bool [V], the base vocabulary. A binary model's target is class 1 where the input
    is wrong. A multiclass model's targets are the `sources`.
    """
    config, logits = model.config, model(inputs).logits.float()  # [B, T, V or classes]
    wrong = inputs != truth
    probability = wrong_from_logits(logits.detach(), config)
    if names(config) == 'source':
        targets, named, right = sources, logits[..., 1:].argmax(-1) + 1 == sources, (probability > 0.5) == wrong
    elif config.mode is ModelMode.TOKEN_CLASSIFIER:
        targets, named = wrong.long(), torch.zeros_like(wrong)
        right = logits.argmax(-1) == targets
    else:
        targets = torch.where(wrong, config.wrong_token_id, truth)
        named = logits.masked_fill(~allowed, -torch.inf).argmax(-1) == truth
        allowed = allowed | (torch.arange(len(allowed), device=allowed.device) == config.wrong_token_id)
        logits = logits.masked_fill(~allowed, -torch.inf)
        right = logits.argmax(-1) == targets
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction='none').view_as(truth)
    return RemaskingTerms(wrong, loss, right, named, probability)


def names(config: GPTConfig) -> Literal['correction', 'source'] | None:
    """What a remasking model of this shape tells about a wrong token besides *wrong*: the right token, or the source of
    the wrong one."""
    if config.mode is not ModelMode.TOKEN_CLASSIFIER:
        return 'correction'
    return 'source' if config.num_token_classes > 2 else None


class PositionSums(NamedTuple):
    """Sums over positions of one kind: their number and the terms of `RemaskingTerms`."""

    count: Tensor
    loss: Tensor
    right: Tensor
    named: Tensor


def position_sums(terms: RemaskingTerms, sources: Tensor) -> Tensor:
    """float32 [B, 2 or 5, 4]: `PositionSums` of each row's clean and corrupted positions. If there are several sources
    (`Corrupted`), then also of the positions that each source has corrupted."""
    columns = PositionSums(torch.ones_like(terms.loss), terms.loss, terms.right, terms.named)
    values = torch.stack([column.detach().float() for column in columns], dim=-1)  # [B, T, 4]
    kinds = [~terms.wrong, terms.wrong] + [sources == 1 + place for place in range(len(SOURCES) * (sources.dim() > 1))]
    return torch.stack([(values * kind[..., None]).sum(1) for kind in kinds], dim=1)


def position_metrics(sums: Tensor, named: Literal['correction', 'source'] | None = 'correction') -> dict[str, float]:
    """Numbers for the log, by their names there; sums [2 or 5, 4]: see `position_sums`.

    Mean loss and accuracy at clean and at corrupted positions, and accuracy at the positions of each source. If a model
    tells more than *wrong* (`names`), also how often that is right at corrupted positions.
    """
    metrics = {}
    for name, row in zip(('clean', 'corrupted', *SOURCES), sums.tolist()):
        found = PositionSums(*row)
        if found.count == 0:
            continue
        if name not in SOURCES:
            metrics[f'loss_{name}'] = found.loss / found.count
        metrics[f'accuracy_{name}'] = found.right / found.count
        if named is not None and name != 'clean':
            suffix = f'_{name}' if name in SOURCES else ''
            metrics[f'{named}_accuracy{suffix}'] = found.named / found.count
    return metrics


def wrong_shares(inputs: Tensor, truth: Tensor) -> Tensor:
    """float32 [B]: a judge's targets, the share of positions after CLS that differ from the truth; both [B, 1 + T]."""
    return (inputs != truth)[:, 1:].float().mean(1)


def remasking_loss(model: GPT, batch: Batch, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """(weighted cross-entropy over all positions, sums for the log) of a remasking model of any kind."""
    terms = remasking_terms(model, batch.inputs, batch.targets, allowed, batch.sources)
    return (terms.loss.flatten() * batch.main_weights).sum(), position_sums(terms, batch.sources).sum(0)


def judge_loss(model: GPT, batch: Batch, allowed: Tensor) -> tuple[Tensor, None]:
    """Weighted squared error of a judge's evaluation of each row against the share that is wrong."""
    error = model.sequence_scores(batch.inputs) - wrong_shares(batch.inputs, batch.targets)  # [B]
    return (error.square() * batch.main_weights).sum(), None


class Hidden(NamedTuple):
    """Hidden states of one trunk call. asked [N, D]: of the predicted positions; all [B, T, D]: of every position,
    without a gradient, None unless the sampler head reads whole rows."""

    asked: Tensor
    all: Tensor | None


WholeLoss = Callable[[GPT, Batch, Tensor], tuple[Tensor, Tensor | None]]


class Objective(nn.Module):
    """The losses of a model; `allowed` bool [V] are the ids that text consists of (the base vocabulary).

    whole_loss: the loss of a kind without heads, with numbers for the log; None for models that write text.
    """

    def __init__(self, model: GPT, allowed: Tensor, whole_loss: WholeLoss | None = None) -> None:
        super().__init__()
        self.model, self.whole_loss = model, whole_loss
        self.register_buffer('allowed', allowed, persistent=False)
        self.trunk_and_sampler_losses = self._trunk_and_sampler_losses
        self.critic_loss = self._critic_loss
        self.waves: WaveRecorder | None = None  # of the text that the critic judges
        self.tiled = False  # whether a block model reads its two streams by `StreamTiles`, not by a dense mask

    def compile_parts(self, ranks: int = 1) -> None:
        """Replace the two network passes by compiled ones. The code between them, which draws tokens, stays eager.

        The first pass of a block model reads tiles where that pays; the critic's keeps the dense mask. With several
        ranks both keep it: DistributedDataParallel lets torch cut the compiled graph between layers, and torch has long
        refused to cut a graph with FlexAttention (pytorch issue 137481). Cut weights (FSDP) are not compiled at all.
        """
        config = self.model.config
        self.tiled = config.attention_type == 'block' and ranks == 1 and tiles_pay(
            self.allowed.device, config.block_size, config.n_embd // config.n_head, config.dropout)
        self.trunk_and_sampler_losses = torch.compile(self._trunk_and_sampler_losses, dynamic=False)
        self.critic_loss = torch.compile(self._critic_loss, dynamic=False)
        if self.whole_loss is not None:
            self.whole_loss = torch.compile(self.whole_loss, dynamic=False)

    def forward(self, batch: Batch, stage: Stage, generator: RowRandom) -> Losses:
        """Losses of one micro-step. `generator` draws the tokens that the critic judges."""
        if self.whole_loss is not None:
            main, sums = self.whole_loss(self.model, batch, self.allowed)
            return Losses(main, main, {}, sums)
        heads = {}
        main, sampler, hidden = self.trunk_and_sampler_losses(batch, SAMPLER.name in stage.heads, self._tiles(batch))
        if sampler is not None:
            heads[SAMPLER.name] = sampler
        if CRITIC.name in stage.heads:
            heads[CRITIC.name] = self._loss_of_filled_text(batch, hidden, generator, SAMPLER.name in stage.heads)
        total = main
        for name, loss in heads.items():
            total = total + stage.heads[name] * loss
        return Losses(total, main, heads)

    def _loss_of_filled_text(self, batch: Batch, hidden: Hidden, generator: RowRandom, with_sampler: bool) -> Tensor:
        """The critic's loss on its rows. Their masks are filled as inference fills them."""
        rows, (asked, hidden_states) = slice(None, None, self.model.config.critic_row_stride), hidden
        if hidden_states is None:
            hidden_states = asked.new_zeros(*batch.inputs.shape, asked.size(-1))  # [B, T, D], read at masked positions
            hidden_states.flatten(0, 1).index_copy_(0, batch.positions, asked.detach())  # padding repeats position 0
        blocks = batch.block_length[rows] if self.model.config.attention_type == 'block' else None
        artifacts = build_critic_artifacts_from_logits(
            self.model, batch.inputs[rows], batch.targets[rows], hidden_states[rows], DrawRule(self.allowed),
            RowRandom(generator.seed, generator.iteration, generator.rows[rows]), use_sampler_head=with_sampler,
            recorder=self.waves, block_length=blocks)
        return self.critic_loss(artifacts.tokens, artifacts.labels, artifacts.labelled * batch.critic_share,
                                *(one[rows] for one in (batch.targets, batch.block_length) if blocks is not None))

    def _tiles(self, batch: Batch) -> StreamTiles | None:
        """Those of the batch, or None if the model reads a dense mask.

        The compiled pass takes them as an input, so it is not compiled again for rows of other lengths. All layers
        read the same tiles, also one that is computed again for the backward pass. A step that is recorded as a CUDA
        graph makes the tiles of its rows inside the graph, from the batch.
        """
        if not self.tiled:
            return None
        return stream_tiles(self._stream_length(batch.block_length), batch.inputs.size(1), batch.inputs.device)

    def _trunk_and_sampler_losses(self, batch: Batch, with_sampler: bool,
                                  tiles: StreamTiles | None = None) -> tuple[Tensor, Tensor | None, Hidden]:
        """(main loss, sampler loss or None, hidden states) from one trunk call. tiles: of a block model's streams."""
        hidden = self._hidden_states(batch, tiles)
        targets = batch.targets.flatten().index_select(0, batch.positions)  # [N]
        embedding = self.model.neighbour_embedding().detach() if with_sampler else None  # [V, D]
        read = hidden.asked.new_empty(len(targets), 0) if embedding is None or hidden.all is None else \
            self._read_rows(batch, hidden.all, embedding)
        parts = hidden.asked, targets, batch.main_weights, batch.mean_weights, batch.neighbours, batch.new, read
        chunks = math.ceil(len(targets) / max(1, most_logits(targets.device) // len(self.allowed)))
        if chunks <= 1:
            return *self._position_losses(*parts, embedding), hidden
        found = [checkpoint(self._position_losses, *chunk, embedding, use_reentrant=False, preserve_rng_state=False)
                 for chunk in zip(*(part.chunk(chunks) for part in parts))]
        main, sampler = zip(*found)
        return sum(main), sum(sampler) if with_sampler else None, hidden

    def _hidden_states(self, batch: Batch, tiles: StreamTiles | None) -> Hidden:
        """The hidden states that the losses need, from one trunk call."""
        config = self.model.config
        if config.attention_type == 'causal':  # every position predicts, in order
            return Hidden(self.model.encode(batch.inputs).flatten(0, 1), None)
        text = {'clean': batch.targets, 'block_length': self._stream_length(batch.block_length), 'tiles': tiles} \
            if config.attention_type == 'block' else {}
        if config.reads_row:
            return Hidden(*self.model.encode_all(batch.inputs, batch.positions, **text))
        if text:
            return Hidden(self.model.encode_streams(batch.inputs, positions=batch.positions, **text), None)
        return Hidden(self.model.encode(batch.inputs, positions=batch.positions), None)

    def _stream_length(self, block_length: Tensor) -> Tensor | int:
        """What `encode_streams` takes: the only block length of the model, or those of the rows, int64 [B]."""
        lengths = self.model.config.block_length
        return lengths[0] if len(lengths) == 1 else block_length

    def _read_rows(self, batch: Batch, hidden_states: Tensor, embedding: Tensor) -> Tensor:
        """[N, W]: the attention output of a sampler head that reads whole rows, at the predicted positions. Each of
        them reads the true tokens that it may see. hidden_states [B, T, D], embedding [V, D]."""
        config, block = self.model.config, None
        if config.attention_type == 'block':
            block = torch.arange(batch.inputs.size(1), device=batch.inputs.device) // batch.block_length[:, None]
        read = rows_read(self.model, hidden_states, (batch.targets, embedding), batch.inputs == config.mask_token_id,
                         Turns(*batch.turns.unbind(2)), block)  # [B, T, W]
        return read.flatten(0, 1).index_select(0, batch.positions)

    def _position_losses(self, hidden: Tensor, targets: Tensor, main_weights: Tensor, mean_weights: Tensor,
                         neighbours: Tensor, new: Tensor, read: Tensor,
                         embedding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(main loss, sampler loss) of N positions. embedding [V, D]: the neighbours'; None: there is no sampler loss.

        hidden [N, D]; read [N, W], or [N, 0] if the head reads no rows; the others are fields of `Batch` at these
        positions. The head's loss moves the trunk only if sampler_gradient is 'trunk'. It never moves the embeddings or
        a shared output matrix.
        """
        logits = self.model.lm_head(hidden)  # [N, V]
        main = weighted_cross_entropy(logits, targets, main_weights, self.allowed)
        if embedding is None:
            return main, None
        head = self.model.sampler_head
        if self.model.config.sampler_gradient == 'head':
            hidden, logits = hidden.detach(), logits.detach()
        inputs = prepare_sampler_inputs(hidden, neighbours, embedding, head.window.left, targets)
        logits = head(inputs.sampler_input, logits, self.model.lm_head.weight.detach(), new,
                      read if read.size(1) else None)  # [N, V]
        return main, weighted_cross_entropy(logits, inputs.sampler_targets, mean_weights, self.allowed)

    def _critic_loss(self, tokens: Tensor, labels: Tensor, weights: Tensor, clean: Tensor | None = None,
                     block_length: Tensor | None = None) -> Tensor:
        """Binary cross-entropy of the wrongness of tokens [B, T], weighted per position: a second trunk call. In a block
        model each block of them is read after the true text before it: clean [B, T], block_length [B]."""
        hidden = self.model.encode(tokens) if clean is None else \
            self.model.encode_streams(tokens, clean, self._stream_length(block_length))
        logits = self.model.critic_logits(hidden).float()  # [B, T]
        return (F.binary_cross_entropy_with_logits(logits, labels, reduction='none') * weights).sum()
