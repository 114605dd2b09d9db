"""Pictures: what is drawn reaches the file, and nothing that fails while one is drawn ends the work."""

import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from core.common.plots import VERMILION, save_picture, tidy


def draw_bar(figure):
    """The left half of the picture in one colour."""
    figure.set_layout_engine('none')
    axes = figure.add_axes((0, 0, 0.5, 1))
    axes.set_axis_off()
    axes.add_patch(axes.patch.__class__((0, 0), 1, 1, color=VERMILION))


def test_what_is_drawn_is_in_the_file_at_its_size(tmp_path):
    lines = []
    save_picture(tmp_path / 'bar.png', (2, 1), draw_bar, lines.append)
    pixels = imread(tmp_path / 'bar.png')[..., :3]
    assert pixels.shape == (150, 300, 3)
    assert np.allclose(pixels[75, 20], [0xD5 / 255, 0x5E / 255, 0]) and np.allclose(pixels[75, 280], 1)
    assert lines == [f'picture written to {tmp_path / "bar.png"}']
    assert os.listdir(tmp_path) == ['bar.png']


@pytest.mark.parametrize('failure',
                         [ValueError('no such\nmarker'), MemoryError(), OSError(28, 'No space left on device')])
def test_a_picture_that_fails_is_a_sentence_and_leaves_the_earlier_one(tmp_path, failing_decoration, failure):
    def draw(figure):
        raise failure

    lines, path = [], tmp_path / 'bar.png'
    path.write_bytes(b'earlier')
    save_picture(path, (2, 1), draw, lines.append)
    assert len(lines) == 1 and lines[0].startswith(f'{path} was not drawn: ') and '\n' not in lines[0]
    assert path.read_bytes() == b'earlier' and os.listdir(tmp_path) == ['bar.png']


def test_a_picture_where_nothing_can_be_written_is_a_sentence(tmp_path, failing_decoration):
    lines = []
    save_picture(tmp_path / 'no such folder' / 'bar.png', (2, 1), draw_bar, lines.append)
    assert len(lines) == 1 and 'was not drawn: UserError: cannot write' in lines[0]


@pytest.mark.parametrize('screen', ['module://matplotlib_inline.backend_inline', 'nonsense'])
def test_a_notebook_s_screen_is_not_needed(tmp_path, screen):
    code = ('import os, pathlib; from core.common.plots import save_picture\n'
            f'save_picture(pathlib.Path({str(tmp_path / "x.png")!r}), (1, 1), lambda figure: None, print)\n'
            'print(os.environ["MPLBACKEND"])')
    run = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'MPLBACKEND': screen}, capture_output=True,
                         text=True)
    assert run.returncode == 0 and run.stdout == f'picture written to {tmp_path / "x.png"}\n{screen}\n', run.stderr
    assert imread(tmp_path / 'x.png').shape[:2] == (150, 150)


def test_the_look_of_axes():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    tidy(axes, 'y')
    assert [side for side, spine in axes.spines.items() if spine.get_visible()] == ['left', 'bottom']
    assert axes.get_axisbelow() is True and axes.yaxis._major_tick_kw['gridOn']
    assert not axes.xaxis._major_tick_kw.get('gridOn')


def test_importing_does_not_import_matplotlib():
    code = 'import core.loss_curve, core.evaluation.run, sys; sys.exit("matplotlib" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
