"""The picture of docs/blocks.md: which tokens see which in the two streams that a block model trains on.

    python -m core.study.blocks docs/results/blocks.png
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from core.common.errors import UserError, run_script
from core.common.plots import BLUE, INK, ORANGE, save_picture
from core.common.printing import say
from core.common.stream_attention import block_attention_mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LENGTH = 12
SHOWN = ((1, 'blocks of 1: causal'), (4, 'blocks of 4'), (LENGTH, 'one block: bidirectional'))


def draw_masks(figure: 'Figure') -> None:
    """One panel for each block length; it shows the mask that the model uses."""
    for number, (block_length, title) in enumerate(SHOWN):
        axes = figure.add_subplot(1, len(SHOWN), number + 1)
        _draw_mask(axes, block_length)
        axes.set_title(title, color=INK, fontsize=10)
        axes.set_ylabel('reads' if number == 0 else '', color=INK)


def _draw_mask(axes: 'Axes', block_length: int) -> None:
    from matplotlib.colors import to_rgb

    mask = block_attention_mask(block_length, LENGTH, torch.device('cpu'))[0, 0].numpy()  # [2T, 2T]
    colours = [[to_rgb('white') if not seen else to_rgb(ORANGE if column < LENGTH else BLUE)
                for column, seen in enumerate(row)] for row in mask]
    axes.imshow(colours, interpolation='nearest')
    for border in range(2 * LENGTH + 1):
        wide = 1.4 if border % LENGTH == 0 else 0.7 if border % block_length == 0 else 0.2
        axes.axhline(border - 0.5, color=INK, linewidth=wide)
        axes.axvline(border - 0.5, color=INK, linewidth=wide)
    names, places = ('masked text', 'clean text'), (LENGTH / 2 - 0.5, 1.5 * LENGTH - 0.5)
    axes.set_xticks(places, names, color=INK)
    axes.set_yticks(places, names, color=INK, rotation=90, va='center')
    axes.tick_params(length=0)


def main(arguments: list[str]) -> None:
    """The command at the top of this file."""
    if len(arguments) != 1 or arguments[0].startswith('-'):
        raise UserError('name one picture to write: python -m core.study.blocks docs/results/blocks.png')
    save_picture(Path(arguments[0]), (10, 3.6), draw_masks, say)


if __name__ == '__main__':
    run_script(main)
