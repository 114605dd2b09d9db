"""Validation: the NELBO in its any-order form, on fixed windows with fixed noise.

Letters: B rows of a batch, W windows, T sequence length, V vocabulary.
"""

import math
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.common.randomness import keyed
from core.common.runtime import Runtime
from core.data.corpus import Corpus, gather_windows
from core.noise import apply_mask, draw_exact_mask, stratified_mask_counts
from model import GPT

VALIDATION_SEED = 20_240_607  # one for all runs, so that their figures compare


class Validation(NamedTuple):
    """value in nats per token: the NELBO of a diffusion model, the exact negative log-likelihood of a causal one.
    standard_error over windows; bits per UTF-8 byte of the real text or, where every character is a token, per
    character; unit says which."""

    value: float
    standard_error: float
    bits: float
    unit: str
    windows: int
    seconds: float

    @property
    def further(self) -> dict[str, float]:
        """What is logged beside the value and its standard error."""
        return {'bits': self.bits}

    def line(self, name: str) -> str:
        """One line for the console."""
        return (f'{name} {self.value:.4f} nats/token (s.e. {self.standard_error:.4f}), {self.bits:.4f} '
                f'bits/{self.unit}, {self.windows} windows, {self.seconds:.1f}s')


def fixed_windows(tokens: np.ndarray, count: int, length: int) -> Tensor:
    """int64 [count, length]: windows spread evenly over a split, from its first to its last token."""
    starts = np.linspace(0, len(tokens) - length, count).astype(np.int64)
    return gather_windows(tokens, starts, length)


def any_order_terms(model: GPT, windows: Tensor, counts: Tensor, mask: Tensor, allowed: Tensor) -> Tensor:
    """float64 [B]: mean cross-entropy over each row's masked positions, in nats.

    With n = counts uniform in 1 .. T and a uniform choice of n masked positions, the expectation is the NELBO per
    token (Uria et al. 2014; Ou et al. 2024, RADD, eq. 9): the 1 / t form with the times integrated out, and bounded.
    """
    inputs = apply_mask(windows, mask, model.config.mask_token_id)
    hidden = model.encode(inputs)[mask]  # [N, D]
    logits = model.lm_head(hidden).float().masked_fill(~allowed, -torch.inf)  # [N, V]
    losses = F.cross_entropy(logits, windows[mask], reduction='none').double()  # [N]
    rows = mask.nonzero()[:, 0]
    return torch.zeros(len(windows), dtype=torch.float64, device=losses.device).index_add(0, rows, losses) / counts


def causal_terms(model: GPT, windows: Tensor, allowed: Tensor) -> Tensor:
    """float64 [B]: mean cross-entropy of each next token of windows [B, T + 1], in nats."""
    logits = model(windows[:, :-1]).logits.float().masked_fill(~allowed, -torch.inf)  # [B, T, V]
    return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction='none').double().mean(1)


@torch.no_grad()
def validate(model: GPT, corpus: Corpus, runtime: Runtime, allowed: Tensor, *, windows: int, batch_size: int,
             split: str = 'val') -> Validation:
    """Validate `model` (in evaluation mode) on fixed windows of a split. The ranks share the work and the result."""
    start, T = time.perf_counter(), model.config.block_size
    causal = model.config.attention_type == 'causal'
    held_out = fixed_windows(corpus.tokens(split, T + causal), windows, T + causal)  # [W, T]
    terms = torch.zeros(windows, dtype=torch.float64, device=runtime.device)
    for first in list(range(0, windows, batch_size))[runtime.rank::runtime.world_size]:
        rows = held_out[first:first + batch_size]
        with runtime.autocast():
            if causal:
                found = causal_terms(model, rows.to(runtime.device), allowed)
            else:
                generator = keyed(VALIDATION_SEED, 0, first, len(rows))
                counts = stratified_mask_counts(generator, windows, T)  # [B]
                mask = draw_exact_mask(generator, counts, T)
                found = any_order_terms(model, *(one.to(runtime.device) for one in (rows, counts, mask)), allowed)
        terms[first:first + batch_size] = found
    terms = runtime.total(terms)
    value = terms.mean().item()
    bits, unit = bits_of(value, corpus, split)
    error = (terms.std() / math.sqrt(windows)).item() if windows > 1 else math.nan
    return Validation(value, error, bits, unit, windows, time.perf_counter() - start)


def bits_of(nats: float, corpus: Corpus, split: str) -> tuple[float, str]:
    """Nats per token as bits per unit of a split's real text: a character where each is a token, else a UTF-8 byte."""
    characters = corpus.vocabulary.kind == 'characters'
    units = corpus.characters[split] if characters else corpus.utf8_bytes[split]
    return nats * corpus.sizes[split] / units / math.log(2), 'character' if characters else 'byte'
