"""The loss curve of a run, drawn from its metrics."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from core.checkpoints.heads import HEADS
from core.common.plots import BLUE, GREEN, INK, ORANGE, PURPLE, RULE, SKY, VERMILION, save_picture, tidy
from core.common.printing import say_if_heard
from core.logger import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAD_COLOURS = ORANGE, GREEN, PURPLE, SKY
TRAINING_CURVES = (  # key of metrics.jsonl, name in the legend, colour
    ('train/loss_main', 'training, main', BLUE),
    *((f'train/loss_{head.name}', head.curve, colour) for head, colour in zip(HEADS, HEAD_COLOURS)))
NELBO, LOSS = ('val/nelbo', 'validation NELBO', VERMILION), ('val/loss', 'validation loss', VERMILION)
# Validation in the weighting of a training curve has its colour, in dashes.
COMPARABLE_CURVES = (('val/loss_main', 'validation, main', BLUE),
                     *((f'val/loss_{head.name}', head.curve.replace('training', 'validation'), colour)
                       for head, colour in zip(HEADS, HEAD_COLOURS)))
STANDARD_ERROR = 'val/nelbo_standard_error'


def plot_loss_curve(metrics_path: Path, picture_path: Path, say: Callable[[str], object] = say_if_heard, *,
                    stage_borders: Mapping[str, int] = MappingProxyType({}), unit: str = 'nats per token') -> None:
    """Draw the training losses and the validation value of a `metrics.jsonl` over iterations. Where validation has a loss
    and a NELBO, as with rewards, the NELBO, which has another unit, gets a panel of its own.

    `stage_borders` maps a stage's name to its first iteration. A missing, empty or one-point file gives a picture too.
    """
    records = read_metrics(metrics_path)
    save_picture(picture_path, (8, 4.5), lambda figure: _draw(figure, records, stage_borders, unit), say)


def _draw(figure: 'Figure', records: Sequence[Mapping[str, Any]], stage_borders: Mapping[str, int], unit: str) -> None:
    if any(LOSS[0] in record and NELBO[0] in record for record in records):
        axes, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))
        _finish(below, [_draw_validation(below, records, *NELBO)], 'NELBO (nats)', 'best')
        validation, legend = [LOSS], 'best'
    else:
        axes = below = figure.add_subplot()
        validation, legend = [NELBO, LOSS], 'upper right'
    drawn = [_draw_training(axes, *_series(records, key), name, colour) for key, name, colour in TRAINING_CURVES]
    drawn += [_draw_comparable(axes, *_series(records, key), name, colour) for key, name, colour in COMPARABLE_CURVES]
    drawn += [_draw_validation(axes, records, *curve) for curve in validation]
    _finish(axes, drawn, f'loss ({unit})', legend)
    below.set_xlabel('iteration', color=INK)
    last = max((record['iteration'] for record in records), default=0)
    _draw_borders(axes, {name: at for name, at in stage_borders.items() if 0 < at <= last})


def _finish(axes: 'Axes', drawn: Sequence[np.ndarray], title: str, legend: str) -> None:
    """Range, legend and look of a panel, from the curves that were drawn in it, some of them empty."""
    shown = [values for values in drawn if len(values)]
    axes.set_ylabel(title, color=INK)
    tidy(axes, 'y')
    if shown:
        _limit(axes, shown)
        axes.legend(frameon=False, loc=legend, labelcolor=INK)
    else:
        axes.text(0.5, 0.5, 'no metrics yet', transform=axes.transAxes, ha='center', color=INK)


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values of `key`, finite ones only."""
    points = [(record['iteration'], record[key]) for record in records
              if isinstance(record.get(key), (int, float)) and math.isfinite(record[key])]
    points.sort(key=lambda point: point[0])
    table = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over 1/25 of the points, over fewer at the ends."""
    half = len(values) // 50
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _draw_training(axes: 'Axes', iterations: np.ndarray, values: np.ndarray, name: str, colour: str) -> np.ndarray:
    if not len(values):
        return values
    smooth = _smoothed(values)
    if len(values) >= 100:  # the single points are noisy: faint, with their moving mean on top
        axes.plot(iterations, values, color=colour, alpha=0.18, linewidth=0.7)
    axes.plot(iterations, smooth, color=colour, linewidth=1.4, label=name, marker='o' if len(values) == 1 else None)
    return smooth


def _draw_comparable(axes: 'Axes', iterations: np.ndarray, values: np.ndarray, name: str, colour: str) -> np.ndarray:
    if len(values):
        axes.plot(iterations, values, color=colour, linewidth=1.4, linestyle=(0, (3, 2)), marker='s', markersize=3.5,
                  zorder=3, label=name)
    return values


def _draw_validation(axes: 'Axes', records: Sequence[Mapping[str, Any]], key: str, name: str,
                     colour: str) -> np.ndarray:
    iterations, values = _series(records, key)
    if not len(values):
        return values
    axes.plot(iterations, values, color=colour, linewidth=1.4, marker='o', markersize=3.5, zorder=3,
              label=f'{name}, lowest {values.min():.3f}')
    at, errors = _series([record for record in records if key in record], STANDARD_ERROR)
    if len(errors) == len(values):
        axes.fill_between(at, values - errors, values + errors, color=colour, alpha=0.2, linewidth=0)
    return values


def _limit(axes: 'Axes', curves: Sequence[np.ndarray]) -> None:
    """Choose the vertical range by the curves, so that one outlier does not set it."""
    low = min(float(np.min(values)) for values in curves)
    high = max(float(np.percentile(values, 99)) for values in curves)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)


def _draw_borders(axes: 'Axes', borders: Mapping[str, int]) -> None:
    for name, iteration in borders.items():
        axes.axvline(iteration, color=RULE, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.text(iteration, 0.02, name, transform=axes.get_xaxis_transform(), color='#707070', fontsize=8,
                  rotation=90, va='bottom', ha='right')
