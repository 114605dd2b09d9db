"""Calibration: the observed error rates of predicted ones, and the map from predicted to observed.

A detector gives tokens a probability of being wrong. Sort the tokens by it and cut them into bins of equal count: the
tokens of a bin should be wrong as often as predicted (reliability table; Murphy and Winkler 1977). If they are not, a
monotone map corrects the predictions: isotonic regression of the bins (Ayer et al. 1955), linear between their means.
The measure `errors` of evaluate.py makes this map for the critic head and keeps it in the checkpoint's folder. The
threshold mode of sample.py reads it.

Letters: N positions, K bins.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from core.checkpoints.checkpoint import checkpoint_hash
from core.common.errors import UserError
from core.common.files import write_whole
from core.common.typed_json import CHECKSUM, Items, Share, Unfit, checked, read_json, verify_checksum, with_checksum

CALIBRATION_NAME = 'calibration.json'
CALIBRATION_FORMAT = 2
BINS = 20


# Predicted against observed -----------------------------------------------------------------------------------------

class Reliability(NamedTuple):
    """Bins from low to high predictions: predicted float64 [K], mean of the bin, rising; observed float64 [K],
    share of its positions that are wrong; count int64 [K], positive."""

    predicted: Tensor
    observed: Tensor
    count: Tensor

    def to_builtins(self) -> dict[str, list[float]]:
        """The columns as lists."""
        return {name: column.tolist() for name, column in self._asdict().items()}


def reliability(predicted: Tensor, wrong: Tensor, bins: int = BINS) -> Reliability:
    """The table of predicted float64 [N] in 0 .. 1 and wrong bool [N], N at least 1, in at most `bins` bins.

    Bins hold equal counts, except that equal predictions always share a bin (Nixon et al. 2019).
    """
    _, kind, counts = predicted.unique(return_inverse=True, return_counts=True)  # in ascending order
    middle = counts.cumsum(0) - counts / 2  # middle rank of equal predictions
    place = (middle * bins / len(predicted)).long()[kind]  # [N]
    zeros = torch.zeros(bins, dtype=torch.float64, device=predicted.device)
    count, total, errors = (zeros.index_add(0, place, values.double()) for values in (
        torch.ones_like(predicted), predicted, wrong))
    held = count > 0
    return Reliability(total[held] / count[held], errors[held] / count[held], count[held].long())


def calibration_error(table: Reliability) -> float:
    """Expected calibration error: the mean of |observed - predicted| over positions, by bins (Naeini et al. 2015).

    With error rate p, a perfectly calibrated detector has an error of about sqrt(2 p (1 - p) K / (pi N)) by chance.
    """
    gap = (table.observed - table.predicted).abs() * table.count
    return (gap.sum() / table.count.sum()).item()


# The map ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Calibration:
    """A monotone, piecewise linear map: predicted float64 [K], rising, to observed float64 [K], not falling."""

    predicted: Tensor
    observed: Tensor

    def error_rate(self, predicted: Tensor) -> Tensor:
        """float64 [...]: the error rate that belongs to probabilities `predicted` [...]; constant beyond the ends."""
        predicted, last = predicted.double(), len(self.predicted) - 1
        right = torch.bucketize(predicted, self.predicted).clamp(min(1, last), last)  # [...]
        left = (right - 1).clamp(min=0)
        span = (self.predicted[right] - self.predicted[left]).clamp(min=torch.finfo(torch.float64).tiny)
        share = ((predicted - self.predicted[left]) / span).clamp(0, 1)
        return torch.lerp(self.observed[left], self.observed[right], share)

    def to(self, device: torch.device) -> 'Calibration':
        """The same map on `device`."""
        return Calibration(self.predicted.to(device), self.observed.to(device))


def fit_calibration(table: Reliability) -> Calibration:
    """The isotonic fit of a table by least squares, its bins weighted by count.

    By the minimax formula (Robertson, Wright and Dykstra 1988, theorem 1.4.4), which gives what pooling adjacent
    violators gives: y_k = max over i <= k of min over j >= k of the mean of bins i .. j.
    """
    weight, total = (_cumulative(values) for values in (table.count.double(), table.count * table.observed))
    spans = weight[None, 1:] - weight[:-1, None]  # [K, K], first bin i, last bin j
    means = ((total[None, 1:] - total[:-1, None]) / spans).masked_fill(spans <= 0, math.inf)
    smallest = means.flip(1).cummin(1).values.flip(1)  # [i, k], over j >= k
    above = torch.ones_like(means, dtype=torch.bool).triu()  # i <= k
    observed = smallest.masked_fill(~above, -math.inf).amax(0)
    return Calibration(table.predicted, observed.clamp(0, 1))


def _cumulative(values: Tensor) -> Tensor:
    """float64 [K + 1]: sums of the first 0 .. K of values [K]."""
    return torch.cat((values.new_zeros(1), values)).double().cumsum(0)


# In a checkpoint's folder --------------------------------------------------------------------------------------------

class CalibrationMap(TypedDict):
    """The columns of a `Calibration`."""

    predicted: Annotated[list[Share], Items(1)]
    observed: Annotated[list[Share], Items(1)]


class Stored(TypedDict):
    """What is read of calibration.json; format 1, without a checksum, is still read."""

    format: Literal[1, 2]
    checkpoint: str
    map: CalibrationMap


def _place(checkpoint: Path) -> Path:
    """Where the calibration of a checkpoint lies: in the folder of its file, or in its exported folder."""
    return (checkpoint if checkpoint.is_dir() else checkpoint.parent) / CALIBRATION_NAME


def write_calibration(checkpoint: Path, digest: str, fitted: Mapping[str, Any]) -> Path:
    """Write calibration.json to the folder of the file `checkpoint` of SHA-256 `digest`; atomic. Returns its path.

    fitted: its 'map' holds the lists 'predicted' and 'observed'; the rest says where they come from.
    """
    path = _place(checkpoint)
    write_whole(path, with_checksum({'format': CALIBRATION_FORMAT, 'checkpoint': digest, **fitted}))
    return path


def find_calibration(checkpoint: Path) -> tuple[Calibration | None, str]:
    """The map in the folder of the file `checkpoint`, if there is one and it is that very checkpoint's, and one line
    about it. UserError where the file is damaged."""
    path = _place(checkpoint)
    cure = f'python evaluate.py --measure=errors --out_dir={checkpoint.parent} --checkpoint_name={checkpoint.name}'
    if not path.exists():
        return None, f"thresholds are the critic's own probabilities; calibrate it with: {cure}"
    digest, calibration = _read(path)
    if digest != checkpoint_hash(checkpoint):
        return None, (f'{path} is ignored, for it is of another checkpoint than {checkpoint.name}, and thresholds are '
                      f"the critic's own probabilities; make a new one with: {cure}")
    return calibration, f'thresholds are error rates: the critic is calibrated by {path}'


def _read(path: Path) -> tuple[str, Calibration]:
    """SHA-256 of the checkpoint that a calibration.json is of, and its map."""
    try:
        stored = checked(read_json(path), dict[str, object], 'it')
        found = checked({name: stored[name] for name in ('format', 'checkpoint', 'map') if name in stored}, Stored)
        if found['format'] == CALIBRATION_FORMAT or CHECKSUM in stored:
            verify_checksum(stored)
        predicted, observed = (torch.tensor(found['map'][name], dtype=torch.float64)
                               for name in ('predicted', 'observed'))
        if len(predicted) != len(observed) or any((column.diff() < 0).any() for column in (predicted, observed)):
            raise Unfit('its map is no rising one of probabilities')
        return found['checkpoint'], Calibration(predicted, observed)
    except Unfit as error:
        raise UserError(f'{path} is damaged or of another program ({error}); move it away, and the critic goes '
                        f'uncalibrated') from None
