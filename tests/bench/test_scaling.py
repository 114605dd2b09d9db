"""Formulas of memory and time against the model, its real state, the allocator and torch's own count; the report."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import core.bench.scaling
import core.bench.scaling_run as scaling_run
import core.objective
from bench import main
from core.batches import BatchPlan, RowShare, unmasking_batches
from core.bench.cases import SPECIAL
from core.bench.options import BenchConfig
from core.bench.records import SCALING_FORMAT, SCALING_VERSION, read_json_record
from core.bench.scaling import (PLANNED, SIZES, Size, iteration_operations, link_bytes, micro_step_bytes, parameters,
                                peak_bytes, rank_operations, staying_bytes, update_bytes, update_operations)
from core.bench.scaling_run import KIND, measure_here, run_scaling, scaling_report
from core.bench.training_cases import TRAINING
from core.checkpoints.kinds import CheckpointKind
from core.common.drawing import allowed_ids
from core.common.errors import UserError
from core.common.runtime import Runtime
from core.noise import Masking, seen_neighbours
from core.training_step import TrainingState, training_step
from model import GPT, GPTConfig

BEGIN, END = KIND.begin, KIND.end
TINY = Size(2, 2, 16, 16, 20, rows=4, micro_steps=1, steps=2)
BROAD = Size(3, 2, 64, 64, 30, rows=16, micro_steps=1, steps=2)  # wide enough for what formulas leave out to be little
HEADS = {'sampler': 'own', 'sampler_n_embd': 96, 'critic': True}


def a_state(size):
    """A training state of `size` on this processor, and its plan."""
    base, config = size.vocab_size - SPECIAL, size.config
    masking = Masking(base, 'masked_mean', seen_neighbours(config), config.critic_row_stride,
                      config.critic_target_scope)
    plan = BatchPlan(np.random.default_rng(0).integers(0, base, 5000, dtype=np.uint16), 1, size.block_size,
                     RowShare(size.rows, size.micro_steps), masking)
    runtime = Runtime(torch.device('cpu'), torch.bfloat16 if size.bfloat16 else torch.float32, False)
    settings = dataclasses.replace(TRAINING, optimizer=size.optimizer, activation_checkpointing=size.recompute)
    return TrainingState(GPT(config), allowed_ids(size.vocab_size, base), runtime, plan, CheckpointKind.UNMASKING,
                         settings), plan


def predicted(plan, iteration):
    """N of the iteration's only micro-step."""
    batch, = unmasking_batches(plan, iteration, lambda count: count)
    return len(batch.positions)


# Weights

@settings(max_examples=25, deadline=None)
@given(layers=st.integers(1, 4), heads=st.integers(1, 4), half=st.integers(1, 9), vocabulary=st.integers(5, 300),
       length=st.integers(4, 40), context=st.integers(1, 3), width=st.none() | st.integers(1, 60),
       output=st.sampled_from([None, 'own', 'shared_detached']), critic=st.booleans(),
       positions=st.sampled_from(['rotary', 'absolute']))
def test_parameters_are_those_of_the_model(layers, heads, half, vocabulary, length, context, width, output, critic,
                                           positions):
    config = GPTConfig(block_size=length, vocab_size=vocabulary, n_layer=layers, n_head=heads, n_embd=2 * half * heads,
                       mask_token_id=0, position_encoding=positions, add_critic_head=critic, sampler_context=context,
                       add_sampler_head=output is not None, sampler_output=output or 'own',
                       sampler_n_embd=width if output == 'own' else None)
    with torch.device('meta'):
        assert parameters(config) == GPT(config).parameter_count()


@pytest.mark.parametrize('name', [*SIZES, *PLANNED])
def test_every_listed_size_is_a_model_and_survives_json(name):
    size = (SIZES | PLANNED)[name]
    assert Size(**json.loads(json.dumps(size.described()))) == size
    assert size.steps >= scaling_run.FEWEST_STEPS and not (size.sharded and size.optimizer == 'muon')
    assert not size.critic or size.rows % size.critic_row_stride == 0
    if parameters(size.config) < 2e8:  # a rotary table is made even on the meta device
        with torch.device('meta'):
            assert parameters(size.config) == GPT(size.config).parameter_count()


# Bytes

@pytest.mark.parametrize('size', [TINY, replace(TINY, **HEADS), replace(TINY, sampler='shared_detached'),
                                  replace(TINY, optimizer='adamw', **HEADS)])
def test_bytes_that_stay_are_those_of_the_state(size):
    state, _ = a_state(size)
    training_step(state, 0, 1e-3)
    held = [*state.model.parameters(), *state.averaged.parameters(), *state.model.parameters()]  # last: gradients
    held += [value for one in state.optimizers for moments in one.state.values() for name, value in moments.items()
             if name != 'step']
    assert staying_bytes(size) == sum(tensor.numel() * tensor.element_size() for tensor in held)


def allocated(call):
    """[(nanosecond, bytes more or less)] of `call`, and the nanosecond at which the first gradient norm is taken."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = profiled.profiler.kineto_results.events()
    border = min(one.start_ns() for one in events if one.name() == 'aten::_foreach_norm')
    return sorted((one.start_ns(), one.nbytes()) for one in events if one.name() == '[memory]'), border


@pytest.mark.parametrize('changes, most_logits', [
    ({}, 2 ** 25), ({'recompute': True}, 2 ** 25), (HEADS, 2 ** 25), ({'bfloat16': True}, 2 ** 25),
    ({'bfloat16': True, 'recompute': True}, 2 ** 25), ({'vocab_size': 2000, 'sampler': 'own'}, 2 ** 25),
    ({'vocab_size': 2000, 'sampler': 'shared_detached'}, 2 ** 19),
    ({'vocab_size': 4000, 'sampler': 'shared_detached', 'rows': 4}, 2 ** 17),
    ({'vocab_size': 4000, 'rows': 4}, 2 ** 17)])
def test_bytes_of_a_micro_step_and_of_the_update_are_what_the_allocator_gives(changes, most_logits, monkeypatch):
    """Of a single micro-step, which finds no gradients. What formulas leave out: norms' roots, ids, random numbers."""
    monkeypatch.setattr(core.objective, 'MOST_LOGITS', most_logits)
    monkeypatch.setattr(core.objective, 'MOST_LOGITS', most_logits)
    size = replace(BROAD, **changes)
    state, plan = a_state(size)
    training_step(state, 0, 1e-3)
    events, border = allocated(lambda: training_step(state, 1, 1e-3))
    held, micro_step, update = 0, 0, 0
    for moment, change in events:
        held += change
        micro_step, update = (max(micro_step, held), update) if moment < border else (micro_step, max(update, held))
    P = parameters(size.config)
    expected = micro_step_bytes(size, predicted(plan, 1)) + (2 * P if size.bfloat16 else 0)
    assert micro_step == pytest.approx(expected, rel=0.06)
    if not size.bfloat16 and size.vocab_size < 100:
        assert update - 4 * P == pytest.approx(update_bytes(size), rel=0.15)  # without the gradients


def test_bytes_by_hand():
    """Of one layer: 12 D^2 + 2 D + 2 D / H weights, all else by the text of docs/memory.md."""
    size = Size(2, 2, 16, 16, 20, rows=4)
    layer = 12 * 16 ** 2 + 2 * 16 + 2 * 8
    P, M = 20 * 16 + 16 + 2 * layer, 2 * 12 * 16 ** 2
    assert parameters(size.config) == P
    assert staying_bytes(size) == 20 * P - 4 * M
    assert staying_bytes(replace(size, bfloat16=True)) == 22 * P - 4 * M
    assert staying_bytes(replace(size, ranks=2)) == 24 * P - 4 * M
    assert staying_bytes(replace(size, optimizer='adamw')) == 20 * P
    assert staying_bytes(replace(size, optimizer='adamw', ranks=4, sharded=True)) == 5 * P + 4 * P
    assert update_operations(replace(size, bfloat16=True)) == 280 * 2 * 16 ** 3
    assert link_bytes(replace(size, ranks=4)) == 8 * P * 3 / 4 and link_bytes(size) == 0
    assert link_bytes(replace(size, optimizer='adamw', ranks=4, sharded=True)) == 2 * 12 * P * 3 / 4
    assert update_operations(size) == 176 * 2 * 16 ** 3 and update_operations(replace(size, optimizer='adamw')) == 0
    assert rank_operations(replace(size, ranks=4), 90) == \
        iteration_operations(replace(size, ranks=4), 90) / 4 + update_operations(size)


# Operations

@pytest.mark.parametrize('changes, most_logits', [
    ({}, 2 ** 25), ({'sampler': 'own'}, 2 ** 25), ({'sampler': 'own', 'sampler_n_embd': 96}, 2 ** 25),
    ({'sampler': 'shared_detached'}, 2 ** 25), ({'sampler': 'own'}, 2000), ({'sampler': 'shared_detached'}, 2000),
    ({'recompute': True}, 2 ** 25), ({'critic': True}, 2 ** 25), (HEADS, 2 ** 25),
    ({**HEADS, 'recompute': True}, 2 ** 25)])
def test_operations_are_those_that_torch_counts(changes, most_logits, monkeypatch):
    """To the last one, but for the critic's draws: they fill as many positions as are masked, not one in two."""
    monkeypatch.setattr(core.objective, 'MOST_LOGITS', most_logits)
    monkeypatch.setattr(core.objective, 'MOST_LOGITS', most_logits)
    size = replace(BROAD, **changes)
    state, plan = a_state(size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it knows no kernel of a CPU
        training_step(state, 0, 1e-3)
    expected = iteration_operations(size, predicted(plan, 0)) + update_operations(size)
    assert counter.get_total_flops() == (pytest.approx(expected, rel=0.02) if size.critic else expected)


# Growth

LISTED = st.sampled_from([*SIZES.values(), *PLANNED.values()])


@settings(max_examples=60, deadline=None)
@given(size=LISTED, field=st.sampled_from(['n_layer', 'n_embd', 'block_size', 'vocab_size', 'rows']))
def test_a_larger_size_takes_more_bytes_and_more_operations(size, field):
    larger = replace(size, **{field: 2 * getattr(size, field)})
    if field == 'n_embd' and size.sampler_n_embd is not None:
        larger = replace(larger, sampler_n_embd=2 * size.sampler_n_embd)
    few, many = size.positions, larger.positions
    assert peak_bytes(larger, many) > peak_bytes(size, few)
    count = size.micro_steps * size.ranks
    assert rank_operations(larger, many * count) > rank_operations(size, few * count)


@given(size=LISTED.filter(lambda one: one.sharded), ranks=st.integers(2, 64))
@settings(deadline=None)
def test_ranks_share_what_is_cut_and_nothing_else(size, ranks):
    one, more = replace(size, ranks=ranks), replace(size, ranks=ranks + 1)
    assert staying_bytes(more) < staying_bytes(one)
    whole = [replace(size, sharded=False, ranks=count) for count in (ranks, ranks + 1)]
    assert staying_bytes(whole[0]) == staying_bytes(whole[1]) > staying_bytes(one) or size.n_layer < 8


# Measuring

def test_a_step_of_a_size_is_measured_with_what_it_predicted():
    size = replace(TINY, micro_steps=2, steps=3, **HEADS)
    found = measure_here(size)
    assert found['parameters'] == parameters(size.config) and found['peak_bytes'] > 2 ** 20
    assert [len(found[name]) for name in ('seconds', 'rates', 'positions', 'predicted')] == [3] * 4
    assert found['predicted'] == [sum(one) for one in found['positions']]
    assert all(len(one) == 2 for one in found['positions']) and min(found['seconds'] + found['rates']) > 0


def test_what_an_empty_process_holds_is_taken_off_either_way(monkeypatch):
    asked = []

    def apart(name, size, tidy):
        asked.append((size.ranks, tidy, size.steps))
        empty = size.n_embd == scaling_run.EMPTY.n_embd
        return {'peak_bytes': (100 if tidy else 1000) + (0 if empty else 7), 'seconds': [9.0, 1.0, 3.0]}

    monkeypatch.setattr(scaling_run, 'measure_apart', apart)
    pair = replace(TINY, ranks=2, steps=5)
    record = scaling_run.measure_sizes({'one': TINY, 'two': replace(TINY, steps=5), 'pair': pair}, lambda line: None)
    assert [(one['tensor_bytes'], one['process_bytes']) for one in record['sizes'].values()] == [(7, 7)] * 3
    assert len(asked) == 2 * 3 + 2 * 2, 'nothing is measured once for each number of ranks'
    assert asked[-3:] == [(2, True, 3), (2, False, 3), (2, False, 5)] and 'peak_bytes' not in record['sizes']['one']


def test_processes_share_the_processors_and_a_failed_one_is_a_clear_sentence(monkeypatch):
    calls, codes = [], iter([0, 0, -9])

    def run(command, *, env, **more):
        calls.append((command, env))
        return SimpleNamespace(returncode=next(codes), stdout='said before\n{"peak_bytes": 5}\n', stderr='a\nb: c\n')

    monkeypatch.setattr(subprocess, 'run', run)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 4)
    monkeypatch.delenv('MALLOC_MMAP_THRESHOLD_', raising=False)
    assert scaling_run.measure_apart('one', TINY, True) == {'peak_bytes': 5}
    scaling_run.measure_apart('two', replace(TINY, ranks=2), False)
    assert [env['OMP_NUM_THREADS'] for _, env in calls] == ['4', '2']
    assert ['MALLOC_MMAP_THRESHOLD_' in env for _, env in calls] == [True, False]
    assert ['--nproc_per_node=2' in command for command, _ in calls] == [False, True]
    with pytest.raises(UserError, match=r'three could not be measured, .* code -9 \(b: c\); .* --sizes='):
        scaling_run.measure_apart('three', TINY, False)


def test_a_process_of_its_own_answers():
    found = scaling_run.measure_apart('one', TINY, True)
    assert found['parameters'] == parameters(TINY.config) and len(found['seconds']) == TINY.steps


# The report

MACHINE = {'versions': {'python': '3', 'torch': '2', 'numpy': '1'}, 'processor': 'P', 'processors': 2, 'threads': 2,
           'devices': [], 'fast_bfloat16': False, 'load_average': 0.5, 'platform': 'X', 'git_revision': 'abc'}


def a_record():
    """One size whose figures can be worked out by head."""
    size = replace(TINY, micro_steps=2, steps=3)
    operations = rank_operations(size, 80)
    return {'format': SCALING_FORMAT, 'version': SCALING_VERSION, 'machine': MACHINE, 'sizes': {'one': {
        'size': size.described(), 'parameters': parameters(size.config), 'tensor_bytes': 2 * peak_bytes(size, 48),
        'process_bytes': 5_000_000, 'seconds': [9.0, 0.5, 1.5], 'rates': [1.0, 4 * operations, 2 * operations],
        'positions': [[36, 36], [48, 32], [36, 44]], 'predicted': [72, 80, 80]}}}


def rows_of(text):
    return {cells[0]: cells[1:] for line in text.splitlines() if line.startswith('|')
            for cells in [[cell.strip() for cell in line.strip('|').split('|')]]}


def test_a_report_follows_its_record():
    row = rows_of(scaling_report(a_record()))['one']
    assert row[:6] == ['2', '16', '16', '20', '2 x 4', '1']
    # twice what the formula says of the largest micro-step; the first step counts for nothing; shares 1/2 and 1/3
    assert row[9:11] == ['2.00', '5'] and row[12:] == ['1.00', '42%']
    assert set(PLANNED) < rows_of(scaling_report(a_record())).keys()


def test_extrapolated_figures_name_what_they_assume():
    text = scaling_report(a_record())
    assert "not measured: eager, in bfloat16, at an assumed 40% of the H200's peak of 989 TFLOP/s" in text
    size = PLANNED['GPT-2, 8 GPUs']
    row = rows_of(text)['GPT-2, 8 GPUs']
    operations = rank_operations(size, size.positions * 5 * 8)
    assert float(row[9]) == pytest.approx(operations / (0.4 * 989e12), abs=0.005)
    assert float(row[7]) == pytest.approx(peak_bytes(size, size.positions) / 1e9, abs=0.05)


def test_a_record_is_shown_again_and_written_between_its_own_markers(tmp_path, capsys):
    page, kept = tmp_path / 'page.md', tmp_path / 'kept.json'
    page.write_text(f'before\n{BEGIN}\nold\n{END}\nafter\n<!-- bench.py writes from here -->\n')
    kept.write_text(json.dumps(a_record()))
    main(['--scaling', f'--from_json={kept}', f'--report={page}'])
    text = scaling_report(a_record())
    assert text in capsys.readouterr().out
    assert page.read_text() == f'before\n{BEGIN}\n\n{text}\n\n{END}\nafter\n<!-- bench.py writes from here -->\n'


def test_the_written_page_follows_the_written_record():
    """docs/results/scaling.md holds nothing typed by hand between its markers."""
    path = Path(__file__).parents[2] / 'docs' / 'results' / 'scaling.json'
    between = path.with_suffix('.md').read_text().split(BEGIN)[1].split(END)[0].strip()
    assert between == scaling_report(read_json_record(path, KIND))


def test_what_is_measured_is_kept_and_reads_back(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(scaling_run, 'measure_sizes', lambda sizes, say: asked.append(list(sizes)) or a_record())
    main(['--scaling', '--sizes=long,small', f'--json={tmp_path / "a.json"}'])
    main(['--scaling'])
    assert read_json_record(tmp_path / 'a.json', KIND) == a_record() and asked == [['long', 'small'], list(SIZES)]


def without(record, *path):
    *parents, last = path
    for key in parents:
        record = record[key]
    del record[last]


@pytest.mark.parametrize('damage, words', [
    (lambda record: without(record, 'sizes', 'one', 'seconds'), "one lacks 'seconds'"),
    (lambda record: without(record, 'machine', 'threads'), "machine lacks 'threads'"),
    (lambda record: record['sizes']['one'].update(seconds=[1.0, 2.0]), 'the steps of one differ in number'),
    (lambda record: record['sizes']['one'].update(rates=[0.0] * 3), 'must lie in'),
    (lambda record: record['sizes']['one']['size'].update(n_layer=10 ** 400), 'n_layer'),
    (lambda record: record['sizes']['one']['size'].update(n_head=5), 'channels for 5 heads'),
    (lambda record: record['sizes']['one'].update(positions=3), 'positions is 3, but must be a list'),
    (lambda record: record.update(sizes=[]), 'sizes is a list')])
def test_absurd_records_are_one_sentence(damage, words, tmp_path):
    record = json.loads(json.dumps(a_record()))
    damage(record)
    (tmp_path / 'a.json').write_text(json.dumps(record))
    with pytest.raises(UserError, match='cannot read .*a.json.*make it with bench.py --scaling') as refused:
        main(['--scaling', f'--from_json={tmp_path / "a.json"}'])
    assert words in str(refused.value) and '\n' not in str(refused.value)


@pytest.mark.parametrize('arguments, words', [
    (['--sizes=small,huge'], "sizes names 'huge'"), (['--sizes=small,small'], "'small' twice"),
    (['--json=nowhere/a.json'], 'the folder nowhere does not exist; create it'),
    (['--report=missing.md'], 'cannot read'),
    (['--report=bare.md'], 'must hold the lines'), (['--from_json=a.json', '--sizes=small'], 'sizes was given'),
    (['--from_json=missing.json'], 'cannot read'), (['--from_json=bare.md'], 'is not JSON'),
    (['--from_json=other.json'], 'is not a record'), (['--shapes=small'], 'shapes')])
def test_bad_options_are_one_clear_sentence(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scaling_run, 'measure_sizes', lambda *_: pytest.fail('nothing is to be measured'))
    (tmp_path / 'bare.md').write_text('nothing here')
    (tmp_path / 'other.json').write_text(json.dumps({'format': SCALING_FORMAT, 'version': SCALING_VERSION + 1}))
    with pytest.raises(UserError, match=words):
        main(['--scaling', *arguments])


def test_sizes_are_refused_in_a_sentence_where_a_system_does_not_tell_the_memory_of_a_process(monkeypatch):
    monkeypatch.setitem(sys.modules, 'resource', None)
    with pytest.raises(UserError, match='does not say how much memory a process has held; measure on Linux'):
        run_scaling(BenchConfig(scaling=True), {}, lambda line: None)
