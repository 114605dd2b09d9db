"""Picture of exact likelihoods."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from core.common.plots import BLUE, GREEN, INK, VERMILION, save_picture, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = (BLUE, VERMILION, GREEN)
Lines = Mapping[str, Sequence[tuple[float, float, float]]]  # name: (x, y, standard error of y)


def plot_likelihood(panels: Mapping[str, Lines], picture: Path, x_label: str, y_label: str,
                    say: Callable[[str], object]) -> None:
    """Lines with error bars, one panel for each title. All panels have the same scale; x is in powers of two."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    save_picture(picture, (max(5, 3.4 * columns), 3.4 * rows),
                 lambda figure: _draw(figure, panels, (rows, columns), (x_label, y_label)), say)


def _draw(figure: 'Figure', panels: Mapping[str, Lines], shape: tuple[int, int], labels: tuple[str, str]) -> None:
    grid = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False).flatten()
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    assert len(names) <= len(COLOURS)
    for axes, (title, lines) in zip(grid, panels.items()):
        for name, points in lines.items():
            x, y, error = np.asarray(sorted(points), dtype=np.float64).T
            axes.errorbar(x, y, yerr=error, color=COLOURS[names.index(name)], linewidth=1.4, marker='o',
                          markersize=3.5, capsize=2, elinewidth=0.8, label=name)
        axes.set_title(title, color=INK, fontsize=10)
        axes.set_xscale('log', base=2)
        axes.xaxis.set_major_formatter('{x:.0f}')
        tidy(axes, 'y')
    for axes in grid[len(panels):]:
        axes.set_visible(False)
    figure.supxlabel(labels[0], color=INK, fontsize=10)
    figure.supylabel(labels[1], color=INK, fontsize=10)
    grid[0].legend(frameon=False, labelcolor=INK, fontsize=8)
