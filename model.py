"""The model: a GPT trunk with optional critic and sampler heads, and nothing else.

Corruption, losses and sampling live elsewhere; `forward` returns raw logits and hidden states and stores nothing.

Letters: B batch, T sequence length, V vocabulary with the special ids, D = n_embd, H heads, C neighbours of
a position, W = sampler_n_embd, N positions picked out of a batch, S queries and K keys of an attention.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.common.layers import Norm, attend_from_one, draw_weights, rotary_tables, rotate
from core.common.precision import to_exact
from core.common.stream_attention import StreamTiles, block_attention_mask
from core.sampler_head import SAMPLER_KINDS, SamplerHead, SamplerShape, SamplerWindow, initialise_sampler_head


class ModelMode(str, Enum):
    """What the last layer predicts."""

    LANGUAGE_MODEL = 'language_model'      # a token per position
    TOKEN_CLASSIFIER = 'token_classifier'  # a class per position: right or wrong, or where from
    SEQUENCE_SCORER = 'sequence_scorer'    # one number per sequence, read at the CLS position: the judge


@dataclass
class GPTConfig:
    """Everything that decides the architecture and the stages; all problems are reported in one `ValueError`."""

    block_size: int = 256
    vocab_size: int = 69  # base vocabulary and the four special ids
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.0
    bias: bool = False
    ignore_index: int = -100
    attention_type: Literal['causal', 'bidirectional', 'block'] = 'bidirectional'
    block_length: tuple[int, ...] = ()  # of attention_type 'block': the lengths that a row may have
    predicts: Literal['own', 'next'] = 'own'  # the position that a hidden state predicts; 'next' for block models only
    position_encoding: Literal['absolute', 'rotary'] = 'rotary'
    mode: ModelMode = ModelMode.LANGUAGE_MODEL
    num_token_classes: int = 2
    cls_token_id: int | None = None
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    wrong_token_id: int | None = None
    freeze_transformer: bool = False
    init_from_checkpoint: str | None = None
    unfreeze_at_iteration: int | None = None
    unfreeze_lr_multiplier: float = 0.1
    add_critic_head: bool = False
    critic_alpha: float = 0.5
    critic_target_scope: Literal['masked_only', 'masked_and_ignore'] = 'masked_only'
    critic_gradient: Literal['trunk', 'head'] = 'trunk'
    critic_row_stride: int = 1  # the critic is trained on every n-th row
    critic_fill: Literal['one_shot', 'revised'] = 'one_shot'  # the text that it is trained on
    start_critic_iteration: int = 0
    end_critic_iteration: int = 0
    add_sampler_head: bool = False
    sampler_kind: str = 'neighbours'  # what the head sees of the tokens that were placed since the trunk call
    start_sampler_iteration: int = 0
    sampler_min_neighbors_ratio: float = 0.01
    sampler_context: int = 1  # neighbours on each side
    sampler_context_left: int | None = None  # None: sampler_context
    sampler_context_right: int | None = None
    sampler_order: Literal['wave', 'left_to_right'] = 'wave'  # of a fill, and of the tokens shown in training
    sampler_gate: bool = False  # a learned share of the trunk's logits in place of all of them
    sampler_gradient: Literal['head', 'trunk'] = 'head'  # where the head's own loss stops
    sampler_output: Literal['own', 'shared_detached'] = 'own'
    sampler_residual: bool = True  # the head's output is added to the trunk's detached logits
    sampler_n_embd: int | None = None  # width of the head; None: n_embd
    sampler_attention_n_embd: int | None = None  # width of its attention, in kinds that have one; None: n_embd
    sampler_zero_hidden: bool = False  # control: the head sees neighbours alone, nothing of the trunk

    def __post_init__(self) -> None:
        self.mode = ModelMode(self.mode)
        self.block_length = tuple(self.block_length)
        problems = [*self._shape_problems(), *self._head_problems()]
        if problems:
            raise ValueError('\n'.join(problems))

    def _shape_problems(self) -> list[str]:
        problems = [f'{name} is {getattr(self, name)}, but must be at least 1'
                    for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd') if getattr(self, name) < 1]
        if not problems and self.n_embd % self.n_head:
            problems.append(f'n_embd is {self.n_embd}, but must be a multiple of n_head ({self.n_head})')
        elif not problems and self.position_encoding == 'rotary' and self.n_embd // self.n_head % 2:
            problems.append(f'rotary positions need an even head size, but n_embd / n_head is '
                            f'{self.n_embd // self.n_head}; change one of them or take position_encoding=absolute')
        if not 0 <= self.dropout < 1:
            problems.append(f'dropout is {self.dropout}, but must lie in [0, 1)')
        for name, choices in (('attention_type', ('causal', 'bidirectional', 'block')),
                              ('predicts', ('own', 'next')), ('position_encoding', ('absolute', 'rotary')),
                              ('critic_target_scope', ('masked_only', 'masked_and_ignore')),
                              ('critic_gradient', ('trunk', 'head')), ('critic_fill', ('one_shot', 'revised')),
                              ('sampler_output', ('own', 'shared_detached')),
                              ('sampler_order', ('wave', 'left_to_right')), ('sampler_gradient', ('head', 'trunk')),
                              ('sampler_kind', tuple(SAMPLER_KINDS))):
            if getattr(self, name) not in choices:
                problems.append(f'{name} is {getattr(self, name)!r}, but must be one of {", ".join(choices)}')
        for name in ('cls_token_id', 'mask_token_id', 'pad_token_id', 'wrong_token_id'):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                problems.append(f'{name} is {token}, but the vocabulary has ids 0 to {self.vocab_size - 1}')
        if self.mode is ModelMode.TOKEN_CLASSIFIER and self.num_token_classes < 2:
            problems.append(f'num_token_classes is {self.num_token_classes}, but a classifier needs at least 2')
        if self.mode is ModelMode.SEQUENCE_SCORER and self.cls_token_id is None:
            problems.append('A sequence scorer requires cls_token_id to be configured')
        if self.mode is not ModelMode.LANGUAGE_MODEL and self.attention_type != 'bidirectional':
            problems.append(f'mode {self.mode.value} requires bidirectional attention')
        return problems + self._block_problems()

    @property
    def sampler_window(self) -> 'SamplerWindow':
        """How many neighbours the sampler head sees on each side."""
        return SamplerWindow.of(self.sampler_context, self.sampler_context_left, self.sampler_context_right) \
            if SAMPLER_KINDS[self.sampler_kind].window else SamplerWindow(0, 0)

    @property
    def sampler_shape(self) -> SamplerShape:
        """What the sampler head is built from."""
        return SamplerShape(
            SAMPLER_KINDS[self.sampler_kind], self.sampler_window, self.n_embd, self.vocab_size, self.n_head,
            self.block_size, self.sampler_n_embd or self.n_embd, self.sampler_attention_n_embd or self.n_embd,
            self.sampler_output == 'own', self.sampler_zero_hidden,
            self.sampler_residual and not self.sampler_zero_hidden, self.sampler_gate)

    @property
    def reads_row(self) -> bool:
        """Whether the sampler head reads whole rows, so that it needs hidden states of visible tokens too."""
        return self.add_sampler_head and SAMPLER_KINDS[self.sampler_kind].reads_row

    def _block_problems(self) -> list[str]:
        if self.attention_type != 'block' and self.predicts == 'next':
            return [f'predicts is next, but attention_type is {self.attention_type}; leave it out or take '
                    f'attention_type=block']
        if self.attention_type != 'block':
            return [f'block_length is {self.block_length}, but attention_type is {self.attention_type}; leave it out '
                    f'or take attention_type=block'] if self.block_length else []
        problems = []
        if not self.block_length:
            problems.append('attention_type is block, but block_length is empty; give one length, such as 8, or '
                            'several')
        problems += [f'block_length is {length}, but must divide block_size ({self.block_size})'
                     for length in self.block_length if not 1 <= length <= self.block_size or self.block_size % length]
        if len(set(self.block_length)) < len(self.block_length):
            problems.append(f'block_length {list(self.block_length)} names a length twice; leave one out')
        if self.mask_token_id is None:
            problems.append('attention_type block requires mask_token_id to be configured')
        if self.predicts == 'next' and self.add_critic_head:
            problems.append("predicts is next, but a critic reads a token's own hidden state; take predicts=own, or "
                            'leave add_critic_head out')
        return problems

    def _head_problems(self) -> list[str]:
        problems = []
        if self.add_sampler_head:
            if self.mode is not ModelMode.LANGUAGE_MODEL:
                problems.append('Sampler head only supported for LANGUAGE_MODEL mode')
            if self.attention_type == 'causal':
                problems.append('Sampler head requires bidirectional attention')
            if self.mask_token_id is None:
                problems.append('Sampler head requires mask_token_id to be configured')
            if not 0 < self.sampler_min_neighbors_ratio <= 0.5:
                problems.append(f'sampler_min_neighbors_ratio is {self.sampler_min_neighbors_ratio}, but must lie in '
                                f'(0, 0.5]: bootstrapped positions are never adjacent')
            problems += self._window_problems()
            if SAMPLER_KINDS.get(self.sampler_kind, SAMPLER_KINDS['neighbours']).reads_row:
                problems += self._attention_problems()
            elif self.sampler_attention_n_embd is not None:
                problems.append(f'sampler_attention_n_embd is {self.sampler_attention_n_embd}, but a head of '
                                f'sampler_kind={self.sampler_kind} has no attention; leave it out')
            if self.sampler_gate and not (self.sampler_residual and not self.sampler_zero_hidden):
                problems.append("sampler_gate is True, but the head does not add the trunk's logits; leave it out, or "
                                'take sampler_residual=True without sampler_zero_hidden')
            if self.sampler_n_embd is not None and self.sampler_n_embd < 1:
                problems.append(f'sampler_n_embd is {self.sampler_n_embd}, but must be at least 1, or None for n_embd')
            if self.sampler_output == 'shared_detached' and self.sampler_n_embd not in (None, self.n_embd):
                problems.append(f"sampler_n_embd is {self.sampler_n_embd}, but sampler_output=shared_detached reads "
                                f"the trunk's matrix of width n_embd ({self.n_embd}); take sampler_output=own")
        if self.add_critic_head:
            if self.mode is not ModelMode.LANGUAGE_MODEL:
                problems.append('Critic head only supported for LANGUAGE_MODEL mode')
            if self.attention_type == 'causal':
                problems.append('Critic head requires bidirectional attention')
            if self.mask_token_id is None:
                problems.append('Critic head requires mask_token_id to be configured')
            if self.critic_row_stride < 1:
                problems.append(f'critic_row_stride is {self.critic_row_stride}, but must be at least 1')
            if self.critic_alpha < 0:
                problems.append(f'critic_alpha is {self.critic_alpha}, but must not be negative')
        return problems

    def _window_problems(self) -> list[str]:
        problems = []
        if self.sampler_kind not in SAMPLER_KINDS:
            return problems
        if not SAMPLER_KINDS[self.sampler_kind].window:
            given = {'sampler_context': self.sampler_context if self.sampler_context != 1 else None,
                     'sampler_context_left': self.sampler_context_left,
                     'sampler_context_right': self.sampler_context_right}
            return [f'{name} is {value}, but a head of sampler_kind={self.sampler_kind} sees no neighbours apart; '
                    f'leave it out, or take sampler_kind=layer_neighbours' for name, value in given.items()
                    if value is not None]
        if not 1 <= self.sampler_context < self.block_size:
            problems.append(f'sampler_context is {self.sampler_context}, but must lie between 1 and '
                            f'block_size - 1 ({self.block_size - 1})')
        problems += [f'{name} is {getattr(self, name)}, but must lie between 0 and block_size - 1 '
                     f'({self.block_size - 1})' for name in ('sampler_context_left', 'sampler_context_right')
                     if getattr(self, name) is not None and not 0 <= getattr(self, name) < self.block_size]
        if self.sampler_window.size == 0:
            problems.append('sampler_context_left and sampler_context_right are 0, but a head needs a neighbour; '
                            'give one of them')
        if self.sampler_order == 'left_to_right' and self.sampler_window.left == 0:
            problems.append('sampler_order is left_to_right, but sampler_context_left is 0; give it at least 1')
        return problems

    def _attention_problems(self) -> list[str]:
        problems, width = [], self.sampler_attention_n_embd or self.n_embd
        if self.n_head >= 1 and (width < 1 or width % self.n_head or width // self.n_head % 2):
            problems.append(f'sampler_attention_n_embd is {width}, but must be n_head ({self.n_head}) times an even '
                            f'number')
        if self.sampler_gradient == 'trunk':
            problems.append(f'sampler_gradient is trunk, but a head of sampler_kind={self.sampler_kind} is trained '
                            f'apart from the trunk; take sampler_gradient=head')
        return problems


class GPTOutput(NamedTuple):
    """logits: [B, T, V] of a language model, [B, T, classes] of a classifier, [B] of a scorer (before the sigmoid).
    hidden_states: [B, T, D] after the final norm."""

    logits: Tensor
    hidden_states: Tensor


@dataclass
class KeyValueCache:
    """Keys and values of the tokens that a causal or block model has read: a tensor [B, H, block_size, D / H] for
    each layer. last: the last token's hidden state [B, 1, D], kept if it predicts the next token."""

    keys: list[Tensor]
    values: list[Tensor]
    length: int = field(default=0)
    last: Tensor | None = field(default=None)


class Reading(NamedTuple):
    """What all layers of one trunk call share.

    rotary: cosine and sine of the positions, [T, 1, D / 2H] each; None with absolute positions. attention_mask: bool,
    broadcast to [B, H, S, K], True where a query sees a key; None: every query sees every key, or all up to its own in
    causal order; or the tiles of two streams. cache: None without one.
    """

    rotary: tuple[Tensor, Tensor] | None
    attention_mask: Tensor | StreamTiles | None
    cache: KeyValueCache | None


class Asked(NamedTuple):
    """Which hidden states the last layer computes, of the first `length` tokens of each row.

    positions: int64 [N], flat indices into [B, length]; None: all of them. all: the call also returns the hidden states
    of all these tokens, without a gradient. This does not change the numbers at `positions`.
    """

    length: int
    positions: Tensor | None
    all: bool = False




def picked(x: Tensor, asked: Asked | None) -> Tensor:
    """The asked part of x [B, T, D]: [N, D], or [B, length, D] without positions; x itself where `asked` is None."""
    if asked is None:
        return x
    x = x[:, :asked.length]
    return x if asked.positions is None else x.flatten(0, 1).index_select(0, asked.positions)


def predicting_places(positions: Tensor, length: int, block_length: Tensor | int | None) -> Tensor:
    """Where the hidden states stand that predict flat positions int64 [N] of [B, length], if each predicts the next
    position.

    With a block length (as in `block_attention_mask`) they are flat indices int64 [N] into the two streams
    [B, 2 length]. The first position of a block is predicted from the clean text, the others from the block itself.
    None: flat indices into [B, length], one stream. The first position of a text has nothing before it, and is
    predicted by its own hidden state.
    """
    row, place = positions // length, positions % length
    before = (place - 1).clamp(min=0)
    if block_length is None:
        return row * length + before
    lengths = block_length[row] if isinstance(block_length, Tensor) else block_length
    from_clean = (place % lengths == 0) & (place > 0)
    return row * 2 * length + before + from_clean * length


class Attention(nn.Module):
    """Multi-head attention, causal or bidirectional; queries and keys are normalised (Henry et al. 2020)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.causal = config.attention_type == 'causal'
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.query_norm = Norm(config.n_embd // config.n_head)
        self.key_norm = Norm(config.n_embd // config.n_head)

    def forward(self, x: Tensor, reading: Reading, layer: int, asked: Asked | None) -> Tensor:
        B, T, D = x.shape
        query, key, value = self.c_attn(x).view(B, T, 3, self.n_head, D // self.n_head).unbind(2)  # [B, T, H, D/H]
        query, key = self.query_norm(query), self.key_norm(key)
        if reading.rotary is not None:
            query, key = rotate(query, *reading.rotary), rotate(key, *reading.rotary)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # [B, H, T, D/H]
        causal, mask, cache = self.causal, reading.attention_mask, reading.cache
        if cache is not None:
            cache.keys[layer][:, :, cache.length:cache.length + T] = key
            cache.values[layer][:, :, cache.length:cache.length + T] = value
            key = cache.keys[layer][:, :, :cache.length + T]
            value = cache.values[layer][:, :, :cache.length + T]
            causal = causal and cache.length == 0  # later calls bring a mask of their own, or one token
        if asked is not None and asked.length < T:
            query = query[:, :, :asked.length]
            mask = mask[:, :, :asked.length] if isinstance(mask, Tensor) and mask.size(2) > 1 else mask
        if isinstance(mask, StreamTiles):
            x = mask.attend(query, key, value)
        elif cache is not None and T == 1 and mask is None and query.device.type == 'cpu' and query.dtype.itemsize < 4:
            x = attend_from_one(query, key, value)  # [B, H, 1, D/H]
        else:
            x = F.scaled_dot_product_attention(query, key, value, attn_mask=mask,
                                               dropout_p=self.dropout if self.training else 0.0,
                                               is_causal=causal and mask is None)  # [B, H, S, D/H]
        x = self.c_proj(picked(x.transpose(1, 2).flatten(2), asked))  # [B, S, D] or [N, D]
        return F.dropout(x, self.dropout, self.training)


class MLP(nn.Module):
    """Two matrices with a squared ReLU between (So et al. 2021)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.relu(self.c_fc(x)).square())
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """One pre-norm transformer layer.

    Where `recompute` is True, a pass with gradients keeps only the layer's input. The backward pass computes the rest
    again, with the same dropout (Chen et al. 2016, arXiv 1604.06174).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = Norm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = Norm(config.n_embd)
        self.mlp = MLP(config)
        self.recompute = False

    def forward(self, x: Tensor, reading: Reading, layer: int, asked: Asked | None) -> Tensor:
        """What the layer makes of x [B, T, D]; only the `asked` hidden states, if that is not None."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._compute, x, reading, layer, asked, use_reentrant=False,
                              preserve_rng_state=self.mlp.dropout > 0)
        return self._compute(x, reading, layer, asked)

    def _compute(self, x: Tensor, reading: Reading, layer: int, asked: Asked | None) -> Tensor:
        x = picked(x, asked) + self.attn(self.ln_1(x), reading, layer, asked)
        return x + self.mlp(self.ln_2(x))


GENERATORS = {'trunk': 0, 'sampler_head': 1, 'critic_head': 2, 'classifier': 3, 'scorer': 4}  # added to a seed


class HeadRow(NamedTuple):
    """What training, logging and loading must know of a head.

    name: of its loss ('loss_<name>' in the log). module: its attribute of `GPT`; the names of its parameters begin with
    it. title, curve: the names of its stage and of its loss in the picture.
    added_by, starts_at: fields of `GPTConfig`; the first adds the head, the second holds its first iteration.
    weight, grows_until: fields of `GPTConfig`; the first holds the weight of its loss, the second the iteration at
    which that weight is reached. None: the weight is 1 from the start.
    clipped_apart: its loss reaches no other parameter, so its gradient is clipped by itself. matrices: its parameters
    that Muon takes.
    """

    name: str
    module: str
    title: str
    curve: str
    added_by: str
    starts_at: str
    weight: str | None = None
    grows_until: str | None = None
    clipped_apart: bool = False
    matrices: tuple[str, ...] = ()


HEAD_ROWS = (
    HeadRow('sampler', 'sampler_head', 'sampler head', 'training, sampler head', 'add_sampler_head',
            'start_sampler_iteration', clipped_apart=True, matrices=(
                'input.weight', 'hidden.weight', *(f'attention.{name}.weight' for name in (
                    'query', 'content', 'token', 'output')))),
    HeadRow('critic', 'critic_head', 'critic', 'training, critic (binary)', 'add_critic_head',
            'start_critic_iteration', 'critic_alpha', 'end_critic_iteration'),
)  # in the order of their stages


class GPT(nn.Module):
    """The trunk, what its mode predicts, and the optional heads. `seed` decides the initial weights.

    Heads draw their initial weights from generators of their own, so a trunk is the same with and without them.
    """

    def __init__(self, config: GPTConfig, seed: int = 1337) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({'wte': nn.Embedding(config.vocab_size, config.n_embd)})
        if config.position_encoding == 'absolute':
            self.transformer['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        self.transformer['h'] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer['ln_f'] = Norm(config.n_embd)
        self.lm_head = self.classifier = self.scorer = self.sampler_head = self.critic_head = None
        if config.mode is ModelMode.LANGUAGE_MODEL:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
            self.lm_head.weight = self.transformer['wte'].weight  # tied
        elif config.mode is ModelMode.TOKEN_CLASSIFIER:
            self.classifier = nn.Linear(config.n_embd, config.num_token_classes)
        else:
            self.scorer = nn.Linear(config.n_embd, 1)
        if config.add_sampler_head:
            self.sampler_head = SamplerHead(config.sampler_shape)
        if config.add_critic_head:
            self.critic_head = nn.Linear(config.n_embd, 1)
        self._initialise(seed)
        if config.position_encoding == 'rotary':
            cosine, sine = rotary_tables(config.block_size, config.n_embd // config.n_head)
            self.register_buffer('rotary_cosine', cosine, persistent=False)
            self.register_buffer('rotary_sine', sine, persistent=False)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Weights are normal with deviation 0.02, as in GPT-2. Those that write into the residual stream are zero, and
        the critic's too."""
        generators = {name: torch.Generator().manual_seed(seed + offset) for name, offset in GENERATORS.items()}
        for name, module in self.named_modules():
            part = name.split('.')[0]
            if part == 'sampler_head':
                continue
            draw_weights(module, generators.get(part, generators['trunk']), 0.02 if name.startswith(
                ('transformer.wte', 'transformer.wpe', 'lm_head')) else None)
            if name.endswith('c_proj') or name == 'critic_head':
                nn.init.zeros_(module.weight)
        if self.sampler_head is not None:
            initialise_sampler_head(self.sampler_head, generators['sampler_head'])

    def encode(self, tokens: Tensor, attention_mask: Tensor | None = None, cache: KeyValueCache | None = None,
               positions: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D] after the final norm, of tokens [B, T]: one trunk call.

        attention_mask: bool [B, T], True where a token may be attended to (False for padding).
        positions: int64 [N], flat indices into tokens. Then the result is [N, D], the hidden states of these alone, and
        the last layer computes no others after its attention.
        cache: of a causal model. Then `tokens` follow those that it holds, and it grows by T.
        A block model reads all tokens as one block here; `encode_streams` and `encode_blocks` read several. A hidden
        state always belongs to the position that it predicts, also if it comes from the position before
        (`GPTConfig.predicts`).
        """
        tokens, T = self._here(tokens), tokens.size(1)
        if self.config.predicts == 'next' and positions is not None:
            positions = predicting_places(self._here(positions), T, None)
        start = 0 if cache is None else cache.length
        if attention_mask is not None:
            attention_mask = attention_mask[:, None, None, :]  # [B, 1, 1, T]
            if self.config.attention_type == 'causal':
                attention_mask = attention_mask & torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
        if start > 0 and T > 1:  # each token sees all that is cached, and the tokens before it
            assert attention_mask is None, 'a cache takes no padding'
            attention_mask = torch.ones(T, start + T, dtype=torch.bool, device=tokens.device).tril(start)
        hidden_states, _ = self._read(tokens, self._places(start, T), attention_mask, cache,
                                      None if positions is None else Asked(T, self._here(positions)))
        if cache is not None:
            cache.length += T
        if self.config.predicts == 'next' and positions is None:
            return torch.cat((hidden_states[:, :1], hidden_states[:, :-1]), dim=1)
        return hidden_states

    def encode_streams(self, noisy: Tensor, clean: Tensor, block_length: Tensor | int,
                       positions: Tensor | None = None, tiles: StreamTiles | None = None) -> Tensor:
        """Hidden states [B, T, D] of a block model's tokens noisy int64 [B, T]: one trunk call of 2T tokens.

        Each block sees itself and the clean text before it. clean: int64 [B, T], the same text without masks.
        block_length: int64 [B], or one number for all rows. A single block has no text before it, so it is read as a
        bidirectional model reads. positions: int64 [N], flat indices into noisy; then the result is [N, D].
        tiles: of these block lengths, for FlexAttention; None: a dense mask is made.
        """
        T, positions = noisy.size(1), None if positions is None else self._here(positions)
        return self._read_streams(noisy, clean, block_length, Asked(T, positions), tiles)[0]

    def encode_all(self, tokens: Tensor, positions: Tensor, clean: Tensor | None = None,
                   block_length: Tensor | int | None = None, tiles: StreamTiles | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states twice, from one trunk call on tokens int64 [B, T].

        First [N, D], those at positions int64 [N], the same numbers as `encode` gives. Then [B, T, D], those of every
        position, without a gradient. clean, block_length and tiles: of a block model, as in `encode_streams`.
        """
        asked = Asked(tokens.size(1), self._here(positions), all=True)
        if clean is None:
            clean, block_length = tokens, tokens.size(1)
        return self._read_streams(tokens, clean, block_length, asked, tiles)

    def _read_streams(self, noisy: Tensor, clean: Tensor, block_length: Tensor | int, asked: Asked,
                      tiles: StreamTiles | None) -> tuple[Tensor, Tensor | None]:
        noisy, clean, T = self._here(noisy), self._here(clean), asked.length
        places, mask = self._places(0, T), None
        if isinstance(block_length, int) and block_length >= T:
            tokens, block_length = noisy, None
        else:
            tokens = torch.cat((noisy, clean), dim=1)
            mask = block_attention_mask(block_length, T, noisy.device) if tiles is None else tiles
            places = places.repeat(2, *[1] * (places.dim() - 1)) if isinstance(places, Tensor) else \
                tuple(one.repeat(2, 1, 1) for one in places)
        if self.config.predicts == 'own':
            return self._read(tokens, places, mask, None, asked)
        every = torch.arange(noisy.numel(), device=noisy.device)
        read = predicting_places(every if asked.positions is None else asked.positions, T, block_length)
        found, whole = self._read(tokens, places, mask, None, Asked(tokens.size(1), read, asked.all))
        if whole is not None:
            whole = whole.flatten(0, 1).index_select(0, predicting_places(every, T, block_length)).view(*noisy.shape, -1)
        return found if asked.positions is not None else found.view(*noisy.shape, -1), whole

    def encode_blocks(self, tokens: Tensor, block_length: int, cache: KeyValueCache, kept: int) -> Tensor:
        """Hidden states [B, T, D] of tokens int64 [B, T] that follow those in a block model's cache: one trunk call.

        Each token sees its own block of `block_length` positions and everything before it. The first `kept` tokens are
        whole blocks without masks, and join the cache. The others are the unfinished block, which the next call reads
        again. The cache holds whole blocks.
        """
        tokens, T, start = self._here(tokens), tokens.size(1), cache.length
        block = torch.arange(start + T, device=tokens.device) // block_length  # [K]
        mask = None if start // block_length == (start + T - 1) // block_length else \
            (block[start:, None] >= block)[None, None]  # [1, 1, T, K]
        hidden_states, _ = self._read(tokens, self._places(start, T), mask, cache, None)
        cache.length += kept
        return self._after_last(hidden_states, cache, kept)

    def _after_last(self, hidden_states: Tensor, cache: KeyValueCache, kept: int) -> Tensor:
        """Hidden states [B, T, D], each at the position that it predicts; `cache` keeps the one after the first `kept`
        tokens."""
        if self.config.predicts == 'own':
            return hidden_states
        before = hidden_states[:, :1] if cache.last is None else cache.last  # [B, 1, D]
        moved = torch.cat((before, hidden_states[:, :-1]), dim=1)
        cache.last = hidden_states[:, kept - 1:kept] if kept else cache.last
        return moved

    def encode_next(self, tokens: Tensor, cache: KeyValueCache, kept: int) -> Tensor:
        """What a block model at blocks of one predicts for each of the last n of tokens int64 [B, kept + n].

        Returns hidden states [B, n, D]: at each of these places of a mask, which sees all tokens before it and nothing
        else. The tokens follow those in the cache; the first `kept` of them join it. One trunk call of kept + 2n
        tokens. A model whose hidden states predict the next position needs no masks, but for the first position of a
        text.
        """
        tokens, T, start = self._here(tokens), tokens.size(1), cache.length
        masks = T - kept if self.config.predicts == 'own' else int(start + kept == 0)  # m
        every = torch.arange(start + T, device=tokens.device)  # [start + T]
        keys = torch.cat((every, every[start + kept:start + kept + masks]))  # [K]
        places, number = keys[start:], torch.arange(len(keys), device=tokens.device)  # [S], S = T + m
        itself, clean = number == number[start:, None], number < start + T  # [S, K], [K]
        sees = itself | (clean & (keys < places[:, None]))  # [S, K]
        read = torch.cat((tokens, torch.full_like(tokens[:, :masks], self.config.mask_token_id)), dim=1)
        at = self.transformer['wpe'].weight[places] if self.config.position_encoding == 'absolute' else \
            (self.rotary_cosine[places], self.rotary_sine[places])
        hidden_states, _ = self._read(read, at, sees[None, None], cache, None)
        cache.length += kept
        if self.config.predicts == 'own':
            return hidden_states[:, T:]
        if masks:
            cache.last = hidden_states[:, T:]
        return self._after_last(hidden_states[:, :T], cache, kept)[:, kept:]

    def _here(self, indices: Tensor) -> Tensor:
        """`indices` on the device of the weights; sampling and scoring hold tokens on a device that has float64."""
        return indices.to(self.transformer['wte'].weight.device)

    def _places(self, start: int, length: int) -> tuple[Tensor, Tensor] | Tensor:
        """Of positions start .. start + length - 1: the rotary tables, or the position embeddings [length, D]."""
        stop = start + length
        assert stop <= self.config.block_size, f'{stop} tokens in a block of {self.config.block_size}'
        if self.config.position_encoding == 'absolute':
            return self.transformer['wpe'].weight[start:stop]
        return self.rotary_cosine[start:stop], self.rotary_sine[start:stop]

    def _read(self, tokens: Tensor, places: tuple[Tensor, Tensor] | Tensor,
              attention_mask: Tensor | StreamTiles | None, cache: KeyValueCache | None,
              asked: Asked | None) -> tuple[Tensor, Tensor | None]:
        """The layers on tokens [B, T] at `places`, then the final norm.

        Returns hidden states [B, T, D], or those that are asked for; and all of them without a gradient, if
        `asked.all`, else None.
        """
        x = self.transformer['wte'](tokens)  # [B, T, D]
        absolute = isinstance(places, Tensor)
        if absolute:
            x = x + places
        x = F.rms_norm(x, (x.size(-1),), eps=1e-6)
        x = F.dropout(x, self.config.dropout, self.training)
        reading, last = Reading(None if absolute else places, attention_mask, cache), self.config.n_layer - 1
        for layer, block in enumerate(self.transformer['h']):
            before, x = x, block(x, reading, layer, asked if layer == last else None)
        x = self.transformer['ln_f'](x)  # [B, T, D] or [N, D]
        if asked is None or not asked.all:
            return x, None
        with torch.no_grad():  # second, so that it does not change the dropout of the first
            return x, self.transformer['ln_f'](block(before, reading, last, Asked(asked.length, None)))

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> GPTOutput:
        """Raw logits and hidden states of tokens [B, T]; `GPTOutput` gives the shapes for each mode."""
        hidden_states = self.encode(tokens, attention_mask)
        if self.config.mode is ModelMode.LANGUAGE_MODEL:
            logits = self.lm_head(hidden_states)  # [B, T, V]
        elif self.config.mode is ModelMode.TOKEN_CLASSIFIER:
            logits = self.classifier(hidden_states)  # [B, T, classes]
        else:
            logits = self.scorer(hidden_states[:, 0]).squeeze(-1)  # [B]
        return GPTOutput(logits, hidden_states)

    def neighbour_embedding(self) -> Tensor:
        """[V, D]: the token embeddings as the trunk reads them (normalised), for the sampler head."""
        weight = self.transformer['wte'].weight
        return F.rms_norm(weight, (weight.size(-1),), eps=1e-6)

    def critic_logits(self, hidden_states: Tensor) -> Tensor:
        """Wrongness logits [...] from hidden states [..., D] of tokens without masks."""
        if self.config.critic_gradient == 'head':
            hidden_states = hidden_states.detach()
        return self.critic_head(hidden_states).squeeze(-1)

    def critic_scores(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Probability float64 [B, T] that each of `tokens` [B, T] is wrong: one network call. It is float64,
        because in float32 all nearly certain ones would be equal."""
        return torch.sigmoid(to_exact(self.critic_logits(self.encode(tokens, attention_mask))).double())

    def sequence_scores(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """A scorer's evaluation [B] in 0..1 of tokens [B, T] that begin with the CLS token; 0 means real text."""
        return torch.sigmoid(self.forward(tokens, attention_mask).logits.float())

    def new_cache(self, batch: int, spare: int = 0) -> KeyValueCache:
        """An empty cache for `batch` rows of a causal or block model, in the weights' device and dtype; spare: places
        beyond the block size, for masks that one call reads and the cache does not keep."""
        config, weight = self.config, self.transformer['wte'].weight
        shape = (batch, config.n_head, config.block_size + spare, config.n_embd // config.n_head)
        dtype = torch.get_autocast_dtype(weight.device.type) if torch.is_autocast_enabled(weight.device.type) \
            else weight.dtype
        layers = range(config.n_layer)
        return KeyValueCache([torch.zeros(shape, dtype=dtype, device=weight.device) for _ in layers],
                             [torch.zeros(shape, dtype=dtype, device=weight.device) for _ in layers])

    def parameter_count(self) -> int:
        """Number of weights; the tied embedding counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def operations_per_token(self) -> int:
        """Floating-point operations of one trunk call per token (two per multiply-add), logits included, heads not."""
        config = self.config
        matrices = config.n_layer * 12 * config.n_embd ** 2 + config.n_embd * config.vocab_size
        attention = config.n_layer * 2 * config.block_size * config.n_embd
        return 2 * (matrices + attention)

    def sampler_operations_per_token(self) -> int:
        """Floating-point operations of the sampler head per token, if one trunk call fills the whole text."""
        shape = self.config.sampler_shape
        return shape.operations_per_token() + shape.operations_per_read_token()
