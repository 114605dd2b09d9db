"""A masked-diffusion GPT for the transformers library: its config and model, in one file that needs nothing else.

    from transformers import AutoModelForMaskedLM, AutoTokenizer
    model = AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True)

Letters: B batch, T sequence length, D channels, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


class MaskedDiffusionConfig(PretrainedConfig):
    """The shape of the model. rotary: rotary positions; otherwise one learnt vector for each position."""

    model_type = 'masked_diffusion_gpt'

    def __init__(self, vocab_size: int = 69, hidden_size: int = 384, num_hidden_layers: int = 6,
                 num_attention_heads: int = 6, max_position_embeddings: int = 256, rotary: bool = True,
                 bias: bool = False, mask_token_id: int | None = None, **others: object) -> None:
        self.vocab_size, self.hidden_size, self.bias, self.rotary = vocab_size, hidden_size, bias, rotary
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.max_position_embeddings, self.mask_token_id = max_position_embeddings, mask_token_id
        super().__init__(**{'tie_word_embeddings': True, **others})


class Norm(nn.Module):
    """Root mean square normalisation with a gain per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight, eps=1e-6)


def rotated(x: Tensor) -> Tensor:
    """x [B, T, H, D / H] turned by its positions, base 10,000."""
    width, place = x.size(-1), torch.arange(x.size(1), dtype=torch.float64)
    angle = place[:, None] * 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)  # [T, D / 2H]
    cosine, sine = (one.float()[:, None].to(x.device) for one in (angle.cos(), angle.sin()))
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Bidirectional attention of normalised queries and keys."""

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.rotary = config.num_attention_heads, config.rotary
        self.c_attn = nn.Linear(width, 3 * width, bias=config.bias)
        self.c_proj = nn.Linear(width, width, bias=config.bias)
        self.query_norm, self.key_norm = Norm(width // self.heads), Norm(width // self.heads)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        query, key, value = self.c_attn(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, T, H, D / H]
        query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary:
            query, key = rotated(query), rotated(key)
        x = F.scaled_dot_product_attention(*(one.transpose(1, 2) for one in (query, key, value)),
                                           attn_mask=attention_mask)
        return self.c_proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two matrices with a squared ReLU between."""

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__()
        self.ln_1, self.attn = Norm(config.hidden_size), Attention(config)
        self.ln_2, self.mlp = Norm(config.hidden_size), MLP(config)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), attention_mask)
        return x + self.mlp(self.ln_2(x))


class MaskedDiffusionForMaskedLM(PreTrainedModel):
    """Predicts masked tokens. Ids from the mask token's on are special: leave them out of a softmax over text."""

    config_class = MaskedDiffusionConfig
    base_model_prefix = 'transformer'
    _tied_weights_keys = {'lm_head.weight': 'transformer.wte.weight'}
    _supports_sdpa = True

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__(config)
        self.transformer = nn.ModuleDict({'wte': nn.Embedding(config.vocab_size, config.hidden_size)})
        if not config.rotary:
            self.transformer['wpe'] = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.transformer['h'] = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.transformer['ln_f'] = Norm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer['wte']

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer['wte'] = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
                **_: object) -> MaskedLMOutput:
        """Logits [B, T, V] of input_ids int64 [B, T]. attention_mask [B, T]: 0 at padding. labels int64 [B, T]: the
        true tokens, -100 at positions without a loss."""
        if input_ids.size(1) > self.config.max_position_embeddings:
            raise ValueError(f'{input_ids.size(1)} tokens, but the model reads at most '
                             f'{self.config.max_position_embeddings}')
        x = self.transformer['wte'](input_ids)  # [B, T, D]
        if not self.config.rotary:
            x = x + self.transformer['wpe'].weight[:x.size(1)]
        x = F.rms_norm(x, (x.size(-1),), eps=1e-6)
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        for block in self.transformer['h']:
            x = block(x, mask)
        logits = self.lm_head(self.transformer['ln_f'](x))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)
