"""The sampler head: what is drawn for a masked position, given the tokens that were placed since the trunk call.

Letters: B rows, T sequence length, N positions, V vocabulary with the special ids, D = n_embd, W width of the head,
A width of its attention, H heads, C = L + R neighbours on the left and on the right.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.common.layers import Norm, draw_weights, rotary_tables, rotate

GATE_AFTER_A_DRAW = 0.3  # share of the trunk's logits that a gate begins with if a neighbour is new; else all


class SamplerWindow(NamedTuple):
    """Neighbours of a position, in the order of the head's slots: left_L .. left_1, right_1 .. right_R."""

    left: int
    right: int

    @classmethod
    def of(cls, context: int, left: int | None, right: int | None) -> 'SamplerWindow':
        """`context` neighbours on each side, unless left or right give another number."""
        return cls(context if left is None else left, context if right is None else right)

    @property
    def size(self) -> int:
        """L + R, called C."""
        return self.left + self.right

    def offsets(self, device: torch.device | None = None) -> Tensor:
        """int64 [C]: -L .. -1, 1 .. R."""
        steps = torch.arange(-self.left, self.right + 1, device=device)
        return torch.cat((steps[:self.left], steps[self.left + 1:]))


class KindRow(NamedTuple):
    """window: it sees the tokens next to a position. reads_row: it reads all known positions of the row, also those
    filled before this one. sees_masks: it also reads the positions that are still masked."""

    window: bool
    reads_row: bool = False
    sees_masks: bool = False


SAMPLER_KINDS: dict[str, KindRow] = {  # by the value of --sampler_kind
    'neighbours': KindRow(window=True),
    'layer': KindRow(window=False, reads_row=True),
    'layer_neighbours': KindRow(window=True, reads_row=True),
    'rerun': KindRow(window=False, reads_row=True, sees_masks=True),
}


class SamplerShape(NamedTuple):
    """What a sampler head is built from.

    kind: a row of SAMPLER_KINDS; n_embd, vocab_size, n_head, length: the trunk's width D, its ids V, the heads of the
    attention and the longest row; width: W; attention_width: A; own_output: an output matrix of its own; zero_hidden,
    residual, gate: see `SamplerHead`.
    """

    kind: KindRow
    window: SamplerWindow
    n_embd: int
    vocab_size: int
    n_head: int
    length: int
    width: int
    attention_width: int
    own_output: bool
    zero_hidden: bool
    residual: bool
    gate: bool

    def operations_per_token(self) -> int:
        """Floating-point operations for each token drawn (two per multiply-add). What tokens add to the first product,
        keys and values comes from tables and costs nothing. The attention counts as if every row were full."""
        hidden = 0 if self.zero_hidden else self.n_embd
        matrices = self.width * (hidden + self.width + self.vocab_size)
        if self.kind.reads_row:
            matrices += self.attention_width * (hidden + 2 * self.length + self.width)
        return 2 * matrices

    def operations_per_read_token(self) -> int:
        """Floating-point operations for each token that a trunk call reads: keys and values of its hidden state."""
        return 2 * 2 * self.attention_width * self.n_embd if self.kind.reads_row and not self.zero_hidden else 0


class Memory(NamedTuple):
    """What queries may look at: keys, values [B, H, S, A / H]. The first of the S is empty and always there, so that a
    row without known positions can be read."""

    keys: Tensor
    values: Tensor


class FillAttention(nn.Module):
    """One attention layer of two streams, in the order of a fill (XLNet, Yang et al. 2019; SSMD, arXiv 2510.03929).

    The query of a masked position comes from its hidden state and knows nothing of its token. Keys and values come from
    the hidden states and tokens of known positions: those visible to the trunk, and those filled earlier. With
    sees_masks the layer also reads positions that are still masked, with the mask's embedding as their token. Then it
    sees what a layer sees that runs again over the whole row after each draw (ADJUST, arXiv 2509.22738). There is only
    one layer, so a draw changes nothing but the token just placed, and everything else is kept. Positions are rotary.
    """

    def __init__(self, shape: SamplerShape) -> None:
        super().__init__()
        D, A, self.n_head, self.sees_masks = shape.n_embd, shape.attention_width, shape.n_head, shape.kind.sees_masks
        self.zero_hidden = shape.zero_hidden
        self.query = nn.Linear(D, A, bias=False)
        self.query_start = nn.Parameter(torch.ones(A))  # the query of a head that does not see hidden states
        self.content = nn.Linear(D, 2 * A, bias=False)
        self.token = nn.Linear(D, 2 * A, bias=False)
        self.query_norm, self.key_norm = Norm(A // shape.n_head), Norm(A // shape.n_head)
        self.output = nn.Linear(A, shape.width, bias=False)
        cosine, sine = rotary_tables(shape.length, A // shape.n_head)
        self.register_buffer('rotary_cosine', cosine, persistent=False)
        self.register_buffer('rotary_sine', sine, persistent=False)

    def forward(self, hidden_states: Tensor, embedded: Tensor, mask_embedding: Tensor, sees: Tensor,
                within: Tensor | None = None) -> Tensor:
        """What every position of a row reads, [B, T, W], all in one pass, each with its own known tokens (teacher
        forcing).

        hidden_states [B, T, D]; embedded [B, T, D]: the embedding of each position's token, true or placed;
        mask_embedding [D]; sees bool [B, T, T]: True where a position (second index) knows the token of another one
        (third index). within bool [B, T, T]: True where it may look at the other one at all; None: everywhere.
        """
        content = self.contents(hidden_states)  # [B, T, 2 A]
        keys, values = self.remembered(content + self.token(embedded))
        if self.sees_masks:
            masks = self.remembered(content + self.token(mask_embedding))
            keys, values = (torch.cat((one, of_masks[:, :, 1:]), dim=2) for one, of_masks in zip((keys, values), masks))
            sees = torch.cat((sees, ~sees if within is None else within & ~sees), dim=2)
        sees = F.pad(sees, (1, 0), value=True)[:, None]  # [B, 1, T, S]
        places = slice(hidden_states.size(1))
        queries = self.queries(hidden_states, places).transpose(1, 2)  # [B, H, T, A / H]
        found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=sees)
        return self.output(found.transpose(1, 2).flatten(2))

    def queries(self, hidden_states: Tensor, places: Tensor | slice) -> Tensor:
        """[..., H, A / H]: of hidden_states [..., D] at `places`, which index the rotary tables."""
        query = self.query(self._shown(hidden_states))
        query = (query + self.query_start.to(query.dtype)).unflatten(-1, (self.n_head, -1))
        return self._rotated(self.query_norm(query), places)

    def contents(self, hidden_states: Tensor) -> Tensor:
        """What hidden_states [..., D] add to keys and values, [..., 2 A]; `token` gives what a token adds."""
        return self.content(self._shown(hidden_states))

    def keys_values(self, content: Tensor, places: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Keys and values [..., H, A / H] of content [..., 2 A] at `places`."""
        key, value = content.unflatten(-1, (2, self.n_head, -1)).unbind(-3)
        return self._rotated(self.key_norm(key), places), value

    def remembered(self, content: Tensor) -> Memory:
        """`Memory` of whole rows, content [B, T, 2 A]."""
        key, value = self.keys_values(content, slice(content.size(1)))  # [B, T, H, A / H]
        return Memory(*(F.pad(one, (0, 0, 0, 0, 1, 0)).transpose(1, 2) for one in (key, value)))

    def read(self, queries: Tensor, memory: Memory, known: Tensor) -> Tensor:
        """[n, W]: what queries [n, H, A / H] read, one a row of `memory`; known bool [n, S]."""
        found = F.scaled_dot_product_attention(queries[:, :, None], *memory, attn_mask=known[:, None, None])
        return self.output(found.flatten(1))  # from [n, H, 1, A / H]

    def _shown(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states) if self.zero_hidden else hidden_states

    def _rotated(self, x: Tensor, places: Tensor | slice) -> Tensor:
        return rotate(x, self.rotary_cosine[places], self.rotary_sine[places])


class RowMemory:
    """What a head that reads rows remembers during one fill: the keys and values of all known positions. Each draw adds
    its token, so a draw costs one query, one key and one value."""

    def __init__(self, attention: FillAttention, tokens: Tensor, hidden_states: Tensor,
                 table: tuple[Tensor, int]) -> None:
        """tokens int64 [B, T] and their hidden_states [B, T, D]. table: what each token adds to keys and values,
        [V, 2 A], and the id of the mask."""
        (contents, mask_token_id), tokens = table, tokens.to(hidden_states.device)
        self._attention, self._contents = attention, contents
        self._of_hidden = attention.contents(hidden_states)  # [B, T, 2 A]
        self._memory = attention.remembered(self._of_hidden + contents[tokens])  # masks with the mask's embedding
        self._known = F.pad((tokens != mask_token_id) | attention.sees_masks, (1, 0), value=True)  # [B, 1 + T]

    def read(self, hidden: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """[n, W]: what the attention gives positions `places` int64 [n] of `rows` int64 [n]; hidden [n, D]. No row may
        occur twice."""
        rows, places = rows.to(hidden.device), places.to(hidden.device)
        memory, known = self._memory, self._known
        if len(rows) < len(known):
            memory, known = Memory(*(one[rows] for one in memory)), known[rows]
        return self._attention.read(self._attention.queries(hidden, places), memory, known)

    def add(self, rows: Tensor, places: Tensor, tokens: Tensor) -> None:
        """Add the tokens int64 [n] at these positions to what is known."""
        rows, places, tokens = (one.to(self._contents.device) for one in (rows, places, tokens))
        made = self._attention.keys_values(self._of_hidden[rows, places] + self._contents[tokens], places)
        at = rows, places + 1
        if torch.is_grad_enabled():  # the backward pass needs the old tensors
            self._memory = Memory(*(old.transpose(1, 2).index_put(at, new).transpose(1, 2)
                                    for old, new in zip(self._memory, made)))
        else:
            for old, new in zip(self._memory, made):
                old.transpose(1, 2).index_put_(at, new)
        self._known = self._known.index_put(at, torch.ones_like(rows, dtype=torch.bool))


class LaterLayers(NamedTuple):
    """The weights of a sampler head from the first matrix's product on.

    A fill finds them once. In a small head, asking the modules for them takes as long as computing with them.
    norm_1, norm_2: weight and bias [W]. hidden: weight [W, W] and bias [W]. output [V, W]. residual: the trunk's logits
    are added. gate: new_neighbours [C + 1, W], gate_start [C + 1], weight [1, W] and bias [1]; None without a gate.
    """

    norm_1: tuple[Tensor, Tensor]
    hidden: tuple[Tensor, Tensor]
    norm_2: tuple[Tensor, Tensor]
    output: Tensor
    residual: bool
    gate: tuple[Tensor, Tensor, Tensor, Tensor] | None

    def logits(self, projection: Tensor, trunk_logits: Tensor, new: Tensor | None = None) -> Tensor:
        """Logits [..., V] from projection [..., W], the sum of the first matrix's product and what was read.

        trunk_logits, new: as in `SamplerHead.forward`.
        """
        width = (projection.size(-1),)
        if self.gate is not None:
            new_neighbours, gate_start, gate_weight, gate_bias = self.gate
            projection = projection + F.embedding(new, new_neighbours)
        x = F.layer_norm(F.silu(projection), width, *self.norm_1)
        x = F.layer_norm(F.silu(F.linear(x, *self.hidden)), width, *self.norm_2)
        logits = F.linear(x, self.output)
        if not self.residual:
            return logits
        if self.gate is None:
            return logits + trunk_logits
        share = gate_start[new] * opening(F.linear(x, gate_weight, gate_bias).squeeze(-1))  # [...]
        return logits + trunk_logits * share[..., None]


def opening(gate: Tensor) -> Tensor:
    """The factor that a gate's output [...] stands for, between 0 and 2: exp(gate) up to 0, then 1 + tanh(gate).

    It needs a bound: in a wide head one step of training can move the output by several units, and an exponential of 30
    ends the training (docs/LOG.md).
    """
    return gate.clamp(max=0).exp() + F.relu(gate).tanh()


class SamplerHead(nn.Module):
    """Predicts a masked token from its hidden state and from tokens that were placed since (docs/sampler.md).

    Its kind decides what it sees of them: the tokens next to the position, what `attention` reads of the row, or both.
    The two add up in the product of the first matrix; everything after that is the same for all kinds.

    Input slots, each D wide: neighbours left_L .. left_1, the hidden state, neighbours right_1 .. right_R. A missing
    neighbour (sequence boundary, or still masked) is a zero vector. The first matrix acts on each slot separately, so
    its product with every token's embedding can be kept in a table. `neighbour_tables`, `hidden_projection` and
    `later_layers` together give what `forward` gives, up to rounding. With sampler_zero_hidden the hidden state is a
    zero vector and the trunk's logits are not added, which measures what neighbours alone are worth.

    A residual head adds the trunk's logits. These know nothing of the neighbours filled since the trunk call, so they
    mislead where there are many. With sampler_gate the head adds only a share of them, which it computes from what it
    sees and from the number of new neighbours.
    """

    def __init__(self, shape: SamplerShape) -> None:
        super().__init__()
        width, self.window = shape.width, shape.window
        self.zero_hidden, self.residual = shape.zero_hidden, shape.residual
        self.input = nn.Linear((self.window.size + 1) * shape.n_embd, width)
        self.norm_1 = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.output_head = nn.Linear(width, shape.vocab_size, bias=False) if shape.own_output else None
        self.attention = FillAttention(shape) if shape.kind.reads_row else None
        self.new_neighbours = self.gate = self.gate_start = None
        if shape.gate:
            self.new_neighbours = nn.Embedding(self.window.size + 1, width)
            self.gate = nn.Linear(width, 1)
            self.gate_start = nn.Parameter(torch.full((self.window.size + 1,), GATE_AFTER_A_DRAW))

    def forward(self, sampler_input: Tensor, trunk_logits: Tensor, output_weight: Tensor,
                new: Tensor | None = None, read: Tensor | None = None) -> Tensor:
        """Logits [..., V] from sampler_input [..., (C + 1) D].

        trunk_logits [..., V]: added if the head is residual. output_weight [V, D]: the trunk's `lm_head`, used if
        sampler_output is 'shared_detached'. new int64 [...]: how many of the neighbours were masked in the trunk call,
        used by a gate. read [..., W]: what the attention gives, None without one.
        """
        if self.zero_hidden:
            slots = sampler_input.unflatten(-1, (self.window.size + 1, -1))  # [..., C + 1, D]
            place = torch.arange(self.window.size + 1, device=slots.device) == self.window.left
            sampler_input = slots.masked_fill(place[:, None], 0.0).flatten(-2)
        projection = self.input(sampler_input)
        return self.later_layers(output_weight).logits(projection if read is None else projection + read, trunk_logits,
                                                       new)

    def later_layers(self, output_weight: Tensor) -> LaterLayers:
        """The weights from the first matrix's product on; output_weight as in `forward`."""
        gate = None if self.gate is None else (self.new_neighbours.weight, self.gate_start, self.gate.weight,
                                               self.gate.bias)
        return LaterLayers((self.norm_1.weight, self.norm_1.bias), (self.hidden.weight, self.hidden.bias),
                           (self.norm_2.weight, self.norm_2.bias),
                           output_weight if self.output_head is None else self.output_head.weight, self.residual, gate)

    def hidden_projection(self, hidden_states: Tensor) -> Tensor:
        """The hidden state's part of the first matrix's product, bias included: [..., D] to [..., W]."""
        if self.zero_hidden:
            hidden_states = torch.zeros_like(hidden_states)
        width, left = hidden_states.size(-1), self.window.left
        return F.linear(hidden_states, self.input.weight[:, left * width:(left + 1) * width], self.input.bias)

    def neighbour_tables(self, embedding: Tensor) -> Tensor:
        """Each token's part of the first matrix's product per neighbour slot: embedding [V, D] to [C, V, W]."""
        slots = self.input.weight.view(self.input.out_features, self.window.size + 1, -1)  # [W, C + 1, D]
        neighbours = torch.cat((slots[:, :self.window.left], slots[:, self.window.left + 1:]), dim=1)  # [W, C, D]
        return torch.einsum('vd,esd->sve', embedding, neighbours)


@torch.no_grad()
def initialise_sampler_head(head: SamplerHead, generator: torch.Generator) -> None:
    """Give a head its initial weights, which depend on `generator` only and not on the trunk."""
    for module in head.modules():
        draw_weights(module, generator)
    if head.residual and head.output_head is not None:
        nn.init.zeros_(head.output_head.weight)  # starts as the trunk's own prediction
    if head.gate is not None:
        nn.init.zeros_(head.new_neighbours.weight)
        nn.init.zeros_(head.gate.weight)
        head.gate_start[0] = 1.0
