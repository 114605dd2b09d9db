"""Pictures of sample quality."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from core.common.plots import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILION, save_picture, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = (('reference_bits', 'reference bits per character'), ('entropy_3', 'trigram entropy, nats'),
          ('divergence_3', 'trigram divergence, nats'), ('known_words', 'share of corpus words'),
          ('copied_span', 'longest copied span, characters'), ('repetition', 'share of repeated 4-grams'))
AXES = (('trunk_calls', 'trunk calls'), ('network_calls', 'network calls'), ('seconds', 'seconds'))
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, '#8C6D00', INK)
MARKERS = 'osD^vPX*h<'  # used with the colours: eight colours alone are hard to tell apart


class Curve(NamedTuple):
    """A policy's points. costs: by name. bits: reference bits. All lists have one length, which may be 0."""

    name: str
    costs: dict[str, list[float]]
    bits: list[float]


def plot_quality(rows: Sequence[Mapping[str, Any]], names: Sequence[str], picture: Path,
                 say: Callable[[str], object]) -> None:
    """One panel for each metric; in it a dot with its interval for each row."""
    panels = [(metric, title) for metric, title in PANELS if any(row.get(metric) is not None for row in rows)]
    save_picture(picture, (2.6 * len(panels) + 1.8, 0.34 * len(rows) + 1.2),
                 lambda figure: _draw_quality(figure, rows, names, panels), say)


def _draw_quality(figure: 'Figure', rows: Sequence[Mapping[str, Any]], names: Sequence[str],
                  panels: Sequence[tuple[str, str]]) -> None:
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (metric, title) in zip(grid, panels):
        for place, row in enumerate(rows):
            if row.get(metric) is None:
                continue
            colour = VERMILION if 'control' in row else BLUE
            axes.plot(row[f'{metric}_interval'], [place, place], color=colour, linewidth=1.4, alpha=0.6)
            axes.plot(row[metric], place, color=colour, marker='D' if 'control' in row else 'o', markersize=4.5)
        axes.set_xlabel(title, color=INK, fontsize=9)
        axes.set_yticks(range(len(rows)), names)
        tidy(axes, 'both')
    grid[0].invert_yaxis()


def plot_curves(families: Mapping[str, Sequence[Curve]], controls: Mapping[str, float], picture: Path,
                say: Callable[[str], object]) -> None:
    """Reference bits at equal entropy against each cost. Each family has a row of panels; other families are grey."""
    shown = {family: found for family, curves in families.items() if (found := [one for one in curves if one.bits])}
    shown = shown or {'no curves': []}
    save_picture(picture, (12, 3.1 * len(shown)), lambda figure: _draw_curves(figure, shown, controls), say)


def _draw_curves(figure: 'Figure', shown: Mapping[str, Sequence[Curve]], controls: Mapping[str, float]) -> None:
    everyone = [curve for curves in shown.values() for curve in curves]
    grid = figure.subplots(len(shown), len(AXES), sharey=True, sharex='col', squeeze=False)
    for line, (family, curves) in zip(grid, shown.items()):
        for axes, (cost, title) in zip(line, AXES):
            for curve in everyone:
                axes.plot(curve.costs[cost], curve.bits, color='#D8D8D8', linewidth=1, marker='.', markersize=3,
                          zorder=1)
            for number, curve in enumerate(curves):
                axes.plot(curve.costs[cost], curve.bits, color=COLOURS[number % len(COLOURS)], linewidth=1.4,
                          marker=MARKERS[number % len(MARKERS)], markersize=4.5, label=curve.name, zorder=3)
            for (name, bits), dashes in zip(controls.items(), ((5, 3), (1, 2))):
                axes.axhline(bits, color=INK, linewidth=0.9, linestyle=(0, dashes), zorder=2,
                             label=name if axes is line[-1] else None)
            axes.set_xscale('log', base=2)
            axes.xaxis.set_major_formatter('{x:g}')
            tidy(axes, 'both')
        line[0].set_ylabel(f'{family}\nreference bits per character', color=INK, fontsize=9)
        line[-1].legend(frameon=False, fontsize=8, labelcolor=INK, loc='center left', bbox_to_anchor=(1.0, 0.5))
    for axes, (_, title) in zip(grid[-1], AXES):
        axes.set_xlabel(title, color=INK)
