"""Validation on fixed windows with fixed noise. Diffusion models are measured by the any-order NELBO, causal models by
their likelihood, remasking models and judges by their training loss.

Letters: B rows of a batch, W windows, T sequence length, N masked positions, D width, V vocabulary.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.batches import position_weights
from core.common.precision import exact_device, to_exact
from core.common.printing import counted
from core.common.randomness import Purpose, RowRandom, keyed
from core.common.runtime import Runtime
from core.data.corpus import Corpus, gather_windows
from core.noise import (SOURCES, Corruption, Masking, Shown, apply_mask, behind_cls, corrupt, draw_exact_mask,
                        judged_text, replace_tokens, seen_neighbours, stratified_mask_counts, what_is_shown)
from core.objective import PositionSums, names, position_metrics, position_sums, remasking_terms, wrong_shares
from model import GPT
from sample_utils import shown_logits

VALIDATION_SEED = 20_240_607  # the same for all runs, so that their figures compare
TIMES = 4096  # points in time of the mean in `training_shares`
RANDOM_SHARE, FILLED_SHARE = 0.1, 0.3  # of wrong tokens in the texts that a judge must rank below the true ones


@dataclass(frozen=True)
class Validation:
    """What a validation found.

    value: the NELBO of a diffusion model, the exact negative log-likelihood of a causal model, or the loss of a
    remasking model, in nats per token; or the squared error of a judge. standard_error: over windows. further: other
    numbers for the log. bits_per: 'character' or 'byte' if `further` holds bits, else None. decided_by: the name in
    `further` of the number that tells which checkpoint is best; None: `value` does.
    """

    value: float
    standard_error: float
    further: Mapping[str, float]
    windows: int
    seconds: float
    bits_per: str | None = None
    decided_by: str | None = None

    @property
    def deciding(self) -> float:
        """The number whose lowest value makes the best checkpoint."""
        return self.value if self.decided_by is None else self.further[self.decided_by]

    def line(self, name: str) -> str:
        """One line for the console."""
        error, spent = f'(s.e. {self.standard_error:.4f})', f'{counted(self.windows, "window")}, {self.seconds:.1f}s'
        if self.bits_per is not None:
            more = ''.join(f', {key.replace("_", " ")} {value:.4f}' for key, value in self.further.items()
                           if key != 'bits')
            return (f'{name} {self.value:.4f} nats/token {error}, {self.further["bits"]:.4f} bits/{self.bits_per}'
                    f'{more}, {spent}')
        further = ''.join(f', {key.replace("_", " ")} {value:.4f}' for key, value in self.further.items())
        return f'{name} {self.value:.4f} {error}{further}, {spent}'


class HeldOut(NamedTuple):
    """The text of a validation: `windows` windows spread evenly over a split, read `batch_size` at a time. The ranks of
    `runtime` share the work and the result."""

    corpus: Corpus
    runtime: Runtime
    windows: int
    batch_size: int
    split: str = 'val'

    def batches(self, length: int) -> Iterator[tuple[slice, Tensor]]:
        """This rank's batches: which windows they are, and their tokens int64 [B, length]."""
        held_out = fixed_windows(self.corpus.tokens(self.split, length), self.windows, length)  # [W, length]
        for first in range(0, self.windows, self.batch_size)[self.runtime.rank::self.runtime.world_size]:
            rows = held_out[first:first + self.batch_size]
            yield slice(first, first + len(rows)), rows

    def zeros(self, *shape: int) -> Tensor:
        """float64 [W, *shape]: room for the numbers of each window."""
        return torch.zeros(self.windows, *shape, dtype=torch.float64, device=exact_device(self.runtime.device))


def fixed_windows(tokens: np.ndarray, count: int, length: int) -> Tensor:
    """int64 [count, length]: windows spread evenly over a split, from its first to its last token."""
    starts = np.linspace(0, len(tokens) - length, count).astype(np.int64)
    return gather_windows(tokens, starts, length)


def any_order_terms(model: GPT, windows: Tensor, counts: Tensor, mask: Tensor, allowed: Tensor) -> Tensor:
    """float64 [B]: mean cross-entropy over each row's masked positions, in nats.

    If n = counts is uniform in 1 .. T and the n masked positions are chosen uniformly, the expectation is the NELBO per
    token (Uria et al. 2014; Ou et al. 2024, RADD, eq. 9). This is the 1 / t form with the times integrated out, so the
    weights are bounded.
    """
    return masked_sums(model, windows, mask, allowed)[0] / to_exact(counts)


def masked_sums(model: GPT, windows: Tensor, mask: Tensor, allowed: Tensor,
                shown: Shown | None = None) -> tuple[Tensor, Tensor | None]:
    """(float64 [B]: cross-entropy summed over each row's masked positions, in nats; the same of the sampler head).

    shown: what the head sees, in the patterns of training; None without a head.
    """
    def summed(logits: Tensor) -> Tensor:
        logits = logits.float().masked_fill(~allowed, -torch.inf)  # [N, V]
        losses = to_exact(F.cross_entropy(logits, targets, reduction='none')).double()  # [N]
        rows = to_exact(mask).nonzero()[:, 0]
        return torch.zeros(len(windows), dtype=torch.float64, device=losses.device).index_add(0, rows, losses)

    inputs, targets = apply_mask(windows, mask, model.config.mask_token_id), windows[mask]
    hidden_states = model.encode(inputs)  # [B, T, D]
    main = summed(model.lm_head(hidden_states[mask]))
    if shown is None:
        return main, None
    shown = Shown(*(part.to(mask.device) for part in shown))
    return main, summed(shown_logits(model, hidden_states, windows, mask, shown))


def training_shares(noise: Masking, counts: Tensor, length: int) -> Tensor:
    """float64 [B]: the probability that training masks `counts` [B] of `length` positions: the mean over time of the
    noise schedule's binomial distribution. For the linear schedule all counts are equally likely."""
    n, times = counts.double()[:, None], (torch.arange(TIMES, dtype=torch.float64) + 0.5) / TIMES  # [B, 1], [TIMES]
    probability = noise.schedule.mask_probability(times).clamp(1e-12, 1 - 1e-12)
    ways = math.lgamma(length + 1) - torch.lgamma(n + 1) - torch.lgamma(length - n + 1)
    return (ways + n * probability.log() + (length - n) * torch.log1p(-probability)).exp().mean(1)


def causal_terms(model: GPT, windows: Tensor, allowed: Tensor) -> Tensor:
    """float64 [B]: mean cross-entropy of each next token of windows [B, T + 1], in nats."""
    logits = model(windows[:, :-1]).logits.float().masked_fill(~allowed, -torch.inf)  # [B, T, V]
    return to_exact(F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction='none')).double().mean(1)


@torch.no_grad()
def validate_generator(model: GPT, held_out: HeldOut, allowed: Tensor, noise: Masking | None = None) -> Validation:
    """Validate a `model` that writes text, in evaluation mode; allowed bool [V]: the base vocabulary.

    The any-order form depends on no noise schedule. With `noise`, `further` also holds the losses that training
    minimises, on the same windows and masks: 'loss_main', if all masked positions weigh alike (with weights 1 / t it
    would be the bound itself), and 'loss_sampler', if there is a sampler head.
    """
    start, T, runtime = time.perf_counter(), model.config.block_size, held_out.runtime
    causal, terms, trained = model.config.attention_type == 'causal', held_out.zeros(), held_out.zeros(3)
    for place, rows in held_out.batches(T + causal):
        with runtime.autocast():
            if causal:
                terms[place] = causal_terms(model, rows.to(runtime.device), allowed)
                continue
            generator = keyed(VALIDATION_SEED, 0, place.start, len(rows))
            counts = stratified_mask_counts(generator, held_out.windows, T)  # [B]
            mask = draw_exact_mask(generator, counts, T)
            shown = None if noise is None or noise.neighbours is None else \
                what_is_shown(generator, rows, mask, noise.neighbours)
            sums, sampler = masked_sums(model, *(one.to(runtime.device) for one in (rows, mask)), allowed, shown)
            terms[place] = sums / to_exact(counts).to(sums.device)
            if noise is not None:
                shares = training_shares(noise, counts, T)
                trained[place] = torch.stack([(one if one is not None else torch.zeros_like(sums)).cpu() * shares for one in
                                              (counts.double(), sums, sampler)], dim=1).to(trained.device)
    terms = runtime.total(terms)
    value = terms.mean().item()
    bits, unit = bits_of(value, held_out.corpus, held_out.split)
    error = (terms.std() / math.sqrt(held_out.windows)).item() if held_out.windows > 1 else math.nan
    further = {'bits': bits} | ({} if causal or noise is None else _as_trained(noise, runtime.total(trained).sum(0)))
    return Validation(value, error, further, held_out.windows, time.perf_counter() - start, unit)


def _as_trained(noise: Masking, sums: Tensor) -> dict[str, float]:
    """The mean losses at masked positions that training minimises. sums [3]: the number of positions, the main loss,
    the sampler head's loss."""
    count, main, sampler = sums.tolist()
    losses = {'loss_main': main / count} if noise.loss_weighting == 'masked_mean' else {}
    return losses if noise.neighbours is None else losses | {'loss_sampler': sampler / count}


def block_terms(model: GPT, windows: Tensor, block_length: int, generator: RowRandom, allowed: Tensor) -> Tensor:
    """float64 [B]: a block model's NELBO per token of windows int64 [B, T], in the any-order form inside each block.

    In each block n positions are masked, with n uniform in 1 .. b and stratified over a row's blocks. The term is the
    mean cross-entropy at them, given the clean text before the block (Arriola et al. 2025, eq. 8, with the times
    integrated out).
    """
    (rows, T), b = windows.shape, block_length
    cells = generator.uniform(Purpose.VALIDATION, T // b, stream=1).argsort(1)  # [B, T / b], one for each block
    offset = generator.uniform(Purpose.VALIDATION, 1, stream=2)  # [B, 1]
    counts = (((offset + cells.double() / (T // b)) % 1.0) * b).long().clamp(max=b - 1) + 1  # [B, T / b]
    order = generator.uniform(Purpose.VALIDATION, T).view(rows, T // b, b).argsort(2).argsort(2)  # [B, T / b, b]
    mask = (order < counts[..., None]).view(rows, T).to(windows.device)
    weights = (1.0 / counts.double()).repeat_interleave(b, dim=1) / (T // b)  # [B, T]
    positions = mask.flatten().nonzero().squeeze(1)  # [N]
    hidden = model.encode_streams(apply_mask(windows, mask, model.config.mask_token_id), windows, b,
                                  positions)  # [N, D]
    logits = model.lm_head(hidden).float().masked_fill(~allowed, -torch.inf)  # [N, V]
    losses = to_exact(F.cross_entropy(logits, windows.flatten()[positions], reduction='none')).double()  # [N]
    terms = torch.zeros(rows, dtype=torch.float64, device=losses.device)
    places = to_exact(positions)
    return terms.index_add(0, places // T, losses * weights.flatten().to(places.device)[places])


def one_call_terms(model: GPT, windows: Tensor, block_length: int, allowed: Tensor) -> Tensor:
    """float64 [B]: exact nats per token of windows int64 [B, T] if a block model writes each block from one
    trunk call, from left to right through its sampler head."""
    rows, T = windows.shape
    masked = torch.ones_like(windows, dtype=torch.bool)
    hidden = model.encode_streams(torch.full_like(windows, model.config.mask_token_id), windows, block_length)
    block = (torch.arange(T, device=windows.device) // block_length).expand(rows, T)
    text, masks, blocks = (part.cpu() for part in (windows, masked, block))
    shown = what_is_shown(keyed(0, 0, 0, rows), text, masks, seen_neighbours(model.config), blocks, groups=blocks)
    shown = Shown(*(part.to(windows.device) for part in shown))
    logits = shown_logits(model, hidden, windows, masked, shown, block)  # [B T, V]
    logits = logits.float().masked_fill(~allowed, -torch.inf)
    return to_exact(F.cross_entropy(logits, windows.flatten(), reduction='none')).double().view(rows, T).mean(1)


@torch.no_grad()
def validate_block_length(model: GPT, held_out: HeldOut, allowed: Tensor, block_length: int) -> Validation:
    """The NELBO of a block model in evaluation mode, at one of its block lengths. If its sampler head writes from left
    to right, `further` also holds the exact nats of one trunk call for each block ('one_call')."""
    start, T, runtime, config = time.perf_counter(), model.config.block_size, held_out.runtime, model.config
    ordered = config.add_sampler_head and config.sampler_order == 'left_to_right'
    terms = held_out.zeros(2)
    for place, rows in held_out.batches(T):
        generator, rows = keyed(VALIDATION_SEED, 0, place.start, len(rows)), rows.to(runtime.device)
        with runtime.autocast():
            terms[place, 0] = block_terms(model, rows, block_length, generator, allowed)
            if ordered:
                terms[place, 1] = one_call_terms(model, rows, block_length, allowed)
    terms = runtime.total(terms)
    value, one_call = terms.mean(0).tolist()
    bits, unit = bits_of(value, held_out.corpus, held_out.split)
    error = (terms[:, 0].std() / math.sqrt(held_out.windows)).item() if held_out.windows > 1 else math.nan
    return Validation(value, error, {'bits': bits, **({'one_call': one_call} if ordered else {})}, held_out.windows,
                      time.perf_counter() - start, unit)


def validate_blocks(model: GPT, held_out: HeldOut, allowed: Tensor, noise: Masking | None = None) -> Validation:
    """`validate_block_length` at the first of a block model's lengths. `further` also holds the values at the others
    ('nelbo_of_8', 'one_call_of_8'). If training shows only blocks that are masked entirely, the NELBO, which also asks
    for the others, does not decide which checkpoint is best; 'one_call' does."""
    first, *others = [validate_block_length(model, held_out, allowed, b) for b in model.config.block_length]
    further = dict(first.further)
    for b, found in zip(model.config.block_length[1:], others):
        further |= {f'nelbo_of_{b}': found.value} | {
            f'{name}_of_{b}': value for name, value in found.further.items() if name != 'bits'}
    whole = noise is not None and noise.blocks.whole_share == 1 and 'one_call' in further
    return replace(first, further=further, seconds=first.seconds + sum(one.seconds for one in others),
                   decided_by='one_call' if whole else None)


def bits_of(nats: float, corpus: Corpus, split: str) -> tuple[float, str]:
    """Nats per token as bits per unit of a split's real text: a character if each is a token, else a UTF-8 byte."""
    characters = corpus.vocabulary.kind == 'characters'
    units = corpus.characters[split] if characters else corpus.utf8_bytes[split]
    return nats * corpus.sizes[split] / units / math.log(2), 'character' if characters else 'byte'


def auroc(scores: Tensor, labels: Tensor) -> float:
    """The probability that a positive scores above a negative; equal scores count one half (the area under the ROC
    curve, Hanley & McNeil 1982). scores [N], labels bool [N]. NaN without positives or without negatives."""
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if positives == 0 or negatives == 0:
        return math.nan
    _, places, counts = scores.unique(return_inverse=True, return_counts=True)  # in ascending order
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[places].double()  # from 1; equal scores share a rank
    return ((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives)).item()


@torch.no_grad()
def validate_remasking(model: GPT, held_out: HeldOut, allowed: Tensor, corruption: Corruption) -> Validation:
    """The training loss of a remasking model, with 1 .. T positions of each window chosen for corruption.

    `further`: loss and accuracy of clean and of corrupted positions, also for each of several sources; AUROC of
    P(wrong).
    """
    start, T, runtime = time.perf_counter(), model.config.block_size, held_out.runtime
    kinds = 2 + (len(SOURCES) if len(corruption.sources) > 1 else 0)
    sums, wrong, scores = held_out.zeros(kinds, 4), held_out.zeros(T), held_out.zeros(T)
    for place, rows in held_out.batches(T):
        generator = keyed(VALIDATION_SEED, 0, place.start, len(rows))
        with runtime.autocast():
            mask = draw_exact_mask(generator, stratified_mask_counts(generator, held_out.windows, T), T)
            inputs, sources = (one.to(runtime.device) for one in corrupt(corruption, generator, rows, mask))
            terms = remasking_terms(model, inputs, rows.to(runtime.device), allowed, sources)
        sums[place] = to_exact(position_sums(terms, sources)).double()
        wrong[place], scores[place] = to_exact(terms.wrong), terms.probability
    sums, wrong, scores = runtime.total(sums), runtime.total(wrong), runtime.total(scores)
    value, error = _weighted_mean(sums[:, :2], corruption.loss_type)
    further = {'auroc': auroc(scores.flatten(), wrong.flatten() > 0),
               **position_metrics(sums.sum(0), names(model.config))}
    return Validation(value, error, further, held_out.windows, time.perf_counter() - start)


def _weighted_mean(sums: Tensor, loss_type: str) -> tuple[float, float]:
    """The loss and its standard error over windows (of a ratio, linearised), from sums [W, 2, 4] per window."""
    window, total, W = PositionSums(*sums.unbind(-1)), PositionSums(*sums.sum(0).unbind(-1)), len(sums)  # [W, 2], [2]
    weights = position_weights(loss_type, *total.count.round().long().tolist()).double().to(sums.device)  # [2]
    value = (total.loss * weights).sum()
    centre = value if loss_type == 'all_positions' else total.loss / total.count.clamp(min=1)  # [2], mean of each kind
    residual = ((window.loss - window.count * centre) * weights).sum(1)  # [W]
    error = (residual.square().sum() * W / (W - 1)).sqrt().item() if W > 1 else math.nan
    return value.item(), error


@torch.no_grad()
def validate_judge(model: GPT, held_out: HeldOut, allowed: Tensor, corruption: Corruption) -> Validation:
    """Squared error of a judge on texts as in training. A judge does not use `allowed`.

    `further`: how often it ranks a window above a spoiled copy. One copy has a tenth of its tokens replaced at random;
    in the other, if there is a generator, it has filled three tenths in one call.
    """
    start, T, runtime = time.perf_counter(), model.config.block_size - 1, held_out.runtime
    names = ['squared_error', 'above_random', *(['above_filled'] if corruption.fill is not None else [])]
    found = held_out.zeros(len(names))
    for place, rows in held_out.batches(T):
        with runtime.autocast():
            found[place] = _judged(model, corruption, rows, keyed(VALIDATION_SEED, 0, place.start, len(rows)),
                                   held_out.windows)
    found = runtime.total(found)
    means = found.mean(0).tolist()
    error = (found[:, 0].std() / math.sqrt(held_out.windows)).item() if held_out.windows > 1 else math.nan
    return Validation(means[0], error, dict(zip(names[1:], means[1:])), held_out.windows, time.perf_counter() - start)


def _judged(model: GPT, corruption: Corruption, rows: Tensor, generator: RowRandom, windows: int) -> Tensor:
    """float64 [B, 2 or 3]: the squared error on rows [B, T] as in training, and whether each row is ranked above its
    copy with random wrong tokens and above its copy with the generator's."""
    device, T = model.scorer.weight.device, rows.size(1)
    counts = stratified_mask_counts(generator, windows, T), *(torch.full((len(rows),), math.ceil(share * T))
                                                              for share in (RANDOM_SHARE, FILLED_SHARE))
    trained, tenth, part = (draw_exact_mask(generator, count, T) for count in counts)  # [B, T]
    shown = judged_text(corruption, generator, rows, trained)
    texts = [rows, shown, replace_tokens(generator, rows, tenth, corruption.base_size)]
    if corruption.fill is not None:
        texts.append(corruption.fill(rows, part, generator))
    texts = [behind_cls(corruption, text).to(device) for text in texts]  # [B, 1 + T]
    clean, as_trained, *made_wrong = (to_exact(model.sequence_scores(text)).double() for text in texts)  # [B]
    error = (as_trained - to_exact(wrong_shares(texts[1], texts[0]))).square()
    return torch.stack([error, *(_above(clean, wrong) for wrong in made_wrong)], dim=1)


def _above(clean: Tensor, corrupted: Tensor) -> Tensor:
    """float64 [B]: 1 if the judge finds the clean text less wrong than the corrupted one, 1/2 if equally wrong."""
    return (clean < corrupted).double() + (clean == corrupted).double() / 2
