"""The checks of a GPU, tried on the processor: that they refuse to run without one, fail loudly, and see what is wrong."""

import json

import pytest
import torch
from torch.nn.attention import flex_attention

import core.bench.gpu_checks as gpu_checks
from bench import main
from core.bench.cases import Shape
from core.common.errors import UserError
from core.common.runtime import Runtime
from core.common.stream_attention import stream_tiles
from helpers.apple import emulated_gpu


def test_without_a_gpu_one_sentence_says_so():
    with pytest.raises(UserError, match='gpu_checks needs a CUDA GPU, but the device is cpu'):
        main(['--gpu_checks', '--device=cpu'])


def test_a_check_that_is_none_is_refused(monkeypatch):
    monkeypatch.setattr(gpu_checks, 'resolve_device', lambda name: 'cuda')
    with pytest.raises(UserError, match='speed.*host waits'):
        main(['--gpu_checks=speed', '--device=cuda'])


def test_a_failed_check_is_named_and_the_others_still_run(tmp_path, monkeypatch):
    def broken(device):
        raise gpu_checks.CheckFailed('3 is not 4')

    said = []
    monkeypatch.setattr(gpu_checks, 'resolve_device', lambda name: 'cuda')
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: None)
    monkeypatch.setattr(gpu_checks, 'CHECKS', {'one': broken, 'two': lambda device: {'rate': 7}})
    options = gpu_checks.BenchConfig(json=str(tmp_path / 'record.json'), gpu_checks='all')
    with pytest.raises(SystemExit) as ended:
        gpu_checks.run_gpu_checks(options, said.append)
    assert ended.value.code == 1 and said[-1] == '1 of 2 checks passed; failed: one' and 'FAILED' in said[0]
    found = json.loads((tmp_path / 'record.json').read_text())['checks']
    assert found['two']['passed'] and found['two']['rate'] == 7 and '3 is not 4' in found['one']['problem']


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(gpu_checks, 'SHAPES', dict.fromkeys(('small', 'large', 'medium'), Shape(2, 2, 16, 16, 8)))
    monkeypatch.setattr(gpu_checks, 'STEPS', 6)


def test_short_trainings_learn_and_are_alike_in_every_precision(tiny):
    facts = gpu_checks.check_precision(torch.device('cpu'))
    assert all(apart < gpu_checks.BF16_TOLERANCE for one in facts.values() for apart in one.values())
    configs = gpu_checks._configs(gpu_checks.SHAPES['small'])
    state = gpu_checks._state(configs['causal'], gpu_checks.SHAPES['small'],
                              gpu_checks._runtime(torch.device('cpu'), 'float32', False))
    losses = gpu_checks._losses(state, 40)
    assert losses[-1] < losses[0] - 0.3


def test_losses_that_differ_are_seen(tiny, monkeypatch):
    whole, calls = gpu_checks._losses, []

    def off(state, steps):
        calls.append(0)
        return [value * (1.05 if len(calls) == 2 else 1.0) for value in whole(state, steps)]

    monkeypatch.setattr(gpu_checks, '_losses', off)
    with pytest.raises(gpu_checks.CheckFailed, match='bfloat16'):
        gpu_checks.check_precision(torch.device('cpu'))


def test_two_trainings_of_one_seed_are_compared_bit_by_bit(tiny, monkeypatch):
    monkeypatch.setattr(gpu_checks, 'COMPILED', (False,))
    facts = gpu_checks.check_repeats(torch.device('cpu'))
    assert all(one['different'] == 0 for one in facts.values())
    whole, calls = gpu_checks._losses, []

    def off(state, steps):
        calls.append(0)
        found = whole(state, steps)
        if len(calls) == 2:
            next(state.model.parameters()).data[0, 0] += 1e-7  # tied: under two names
        return found

    monkeypatch.setattr(gpu_checks, '_losses', off)
    with pytest.raises(gpu_checks.CheckFailed, match="'different': 2"):
        gpu_checks.check_repeats(torch.device('cpu'))


def test_every_checked_step_runs_where_no_tensor_of_the_processor_may_meet_one_of_the_device(tiny):
    with emulated_gpu():
        for config in gpu_checks._configs(gpu_checks.SHAPES['small']).values():
            state = gpu_checks._state(config, gpu_checks.SHAPES['small'],
                                      gpu_checks._runtime(torch.device('mps'), 'float32', False))
            assert len(gpu_checks._losses(state, 2)) == 2


@pytest.fixture
def tiles_on_a_processor(tiny, monkeypatch):
    """Long rows that are short, tiles that pay, a compiler that does nothing, and no device to wait for."""
    monkeypatch.setattr(gpu_checks, 'LONG_ROWS', {16: 3, 24: 2})
    monkeypatch.setattr('core.objective.tiles_pay', lambda *shape: True)
    monkeypatch.setattr(flex_attention, '_validate_device', lambda *tensors: None)
    monkeypatch.setattr(flex_attention, '_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG', True)
    monkeypatch.setattr(torch, 'compile', lambda function, **options: function)
    monkeypatch.setattr(gpu_checks, '_counted_waits', lambda run: run() and [])
    monkeypatch.setattr(gpu_checks, '_apart_if_recorded', lambda *given: 0.0)
    monkeypatch.setattr(gpu_checks, '_runtime', lambda device, dtype, compile: Runtime(device, torch.float32, compile))


def test_tiles_are_compared_with_the_dense_mask(tiles_on_a_processor):
    facts = gpu_checks.check_streams(torch.device('cpu'))
    assert [one['block lengths'] for one in facts.values()] == [(8,), (1, 8, 24)]
    assert all(one['loss'] < 1e-5 and one['gradient'] < 1e-4 for one in facts.values())
    assert all(set(one['milliseconds']) == {'dense', 'tiles'} for one in facts.values())


def test_tiles_of_other_blocks_are_seen(tiles_on_a_processor, monkeypatch):
    monkeypatch.setattr('core.objective.stream_tiles', lambda block_length, length, device: stream_tiles(
        4, length, device))
    with pytest.raises(gpu_checks.CheckFailed, match='apart: .*16'):
        gpu_checks.check_streams(torch.device('cpu'))


def test_a_step_that_reads_no_tiles_is_seen(tiles_on_a_processor, monkeypatch):
    monkeypatch.setattr('core.objective.tiles_pay', lambda *shape: False)
    with pytest.raises(gpu_checks.CheckFailed, match='does not read tiles'):
        gpu_checks.check_streams(torch.device('cpu'))
