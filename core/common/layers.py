"""Parts that trunk and heads are built of.

Letters: B rows, T sequence length, D width, H heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """Root mean square normalisation (Zhang & Sennrich 2019) with a gain per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight.to(x.dtype), eps=1e-6)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) on queries or keys x [B, T, H, D / H]; cosine and sine are [T, 1, D / 2H]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)


def attend_from_one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of a single query [B, H, 1, D / H] to all of key and value [B, H, K, D / H], on a processor, computed
    in float32. With one query, torch's attention in lower precision costs several times as much there."""
    with torch.autocast('cpu', enabled=False):
        return F.scaled_dot_product_attention(query.float(), key.float(), value.float()).to(query.dtype)


def rotary_tables(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [length, 1, width / 2] of position times frequency, base 10,000 (Su et al. 2021)."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float()[:, None], angle.sin().float()[:, None]


def draw_weights(module: nn.Module, generator: torch.Generator, deviation: float | None = None) -> None:
    """Normal initial weights of one linear layer or embedding, 1 / sqrt(3 width) as `deviation` by default; zero
    biases. Other modules stay as they are."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=deviation or 1 / math.sqrt(3 * module.weight.size(1)), generator=generator)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
