"""Validation of remasking models and judges on fixed windows with fixed corruption, and of any kind by one call.

Letters: B rows of a batch, W windows, T sequence length.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from core.batches import position_weights
from core.checkpoints.kinds import CheckpointKind
from core.common.randomness import keyed
from core.common.runtime import Runtime
from core.data.corpus import Corpus
from core.noise import (Corruption, behind_cls, corrupt, draw_exact_mask, judged_text, replace_tokens,
                        stratified_mask_counts)
from core.objective import PositionSums, position_metrics, position_sums, remasking_terms, wrong_shares
from core.validation import VALIDATION_SEED, Validation, fixed_windows, validate
from model import GPT, ModelMode

RANDOM_SHARE, FILLED_SHARE = 0.1, 0.3  # of the texts that a judge must rank below the true ones


class HelperValidation(NamedTuple):
    """value: the loss that is trained on, in nats per token, or a judge's squared error; standard_error over windows;
    further: what is logged beside them."""

    value: float
    standard_error: float
    further: Mapping[str, float]
    windows: int
    seconds: float

    def line(self, name: str) -> str:
        """One line for the console."""
        further = ''.join(f', {key.replace("_", " ")} {value:.4f}' for key, value in self.further.items())
        return (f'{name} {self.value:.4f} (s.e. {self.standard_error:.4f}){further}, {self.windows} windows, '
                f'{self.seconds:.1f}s')


def validate_kind(kind: str, model: GPT, corpus: Corpus, runtime: Runtime, allowed: Tensor,
                  corruption: Corruption | None, *, windows: int, batch_size: int,
                  split: str = 'val') -> Validation | HelperValidation:
    """Validate a `model` of `kind` (in evaluation mode) on a split, as its kind asks for."""
    if kind == CheckpointKind.JUDGE:
        return validate_judge(model, corpus, runtime, corruption, windows=windows, batch_size=batch_size, split=split)
    if kind in (CheckpointKind.REMASKING, CheckpointKind.CLASSIFIER):
        return validate_remasking(model, corpus, runtime, allowed, corruption, windows=windows, batch_size=batch_size,
                                  split=split)
    return validate(model, corpus, runtime, allowed, windows=windows, batch_size=batch_size, split=split)


def auroc(scores: Tensor, labels: Tensor) -> float:
    """The probability that a positive scores above a negative, equal ones counting one half (the area under the ROC
    curve, Hanley & McNeil 1982); scores [N], labels bool [N]. NaN where one of the two kinds is missing."""
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if positives == 0 or negatives == 0:
        return math.nan
    _, places, counts = scores.unique(return_inverse=True, return_counts=True)  # in ascending order
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[places].double()  # from 1 on, equal scores share theirs
    return ((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives)).item()


@torch.no_grad()
def validate_remasking(model: GPT, corpus: Corpus, runtime: Runtime, allowed: Tensor, corruption: Corruption, *,
                       windows: int, batch_size: int, split: str = 'val') -> HelperValidation:
    """The training loss on windows evenly over a split, 1 .. T positions of each chosen for corruption; loss and
    accuracy apart for clean and corrupted positions; AUROC of P(wrong). The ranks share the work and the result."""
    start, T = time.perf_counter(), model.config.block_size
    held_out = fixed_windows(corpus.tokens(split, T), windows, T)  # [W, T]
    sums = torch.zeros(windows, 2, 4, dtype=torch.float64, device=runtime.device)
    wrong = torch.zeros(windows, T, dtype=torch.float64, device=runtime.device)
    scores = torch.zeros_like(wrong)

    def one_batch(first: int, rows: Tensor) -> None:
        generator = keyed(VALIDATION_SEED, 0, first, len(rows))
        mask = draw_exact_mask(generator, stratified_mask_counts(generator, windows, T), T)
        inputs = corrupt(corruption, generator, rows, mask).to(runtime.device)
        terms = remasking_terms(model, inputs, rows.to(runtime.device), allowed)
        place = slice(first, first + len(rows))
        sums[place], wrong[place], scores[place] = position_sums(terms).double(), terms.wrong, terms.probability

    _for_batches(held_out, batch_size, runtime, one_batch)
    sums, wrong, scores = runtime.total(sums), runtime.total(wrong), runtime.total(scores)
    value, error = _weighted_mean(sums, corruption.loss_type)
    binary = model.config.mode is ModelMode.TOKEN_CLASSIFIER
    further = {'auroc': auroc(scores.flatten(), wrong.flatten() > 0), **position_metrics(sums.sum(0), binary)}
    return HelperValidation(value, error, further, windows, time.perf_counter() - start)


def _for_batches(held_out: Tensor, batch_size: int, runtime: Runtime, work: Callable[[int, Tensor], None]) -> None:
    """Call `work` with the first number and the rows of each batch that is this rank's."""
    for first in list(range(0, len(held_out), batch_size))[runtime.rank::runtime.world_size]:
        with runtime.autocast():
            work(first, held_out[first:first + batch_size])


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
def validate_judge(model: GPT, corpus: Corpus, runtime: Runtime, corruption: Corruption, *, windows: int,
                   batch_size: int, split: str = 'val') -> HelperValidation:
    """Squared error on texts as in training, and how often a window is ranked above itself with a tenth of its tokens
    replaced at random, and above itself with three tenths filled in one shot by the generator, if there is one."""
    start, T = time.perf_counter(), model.config.block_size - 1
    held_out = fixed_windows(corpus.tokens(split, T), windows, T)  # [W, T]
    names = ['squared_error', 'above_random', *(['above_filled'] if corruption.fill is not None else [])]
    found = torch.zeros(windows, len(names), dtype=torch.float64, device=runtime.device)

    def one_batch(first: int, rows: Tensor) -> None:
        generator = keyed(VALIDATION_SEED, 0, first, len(rows))

        def masked(counts: Tensor) -> Tensor:
            return draw_exact_mask(generator, counts, T)

        def evaluated(text: Tensor) -> Tensor:
            return model.sequence_scores(behind_cls(corruption, text).to(runtime.device)).double()  # [B]

        shown = judged_text(corruption, generator, rows, masked(stratified_mask_counts(generator, windows, T)))
        shares = wrong_shares(behind_cls(corruption, shown), behind_cls(corruption, rows)).to(runtime.device)
        columns, clean = [(evaluated(shown) - shares).square()], evaluated(rows)
        tenth = masked(torch.full((len(rows),), math.ceil(RANDOM_SHARE * T)))
        columns.append(_above(clean, evaluated(replace_tokens(generator, rows, tenth, corruption.base_size))))
        if corruption.fill is not None:
            part = masked(torch.full((len(rows),), math.ceil(FILLED_SHARE * T)))
            columns.append(_above(clean, evaluated(corruption.fill(rows, part, generator))))
        found[first:first + len(rows)] = torch.stack(columns, dim=1)

    _for_batches(held_out, batch_size, runtime, one_batch)
    found = runtime.total(found)
    means = found.mean(0).tolist()
    error = (found[:, 0].std() / math.sqrt(windows)).item() if windows > 1 else math.nan
    return HelperValidation(means[0], error, dict(zip(names[1:], means[1:])), windows, time.perf_counter() - start)


def _above(clean: Tensor, corrupted: Tensor) -> Tensor:
    """float64 [B]: 1 where the clean text is evaluated as less wrong, 1/2 where as equally wrong."""
    return (clean < corrupted).double() + (clean == corrupted).double() / 2
