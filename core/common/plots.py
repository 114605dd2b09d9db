"""The look that all pictures share."""

from typing import Any

INK = '#404040'


def tidy(axes: Any, grid: str) -> None:
    """The look of all pictures: a pale grid along 'x', 'y' or 'both', and no frame at the top and the right."""
    axes.tick_params(colors=INK)
    axes.grid(axis=grid, color='#E6E6E6', linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ('top', 'right'):
        axes.spines[side].set_visible(False)
    for side in ('left', 'bottom'):
        axes.spines[side].set_color('#B0B0B0')
