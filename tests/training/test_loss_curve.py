"""The loss curve from whole, tiny, empty and damaged metrics."""

import json
import math

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.image import imread

from core.common.plots import BLUE, GREEN, ORANGE, VERMILION
from core.loss_curve import _smoothed, plot_loss_curve


def write(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved, to look at its lines."""
    saved, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, 'savefig',
                        lambda figure, *given, **named: (saved.append(figure), save(figure, *given, **named)))
    return saved


def legend(figure):
    shown = figure.axes[0].get_legend()
    return [text.get_text() for text in shown.get_texts()] if shown else []


def coloured(picture, colour):
    """How many pixels of a PNG have nearly this colour."""
    wanted = np.array([int(colour[place:place + 2], 16) / 255 for place in (1, 3, 5)])
    return int((np.abs(imread(picture)[..., :3] - wanted) < 0.02).all(-1).sum())


def test_every_active_part_is_a_curve_at_its_iterations(tmp_path, figures):
    records = [{'kind': 'iteration', 'iteration': i, 'train/loss_main': 4.0 - i / 100} |
               ({'train/loss_sampler': 3.0} if i >= 20 else {}) for i in range(0, 60, 10)]
    records += [{'kind': 'evaluation', 'iteration': i, 'val/nelbo': 4.1 - i / 100, 'val/nelbo_standard_error': 0.01}
                for i in (0, 50)]
    write(tmp_path / 'metrics.jsonl', records)
    plot_loss_curve(tmp_path / 'metrics.jsonl', tmp_path / 'loss.png', stage_borders={'sampler': 20, 'critic': 500})
    axes = figures[0].axes[0]
    assert legend(figures[0]) == ['training, main', 'training, sampler head', 'validation NELBO, lowest 3.600']
    curves = {line.get_label(): line for line in axes.get_lines()}
    assert curves['training, sampler head'].get_xdata().tolist() == [20, 30, 40, 50]
    assert curves['validation NELBO, lowest 3.600'].get_ydata().tolist() == pytest.approx([4.1, 3.6])
    assert axes.get_xlabel() == 'iteration' and 'nats' in axes.get_ylabel()
    assert [text.get_text() for text in axes.texts] == ['sampler']  # a border beyond the run is left out
    picture = tmp_path / 'loss.png'
    assert imread(picture).shape[:2] == (675, 1200)
    assert all(coloured(picture, colour) > 400 for colour in (BLUE, ORANGE, VERMILION))
    assert coloured(picture, GREEN) == 0
    assert {entry.name for entry in tmp_path.iterdir()} == {'metrics.jsonl', 'loss.png'}


def test_validation_in_the_weighting_of_training_has_its_colour(tmp_path, figures):
    records = [{'kind': 'iteration', 'iteration': i, 'train/loss_main': 3.0, 'train/loss_sampler': 2.5}
               for i in range(0, 60, 10)]
    records += [{'kind': 'evaluation', 'iteration': i, 'val/nelbo': 2.0, 'val/loss_main': 3.1, 'val/loss_sampler': 2.6}
                for i in (0, 50)]
    write(tmp_path / 'metrics.jsonl', records)
    plot_loss_curve(tmp_path / 'metrics.jsonl', tmp_path / 'loss.png')
    curves = {line.get_label(): line for line in figures[0].axes[0].get_lines()}
    for name, value in (('main', 3.1), ('sampler head', 2.6)):
        assert curves[f'validation, {name}'].get_ydata().tolist() == [value] * 2
        assert curves[f'validation, {name}'].get_color() == curves[f'training, {name}'].get_color()
    assert 'validation NELBO, lowest 2.000' in curves


def test_rewards_and_the_nelbo_have_panels_of_their_own(tmp_path, figures):
    records = [{'kind': 'iteration', 'iteration': i, 'train/loss_main': -0.5} for i in range(0, 60, 10)]
    records += [{'kind': 'evaluation', 'iteration': i, 'val/loss': -0.6, 'val/nelbo': 2.0 + i / 100} for i in (0, 50)]
    write(tmp_path / 'metrics.jsonl', records)
    plot_loss_curve(tmp_path / 'metrics.jsonl', tmp_path / 'loss.png', unit='minus reward')
    rewards, bound = figures[0].axes
    assert [line.get_label() for line in rewards.get_lines()] == ['training, main', 'validation loss, lowest -0.600']
    assert [line.get_ydata().tolist() for line in bound.get_lines()] == [[2.0, 2.5]]
    assert rewards.get_ylabel() == 'loss (minus reward)' and bound.get_ylabel() == 'NELBO (nats)'
    assert bound.get_xlabel() == 'iteration' and rewards.get_ylim()[1] < 0 < bound.get_ylim()[0]


@pytest.mark.parametrize('text', [
    None, '', '{"iteration": 3, "train/loss_main": 2.5}\n', '{"iteration": 0, "val/nelbo": 1.5}\n',
    '{"iteration": 1, "train/loss_main": null}\n{"iteration": 2, "train/lo', 'null\n[]\n{}\n{"iteration": "x"}\n'])
def test_little_or_damaged_data_gives_a_picture(tmp_path, text):
    if text is not None:
        (tmp_path / 'metrics.jsonl').write_text(text)
    plot_loss_curve(tmp_path / 'metrics.jsonl', tmp_path / 'loss.png', stage_borders={'sampler': 1})
    assert imread(tmp_path / 'loss.png').size


def test_the_smoothing_is_a_centred_mean():
    values = np.sin(np.arange(200.0))
    smooth = _smoothed(values)
    assert smooth[100] == pytest.approx(values[96:105].mean()) and smooth[0] == pytest.approx(values[:5].mean())
    assert smooth[-1] == pytest.approx(values[-5:].mean())
    assert _smoothed(values[:10]) == pytest.approx(values[:10]) and not math.isnan(_smoothed(values[:1])[0])
