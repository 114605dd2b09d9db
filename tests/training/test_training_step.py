"""Steps: stage gates, isolation of the sampler head, exact resume, averaging, freezing, and ranks."""

import copy
import dataclasses
import math
import os
import runpy
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed

from core.batches import RowShare, unmasking_batches
from core.checkpoints.heads import CRITIC
from core.checkpoints.kinds import CheckpointKind
from core.common.drawing import allowed_ids
from core.common.randomness import RowRandom
from core.common.runtime import Runtime
from core.noise import Corruption, seen_neighbours
from core.sampler_head import SAMPLER_KINDS
from core.stages import Stage, stage_at
from core.training_step import TrainingState, training_step
from helpers.toys import V0, toy_config, toy_plan, toy_settings, toy_state
from model import GPT, GPTConfig
from sample_utils import prepare_sampler_inputs

STAGED = {'add_sampler_head': True, 'start_sampler_iteration': 2, 'add_critic_head': True,
          'start_critic_iteration': 4, 'end_critic_iteration': 8}


def weights(state):
    return {name: parameter.detach().clone() for name, parameter in state.model.named_parameters()}


def same_losses(one, other):
    """Bit for bit, every part."""
    return one.heads.keys() == other.heads.keys() and all(
        a is b is None or torch.equal(a, b) for a, b in
        zip((one.total, one.main, one.sums, *one.heads.values()),
            (other.total, other.main, other.sums, *other.heads.values())))


def test_parts_of_the_loss_appear_with_their_stage():
    state = toy_state(toy_config(**STAGED), toy_plan(sampler_context=1))
    for iteration in range(6):
        losses = training_step(state, iteration, 1e-2)
        assert [*losses.heads] == ['sampler'] * (iteration >= 2) + ['critic'] * (iteration >= 4)
        expected = losses.main + (losses.heads['sampler'] if iteration >= 2 else 0)
        if iteration >= 4:
            expected = expected + CRITIC.weight_at(state.model.config, iteration) * losses.heads['critic']
        assert losses.total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_heads_do_not_move_before_their_stage():
    state = toy_state(toy_config(**STAGED), toy_plan(sampler_context=1))
    for iteration in range(5):
        before = weights(state)
        training_step(state, iteration, 1e-2)
        moved = {name.split('.')[0] for name, weight in weights(state).items() if not torch.equal(weight, before[name])}
        assert moved == {'transformer'} | ({'sampler_head'} if iteration >= 2 else set()) | \
            ({'critic_head'} if iteration >= 4 else set())


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
@pytest.mark.parametrize('kind', SAMPLER_KINDS)
def test_the_trunk_is_bit_identical_with_and_without_a_sampler_head(optimizer, kind):
    """Dropout, accumulation and clipping included, until the critic would start."""
    plain = toy_state(toy_config(dropout=0.2), toy_plan(micro_steps=2), optimizer=optimizer, grad_clip=0.1)
    config = toy_config(dropout=0.2, add_sampler_head=True, sampler_kind=kind, start_sampler_iteration=1)
    headed = toy_state(config, toy_plan(micro_steps=2, neighbours=seen_neighbours(config)), optimizer=optimizer,
                       grad_clip=0.1)
    with torch.no_grad():
        for name, parameter in headed.model.named_parameters():
            if name in dict(plain.model.named_parameters()):
                parameter.copy_(dict(plain.model.named_parameters())[name])
    for iteration in range(6):
        first, second = training_step(plain, iteration, 1e-2), training_step(headed, iteration, 1e-2)
        assert torch.equal(first.main, second.main)
    found = weights(headed)
    for name, weight in weights(plain).items():
        assert torch.equal(weight, found[name]), name


def saved_bytes(state):
    """Bytes that the graph of a step's losses holds, without the weights."""
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        training_step(state, 0, 1e-2)
    own = {parameter.data_ptr() for parameter in state.model.parameters()}
    return sum(size for place, size in kept.items() if place not in own)


@pytest.mark.parametrize('kind', ['unmasking', 'causal', 'remasking', 'judge'])
def test_layers_computed_again_change_no_number(kind):
    """Losses and weights bit for bit, dropout included, through all three stages, a frozen trunk's too."""
    changes = {'unmasking': STAGED, 'causal': {'attention_type': 'causal'}, 'remasking': {},
               'judge': {'mode': 'sequence_scorer'}}[kind]
    corruption = Corruption(V0, V0 + 3) if kind in ('remasking', 'judge') else None
    plan = toy_plan(sampler_context=int(kind == 'unmasking'), corruption=corruption)
    for frozen in {'unmasking': ({}, {'freeze_transformer': True, 'start_sampler_iteration': 0})}.get(kind, ({},)):
        config = toy_config(**{**changes, 'n_layer': 2, 'dropout': 0.3, **frozen})
        plain, again = (toy_state(config, plan, kind, activation_checkpointing=wanted) for wanted in (False, True))
        assert again.model.transformer['h'][0].recompute and not again.averaged.transformer['h'][0].recompute
        for iteration in range(6):
            losses = [training_step(state, iteration, 1e-2) for state in (plain, again)]
            assert same_losses(*losses)
        assert all(torch.equal(weight, weights(again)[name]) for name, weight in weights(plain).items())


def test_layers_computed_again_keep_their_input_only():
    """One more layer adds its input, [B, T, D] in float32, to what is kept; otherwise 22 times that."""
    plan, grown = toy_plan(batch_size=8), {}  # [B, T, D] = [8, 4, 64]
    for wanted in (False, True):
        two, three = (saved_bytes(toy_state(toy_config(n_layer=layers, n_embd=64), plan,
                                            activation_checkpointing=wanted)) for layers in (2, 3))
        grown[wanted] = (three - two) / (8 * 4 * 64 * 4)
    assert grown[True] == 1 and 22 <= grown[False] < 22.5  # 22 as in docs/memory.md; and the norms' factors


def test_gradient_norms_are_those_before_clipping():
    """Of everything but the sampler head, and of that head alone, against gradients taken by hand."""
    config, plan = toy_config(add_sampler_head=True), toy_plan(sampler_context=1)
    state, other = (toy_state(config, plan, grad_clip=clip) for clip in (1e-3, 0.0))
    training_step(state, 0, 1e-2)
    batch, = unmasking_batches(plan, 0, int)
    other.objective(batch, stage_at(config, 0), RowRandom(plan.seed, 0, batch.rows)).total.backward()
    gradients = [(name, one.grad) for name, one in other.model.named_parameters() if one.grad is not None]
    for whose, of_head in (('main', False), ('sampler', True)):
        expected = sum(grad.square().sum() for name, grad in gradients if name.startswith('sampler_head') == of_head).sqrt()
        assert state.gradient_norms[whose].item() == pytest.approx(expected.item(), rel=1e-5) and expected > 1e-2
    assert state.gradient_norms.keys() == {'main', 'sampler'}


def test_average_follows_the_weights():
    state = toy_state(toy_config(), toy_plan())
    expected = {name: weight.double() for name, weight in weights(state).items()}
    for iteration in range(30):
        training_step(state, iteration, 1e-2)
        decay = min(0.9, (1 + iteration) / (10 + iteration))
        expected = {name: decay * value + (1 - decay) * weights(state)[name] for name, value in expected.items()}
    for name, parameter in state.averaged.named_parameters():
        assert torch.allclose(parameter.double(), expected[name], atol=1e-5)
        assert not torch.equal(parameter, weights(state)[name]) and not parameter.requires_grad


def test_a_frozen_trunk_waits_and_then_moves_slower():
    config = toy_config(**STAGED, freeze_transformer=True, unfreeze_at_iteration=3, unfreeze_lr_multiplier=0.5)
    state = toy_state(config, toy_plan(sampler_context=1))
    for iteration in range(2, 4):
        before = weights(state)
        training_step(state, iteration, 1e-2)
        moved = {name.split('.')[0] for name, weight in weights(state).items() if not torch.equal(weight, before[name])}
        assert moved == ({'sampler_head'} if iteration == 2 else {'sampler_head', 'transformer'})
    rates = {(group['trunk'], group['lr']) for optimizer in state.optimizers for group in optimizer.param_groups}
    assert rates == {(True, 0.005), (False, 0.01)}


def test_a_step_does_not_depend_on_what_ran_before_it():
    """Drawing from torch's own generator in between, as evaluation or sampling might, changes nothing."""
    results = []
    for disturb in (False, True):
        state = toy_state(toy_config(**STAGED, dropout=0.3), toy_plan(sampler_context=1))
        for iteration in range(6):
            if disturb:
                torch.rand(iteration + 1)
            training_step(state, iteration, 1e-2)
        results.append(weights(state))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize('stop, kind', [*((stop, 'neighbours') for stop in (1, 2, 3, 4, 5, 7)), (4, 'layer'),
                                        (5, 'rerun')])
def test_resume_is_exact(stop, kind):
    """Stop after any number of steps, dropout, accumulation and every stage border crossed: bitwise the same."""
    config = toy_config(**STAGED, sampler_kind=kind, dropout=0.3)

    def fresh():
        return toy_state(config, toy_plan(micro_steps=2, neighbours=seen_neighbours(config)))

    whole, losses = fresh(), []
    for iteration in range(8):
        losses.append(training_step(whole, iteration, 1e-2))
    first = fresh()
    for iteration in range(stop):
        training_step(first, iteration, 1e-2)
    saved = copy.deepcopy((first.model.state_dict(), first.averaged.state_dict(),
                           [optimizer.state_dict() for optimizer in first.optimizers]))
    second = fresh()
    second.model.load_state_dict(saved[0])
    second.averaged.load_state_dict(saved[1])
    for optimizer, values in zip(second.optimizers, saved[2]):
        optimizer.load_state_dict(values)
    for iteration in range(stop, 8):
        found = training_step(second, iteration, 1e-2)
        assert same_losses(found, losses[iteration])
    for one, other in ((whole.model, second.model), (whole.averaged, second.averaged)):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
    for one, other in zip(whole.optimizers, second.optimizers):
        for left, right in zip(one.state_dict()['state'].values(), other.state_dict()['state'].values()):
            assert all(torch.equal(torch.as_tensor(left[key]), torch.as_tensor(right[key])) for key in left)


RANKS = '''
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
from helpers.toys import toy_config, toy_plan, toy_state
import core.objective
from core.common.runtime import start_runtime, stop_runtime
from core.training_step import training_step
runtime = start_runtime('cpu', 'float32', False, width=8, iterations=8)
config = toy_config(add_sampler_head=True, start_sampler_iteration=2, add_critic_head=True, start_critic_iteration=4,
                    end_critic_iteration=8)
plan = toy_plan(sampler_context=1, batch_size=4, micro_steps=4 // runtime.world_size, rank=runtime.rank,
                world_size=runtime.world_size, loss_weighting='masked_mean', critic_row_stride=2)
state = toy_state(config, plan, activation_checkpointing=runtime.world_size > 1)
state.runtime = runtime
if runtime.world_size > 1:
    core.objective.MOST_LOGITS = 3 * config.vocab_size
forward = state.objective.forward
def bad_once(*given):
    losses = forward(*given)
    spoiled = given[-1].iteration == 5 and runtime.rank == runtime.world_size - 1
    return losses._replace(total=losses.total * float('nan')) if spoiled else losses
state.objective.forward = bad_once
found = [training_step(state, i, 1e-2) for i in range(8)]
losses = [[loss.total.item(), loss.main.item(), *(loss.heads.get(name, torch.tensor(-1.0)).item()
                                                  for name in ('sampler', 'critic'))] for loss in found]
found = losses, state.model.state_dict(), tuple(state.guard.skipped())
torch.save(found, f'{{sys.argv[1]}}.{{runtime.rank}}')
state.leave_ranks()
stop_runtime(runtime)
'''


def test_two_ranks_give_the_losses_of_one(tmp_path, monkeypatch):
    """gloo, all three stages, two micro-steps a rank, against one process on the same global batch. The ranks take
    their losses in chunks of three positions and compute their layers again. One step is bad on the last rank alone,
    and all of them skip it."""
    tests = Path(__file__).parent.parent
    script = tmp_path / 'ranks.py'
    script.write_text(RANKS.format(root=str(tests.parent), tests=str(tests)))
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(script)]
    result = subprocess.run([*command, str(tmp_path / '2')], env=environment, capture_output=True, text=True,
                            timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    monkeypatch.setattr(sys, 'argv', [str(script), str(tmp_path / '1')])
    monkeypatch.setattr(sys, 'path', [*sys.path])
    runpy.run_path(str(script), run_name='__main__')
    found = {ranks: torch.load(tmp_path / f'{ranks}.0') for ranks in (1, 2)}
    assert torch.allclose(torch.tensor(found[1][0]), torch.tensor(found[2][0]), rtol=2e-3, atol=2e-4,
                          equal_nan=True)
    assert torch.allclose(torch.tensor(found[1][0][:3]), torch.tensor(found[2][0][:3]), rtol=1e-4)
    for one, other in zip(found[1][1].values(), found[2][1].values()):
        assert torch.allclose(one, other, atol=5e-3)
    other_rank = torch.load(tmp_path / '2.1')
    assert all(torch.equal(one, other) for one, other in zip(found[2][1].values(), other_rank[1].values()))
    assert found[1][2] == found[2][2] == other_rank[2] == (1, 0)
    assert math.isnan(found[2][0][5][0]) and math.isfinite(found[2][0][6][0])


def test_nothing_holds_the_ranks_together_once_they_are_left():
    """A wrapper that outlives the group of processes would wait for a thread that waits for it."""
    distributed.init_process_group('gloo', store=distributed.HashStore(), rank=0, world_size=1)
    try:
        state = toy_state(toy_config(), toy_plan())
        state.runtime = dataclasses.replace(state.runtime, world_size=2)
        state.enter(Stage({}))
        wrapper = weakref.ref(state.parallel)
        batch, *_ = unmasking_batches(state.plan, 0, lambda count: count)
        state.parallel(batch, Stage({}), None).total.backward()
        assert wrapper() is not state.objective
        state.leave_ranks()
        assert wrapper() is None and state.parallel is state.objective
    finally:
        distributed.destroy_process_group()


def test_a_trained_head_knows_more_than_the_trunk(small_corpus):
    """Given both true neighbours the head's cross-entropy at masked positions is far below the trunk's; told nothing,
    it is no better; and it has learned to use one neighbour alone."""
    vocabulary = small_corpus.vocabulary
    config = GPTConfig(block_size=32, vocab_size=vocabulary.size, n_layer=1, n_head=2, n_embd=32,
                       mask_token_id=vocabulary.mask_token_id, add_sampler_head=True)
    allowed = allowed_ids(vocabulary.size, vocabulary.base_size)
    plan = toy_plan(tokens=small_corpus.tokens('train'), block_size=32, batch_size=16,
                    mask_token_id=vocabulary.mask_token_id, sampler_context=1, loss_weighting='masked_mean')
    state = TrainingState(GPT(config), allowed, Runtime(torch.device('cpu'), torch.float32, False), plan,
                          CheckpointKind.UNMASKING, toy_settings(weight_decay=0.0))
    for iteration in range(250):
        training_step(state, iteration, 1e-2)
    model = state.averaged
    held_out = plan._replace(tokens=small_corpus.tokens('val'), rows=RowShare(128))
    batch, = unmasking_batches(held_out, 0, lambda count: count)
    masked = (batch.inputs == vocabulary.mask_token_id)
    masked[:, [0, -1]] = False  # positions with two neighbours
    with torch.no_grad():
        hidden, truth = model.encode(batch.inputs)[masked], batch.targets[masked]
        left, right = batch.targets.roll(1, 1)[masked], batch.targets.roll(-1, 1)[masked]
        trunk = model.lm_head(hidden)

        def cost(logits):
            return torch.nn.functional.cross_entropy(logits.masked_fill(~allowed, -torch.inf), truth).item()

        found = {}
        for name, shown in (('both', (left, right)), ('left', (left, torch.full_like(left, -1))),
                            ('none', (torch.full_like(left, -1),) * 2)):
            inputs = prepare_sampler_inputs(hidden, torch.stack(shown, 1), model.neighbour_embedding()).sampler_input
            found[name] = cost(model.sampler_head(inputs, trunk, model.lm_head.weight))
    assert found['both'] < cost(trunk) - 0.4 and found['left'] < cost(trunk) - 0.15
    assert abs(found['none'] - cost(trunk)) < 0.3
