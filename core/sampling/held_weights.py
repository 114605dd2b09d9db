"""A model that only samples: the trunk's matrices are held in the lower precision of autocast.

Autocast casts a weight at every use, and a call that reads one token spends most of its time on that. Held weights are
cast once. On a processor they are also laid out for its matrix products once (oneDNN). The numbers are the same.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT


class HeldLinear(nn.Module):
    """The linear layer `linear`, without gradients, held in `dtype`. It reads [..., in] of any float type and gives
    [..., out] in `dtype`, with the numbers of autocast."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, weight = dtype, linear.weight.detach().to(dtype)
        self.packed = can_pack(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.packed else weight
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')
        return F.linear(x, self.weight, self.bias)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can lay out `weight` for this processor's products: the operator that compiled models use."""
    return weight.device.type == 'cpu' and weight.dtype is torch.bfloat16 and torch.backends.mkldnn.is_available() and \
        hasattr(torch.ops.mkldnn, '_reorder_linear_weight') and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def with_held_weights(model: GPT, autocast: torch.dtype | None) -> GPT:
    """A copy of `model` for sampling in `autocast`, whose layers hold their weights in it; `model` itself if that is
    None. Embeddings, norms and heads stay as they are."""
    if autocast is None:
        return model
    held = copy.deepcopy(model)
    for layer in held.transformer['h']:
        for part in (layer.attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, HeldLinear(linear, autocast))
    return held
