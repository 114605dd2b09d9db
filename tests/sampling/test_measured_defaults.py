"""Defaults that follow what was measured: options of adaptive policies from the NELBO, thresholds from the guide."""

import pytest

from core.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from core.sampling.options import SampleConfig
from core.sampling.policy_options import (adaptive_defaults, build_policy, four_at_once, make_policy, remasking_levels)
from helpers.sampling import sample, write_checkpoint

FEW = ('--num_samples=2', '--quality_metric=none')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('defaults')
    write_checkpoint(folder / 'ckpt_best.pt', add_critic_head=True)
    checkpoint = load_checkpoint(folder / 'ckpt_best.pt')
    checkpoint.best_value = 2.0
    save_checkpoint(folder / 'known.pt', checkpoint.to_payload())
    return folder


def test_four_at_once_for_the_recipe_that_was_measured():
    """Of texts of 128 tokens, 31 to 33 calls with three seeds of NELBO 1.90 to 1.91 (docs/LOG.md)."""
    assert four_at_once(1.9) == {'entropy_bound': pytest.approx(8.17), 'confidence_threshold': pytest.approx(0.1578, abs=2e-4)}
    assert four_at_once(0.0)['confidence_threshold'] == 1.0  # a probability, whatever the model


@pytest.mark.parametrize('policy, option, value', [
    ('entropy_bounded', 'entropy_bound', 8.6), ('fast_dllm_threshold', 'confidence_threshold', 0.143)])
def test_an_adaptive_option_follows_the_checkpoints_nelbo(folder, policy, option, value):
    assert float(f'{four_at_once(2.0)[option]:.3g}') == value
    made, said = sample(folder, *FEW, '--checkpoint_name=known.pt', f'--sampling_policy={policy}')
    assert f'{option}={value:g}, for about four tokens a call: the NELBO is 2.000' in said
    given, told = sample(folder, *FEW, '--checkpoint_name=known.pt', f'--sampling_policy={policy}', f'--{option}={value}')
    assert given.texts == made.texts and given.trunk_calls == made.trunk_calls and 'NELBO' not in told


def test_a_checkpoint_without_a_nelbo_takes_the_usual_one(folder):
    made, said = sample(folder, *FEW, '--sampling_policy=entropy_bounded')
    usual, _ = sample(folder, *FEW, '--sampling_policy=entropy_bounded', f'--entropy_bound={four_at_once(1.9)["entropy_bound"]}')
    assert made.texts == usual.texts and 'NELBO' not in said


def test_no_other_policy_is_told_of_the_nelbo():
    for options in ({}, {'sampling_policy': 'fast_dllm_factor'}, {'sampling_method': 'standard'}):
        config = SampleConfig(**options)
        assert adaptive_defaults(config, 2.0) == (config, [])
    assert make_policy('entropy_bounded') and make_policy('fast_dllm_threshold')


@pytest.mark.parametrize('options, first, last', [
    ({}, 0.3, 0.7), ({'guidance': 'self'}, 0.3, 0.7), ({'guidance': 'critic'}, 0.45, 0.85),
    ({'remasking_checkpoint_name': 'x.pt'}, 0.45, 0.85), ({'start_threshold': 0.0}, 0.0, 0.7),
    ({'guidance': 'critic', 'end_threshold': 0.9}, 0.45, 0.9)])
def test_thresholds_follow_the_guide_and_what_was_given(options, first, last):
    config = SampleConfig(schedule_mode='threshold', iterations=3, **options)
    assert remasking_levels(config) == pytest.approx([first, last])
    assert build_policy(config)


def test_ratios_know_nothing_of_thresholds():
    assert remasking_levels(SampleConfig(iterations=3, start_threshold=0.5)) == pytest.approx([0.95, 0.05])


def test_the_default_takes_no_critic_and_says_so(folder):
    made, said = sample(folder, *FEW)
    assert made.network_calls == made.trunk_calls == 50 and 'guidance self' in said
