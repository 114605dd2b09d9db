"""An adapter that makes a model of the transformers library look like a model of this program.

`PretrainedTrunk` offers what `GPT` offers to samplers, likelihoods, validation and heads: `config`, `encode`,
`lm_head`, `neighbour_embedding`, `sampler_head`, `critic_head`. The library's own modules compute, unchanged. Their
weights stay frozen.

Letters: B batch, T sequence length, P and S tokens of the frame before and after a text, V vocabulary, D width,
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
TRIAL_TOLERANCE, COARSE_TOLERANCE = 1e-5, 0.02  # of logits computed in two ways: float32, 16 bits


class Framing(NamedTuple):
    """The frame that a model reads around each text: ids before it, ids after it, and the id that pads shorter rows."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    padding: int = 0


class Tap(nn.Module):
    """Replaces the output matrix in the library's model, and keeps its input, the hidden states [..., D].

    So logits are computed only where they are needed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.seen = hidden_states
        return hidden_states[..., :1]

    def take(self) -> Tensor:
        """The hidden states of the last call. They can be taken once. UserError if there are none."""
        seen, self.seen = self.seen, None
        if seen is None:
            raise UserError('the model computes its logits without its output layer, so hidden states cannot be read; '
                            'this program cannot use it')
        return seen


class PretrainedTrunk(nn.Module):
    """The frozen model, with this program's heads if `config` asks for them. seed: of the heads' first weights.

    network: the library's model, with a `Tap` as output layer. lm_head: the original output layer. framing: put around
    each text. next_token: a hidden state of the network predicts the token after its position, as in diffusion models
    that began as causal ones (Gong et al. 2025, DiffuLLaMA; Ye et al. 2025, Dream). `encode` always returns a hidden
    state at the position that it predicts.
    """

    def __init__(self, network: nn.Module, tap: Tap, lm_head: nn.Linear, framing: Framing, config: GPTConfig,
                 next_token: bool, seed: int = 1337) -> None:
        super().__init__()
        self.network, self.lm_head = network.requires_grad_(False), lm_head.requires_grad_(False)
        self.config, self.framing, self.next_token = config, framing, next_token
        object.__setattr__(self, 'tap', tap)  # it is a part of `network` already
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
        """Hidden states [B, T, D] of tokens int64 [B, T]: one trunk call.

        `lm_head` predicts each position from its hidden state. attention_mask: bool [B, T], True for a row's text,
        which comes first, and False for the padding after it. positions: int64 [N], flat indices into tokens; then the
        result is [N, D], the hidden states of these alone.
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
        """Two int64 [B, P + T + S]: each row's text in its frame, with padding last; and an attention mask, 1 where the
        model may look, or None for everywhere."""
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
        """This model; its windows have `length` tokens from now on."""
        assert length <= self.config.block_size
        self.config = replace(self.config, block_size=length)
        return self

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> GPTOutput:
        """Raw logits [B, T, V] and hidden states [B, T, D] of tokens [B, T], position by position."""
        hidden_states = self.encode(tokens, attention_mask)
        return GPTOutput(self.lm_head(hidden_states), hidden_states)

    def neighbour_embedding(self) -> Tensor:
        """[V, D]: what the sampler head sees of a token. These are the normalised rows of the output matrix. Their
        width is that of the hidden states in every model, and most models also embed tokens with this matrix."""
        weight = self.lm_head.weight
        return F.rms_norm(weight, (weight.size(-1),), eps=1e-6)

    def critic_logits(self, hidden_states: Tensor) -> Tensor:
        """Wrongness logits [...] from hidden states [..., D] of tokens without masks."""
        return self.critic_head(hidden_states).squeeze(-1)

    def critic_scores(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Probability float64 [B, T] that each of `tokens` [B, T] is wrong: one network call."""
        return torch.sigmoid(to_exact(self.critic_logits(self.encode(tokens, attention_mask))).double())

    def parameter_count(self) -> int:
        """Number of weights. Each counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def operations_per_token(self) -> int:
        """Floating-point operations of one trunk call per token (two per multiply-add): attention, the logits, and
        every matrix of the network that is not an embedding table."""
        tables = {id(module.weight) for module in self.network.modules() if isinstance(module, nn.Embedding)}
        matrices = sum(parameter.numel() for parameter in self.network.parameters()
                       if parameter.ndim == 2 and id(parameter) not in tables)
        config = self.config
        attention = config.n_layer * 2 * config.block_size * config.n_embd
        return 2 * (matrices + attention + config.n_embd * config.vocab_size)

    def sampler_operations_per_token(self) -> int:
        """Floating-point operations of the sampler head per token, if one trunk call fills a whole text."""
        shape = self.config.sampler_shape
        return shape.operations_per_token() + shape.operations_per_read_token()


# Taking a model of the library apart ----------------------------------------------------------------------------------

@torch.no_grad()
def detach_output_layer(network: nn.Module, tokens: Tensor) -> tuple[Tap, nn.Linear]:
    """Replace the output layer of the library's `network` by a `Tap`. Returns the tap, and the layer with its bias.

    tokens int64 [1, n]: a text for a trial. UserError unless the layer, applied to the hidden states that enter it,
    gives the library's own logits.
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
    further = getattr(above, 'bias', None)  # some models add it outside the layer
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
    """Largest difference of two computations of logits, relative to the largest logit. Infinite if shapes differ."""
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
    """Whether the prediction at the first position depends on the last token. tokens int64 [2, T]: two texts that
    differ only there."""
    first, other = model(tokens).logits[:, 0]
    return not torch.equal(first, other)
