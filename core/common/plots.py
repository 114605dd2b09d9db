"""One way to draw a picture: its figure, its look and its file.

Pictures are extras: if drawing one fails, a sentence says so and the work goes on. Matplotlib takes seconds to import,
so it is imported only when a picture is drawn.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from core.common.files import atomic_writer
from core.common.printing import optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, RULE = '#404040', '#B0B0B0'  # of words, of frames and borders
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = (  # Okabe and Ito's, which colour-blind readers can tell apart
    '#0072B2', '#E69F00', '#009E73', '#D55E00', '#CC79A7', '#56B4E9')
RESOLUTION = 150  # dots per inch


def save_picture(path: Path, size: tuple[float, float], draw: 'Callable[[Figure], object]',
                 say: Callable[[str], object]) -> None:
    """Let `draw` fill a figure of `size` (width and height in inches) and write it to `path` as a PNG; atomic.

    `say` gets one line: where the picture is, or why there is none. Nothing is raised.
    """
    def write() -> bool:
        figure = _new_figure(size)
        draw(figure)
        with atomic_writer(path) as file:
            figure.savefig(file, format='png')
        return True

    if optional(f'{path} was not drawn', write, say):  # the numbers that the picture shows are safe already
        say(f'picture written to {path}')


def _new_figure(size: tuple[float, float]) -> 'Figure':
    """An empty figure that needs no screen.

    A notebook sets MPLBACKEND to its own backend. If Matplotlib does not know that backend, importing it fails.
    """
    screen = os.environ.pop('MPLBACKEND', None)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    finally:
        if screen is not None:
            os.environ['MPLBACKEND'] = screen
    figure = Figure(figsize=size, dpi=RESOLUTION, layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: 'Axes', grid: str) -> None:
    """The look of all pictures: a pale grid along 'x', 'y' or 'both', and no frame at the top and the right."""
    axes.tick_params(colors=INK)
    axes.grid(axis=grid, color='#E6E6E6', linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ('top', 'right'):
        axes.spines[side].set_visible(False)
    for side in ('left', 'bottom'):
        axes.spines[side].set_color(RULE)
