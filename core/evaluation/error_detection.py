"""How well a generator's own errors are found: the measure `errors` of evaluate.py (docs/evaluation.md).

The measure masks a share of the positions of held-out windows, at random and the same number in each window. One trunk
call and one wavefront fill them at temperature 1 (without a trained sampler head: independent draws). A filled position
is *wrong* if it differs from the truth. A detector gives each filled position a score. All scores except the random one
are probabilities of being wrong:

    random             a random number; its AUROC is 0.5, whatever the errors
    self_confidence    1 - the probability with which the token was drawn
    marginal           1 - the trunk's probability of the token given the visible tokens only, from the same call
    pseudo_likelihood  1 - the trunk's probability of the token given all tokens outside its group, in further calls
    critic             the probability that the critic head gives, from the filled text
    remasking          the probability that an external remasking model gives, from the filled text

The AUROC measures a detector. It is the probability that a wrong position scores above a right one.

No detector reaches 1. Let v be the visible tokens, x the truth, and p the true distribution of position i given v. A
fill y depends on v and on random numbers that are independent of x. So P(x_i differs from y_i | v, y) = 1 - p(y_i | v).
Ranking by this probability gives the largest possible AUROC (Neyman and Pearson 1933). It is below 1 wherever p leaves
a choice: a drawn token is right by chance, and a good one can differ from the truth. p is not known. `marginal` uses
the trunk instead of p. It knows which tokens were visible; critics do not. Like every detector it gives a lower bound
of the ceiling. `expected_auroc` is the ceiling if the trunk were p.

Letters: B rows of a batch, W windows, T window length, N positions, R replicates.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from dataclasses import replace
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from core.checkpoints.checkpoint import checkpoint_hash
from core.checkpoints.heads import started_heads
from core.checkpoints.helpers import helper_path, load_remasking_model, require_block
from core.checkpoints.kinds import CheckpointKind
from core.checkpoints.run_folder import find_checkpoint
from core.common.drawing import DrawRule
from core.common.errors import UserError
from core.common.precision import exact_device, to_exact
from core.common.randomness import Purpose, RowRandom, keyed
from core.common.typed_json import Count, Interval, Items, Seconds, Share
from core.evaluation.error_plots import plot_errors
from core.evaluation.measure import Cell, Evaluation, Measure, Result
from core.evaluation.text_metrics import FEWEST_TEXTS, Statistic, bootstrap
from core.noise import apply_mask, draw_exact_mask
from core.sampling.calibration import CalibrationMap, calibration_error, fit_calibration, reliability, write_calibration
from core.sampling.self_confidence import pseudo_log_likelihood
from core.validation import VALIDATION_SEED, fixed_windows
from model import GPT, ModelMode
from sample_utils import FillTask, Filler, wrong_probabilities

SHARES = tuple(tenths / 10 for tenths in range(1, 10))  # of positions masked
SHOWN_SHARE = 0.5  # mask share of the printed summary and of the reliability diagram
DETECTORS = ('random', 'self_confidence', 'marginal', 'pseudo_likelihood', 'critic', 'remasking')
WINDOWS = 256
GROUPS = 8  # network calls of pseudo_likelihood
PICTURE_NAME = 'errors.png'
_CHUNK = 1 << 22  # most comparisons held at once


# Errors and their detectors -----------------------------------------------------------------------------------------

class Filled(NamedTuple):
    """Texts after a one-shot fill. tokens int64 [B, T]. filled bool [B, T]: the positions that were masked. wrong bool
    [B, T]: those that differ from the truth. self_confidence, marginal float64 [B, T]: P(wrong) of filled positions."""

    tokens: Tensor
    filled: Tensor
    wrong: Tensor
    self_confidence: Tensor
    marginal: Tensor


@torch.no_grad()
def one_shot(model: GPT, truth: Tensor, share: float, allowed: Tensor, generator: RowRandom, *,
             use_sampler_head: bool) -> Filled:
    """Mask round(share T) positions of each row of truth int64 [B, T], at least one, and fill them."""
    truth, T, rule = to_exact(truth), truth.size(1), DrawRule(allowed)
    counts = torch.full((len(truth),), max(1, round(share * T)), device=truth.device)
    mask = draw_exact_mask(generator, counts, T)
    masked = apply_mask(truth, mask, model.config.mask_token_id)
    hidden_states = model.encode(masked)
    task = FillTask(masked, hidden_states, rule, generator, mask)
    fill = Filler(model, 'wave' if use_sampler_head else 'none').fill(task)
    alone = Filler(model, 'none').fill(replace(task, truth=fill.tokens))
    return Filled(fill.tokens, mask, fill.tokens != truth, 1 - fill.confidence.exp(), 1 - alone.confidence.exp())


Detector = Callable[[Filled, RowRandom], Tensor]  # texts and their random numbers -> scores float64 [B, T]


def detectors(model: GPT, allowed: Tensor, *, sampler_head: bool, critic: bool,
              remasking_model: GPT | None) -> dict[str, Detector]:
    """The detectors of this model, by name. Without a sampler head, self_confidence is the marginal itself."""
    found: dict[str, Detector] = {
        'random': lambda texts, numbers: numbers.uniform(Purpose.REMASK, texts.tokens.size(1)),
        'self_confidence': lambda texts, numbers: texts.self_confidence}
    if sampler_head:
        found['marginal'] = lambda texts, numbers: texts.marginal
    found['pseudo_likelihood'] = lambda texts, numbers: 1 - pseudo_log_likelihood(
        model, texts.tokens, texts.filled, allowed, numbers, GROUPS).exp()
    if critic:
        found['critic'] = lambda texts, numbers: model.critic_scores(texts.tokens)
    if remasking_model is not None:
        found['remasking'] = lambda texts, numbers: wrong_probabilities(remasking_model, texts.tokens)
    return found


# How well they do ---------------------------------------------------------------------------------------------------

def auroc_statistic(scores: Tensor, wrong: Tensor, filled: Tensor) -> Statistic:
    """The AUROC of scores float64 [W, T] for wrong among filled bool [W, T], as a function of the windows' weights w.

    It is sum(w_a w_b above[a, b]) / (sum(w_a wrong_a) sum(w_b right_b)). above[a, b] is the number of pairs of a wrong
    position of window a and a right one of window b where the wrong one scores higher. Equal scores count half.
    """
    bad, good = filled & wrong, filled & ~wrong
    windows = len(scores)
    rising = scores.masked_fill(~good, math.inf).sort(1).values  # [W, T]
    asked, owner = scores[bad], bad.nonzero()[:, 0]  # [N]
    above = torch.zeros(windows, windows, dtype=torch.float64, device=scores.device)
    for part in torch.arange(len(asked), device=scores.device).split(max(1, _CHUNK // windows)):
        values = asked[part].expand(windows, -1).contiguous()  # [W, n]
        below = torch.searchsorted(rising, values) + torch.searchsorted(rising, values, right=True)
        above.index_add_(0, owner[part], below.T.double() / 2)
    pairs, wrongs, rights = (part.double().cpu().numpy() for part in (above, bad.sum(1), good.sum(1)))

    def statistic(weights: np.ndarray) -> np.ndarray:
        below = (weights @ wrongs) * (weights @ rights)
        return np.divide(((weights @ pairs) * weights).sum(1), below, out=np.full(len(weights), np.nan),
                         where=below > 0)

    return statistic


def expected_auroc(probability: Tensor) -> float | None:
    """The AUROC of probability float64 [N] if it is exact, that is, if each position is wrong with this probability.

    Take the pairs of a wrong and a right position. The result is the expected number of those where the wrong one
    scores higher (equal scores count half), divided by the expected number of all. None if that is 0.
    """
    values, place = probability.unique(return_inverse=True)  # in ascending order
    wrong, right = (torch.zeros_like(values).index_add(0, place, weight) for weight in (probability, 1 - probability))
    total = wrong.sum() * right.sum()
    ordered = (wrong * (right.cumsum(0) - right / 2)).sum()
    return (ordered / total).item() if total > 0 else None


def measured(scores: Tensor, wrong: Tensor, filled: Tensor, is_probability: bool) -> Result:
    """Figures of one detector's scores float64 [W, T] for wrong among filled bool [W, T].

    The 95 % interval of the AUROC comes from half-samples of the windows (`core.evaluation.text_metrics.bootstrap`). If
    all or none of the positions are wrong, both are None. A probability also has a Brier score, an expected calibration
    error and a reliability table.
    """
    error_rate = wrong[filled].double().mean().item()
    area = bootstrap(auroc_statistic(scores, wrong, filled), len(scores), VALIDATION_SEED)
    found: Result = {'error_rate': error_rate, 'auroc': area.value if 0 < error_rate < 1 else None,
                     'auroc_interval': [area.low, area.high] if math.isfinite(area.low) else None}
    if is_probability:
        predicted, wrongs = scores[filled], wrong[filled]
        found['brier'] = brier(predicted, wrongs)  # NaN if a score is NaN; the run then stops with a message
        if math.isfinite(found['brier']):
            table = reliability(predicted, wrongs)
            found |= {'expected_auroc': expected_auroc(predicted), 'calibration_error': calibration_error(table),
                      'reliability': table.to_builtins()}
    return found


def brier(predicted: Tensor, wrong: Tensor) -> float:
    """Mean of (P(wrong) - wrong)^2 over positions (Brier 1950); predicted float64 [N], wrong bool [N]."""
    return (predicted - wrong.double()).square().mean().item()


def calibrated(scores: Tensor, wrong: Tensor, filled: Tensor) -> Result:
    """Fit a calibration of scores float64 [W, T], and measure how good it is. wrong, filled: bool [W, T].

    The map is fitted on the even windows. All other figures come from the odd windows; those named calibrated use the
    mapped scores.
    """
    (fitted, wrongs), (held_out, held_wrongs) = (
        (scores[half::2][filled[half::2]], wrong[half::2][filled[half::2]]) for half in (0, 1))
    curve = fit_calibration(reliability(fitted, wrongs))
    rate = curve.error_rate(held_out)
    return {'map': {'predicted': curve.predicted.tolist(), 'observed': curve.observed.tolist()},
            **measured(scores[1::2], wrong[1::2], filled[1::2], True), 'calibrated_brier': brier(rate, held_wrongs),
            'calibrated_error': calibration_error(reliability(rate, held_wrongs))}


# The measure --------------------------------------------------------------------------------------------------------

class Ranked(TypedDict):
    """Figures of a detector whose scores only rank. seconds: to score all windows."""

    error_rate: Share
    auroc: Share | None
    auroc_interval: Interval | None
    seconds: NotRequired[Seconds]


class Table(TypedDict):
    """The columns of a `Reliability`."""

    predicted: Annotated[list[Share], Items(1)]
    observed: Annotated[list[Share], Items(1)]
    count: Annotated[list[Count], Items(1)]


class Probable(Ranked):
    """Further figures of a detector whose scores are probabilities."""

    brier: Share
    expected_auroc: Share | None
    calibration_error: Share
    reliability: Table
    correction_accuracy: NotRequired[Share | None]


class Calibrated(Probable):
    """Further figures of the calibration cell. The map is fitted on the even windows and measured on the odd ones."""

    map: CalibrationMap
    calibrated_brier: Share
    calibrated_error: Share


class ErrorStudy:
    """What the cells of one run share: windows, fills and scores, on the CPU. Each is made when it is first needed."""

    def __init__(self, evaluation: Evaluation) -> None:
        config, model = evaluation.config, evaluation.model
        self.evaluation, self.windows, self.remasking_hash = evaluation, config.windows or WINDOWS, None
        if evaluation.checkpoint.kind != CheckpointKind.UNMASKING:
            raise UserError(f'only a diffusion checkpoint fills masks and makes errors at them, but '
                            f'{config.checkpoint_name} is {evaluation.checkpoint.kind}; give another checkpoint_name')
        if self.windows < 2 * FEWEST_TEXTS:
            raise UserError(f'windows is {self.windows}, but an interval needs at least {2 * FEWEST_TEXTS}')
        _, critic, said = started_heads(model.config, evaluation.checkpoint.iteration)
        for line in said[-1:] if model.config.add_critic_head and not critic else ():
            evaluation.say(line)
        name, self.remasking_model = config.remasking_checkpoint_name, None
        if name is not None:
            self.remasking_model = load_remasking_model(name, config.out_dir, evaluation.vocabulary,
                                                        evaluation.runtime.device)
            require_block(self.remasking_model, f'remasking_checkpoint_name={name}', model.config.block_size,
                          'a window')
            self.remasking_hash = checkpoint_hash(helper_path(name, config.out_dir))
        self.detectors = detectors(model, evaluation.allowed, sampler_head=evaluation.sampler_head, critic=critic,
                                   remasking_model=self.remasking_model)
        self._filled: dict[float, Filled] = {}
        self._scores: dict[tuple[str, float], Tensor] = {}

    @cached_property
    def _truth(self) -> Tensor:
        evaluation, T = self.evaluation, self.evaluation.model.config.block_size
        return fixed_windows(evaluation.corpus.tokens(evaluation.config.split, T), self.windows, T)  # [W, T]

    def _batches(self, share: float) -> Iterator[tuple[slice, RowRandom]]:
        """Slices of the windows, each with its random numbers at this mask share."""
        size, device = self.evaluation.config.batch_size, self.evaluation.runtime.device
        for first in range(0, self.windows, size):
            count = min(size, self.windows - first)
            yield slice(first, first + count), keyed(VALIDATION_SEED, round(share * 10), first, count, device)

    def filled(self, share: float) -> Filled:
        """All windows filled at this mask share."""
        if share not in self._filled:
            evaluation = self.evaluation
            with evaluation.runtime.autocast():
                parts = [one_shot(evaluation.model, self._truth[place].to(evaluation.runtime.device), share,
                                  evaluation.allowed, numbers, use_sampler_head=evaluation.sampler_head)
                         for place, numbers in self._batches(share)]
            self._filled[share] = Filled(*(torch.cat(columns).cpu() for columns in zip(*parts)))
        return self._filled[share]

    def scores(self, name: str, share: float) -> Tensor:
        """float64 [W, T]: a detector's scores at this mask share."""
        if (name, share) not in self._scores:
            texts, runtime = self.filled(share), self.evaluation.runtime
            with torch.no_grad(), runtime.autocast():
                self._scores[name, share] = torch.cat([
                    self.detectors[name](Filled(*(column[place].to(exact_device(runtime.device)) for column in texts)),
                                         numbers).cpu()
                    for place, numbers in self._batches(share)])
        return self._scores[name, share]

    def correction_accuracy(self, share: float) -> float | None:
        """The share of wrong positions where a remasking model's most probable base token is the truth. None for a
        classifier, which predicts no tokens, and if nothing is wrong."""
        texts, runtime, model = self.filled(share), self.evaluation.runtime, self.remasking_model
        if model.config.mode is ModelMode.TOKEN_CLASSIFIER or not texts.wrong.any():
            return None
        right = 0
        with torch.no_grad(), runtime.autocast():
            for place, _ in self._batches(share):
                logits = model(texts.tokens[place].to(runtime.device)).logits  # [B, T, V]
                guess = logits.masked_fill(~self.evaluation.allowed, -torch.inf).argmax(-1).cpu()  # [B, T]
                right += (guess == self._truth[place])[texts.wrong[place]].sum().item()
        return right / texts.wrong.sum().item()

    def cell(self, name: str, share: float) -> Cell:
        """The cell of a detector at a mask share."""
        def compute() -> Result:
            texts, start = self.filled(share), time.perf_counter()
            scores = self.scores(name, share)
            seconds = time.perf_counter() - start
            found = {**measured(scores, texts.wrong, texts.filled, name != 'random'), 'seconds': seconds}
            if name == 'remasking':
                found['correction_accuracy'] = self.correction_accuracy(share)
            return found

        cost = GROUPS if name == 'pseudo_likelihood' else 1
        return Cell(self._settings(name, mask_share=share), Ranked if name == 'random' else Probable, compute,
                    float(cost))

    def calibration_cell(self) -> Cell:
        """The critic head's calibration over all mask shares together."""
        def compute() -> Result:
            texts = [self.filled(share) for share in SHARES]
            wrong, filled = (torch.cat([getattr(one, name) for one in texts], dim=1) for name in ('wrong', 'filled'))
            return calibrated(torch.cat([self.scores('critic', share) for share in SHARES], dim=1), wrong, filled)

        return Cell(self._settings('critic', mask_shares=list(SHARES)), Calibrated, compute)

    def _settings(self, name: str, **values: Any) -> Result:
        return self.evaluation.settings(detector=name, windows=self.windows, remasking=self.remasking_hash
                                        if name == 'remasking' else None, **values)


def error_cells(evaluation: Evaluation) -> list[Cell]:
    """A cell for each mask share and detector. A checkpoint's critic also has a calibration cell, unless the checkpoint
    was trained on this split."""
    study = ErrorStudy(evaluation)
    cells = [study.cell(name, share) for share in SHARES for name in study.detectors]
    own = evaluation.config.model is not None or \
        evaluation.checkpoint.config.get('train_split', 'train') == evaluation.config.split
    return cells + ([study.calibration_cell()] if 'critic' in study.detectors and not own else [])


def arranged(rows: Sequence[Result]) -> list[Result]:
    """Table rows by mask share, with the AUROC of each detector and its interval side by side."""
    table: dict[float, Result] = {}
    for row in rows:
        if 'mask_share' in row:
            line = table.setdefault(row['mask_share'], {name: row[name] for name in ('mask_share', 'error_rate')})
            low, high = row['auroc_interval'] or (math.nan, math.nan)
            line[row['detector']] = '-' if row['auroc'] is None else f'{row["auroc"]:.3f} ({low:.3f} {high:.3f})'
    return list(table.values())


def finish(evaluation: Evaluation, rows: Sequence[Result]) -> None:
    """Report how well the probabilities are calibrated, save the critic's calibration, and draw the picture."""
    for row in rows:
        if row.get('mask_share') == SHOWN_SHARE and 'brier' in row:
            evaluation.say(f'{row["detector"]} at mask share {SHOWN_SHARE}: Brier score {row["brier"]:.4f}, expected '
                           f'calibration error {row["calibration_error"]:.4f}, AUROC {_figure(row["auroc"])}, '
                           f'{_figure(row["expected_auroc"])} if it were exact')
        if 'mask_shares' in row:
            checkpoint, _ = find_checkpoint(evaluation.out_dir, evaluation.config.checkpoint_name,
                                            'checkpoint_name' in evaluation.explicit)
            path = write_calibration(checkpoint, evaluation.checkpoint_hash, row)
            evaluation.say(f'critic at all mask shares, odd windows: expected calibration error '
                           f'{row["calibration_error"]:.4f}, {row["calibrated_error"]:.4f} with the calibration of the '
                           f'even ones, which is kept in {path}')
    plot_errors([row for row in rows if 'mask_share' in row], SHOWN_SHARE,
                evaluation.out_dir / PICTURE_NAME, evaluation.say)


def _figure(value: float | None) -> str:
    return '-' if value is None else f'{value:.4f}'


ERRORS = Measure(error_cells, ('mask_share', 'error_rate', *DETECTORS),
                 'how well one-shot errors are found by critic, self-confidence and others: AUROC (95 % interval)',
                 finish=finish, arrange=arranged)
