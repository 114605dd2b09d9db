"""Presets of sample.py: named sets of options that were measured together (README, docs/sampling.md).

A new one is a row of `PRESETS`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from core.common.errors import raise_problems
from core.common.expressions import unknown_choice
from core.sampling.options import SampleConfig


class Preset(NamedTuple):
    """summary: what it is for; options: of `SampleConfig`, used unless others are given."""

    summary: str
    options: Mapping[str, Any]


PRESETS = {
    'fast': Preset('few trunk calls', {'sampling_policy': 'strided', 'iterations': 8, 'temperature': 0.7}),
    'balanced': Preset('the defaults', {'sampling_policy': 'remask', 'iterations': 50, 'temperature': 0.8,
                                        'randomness_strength': 0.85}),
    'careful': Preset('more of the words are right, and text repeats itself more',
                      {'sampling_policy': 'remask', 'iterations': 100, 'start_ratio': 0.5, 'temperature': 0.8,
                       'randomness_strength': 0.85}),
    'varied': Preset('texts differ most, and fewer of the words are right',
                     {'sampling_policy': 'remask', 'iterations': 50, 'temperature': 1.0, 'randomness_strength': 0.85}),
}


def with_preset(config: SampleConfig, explicit: Mapping[str, str]) -> tuple[SampleConfig, list[str]]:
    """`config` with those options of its preset that were not given, and a line that names them. UserError if there is
    no such preset."""
    if config.preset is None:
        return config, []
    raise_problems(unknown_choice('preset', config.preset, PRESETS))
    options = PRESETS[config.preset].options
    taken = {name: value for name, value in options.items() if name not in explicit}
    given = ''.join(f', {name} as given' for name in options if name in explicit)
    listed = ', '.join(f'{name}={value}' for name, value in taken.items())
    return replace(config, **taken), [f'preset {config.preset}: {listed}{given}']
