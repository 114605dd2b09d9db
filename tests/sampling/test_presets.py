"""Presets: what they set, that what was given wins, and that the line names them."""

import dataclasses

import pytest

from configurator import configure
from core.common.errors import UserError
from core.sampling.options import SampleConfig
from core.sampling.presets import PRESETS, with_preset
from helpers.sampling import sample, write_checkpoint

FEW = ('--num_samples=2', '--quality_metric=none')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('presets')
    write_checkpoint(folder / 'ckpt_best.pt')
    write_checkpoint(folder / 'causal.pt', kind='causal', attention_type='causal')
    return folder


def test_every_preset_can_be_asked_for_and_holds_nothing_but_options():
    described = next(one.metadata['help'] for one in dataclasses.fields(SampleConfig) if one.name == 'preset')
    assert all(name in described for name in PRESETS)
    for preset in PRESETS.values():
        assert preset.options.keys() <= {name for name in vars(SampleConfig())} and preset.summary


@pytest.mark.parametrize('name', PRESETS)
def test_a_preset_writes_what_its_options_write_and_says_them(folder, name):
    made, said = sample(folder, *FEW, f'--preset={name}')
    options = PRESETS[name].options
    asked, _ = sample(folder, *FEW, *(f'--{option}={value}' for option, value in options.items()))
    assert made.texts == asked.texts and made.trunk_calls == asked.trunk_calls
    line = said.split('\n')[0]
    assert line == f'preset {name}: ' + ', '.join(f'{option}={value}' for option, value in options.items())


def test_balanced_is_what_nobody_asked_for(folder):
    assert sample(folder, *FEW, '--preset=balanced')[0].texts == sample(folder, *FEW)[0].texts
    defaults = SampleConfig()
    assert all(getattr(defaults, name) == value for name, value in PRESETS['balanced'].options.items())


def test_what_was_given_wins_and_is_told(folder):
    made, said = sample(folder, *FEW, '--preset=fast', '--iterations=3')
    assert made.trunk_calls == 3
    assert said.startswith('preset fast: sampling_policy=strided, temperature=0.7, iterations as given\n')


def test_a_preset_leaves_other_options_alone():
    configuration = configure(SampleConfig, ['--preset=careful', '--seed=5', '--top_p=0.9'])
    config, _ = with_preset(configuration.config, configuration.explicit)
    assert (config.seed, config.top_p, config.end_ratio) == (5, 0.9, 0.05)


@pytest.mark.parametrize('arguments, words', [
    (('--preset=fast', '--sampling_method=standard'), 'preset does not apply to sampling_method=standard'),
    (('--preset=fast', '--sampling_method=multinomial'), 'preset does not apply to sampling_method=multinomial'),
    (('--preset=fast', '--start_ratio=0.5'), 'start_ratio does not apply to sampling_policy=strided'),
    (('--preset=fastest',), "did you mean 'fast'")])
def test_a_preset_that_does_not_fit_is_refused(folder, arguments, words):
    with pytest.raises(UserError, match=words):
        sample(folder, *FEW, *arguments)
