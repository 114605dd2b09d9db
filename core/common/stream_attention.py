"""Attention in the two streams [x_t ; x_0] that block models train on: who sees whom, as a dense mask and as tiles.

A dense mask works on every device. FlexAttention (Dong et al. 2024, arXiv 2412.05496) keeps no mask of the whole
square, and skips its tiles that nobody sees. In long rows these are nearly three quarters.

Letters: B batch, T sequence length, D width, H heads, S queries.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

LONG = 2048  # tokens of both streams from which tiles pay: in shorter rows the dense mask is cheap
NARROWEST = 16  # channels of a head that FlexAttention's kernels can multiply

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def block_attention_mask(block_length: Tensor | int, length: int, device: torch.device) -> Tensor:
    """bool [B, 1, 2T, 2T]: who sees whom in the two streams [x_t ; x_0] of T tokens each (Arriola et al. 2025, BD3-LM,
    section 3.1, figure 1).

    A token of x_t sees its own block of x_t and the earlier blocks of x_0. A token of x_0 sees its own block of x_0 and
    the earlier ones. block_length: int64 [B], a length for each row, or one number for all (then B is 1).
    """
    lengths = block_length[:, None] if isinstance(block_length, Tensor) else block_length  # [B, 1]
    block = torch.arange(length, device=device)[None] // lengths  # [B, T]
    own, earlier = block[:, :, None] == block[:, None, :], block[:, :, None] > block[:, None, :]  # [B, T, T]
    noisy = torch.cat((own, earlier), dim=2)
    clean = torch.cat((torch.zeros_like(own), own | earlier), dim=2)
    return torch.cat((noisy, clean), dim=1)[:, None]


def block_sees(block_length: Tensor | int, length: int) -> Sees:
    """The definition of `block_attention_mask` for one pair of tokens, as FlexAttention asks for it: a function of row,
    head, query and key, integers of any shapes, that says whether the query sees the key."""
    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        lengths = block_length[row] if isinstance(block_length, Tensor) else block_length
        reader, read = query % length // lengths, key % length // lengths
        own, earlier = reader == read, reader > read
        return torch.where(key < length, own & (query < length), earlier | (own & (query >= length)))

    return sees


class StreamTiles(NamedTuple):
    """Which tiles of 128 x 128 pairs of tokens are seen, in full, in part or not at all. FlexAttention calls this a
    block mask; it has nothing to do with the blocks of the text.

    both: [B or 1, 1, 2T, 2T]. noisy: its first T queries, for a last layer that computes no others.
    """

    both: BlockMask
    noisy: BlockMask

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention [B, H, S, D / H] of the first S queries, T or 2T, to all keys [B, H, 2T, D / H]."""
        tiles = self.both if query.size(2) == key.size(2) else self.noisy
        query, key = query.to(value.dtype), key.to(value.dtype)  # a GPU's autocast has normalised them in float32
        return flex_attention(query, key, value, block_mask=tiles)


def stream_tiles(block_length: Tensor | int, length: int, device: torch.device) -> StreamTiles:
    """The tiles of two streams of `length` tokens; block_length as in `block_attention_mask`.

    Those of one number are made once and kept for good, so a recorded CUDA graph may go on reading them. Those of
    single rows are made for each batch, by operations on the device alone. That takes a few dense masks of memory for
    a moment, before the layers have used any.
    """
    if isinstance(block_length, int):
        return _kept_tiles(block_length, length, device)
    return _made_tiles(block_length, length, len(block_length), device)


@cache
def _kept_tiles(block_length: int, length: int, device: torch.device) -> StreamTiles:
    return _made_tiles(block_length, length, None, device)


def _made_tiles(block_length: Tensor | int, length: int, rows: int | None, device: torch.device) -> StreamTiles:
    sees = block_sees(block_length, length)
    return StreamTiles(*(create_block_mask(sees, rows, None, queries, 2 * length, device=device)
                         for queries in (2 * length, length)))


def tiles_pay(device: torch.device, length: int, head_width: int, dropout: float) -> bool:
    """Whether a compiled training step of one rank reads its two streams of `length` tokens each by `StreamTiles`.

    Only compiled code on a CUDA GPU has fused kernels. They have no dropout.
    """
    return device.type == 'cuda' and 2 * length >= LONG and head_width >= NARROWEST and dropout == 0
