"""What the rows of a benchmark have in common: shapes, the model of a shape, and a case to measure."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model import GPTConfig
from sample_utils import allowed_ids

BASE_SIZE, VOCABULARY_SIZE = 63, 67  # characters of shakespeare_char; with the four special ids


@dataclass(frozen=True)
class Shape:
    """A model and its batch."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int

    @property
    def tokens(self) -> int:
        """Tokens of one training step."""
        return self.batch_size * self.block_size


SHAPES = {'small': Shape(4, 4, 128, 128, 64), 'large': Shape(6, 6, 384, 256, 32)}


class Case(NamedTuple):
    """Something to measure. run takes the number of the call, so that no two calls do the same; operations: floating
    point, two per multiply-add, that a call cannot do without; tokens: trained on or written by a call; dtype: what
    its matrices are multiplied in; bytes: that a call cannot do without moving beside its matrix products, None where
    nobody has counted."""

    run: Callable[[int], object]
    operations: float
    tokens: int
    dtype: torch.dtype
    bytes: float | None = None


def model_config(shape: Shape, **changes: Any) -> GPTConfig:
    """The model of `shape` with the special ids of shakespeare_char; `changes` add heads or make it causal."""
    return GPTConfig(block_size=shape.block_size, vocab_size=VOCABULARY_SIZE, n_layer=shape.n_layer,
                     n_head=shape.n_head, n_embd=shape.n_embd, mask_token_id=BASE_SIZE, wrong_token_id=BASE_SIZE + 1,
                     pad_token_id=BASE_SIZE + 2, cls_token_id=BASE_SIZE + 3, **changes)


def base_vocabulary(device: torch.device) -> Tensor:
    """bool [V], True for the ids that may be drawn."""
    return allowed_ids(VOCABULARY_SIZE, BASE_SIZE, device)


def short_name(dtype: torch.dtype) -> str:
    """'float32' for torch.float32."""
    return str(dtype).removeprefix('torch.')
