"""Recorded steps, with a graph that is not one: it computes again, at every replay, what was to be recorded."""

import pytest
import torch
from torch import Tensor

from core.bench.cases import Shape, base_vocabulary, model_config
from core.bench.training_cases import TRAINING, training_plan
from core.common.errors import UserError
from core.common.runtime import Runtime
from core.optimizer import make_capturable
from core.recorded_step import STEPS_BEFORE, Recording, StepRecorder
from core.training_step import TrainingState, training_step
from helpers.runs import run
from model import GPT

SHAPE = Shape(2, 2, 16, 16, 4)
SAMPLER = {'add_sampler_head': True, 'start_sampler_iteration': 6}


class Again:
    """In place of a CUDA graph."""

    def __init__(self, compute, taken):
        self.compute, self.taken, self.replays = compute, taken, 0

    def replay(self):
        self.replays += 1
        found = self.compute()
        for place, value in zip(numbers(self.taken), numbers(found), strict=True):
            place.copy_(value)


def numbers(taken):
    return [taken.losses.total, taken.losses.main, *taken.losses.heads.values(), *taken.norms.values()]


class Recorder(StepRecorder):
    """Records on the processor."""

    def __init__(self):
        self.last = None
        super().__init__()

    def step(self, kind, batch, body, device):
        found = super().step(kind, batch, body, device)
        self.last = found
        return found

    def _record(self, place, body):
        taken = self.last.copied()
        return Recording(Again(lambda: body(place), taken), place, taken)


@pytest.fixture(autouse=True)
def on_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'graph_pool_handle', lambda: None)
    monkeypatch.setattr(Tensor, 'pin_memory', lambda self: self)


def state(recorder, **changes):
    config = model_config(SHAPE, **changes)
    kind, plan = training_plan(config, SHAPE)
    made = TrainingState(GPT(config), base_vocabulary(config, torch.device('cpu')),
                         Runtime(torch.device('cpu'), torch.float32, False), plan, kind, TRAINING)
    made.recorder, made.average_weight = recorder, torch.zeros(())
    make_capturable(made.optimizers, torch.device('cpu'))
    return made


def rate(iteration):
    return 1e-2 / (1 + iteration)


@pytest.mark.parametrize('changes', [
    {}, {'dropout': 0.2}, {'attention_type': 'causal'}, SAMPLER, {'attention_type': 'block', 'block_length': (4,)}],
    ids=lambda changes: ' '.join(map(str, changes.values())) or 'plain')
def test_replayed_steps_are_the_steps_themselves(changes):
    recorded, plain = state(Recorder(), **changes), state(None, **changes)
    for iteration in range(14):
        found, expected = (training_step(one, iteration, rate(iteration)) for one in (recorded, plain))
        assert (found.total, found.main, found.heads) == (expected.total, expected.main, expected.heads)
        assert recorded.gradient_norms == plain.gradient_norms
    assert recorded.recorder.recorded >= (2 if changes is SAMPLER else 1)
    assert sum(one.graph.replays for one in recorded.recorder._recordings.values()) >= 4
    for one, other in ((recorded.model, plain.model), (recorded.averaged, plain.averaged)):
        assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_rates_in_tensors_are_those_in_numbers():
    tensors, floats = state(None), state(None)
    floats.average_weight = 0.0
    for optimizer in floats.optimizers:
        for group in optimizer.param_groups:
            group['lr'] = 0.0
    for iteration in range(5):
        for one in (tensors, floats):
            training_step(one, iteration, rate(iteration))
    assert all(isinstance(group['lr'], Tensor) for one in tensors.optimizers for group in one.param_groups)
    for one, other in ((tensors.model, floats.model), (tensors.averaged, floats.averaged)):
        for mine, theirs in zip(one.parameters(), other.parameters()):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_a_critic_is_never_recorded():
    made = state(Recorder(), add_sampler_head=True, add_critic_head=True, start_critic_iteration=2)
    for iteration in range(STEPS_BEFORE + 6):
        training_step(made, iteration, 1e-2)
    assert made.recorder.recorded == 0 and sum(made.recorder._seen.values()) == 2


def test_what_cannot_be_recorded_runs_as_ever_and_one_line_says_so(monkeypatch, capsys):
    class Refused:
        def __init__(self, *words, **more):
            pass

        def __enter__(self):
            for weight in made.model.parameters():  # as a backward pass that was broken off leaves it
                weight.grad = torch.ones_like(weight)
            raise RuntimeError('operation not permitted when stream is capturing\nmore words')

        def __exit__(self, *words):
            pass

    monkeypatch.setattr(torch.cuda, 'CUDAGraph', object)
    monkeypatch.setattr(torch.cuda, 'graph', Refused)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
    made, plain = state(StepRecorder()), state(None)
    for iteration in range(STEPS_BEFORE + 3):
        found, expected = (training_step(one, iteration, 1e-2) for one in (made, plain))
        assert found.total == expected.total
    said = capsys.readouterr()
    assert (said.out + said.err).count('steps are not recorded as CUDA graphs (operation not permitted') == 1


@pytest.mark.parametrize('options, words', [
    (['--cuda_graphs=True', '--device=cpu'], ['the device is cpu']),
    (['--cuda_graphs=True', '--device=cpu', '--gradient_accumulation_steps=2', '--skip_spikes=6'],
     ['the device is cpu', 'gradient_accumulation_steps is 2', 'skip_spikes is 6.0'])])
def test_what_cannot_be_recorded_is_refused(small_corpus, options, words):
    with pytest.raises(UserError) as raised:
        run('--out_dir=out', *options)
    assert str(raised.value).splitlines() == [f'cuda_graphs is True, but {word}; leave one of them out'
                                              for word in words]
