"""What the rows of a benchmark have in common: shapes, the model of a shape, and a case to measure."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.common.drawing import allowed_ids
from model import GPTConfig

SPECIAL = 4  # ids after the base vocabulary: mask, wrong, pad and CLS


@dataclass(frozen=True)
class Shape:
    """A model and its batch. base_size: size of the vocabulary without its special ids; by default the characters of
    shakespeare_char. sampler_output: the sampler head's, see `GPTConfig`."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int
    base_size: int = 63
    sampler_output: str = 'own'

    @property
    def tokens(self) -> int:
        """Tokens of one training step."""
        return self.batch_size * self.block_size

    @property
    def vocabulary_size(self) -> int:
        """V, including the special ids."""
        return self.base_size + SPECIAL


SHAPES = {'small': Shape(4, 4, 128, 128, 64), 'large': Shape(6, 6, 384, 256, 32),
          'medium': Shape(10, 6, 384, 256, 64),  # 17.7 million weights
          'gpt2': Shape(12, 12, 768, 1024, 12, base_size=50_257, sampler_output='shared_detached')}  # 124 million


class Case(NamedTuple):
    """Something to measure. run: takes the number of the call, so that no two calls do the same. operations:
    floating-point operations that a call needs, two per multiply-add. tokens: that a call trains on or writes. dtype:
    of its matrix products. bytes: the least that a call moves, without its matrix products; None if not counted."""

    run: Callable[[int], object]
    operations: float
    tokens: int
    dtype: torch.dtype
    bytes: float | None = None


def model_config(shape: Shape, **changes: Any) -> GPTConfig:
    """The model of `shape`; `changes` add heads or make it causal."""
    return GPTConfig(block_size=shape.block_size, vocab_size=shape.vocabulary_size, n_layer=shape.n_layer,
                     n_head=shape.n_head, n_embd=shape.n_embd, mask_token_id=shape.base_size,
                     wrong_token_id=shape.base_size + 1, pad_token_id=shape.base_size + 2,
                     cls_token_id=shape.base_size + 3, sampler_output=shape.sampler_output, **changes)


def base_vocabulary(config: GPTConfig, device: torch.device) -> Tensor:
    """bool [V], True for the ids that may be drawn by a model of `model_config`."""
    return allowed_ids(config.vocab_size, config.mask_token_id, device)


def short_name(dtype: torch.dtype) -> str:
    """'float32' for torch.float32."""
    return str(dtype).removeprefix('torch.')
