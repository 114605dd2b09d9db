"""Models from checkpoints: what is built, what initialises another model, and what a run may go on with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from core.checkpoints.weights import (build_model, check_resume, initialise_from, load_weights, model_config_from_dict,
                                      model_config_to_dict)
from core.common.errors import UserError
from helpers.checkpoints import HEADS, SMALL, assert_same, checkpoint_of
from model import GPT, GPTConfig, ModelMode


def test_build_model_takes_the_averaged_weights(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    averaged, last = build_model(checkpoint), build_model(checkpoint, use_ema=False)
    assert not averaged.training and averaged.config == HEADS
    assert torch.equal(averaged.lm_head.weight, checkpoint.ema['transformer.wte.weight'])
    assert torch.equal(last.lm_head.weight, checkpoint.model['transformer.wte.weight'])
    assert not torch.equal(averaged.lm_head.weight, last.lm_head.weight)
    without = build_model(replace(checkpoint, ema=None))
    assert torch.equal(without.critic_head.bias, last.critic_head.bias)


def test_other_weights_are_listed(saved: Path) -> None:
    weights = dict(load_checkpoint(saved).model)
    names = [name for name in weights if name.startswith('sampler_head.')]
    assert len(names) > 5
    for name in names:
        del weights[name]
    weights['extra.weight'] = torch.ones(1)
    weights['critic_head.bias'] = torch.ones(3)
    model = GPT(HEADS, seed=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(model, weights, 'here')
    missing, superfluous, shapes = str(error.value).splitlines()
    assert f'here lacks weights of this model ({", ".join(names[:5])} and {len(names) - 5} more)' in missing
    assert '(extra.weight)' in superfluous and '(critic_head.bias (3,) instead of (1,))' in shapes
    assert_same(dict(model.state_dict()), before)


def test_model_config_travels_as_built_in_types() -> None:
    config = replace(HEADS, dropout=0.25)
    values = model_config_to_dict(config)
    assert {type(value) for value in values.values()} <= {int, float, str, bool, list, type(None)}
    assert model_config_from_dict(values, 'c.pt') == config
    with pytest.raises(UserError, match=r'c.pt describes its model with unknown options \(n_wheels\)'):
        model_config_from_dict(values | {'n_wheels': 4}, 'c.pt')
    with pytest.raises(UserError, match='c.pt describes a model that cannot be built: n_embd'):
        model_config_from_dict(values | {'n_embd': 7}, 'c.pt')
    with pytest.raises(UserError, match='c.pt describes a model that cannot be built'):
        model_config_from_dict(values | {'n_embd': 'wide'}, 'c.pt')


def initialised(config: GPTConfig, path: Path, vocabulary_hash: str = 'v' * 64) -> tuple[GPT, list[str]]:
    model, said = GPT(config, seed=99), []
    initialise_from(model, path, vocabulary_hash, said.append)
    return model, said


def test_initialising_drops_superfluous_heads(saved: Path) -> None:
    ema = load_checkpoint(saved).ema
    model, said = initialised(SMALL, saved)
    assert all(torch.equal(parameter, ema[name]) for name, parameter in model.named_parameters())
    assert [line.split()[0] for line in said] == ['initialised', 'critic_head', 'sampler_head']
    assert said[1].endswith('was dropped')


def test_initialising_starts_missing_heads_fresh(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / 'c.pt', checkpoint_of(GPT(SMALL)).to_payload())
    model, said = initialised(HEADS, tmp_path / 'c.pt')
    fresh = GPT(HEADS, seed=99)
    assert torch.equal(model.sampler_head.input.weight, fresh.sampler_head.input.weight)
    assert torch.equal(model.lm_head.weight, load_checkpoint(tmp_path / 'c.pt').ema['transformer.wte.weight'])
    assert said[1:] == ['critic_head is not in the checkpoint and starts fresh',
                        'sampler_head is not in the checkpoint and starts fresh']
    classifier, said = initialised(replace(SMALL, mode=ModelMode.TOKEN_CLASSIFIER), tmp_path / 'c.pt')
    assert torch.equal(classifier.transformer['wte'].weight, model.lm_head.weight)
    assert said[1] == 'classifier is not in the checkpoint and starts fresh'


@pytest.mark.parametrize('predicts', ['own', 'next'])
def test_a_block_model_that_begins_as_a_causal_one_is_told_of_the_shift(tmp_path: Path, predicts: str) -> None:
    causal = replace(SMALL, attention_type='causal')
    save_checkpoint(tmp_path / 'c.pt', replace(checkpoint_of(GPT(causal)), kind='causal').to_payload())
    block = replace(SMALL, attention_type='block', block_length=(1,), predicts=predicts)
    said = initialised(block, tmp_path / 'c.pt')[1]
    assert ['--predicts=next keeps' in line for line in said] == [False, True][:2 if predicts == 'own' else 1]


@pytest.mark.parametrize(('change', 'words'), [
    ({'n_layer': 2}, r'does not fit this model \(transformer.h.1'),
    ({'n_embd': 16}, r'transformer.wte.weight \(9, 8\) instead of \(9, 16\)'),
    ({'position_encoding': 'absolute'}, 'transformer.wpe.weight'),
    ({'sampler_context': 2}, r'sampler_head.input.weight \(8, 24\) instead of \(8, 40\)'),
    ({'sampler_output': 'shared_detached'}, 'sampler_head.output_head.weight'),
])
def test_initialising_refuses_other_shapes(saved: Path, change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        initialised(replace(HEADS, **change), saved)


def test_initialising_refuses_half_a_head(tmp_path: Path) -> None:
    """A head counts as a whole: one that lacks a matrix is not a fresh head."""
    partial = GPT(replace(HEADS, sampler_output='shared_detached'))
    save_checkpoint(tmp_path / 'c.pt', checkpoint_of(partial).to_payload())
    with pytest.raises(UserError, match=r'does not fit this model \(sampler_head.output_head.weight\)'):
        initialised(HEADS, tmp_path / 'c.pt')


def test_initialising_refuses_another_vocabulary(saved: Path) -> None:
    with pytest.raises(UserError, match=r'another vocabulary \(9 ids, this model 12\)'):
        initialised(replace(HEADS, vocab_size=12), saved, 'w' * 64)


def test_resuming_lists_differences(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    same = model_config_to_dict(HEADS)
    assert check_resume(checkpoint, same, 'v' * 64, 'd' * 64) == []
    older = replace(checkpoint, model_config={name: value for name, value in checkpoint.model_config.items()
                                              if name not in ('sampler_n_embd', 'sampler_zero_hidden', 'sampler_kind')})
    assert check_resume(older, same, 'v' * 64, 'd' * 64) == [] and build_model(older).sampler_head is not None
    with pytest.raises(UserError, match='sampler_zero_hidden: False in the checkpoint, True now'):
        check_resume(older, same | {'sampler_zero_hidden': True}, 'v' * 64, 'd' * 64)
    with pytest.raises(UserError, match="sampler_kind: 'neighbours' in the checkpoint, 'layer' now"):
        check_resume(older, same | {'sampler_kind': 'layer'}, 'v' * 64, 'd' * 64)
    assert check_resume(checkpoint, same | {'dropout': 0.5}, 'v' * 64, 'd' * 64) == [
        'resuming with another dropout: 0.0 in the checkpoint, 0.5 now']
    for force in (False, True):
        with pytest.raises(UserError) as error:
            check_resume(checkpoint, same | {'n_layer': 3, 'add_critic_head': False}, 'v' * 64, 'd' * 64, force)
        first, second = str(error.value).splitlines()
        assert 'add_critic_head: True in the checkpoint, False now' in first
        assert 'n_layer: 1 in the checkpoint, 3 now' in second


def test_resuming_on_other_data_needs_force(saved: Path) -> None:
    checkpoint, same = load_checkpoint(saved), model_config_to_dict(HEADS)
    with pytest.raises(UserError, match='another corpus: dddddddddddd in the checkpoint, eeeeeeeeeeee now'):
        check_resume(checkpoint, same, 'v' * 64, 'e' * 64)
    with pytest.raises(UserError, match='another vocabulary'):
        check_resume(checkpoint, same, 'w' * 64, 'd' * 64)
    assert len(check_resume(checkpoint, same, 'w' * 64, 'e' * 64, force=True)) == 2
