"""The yardstick of training speed: a causal GPT and its step in the manner of nanoGPT (Karpathy 2022), in plain code.

LayerNorm before each part of a layer, GELU, learned positions, tied embeddings (GPT-2, Radford et al. 2019), fused
AdamW, clipped gradients; no dropout. bench.py measures it with this program's own steps; nothing else uses it.

Letters: B rows, T sequence length, V vocabulary, D width, H heads.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.common.runtime import moved
from core.data.corpus import gather_windows

LEARNING_RATE, WEIGHT_DECAY, BETAS, GRAD_CLIP = 1e-3, 0.1, (0.9, 0.99), 1.0


class BaselineBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=bias)
        self.to_query_key_value = nn.Linear(width, 3 * width, bias=bias)
        self.from_attention = nn.Linear(width, width, bias=bias)
        self.mlp_norm = nn.LayerNorm(width, bias=bias)
        self.widen = nn.Linear(width, 4 * width, bias=bias)
        self.narrow = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        B, T, D = x.shape
        parts = self.to_query_key_value(self.attention_norm(x)).split(D, dim=2)
        query, key, value = (part.view(B, T, self.heads, D // self.heads).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # [B, H, T, D/H]
        x = x + self.from_attention(mixed.transpose(1, 2).reshape(B, T, D))
        return x + self.narrow(F.gelu(self.widen(self.mlp_norm(x))))


class Baseline(nn.Module):
    """The model. bias: whether linear layers and norms have biases; nanoGPT's default is no."""

    def __init__(self, block_size: int, vocab_size: int, n_layer: int, n_head: int, n_embd: int,
                 bias: bool = False, seed: int = 1337) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(BaselineBlock(n_embd, n_head, bias) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd, bias=bias)
        self._initialise(torch.Generator().manual_seed(seed))

    def _initialise(self, generator: torch.Generator) -> None:
        """Normal with deviation 0.02. For matrices that write into the residual stream it is divided by the root of
        their number."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                adds = 'from_attention' in name or 'narrow' in name
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.blocks) if adds else 1),
                                generator=generator)
            elif name.endswith('bias'):
                nn.init.zeros_(parameter)

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] and the mean cross-entropy in nats over every position, of int64 [B, T] both."""
        x = self.tokens(inputs) + self.positions.weight[:inputs.size(1)]  # [B, T, D]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)  # [B, T, V]
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Form(NamedTuple):
    """How the yardstick is run: in float32 or in autocast of a lower precision, eager or compiled."""

    dtype: torch.dtype
    compile: bool

    @property
    def name(self) -> str:
        """'baseline, float32, eager'."""
        return f'baseline, {str(self.dtype).removeprefix("torch.")}, {"compiled" if self.compile else "eager"}'


class BaselineTraining:
    """Training of `model` on random windows of a corpus. tokens: [N], of any integer type."""

    def __init__(self, model: Baseline, tokens: np.ndarray, batch_size: int, block_size: int,
                 form: Form = Form(torch.float32, False), seed: int = 1) -> None:
        self.model, self.tokens, self.batch_size, self.block_size = model, tokens, batch_size, block_size
        self.form, self.network = form, torch.compile(model, dynamic=False) if form.compile else model
        self.device = model.tokens.weight.device
        self.generator = torch.Generator().manual_seed(seed)
        matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
        others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
        self.optimizer = torch.optim.AdamW([{'params': matrices, 'weight_decay': WEIGHT_DECAY},
                                            {'params': others, 'weight_decay': 0.0}],
                                           lr=LEARNING_RATE, betas=BETAS, fused=True)

    def step(self, learning_rate: float = LEARNING_RATE) -> Tensor:
        """Draw a batch and train on it. Returns the loss before the update, a scalar on the device."""
        for group in self.optimizer.param_groups:
            group['lr'] = learning_rate
        starts = torch.randint(len(self.tokens) - self.block_size, (self.batch_size,), generator=self.generator)
        windows = moved(gather_windows(self.tokens, starts, self.block_size + 1), self.device)  # [B, T + 1]
        with self._precision():
            _, loss = self.network(windows[:, :-1], windows[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def validate(self, windows: Tensor) -> float:
        """Mean negative log-likelihood of windows int64 [W, T + 1], W a multiple of the batch, in nats per token."""
        total = 0.0
        for rows in windows.split(self.batch_size):
            rows = rows.to(self.device)  # [B, T + 1]
            with self._precision():
                total += self.model(rows[:, :-1], rows[:, 1:])[1].item() * len(rows)
        return total / len(windows)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.form.dtype, enabled=self.form.dtype is not torch.float32)
