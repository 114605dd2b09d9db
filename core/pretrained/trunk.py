"""A model of the transformers library as the rest of the program sees a model: an adapter.

`PretrainedTrunk` offers what `GPT` offers to samplers, likelihoods, validation and heads: `config`, `encode`,
`lm_head`, `neighbour_embedding`, `sampler_head`, `critic_head`. The library's own modules compute, unchanged; its
weights stay frozen.

Letters: B batch, T sequence length, P and S tokens that the model wants before and after a text, V vocabulary, D width,
N positions picked out of a batch.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.common.errors import UserError
from core.common.precision import to_exact
from core.sampler_head import SamplerHead, initialise_sampler_head
from model import GPTConfig, GPTOutput, KeyValueCache

TRIAL_TOKENS = 6
TRIAL_TOLERANCE, COARSE_TOLERANCE = 1e-5, 0.02  # by how much logits computed in two ways differ: float32, 16 bits


class Framing(NamedTuple):
    """What a model reads around every text: ids before it, ids after it, and the id that fills shorter rows up."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    padding: int = 0


class Tap(nn.Module):
    """Takes the place of the output matrix in the library's model and keeps what comes in, the hidden states [..., D].

    So logits are computed where they are asked for and nowhere else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.seen = hidden_states
        return hidden_states[..., :1]

    def take(self) -> Tensor:
        """What came in, once."""
        seen, self.seen = self.seen, None
        if seen is None:
            raise UserError('the model computes its logits without its output layer, so hidden states cannot be read; '
                            'this program cannot use it')
        return seen


class PretrainedTrunk(nn.Module):
    """The frozen model, with heads of our own where `config` asks for them; `seed` decides the heads' first weights.

    network: the library's model, its output layer a `Tap`; lm_head: that output layer; framing: put around each text;
    next_token: hidden states at a position predict the token after it, as of diffusion models that began as causal ones
    (Gong et al. 2025, DiffuLLaMA; Ye et al. 2025, Dream). Here a hidden state always belongs to the position that it
    predicts.
    """

    def __init__(self, network: nn.Module, tap: Tap, lm_head: nn.Linear, framing: Framing, config: GPTConfig,
                 next_token: bool, seed: int = 1337) -> None:
        super().__init__()
        self.network, self.lm_head = network.requires_grad_(False), lm_head.requires_grad_(False)
        self.config, self.framing, self.next_token = config, framing, next_token
        object.__setattr__(self, 'tap', tap)  # a part of `network` already
        self.sampler_head = self.critic_head = None
        if config.add_sampler_head:
            self.sampler_head = SamplerHead(config.sampler_shape)
            initialise_sampler_head(self.sampler_head, torch.Generator().manual_seed(seed))
            self.sampler_head.to(lm_head.weight.device)
        if config.add_critic_head:
            self.critic_head = nn.Linear(config.n_embd, 1, device=lm_head.weight.device)
            nn.init.zeros_(self.critic_head.weight)
            nn.init.zeros_(self.critic_head.bias)
        self.eval()

    @torch.no_grad()
    def encode(self, tokens: Tensor, attention_mask: Tensor | None = None, cache: KeyValueCache | None = None,
               positions: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D] of tokens int64 [B, T], each what `lm_head` predicts its position from: one trunk
        call.

        attention_mask: bool [B, T], True for a row's text, which comes first, and False for the padding after it.
        positions: int64 [N], flat indices into tokens; hidden states of these alone come out, [N, D].
        """
        assert cache is None, 'a bidirectional model reads everything again'
        tokens, T = tokens.to(self.lm_head.weight.device), tokens.size(1)
        assert T <= self.config.block_size, f'{T} tokens in a block of {self.config.block_size}'
        framed, seen = self._framed(tokens, attention_mask)
        self.network(input_ids=framed, attention_mask=seen)
        read, first = self.tap.take(), len(self.framing.before) - self.next_token  # [B, P + T + S, D]
        hidden_states = torch.cat((read[:, :1], read[:, :T - 1]), dim=1) if first < 0 else read[:, first:first + T]
        return hidden_states if positions is None else \
            hidden_states.flatten(0, 1).index_select(0, positions.to(read.device))

    def _framed(self, tokens: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """int64 [B, P + T + S]: the frame around each row's text, padding last; int64 of the same shape: 1 where the
        model is to look, None for everywhere."""
        before, after, padding = self.framing
        B, T = tokens.shape
        first, last = (tokens.new_tensor(ids).expand(B, -1) for ids in (before, after))
        if attention_mask is None:
            return torch.cat((first, tokens, last), dim=1), None
        attention_mask = attention_mask.to(tokens.device)
        framed = torch.cat((first, tokens.masked_fill(~attention_mask, padding), torch.full_like(last, padding)), dim=1)
        lengths = len(before) + attention_mask.sum(1, keepdim=True)  # [B, 1]
        framed = framed.scatter(1, lengths + torch.arange(len(after), device=tokens.device), last)
        return framed, (torch.arange(framed.size(1), device=tokens.device) < lengths + len(after)).long()

    def encode_all(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [N, D] of tokens int64 [B, T] at positions int64 [N], and those of every position [B, T, D]:
        one trunk call."""
        hidden_states = self.encode(tokens)
        return hidden_states.flatten(0, 1).index_select(0, positions.to(hidden_states.device)), hidden_states

    def at_most(self, length: int) -> 'PretrainedTrunk':
        """The same model, whose windows have `length` tokens from now on."""
        assert length <= self.config.block_size
        self.config = replace(self.config, block_size=length)
        return self

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> GPTOutput:
        """Raw logits [B, T, V] and hidden states [B, T, D] of tokens [B, T], position by position."""
        hidden_states = self.encode(tokens, attention_mask)
        return GPTOutput(self.lm_head(hidden_states), hidden_states)

    def neighbour_embedding(self) -> Tensor:
        """[V, D]: what the sampler head sees of a token, the rows of the output matrix, normalised. They have the width
        of the hidden states in every model, and most models read tokens through the same matrix."""
        weight = self.lm_head.weight
        return F.rms_norm(weight, (weight.size(-1),), eps=1e-6)

    def critic_logits(self, hidden_states: Tensor) -> Tensor:
        """Wrongness logits [...] from hidden states [..., D] of tokens without masks."""
        return self.critic_head(hidden_states).squeeze(-1)

    def critic_scores(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Probability float64 [B, T] that each of `tokens` [B, T] is wrong: one network call."""
        return torch.sigmoid(to_exact(self.critic_logits(self.encode(tokens, attention_mask))).double())

    def parameter_count(self) -> int:
        """Number of weights, each once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def operations_per_token(self) -> int:
        """Floating-point operations of one trunk call per token (two per multiply-add): every matrix of the network but
        its tables, attention, and the logits."""
        tables = {id(module.weight) for module in self.network.modules() if isinstance(module, nn.Embedding)}
        matrices = sum(parameter.numel() for parameter in self.network.parameters()
                       if parameter.ndim == 2 and id(parameter) not in tables)
        config = self.config
        attention = config.n_layer * 2 * config.block_size * config.n_embd
        return 2 * (matrices + attention + config.n_embd * config.vocab_size)

    def sampler_operations_per_token(self) -> int:
        """Floating-point operations of the sampler head per token, where one trunk call fills all of a text."""
        shape = self.config.sampler_shape
        return shape.operations_per_token() + shape.operations_per_read_token()


# Taking a model of the library apart ----------------------------------------------------------------------------------

@torch.no_grad()
def detach_output_layer(network: nn.Module, tokens: Tensor) -> tuple[Tap, nn.Linear]:
    """Put a `Tap` in the place of the output layer of the library's `network`; the tap, and that layer with its bias.

    tokens int64 [1, n]: a text to try it on. UserError unless the library's own logits are the layer's, of the hidden
    states that come into it.
    """
    decoder = network.get_output_embeddings()
    if not isinstance(decoder, nn.Linear):
        raise UserError(f'{type(network).__name__} has no output layer that is one matrix, so it is not a language '
                        f'model that this program can read')
    name = next(name for name, module in network.named_modules() if module is decoder)
    parent, _, leaf = name.rpartition('.')
    above, incoming = network.get_submodule(parent), []
    hook = decoder.register_forward_pre_hook(lambda module, inputs: incoming.append(inputs[0]))
    expected = network(input_ids=tokens).logits
    hook.remove()
    further = getattr(above, 'bias', None)  # of models that add it by themselves
    layers = []
    for bias in (decoder.bias, further) if isinstance(further, Tensor) else (decoder.bias,):
        layer = nn.Linear(decoder.in_features, decoder.out_features, bias=bias is not None, device='meta')
        layer.weight, layer.bias = decoder.weight, bias
        layers.append((deviation(layer(incoming[0]), expected) if incoming else math.inf, len(layers), layer))
    least, _, layer = min(layers)
    if least <= (TRIAL_TOLERANCE if expected.dtype.itemsize >= 4 else COARSE_TOLERANCE):
        tap = Tap()
        setattr(above, leaf, tap)
        return tap, layer
    raise UserError(f'the logits of {type(network).__name__} are not its output matrix times hidden states, so its '
                    f'sampler head and likelihoods cannot be computed; this program cannot use it')


def deviation(found: Tensor, expected: Tensor) -> float:
    """How far apart two computations of logits are, relative to the largest; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    return ((found - expected).abs().amax() / (1 + expected.abs().amax())).item()


def make_bidirectional(network: nn.Module) -> None:
    """Let every position of a causal architecture see all others."""
    network.config.is_causal = False
    for module in network.modules():
        if hasattr(module, 'is_causal'):
            module.is_causal = False


@torch.no_grad()
def sees_both_sides(model: PretrainedTrunk, tokens: Tensor) -> bool:
    """Whether the prediction at the first of tokens int64 [2, T] changes with the last one, in which they differ."""
    first, other = model(tokens).logits[:, 0]
    return not torch.equal(first, other)
