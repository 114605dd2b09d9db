"""Picture of exact likelihoods. Matplotlib takes seconds to import, so it is imported where a picture is drawn."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from core.common.plots import INK, tidy

COLOURS = ('#0072B2', '#D55E00', '#009E73')  # Okabe and Ito's
Lines = Mapping[str, Sequence[tuple[float, float, float]]]  # name: (x, y, standard error of y)


def plot_likelihood(panels: Mapping[str, Lines], picture: Path, x_label: str, y_label: str) -> None:
    """Lines with error bars, one panel for each title and all of one scale, x in powers of two; a PNG, atomic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(5, 3.4 * columns), 3.4 * rows), dpi=150, layout='constrained')
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
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
    figure.supxlabel(x_label, color=INK, fontsize=10)
    figure.supylabel(y_label, color=INK, fontsize=10)
    grid[0].legend(frameon=False, labelcolor=INK, fontsize=8)
    temporary = picture.with_name(f'{picture.name}.tmp')
    figure.savefig(temporary, format='png')
    os.replace(temporary, picture)
