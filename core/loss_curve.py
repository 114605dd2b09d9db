"""The loss curve of a run, drawn from its metrics. Matplotlib takes seconds to import, so it is imported while drawing."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from core.common.plots import INK, tidy
from core.logger import read_metrics
TRAINING_CURVES = (  # key of metrics.jsonl, name in the legend, colour (Okabe and Ito's, safe for colour-blind readers)
    ('train/loss_main', 'training, main', '#0072B2'),
    ('train/loss_sampler', 'training, sampler head', '#E69F00'),
    ('train/loss_critic', 'training, critic (binary)', '#009E73'),
)
VALIDATION_CURVES = (('val/nelbo', 'validation NELBO', '#D55E00'), ('val/loss', 'validation loss', '#D55E00'))
STANDARD_ERROR = 'val/nelbo_standard_error'


def plot_loss_curve(metrics_path: Path, picture_path: Path, *, stage_borders: Mapping[str, int] = MappingProxyType({}),
                    unit: str = 'nats per token') -> None:
    """Draw the training losses and the validation value of a `metrics.jsonl` over iterations as a PNG; atomic.

    `stage_borders` maps a stage's name to its first iteration. A missing, empty or one-point file gives a picture too.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(metrics_path)
    figure = Figure(figsize=(8, 4.5), dpi=150, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = [_draw_training(axes, *_series(records, key), name, colour) for key, name, colour in TRAINING_CURVES]
    drawn += [_draw_validation(axes, records, key, name, colour) for key, name, colour in VALIDATION_CURVES]
    shown = [values for values in drawn if len(values)]
    _style(axes, unit)
    if shown:
        _limit(axes, shown)
        axes.legend(frameon=False, loc='upper right', labelcolor=INK)
    else:
        axes.text(0.5, 0.5, 'no metrics yet', transform=axes.transAxes, ha='center', color=INK)
    last = max((record['iteration'] for record in records), default=0)
    _draw_borders(axes, {name: at for name, at in stage_borders.items() if 0 < at <= last})
    temporary = picture_path.with_name(picture_path.name + '.tmp')
    figure.savefig(temporary, format='png')
    os.replace(temporary, picture_path)


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values of `key`, finite ones only."""
    points = [(record['iteration'], record[key]) for record in records
              if isinstance(record.get(key), (int, float)) and math.isfinite(record[key])]
    points.sort(key=lambda point: point[0])
    table = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over 1/25 of the points; at the ends over those there are."""
    half = len(values) // 50
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _draw_training(axes: Any, iterations: np.ndarray, values: np.ndarray, name: str, colour: str) -> np.ndarray:
    if not len(values):
        return values
    smooth = _smoothed(values)
    if len(values) >= 100:  # the single points are noisy: faint, with their moving mean on top
        axes.plot(iterations, values, color=colour, alpha=0.18, linewidth=0.7)
    axes.plot(iterations, smooth, color=colour, linewidth=1.4, label=name, marker='o' if len(values) == 1 else None)
    return smooth


def _draw_validation(axes: Any, records: Sequence[Mapping[str, Any]], key: str, name: str, colour: str) -> np.ndarray:
    iterations, values = _series(records, key)
    if not len(values):
        return values
    axes.plot(iterations, values, color=colour, linewidth=1.4, marker='o', markersize=3.5, zorder=3,
              label=f'{name}, lowest {values.min():.3f}')
    at, errors = _series([record for record in records if key in record], STANDARD_ERROR)
    if len(errors) == len(values):
        axes.fill_between(at, values - errors, values + errors, color=colour, alpha=0.2, linewidth=0)
    return values


def _limit(axes: Any, curves: Sequence[np.ndarray]) -> None:
    """Let the vertical range follow the curves, not one wild point."""
    low = min(float(np.min(values)) for values in curves)
    high = max(float(np.percentile(values, 99)) for values in curves)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)


def _style(axes: Any, unit: str) -> None:
    axes.set_xlabel('iteration', color=INK)
    axes.set_ylabel(f'loss ({unit})', color=INK)
    tidy(axes, 'y')


def _draw_borders(axes: Any, borders: Mapping[str, int]) -> None:
    for name, iteration in borders.items():
        axes.axvline(iteration, color='#B0B0B0', linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.text(iteration, 0.02, name, transform=axes.get_xaxis_transform(), color='#707070', fontsize=8,
                  rotation=90, va='bottom', ha='right')
