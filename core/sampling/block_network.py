"""A block model as generation sees it: the block in work, with a cache for the text before it.

A call reads the unfinished block only; keys and values of the text before it are kept (Arriola et al. 2025, BD3-LM).
The first call of a block also reads the block finished before it. So a block costs as many trunk calls as its policy
makes, and no more.

Letters: B rows, L sequence length, b block length, W width of the block in work (b, less at the end of a sequence).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from core.common.precision import to_exact
from core.sampling.network import Network
from model import KeyValueCache


class BlockNetwork(Network):
    """`whole` on one block after another. Its calls are counted and timed in `whole`, and get only the block in work,
    int64 [B, W]."""

    def __init__(self, whole: Network, block_length: int, rows: int, spare: int = 0) -> None:
        """spare: see `GPT.new_cache`."""
        super().__init__(whole.model, whole.timer, whole.autocast)
        self.fillers, self._whole, self._block_length, self._rows = whole.fillers, whole, block_length, rows
        self._spare = spare
        self._cache: KeyValueCache = self.model.new_cache(rows, spare)
        self._first = 0  # the position in the text of the first token that the cache may hold
        self._unread: Tensor | None = None  # int64 [B, n], written and not in the cache
        self.compiled = True  # a call reads all rows and positions of a block, since the cache holds every row

    def begin(self, text: Tensor, start: int, stop: int) -> None:
        """Go on to positions start .. stop - 1 of text int64 [B, L], which is written before `start`.

        If the cache is full, it starts again with the last half of its size as context, in whole blocks.
        """
        most, b = self.model.config.block_size, self._block_length
        if stop - self._first > most:
            self._first = start - max(1, most // 2 // b) * b
            self._cache = self.model.new_cache(self._rows, self._spare)
        self._unread = text[:, self._first + self._cache.length:start]
        if self.model.sampler_head is not None:
            left = self.model.sampler_head.window.left
            before = text[:, max(0, start - left):start]
            self.left_context = F.pad(before, (left - before.size(1), 0), value=self.model.config.mask_token_id)

    def encode(self, tokens: Tensor, cache: KeyValueCache | None = None, positions: Tensor | None = None) -> Tensor:
        """Hidden states [B, W, D] of the block in work: one trunk call."""
        assert cache is None and positions is None
        self._whole.trunk_calls += 1
        self._whole.network_calls += 1
        with self.timer.measure('trunk'):
            return self._read(tokens)

    def predict_each(self, tokens: Tensor) -> Tensor:
        """Hidden states [B, W, D] that predict each of the block's tokens int64 [B, W] from all before it: one trunk
        call of a model at blocks of one."""
        self._whole.trunk_calls += 1
        self._whole.network_calls += 1
        with self.timer.measure('trunk'):
            unread, self._unread = self._unread, tokens[:, :0]
            return self.model.encode_next(torch.cat((unread, tokens), dim=1), self._cache, unread.size(1))

    def critic(self, tokens: Tensor) -> Tensor:
        """Probability float64 [B, W] that each token of the block in work is wrong, by the critic head: one network
        call."""
        self._whole.network_calls += 1
        with self.timer.measure('critic'):
            return torch.sigmoid(to_exact(self.model.critic_logits(self._read(tokens))).double())

    def _read(self, tokens: Tensor) -> Tensor:
        unread, self._unread = self._unread, tokens[:, :0]
        hidden = self.model.encode_blocks(torch.cat((unread, tokens), dim=1), self._block_length, self._cache,
                                          unread.size(1))
        return hidden[:, unread.size(1):]
