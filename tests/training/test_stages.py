"""When each part of the model trains, and with what weight."""

import pytest

from core.checkpoints.heads import CRITIC, HEADS, SAMPLER, not_begun
from core.stages import Stage, all_heads_trained_from, stage_at, trains
from helpers.toys import toy_config
from model import GPT

STAGED = {'add_sampler_head': True, 'start_sampler_iteration': 2, 'add_critic_head': True,
          'start_critic_iteration': 4, 'end_critic_iteration': 8}


def test_stages_begin_at_their_iterations():
    config = toy_config(**STAGED)
    assert [stage_at(config, iteration) for iteration in range(6)] == [Stage({})] * 2 + \
        [Stage({'sampler': 1.0})] * 2 + [Stage({'sampler': 1.0, 'critic': weight}) for weight in (0.125, 0.25)]
    assert stage_at(toy_config(), 100) == Stage({})
    assert all_heads_trained_from(config) == 8 and all_heads_trained_from(toy_config()) == 0
    assert all_heads_trained_from(toy_config(add_sampler_head=True, start_sampler_iteration=3)) == 4


def test_alpha_grows_from_its_first_to_its_last_value():
    config = toy_config(**STAGED, critic_alpha=0.5)
    weights = [CRITIC.weight_at(config, iteration) for iteration in (3, 4, 5, 7, 8, 100)]
    assert weights == [0, 0.125, 0.25, 0.5, 0.5, 0.5]
    at_once = toy_config(**{**STAGED, 'end_critic_iteration': 4}, critic_alpha=0.5)
    assert [CRITIC.weight_at(at_once, iteration) for iteration in (3, 4)] == [0, 0.5]


def test_a_frozen_trunk_waits_for_its_iteration():
    config = toy_config(add_critic_head=True, freeze_transformer=True, unfreeze_at_iteration=3)
    assert [stage_at(config, iteration).trunk for iteration in range(5)] == [False, False, False, True, True]
    assert not stage_at(toy_config(add_critic_head=True, freeze_transformer=True), 10 ** 9).trunk


def test_every_head_is_named_as_the_model_has_it():
    """The module, its parameters and its matrices, so that no row is silently without effect."""
    model = GPT(toy_config(**STAGED))
    names = [name for name, _ in model.named_parameters()]
    reads_rows = GPT(toy_config(**STAGED, sampler_kind='layer_neighbours'))
    every = {*names, *(name for name, _ in reads_rows.named_parameters())}
    for head in HEADS:
        assert getattr(model, head.module) is not None and any(name.startswith(f'{head.module}.') for name in names)
        assert all(f'{head.module}.{name}' in every for name in head.matrices)
    modules = {name.split('.')[0] for name in names}
    assert modules == {'transformer', *(head.module for head in HEADS)}
    assert {module for module in modules if trains(Stage({'critic': 1.0}, trunk=False), module)} == {'critic_head'}
    assert trains(Stage({}, trunk=False), 'scorer') and trains(Stage({}), 'transformer')


@pytest.mark.parametrize('steps, sampler, critic',
                         [(2, False, False), (3, True, False), (4, True, False), (5, True, True)])
def test_a_head_has_begun_once_a_step_has_trained_it(steps, sampler, critic):
    config = toy_config(**STAGED)
    assert (SAMPLER.has_begun(config, steps), CRITIC.has_begun(config, steps)) == (sampler, critic)
    said = [line for head in HEADS for line in not_begun(head, config, steps)]
    assert [line.split()[1] for line in said] == ['sampler'] * (not sampler) + ['critic'] * (not critic)
    assert not CRITIC.has_begun(toy_config(), 100) and not_begun(CRITIC, toy_config(), 0) == []
