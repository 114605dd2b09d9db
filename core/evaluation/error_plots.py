"""Picture of how errors are found."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.common.plots import BLUE, GREEN, INK, PURPLE, RULE, SKY, VERMILION, save_picture, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {'random': '#999999', 'self_confidence': BLUE, 'marginal': SKY, 'pseudo_likelihood': GREEN,
           'critic': VERMILION, 'remasking': PURPLE}


def plot_errors(rows: Sequence[Mapping[str, Any]], share: float, picture: Path, say: Callable[[str], object]) -> None:
    """Left: AUROC against mask share for each detector, with 95 % intervals. Right: observed against predicted error
    rate at mask share `share` (reliability diagram). rows: results of `errors`."""
    save_picture(picture, (10.5, 4.6), lambda figure: _draw(figure, rows, share), say)


def _draw(figure: 'Figure', rows: Sequence[Mapping[str, Any]], share: float) -> None:
    areas, diagram = figure.subplots(1, 2)
    for name, colour in COLOURS.items():
        points = [row for row in rows if row['detector'] == name and row['auroc'] is not None]
        if points:
            _draw_areas(areas, points, name, colour)
        for row in points:
            if row['mask_share'] == share and 'reliability' in row:
                table = row['reliability']
                diagram.plot(table['predicted'], table['observed'], color=colour, linewidth=1.4, marker='o',
                             markersize=3.5)
    diagram.set_aspect('equal')
    diagram.plot([0, 1], [0, 1], color=RULE, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    for axes, x_label, y_label in ((areas, 'mask share', 'AUROC of P(wrong)'),
                                   (diagram, f'predicted P(wrong), mask share {share}', 'observed error rate')):
        axes.set_xlabel(x_label, color=INK)
        axes.set_ylabel(y_label, color=INK)
        tidy(axes, 'both')
    if areas.lines:
        areas.legend(frameon=False, labelcolor=INK, fontsize=8)


def _draw_areas(axes: 'Axes', points: Sequence[Mapping[str, Any]], name: str, colour: str) -> None:
    """One detector's line, with its intervals as a band."""
    shares, values = ([row[key] for row in points] for key in ('mask_share', 'auroc'))
    axes.plot(shares, values, color=colour, linewidth=1.4, marker='o', markersize=3.5, label=name.replace('_', '-'))
    if all(row['auroc_interval'] for row in points):
        low, high = zip(*(row['auroc_interval'] for row in points))
        axes.fill_between(shares, low, high, color=colour, alpha=0.2, linewidth=0)
