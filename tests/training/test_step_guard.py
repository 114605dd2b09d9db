"""Steps that must not be taken: nothing moves, they are counted, and the run goes on or ends with what was saved."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import core.step_guard
import core.trainer
from core.checkpoints.checkpoint import load_checkpoint
from core.common.runtime import Runtime
from core.step_guard import WINDOW, Skipped, StepGuard
from core.training_step import TrainingState, training_step
from helpers.runs import equal_runs, refused, run
from helpers.toys import toy_config, toy_plan, toy_state

STAGED = {'add_sampler_head': True, 'start_sampler_iteration': 0, 'add_critic_head': True, 'start_critic_iteration': 2,
          'end_critic_iteration': 4, 'dropout': 0.2}
CPU = torch.device('cpu')


def poison(state: TrainingState, at: set[int], change) -> None:
    """From now on `change` is made to the total loss of the iterations `at`."""
    forward = state.objective.forward

    def patched(*given):
        losses = forward(*given)
        return losses._replace(total=change(losses.total)) if given[-1].iteration in at else losses

    state.objective.forward = patched


def contents(state: TrainingState) -> list[torch.Tensor]:
    """Weights and optimizer states."""
    found = [*state.model.state_dict().values()]
    for optimizer in state.optimizers:
        for values in optimizer.state_dict()['state'].values():
            found += [torch.as_tensor(value) for value in values.values()]
    return copy.deepcopy(found)


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def not_a_number(state):
    poison(state, {3}, lambda total: total * math.nan)


def infinite_loss_alone(state):
    poison(state, {3}, lambda total: total + math.inf)


def infinite_gradient(state, name='transformer.h.0.mlp.c_fc.weight'):
    parameters = dict(state.model.named_parameters())
    calls = []

    def hook(gradient):
        calls.append(1)
        return gradient * (math.inf if len(calls) == 4 else 1)

    parameters[name].register_hook(hook)


def infinite_gradient_of_the_head(state):
    infinite_gradient(state, 'sampler_head.output_head.weight')


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
@pytest.mark.parametrize('fault', [not_a_number, infinite_loss_alone, infinite_gradient, infinite_gradient_of_the_head])
def test_a_step_without_finite_loss_and_gradient_changes_nothing(optimizer, fault):
    """Bitwise, optimizer states included; the steps after it are those of a run that never had it."""
    states = [toy_state(toy_config(**STAGED), toy_plan(sampler_context=1), optimizer=optimizer) for _ in range(2)]
    fault(states[0])
    for iteration in range(7):
        before = contents(states[0])
        losses = training_step(states[0], iteration, 1e-2)
        assert same(before, contents(states[0])) == (iteration == 3)
        assert states[0].guard.skipped() == Skipped(int(iteration >= 3), int(iteration == 3))
        assert losses.total.isfinite().item() == (iteration != 3 or 'gradient' in fault.__name__)
        if iteration != 3:
            training_step(states[1], iteration, 1e-2)
        else:
            states[1].set_rates(iteration, 1e-2)
            states[1].update_average()
    assert same(contents(states[0]), contents(states[1]))
    assert same([*states[0].averaged.parameters()], [*states[1].averaged.parameters()])


def test_a_bad_first_step_is_skipped_too():
    state = toy_state(toy_config(), toy_plan())
    before = [*copy.deepcopy(state.model).parameters()]
    poison(state, {0}, lambda total: total * math.nan)
    training_step(state, 0, 1e-2)
    assert same(before, [*state.model.parameters()])
    training_step(state, 1, 1e-2)
    assert all(value.isfinite().all() for value in contents(state)) and not same(before, [*state.model.parameters()])


def test_one_bad_micro_step_spoils_the_whole_step():
    state = toy_state(toy_config(), toy_plan(micro_steps=2))
    forward, calls = state.objective.forward, []

    def second_is_bad(*given):
        calls.append(1)
        losses = forward(*given)
        return losses._replace(total=losses.total * math.nan) if len(calls) == 2 else losses

    state.objective.forward = second_is_bad
    before = [*copy.deepcopy(state.model).parameters()]
    training_step(state, 0, 1e-2)
    assert same(before, [*state.model.parameters()]) and state.guard.skipped() == Skipped(1, 1)


def reference(values: np.ndarray, deviations: float) -> list[bool]:
    """The verdicts on (loss, norm) pairs [N, 2], written down from the definition."""
    verdicts = []
    for number, latest in enumerate(values):
        window = values[max(0, number - WINDOW):number]
        verdict = not np.isfinite(latest).all()
        for column in range(2):
            finite = window[np.isfinite(window[:, column]), column]
            if len(finite) >= WINDOW // 2:
                verdict |= bool(latest[column] > finite.mean() + deviations * finite.std())
        verdicts.append(verdict)
    return verdicts


@pytest.mark.parametrize('deviations', [2.0, 6.0])
def test_spikes_are_those_of_the_definition(deviations):
    """Noise, a spike of each number, values that are not finite, and a rise that lasts, soon taken as usual."""
    values = np.random.default_rng(0).normal(5, 0.1, (420, 2)).astype(np.float32)
    values[[30, 100], 0], values[[64, 130, 200], 1], values[[150, 151], [0, 1]] = 50, 20, [np.nan, np.inf]
    values[250:, 0] += 3
    guard = StepGuard(CPU, deviations)
    found = [bool(guard.refuses(number, *torch.tensor(pair))) for number, pair in enumerate(values)]
    assert found == reference(values.astype(np.float64), deviations)
    assert all(found[number] for number in (64, 100, 130, 200, 250)) and not found[30]
    assert deviations < 6 or not any(found[330:])
    assert guard.skipped().total == sum(found)
    usual = StepGuard(CPU, 0.0)
    assert sum(bool(usual.refuses(number, *torch.tensor(pair))) for number, pair in enumerate(values)) == 2


def test_the_guard_goes_on_as_it_was():
    values = torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    guard = StepGuard(CPU, 1.0)
    for number in range(100):
        guard.refuses(number, *values[number])
    other = StepGuard(CPU, 1.0)
    other.load_state_dict(copy.deepcopy(guard.state_dict()))
    for number in range(100, 200):
        assert torch.equal(guard.refuses(number, *values[number]), other.refuses(number, *values[number]))
    assert guard.skipped() == other.skipped() and guard.skipped().total > 5


class NoWaiting(TorchDispatchMode):
    """Fails where a tensor's value is asked for on the host, which on a GPU waits for all work before it."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), function
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize('spikes', [0.0, 6.0])
def test_a_step_does_not_wait_for_its_verdict(spikes):
    state = toy_state(toy_config(add_sampler_head=True), toy_plan(sampler_context=1), spike_deviations=spikes)
    batches = state.training.batches(state.plan, 0, lambda count: count)
    state.training = replace(state.training, batches=lambda *given: batches)
    with NoWaiting():
        training_step(state, 0, 1e-2)
        with pytest.raises(AssertionError):
            state.guard.counts[0].item()


def half_precision(config, **changes) -> TrainingState:
    return toy_state(config, toy_plan(sampler_context=1), runtime=Runtime(CPU, torch.float16, False), **changes)


def test_float16_scales_its_loss_and_gives_way_when_that_overflows():
    config = toy_config(add_sampler_head=True)
    state, exact = half_precision(config), toy_state(config, toy_plan(sampler_context=1))
    assert state.scaler.is_enabled() and not exact.scaler.is_enabled()
    state.scaler.load_state_dict(state.scaler.state_dict() | {'scale': 256.0})  # for which a toy has no overflow
    infinite_gradient(state)
    for iteration in range(8):
        before = contents(state)
        training_step(state, iteration, 1e-2)
        assert same(before, contents(state)) == (iteration == 3)
        assert state.scaler.get_scale() == (128 if iteration >= 3 else 256)
        if iteration != 3:
            training_step(exact, iteration, 1e-2)
    for one, other in zip(state.model.parameters(), exact.model.parameters()):
        assert torch.allclose(one, other, atol=0.03) and one.dtype is torch.float32
    assert state.guard.skipped() == Skipped(1, 0)


def test_float16_trains_heads_on_a_frozen_trunk():
    """One of the two optimizers then has no gradients at all."""
    state = half_precision(toy_config(add_critic_head=True, freeze_transformer=True))
    before = copy.deepcopy(state.model.state_dict())
    training_step(state, 0, 1e-2)
    moved = {name.split('.')[0] for name, value in state.model.state_dict().items()
             if not torch.equal(value, before[name])}
    assert moved == {'critic_head'}


# ---------------------------------------------------------------- in a run

@pytest.fixture(autouse=True)
def quick_runs(monkeypatch):
    """Runs without their picture and without measuring the machine."""
    monkeypatch.setattr(core.trainer.Run, 'draw_curve', lambda self: None)
    monkeypatch.setattr(Runtime, 'matrix_rate', lambda self: (1.0, 'nothing'))


def spoiled_runs(monkeypatch, at: set[int]) -> None:
    """Every run's loss is NaN at the iterations `at`."""
    real = core.trainer.TrainingState

    def spoiled(*given, **options):
        state = real(*given, **options)
        poison(state, at, lambda total: total * math.nan)
        return state

    monkeypatch.setattr(core.trainer, 'TrainingState', spoiled)


def test_a_run_counts_what_it_skipped_and_goes_on(small_corpus, monkeypatch, capsys):
    spoiled_runs(monkeypatch, {2, 5, 6})
    run('--log_interval=4')
    lines = [line for line in capsys.readouterr().out.splitlines() if 'skipped' in line]
    assert lines == [f'iter {iteration}: {more} more skipped ({total} in all), as loss or gradient was not finite'
                     for iteration, more, total in ((4, 1, 1), (8, 2, 3))]
    for name in ('ckpt.pt', 'ckpt_best.pt'):
        assert all(value.isfinite().all() for value in load_checkpoint(Path('out') / name).model.values())


def test_a_run_that_skips_on_and_on_ends_and_keeps_its_last_good_checkpoint(small_corpus, monkeypatch):
    monkeypatch.setattr(core.trainer, 'MOST_IN_A_ROW', 3)
    run('--out_dir=whole')
    with monkeypatch.context() as patch:
        spoiled_runs(patch, set(range(8, 100)))
        message = refused()
        assert 'the last 3 steps until iteration 10 were skipped' in message
        assert 'go on from out/ckpt.pt with --init_from=resume' in message
    latest, best = load_checkpoint('out/ckpt.pt'), load_checkpoint('out/ckpt_best.pt')
    assert latest.iteration == best.iteration == 8 and math.isfinite(best.best_value)
    run('--init_from=resume')
    equal_runs(Path('whole'), Path('out'))
    with monkeypatch.context() as patch:
        spoiled_runs(patch, set(range(100)))
        assert 'start again, as nothing was saved' in refused('--out_dir=never')


def test_a_resumed_run_skips_the_same_spikes(small_corpus, monkeypatch, capsys):
    monkeypatch.setattr(core.step_guard, 'WINDOW', 4)
    options = ('--skip_spikes=0.5', '--lr_decay_iters=12')
    run('--out_dir=whole', *options)
    run('--out_dir=parts', '--max_iters=8', *options)
    run('--out_dir=parts', '--init_from=resume', *options)
    assert 'or a spike' in capsys.readouterr().out
    equal_runs(Path('whole'), Path('parts'))
    counts = [load_checkpoint(f'{name}/ckpt.pt').guard['counts'].tolist() for name in ('whole', 'parts')]
    assert counts[0] == counts[1] and 1 <= counts[0][0] < 10
    assert 'skip_spikes is -1' in refused('--skip_spikes=-1')
