"""The benchmark takes turns, compares within a round, counts operations as torch does; tables follow the record."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import core.bench.measuring as benchmark_module
import core.bench.training_cases as benchmark_training
from bench import main
from core.batches import causal_batches, unmasking_batches
from core.bench.cases import Case, Shape, base_vocabulary, model_config
from core.bench.measuring import GROUPS, another_round, benchmark, measure_in_turns, measure_policies
from core.bench.records import COPY
from core.bench.report import (KIND, added_share, fastest, floors, gap, overhead, rate_share, ratio, ratios,
                               read_record, report)
from core.bench.sampling_cases import (BLOCKS, DECODE_PREDICTIONS, POLICY_CALLS, POLICY_ROWS, WITH_HEAD, decode_cases,
                                       fill_operations, policy_runs, sampling_cases)
from core.bench.training_cases import baseline_bytes, step_bytes, step_operations
from core.bench.yardstick import Baseline
from core.checkpoints.kinds import CheckpointKind
from core.common.drawing import DrawRule
from core.common.errors import UserError
from core.common.randomness import RowRandom, keyed
from core.common.runtime import Runtime
from core.common.tables import write_between
from core.common.timing import TimingAccumulator
from core.objective import Objective
from core.sampling.generation import Generation
from core.sampling.network import Network
from core.sampling.policies import POLICIES
from core.stages import Stage
from core.training_step import TrainingState
from helpers.benchmark import TINY, group
from helpers.toys import toy_plan
from model import GPT
from sample_utils import FillTask, Filler

BEGIN, END = KIND.begin, KIND.end
ROOT = Path(__file__).parent.parent.parent


# Taking turns

class Clock:
    """A clock that moves only when told to."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(benchmark_module, 'time', SimpleNamespace(perf_counter=lambda: self.now))


def test_cases_take_turns_and_the_first_call_counts_apart(monkeypatch):
    clock, order, numbers = Clock(monkeypatch), [], []

    def case(name, seconds):
        durations = iter(seconds)

        def run(number):
            order.append(name)
            numbers.append(number)
            clock.now += next(durations)
        return Case(run, 10.0, 7, torch.bfloat16, 5.0)

    def rate():
        order.append('rate')
        return 3.0

    cases = {'a': case('a', [9.0, 1.0, 2.0, 3.0]), 'b': case('b', [5.0, 0.5, 0.75, 1.0])}
    found = measure_in_turns(cases, {'x': rate}, lambda: None, lambda line: None, repetitions=2, warm_ups=2)
    assert order == ['a', 'a', 'b', 'b', 'rate', 'a', 'b', 'rate', 'a', 'b']
    assert len(set(numbers)) == len(numbers), 'no two calls do the same'
    assert found['rates'] == {'x': [3.0, 3.0]}
    assert found['cases']['a'] == {'seconds': [2.0, 3.0], 'first_seconds': 9.0, 'operations': 10.0, 'tokens': 7,
                                   'dtype': 'bfloat16', 'bytes': 5.0}
    assert found['cases']['b']['seconds'] == [0.75, 1.0]


def test_a_quick_call_is_made_several_times_and_its_time_is_per_call(monkeypatch):
    clock, calls = Clock(monkeypatch), []

    def run(number):
        calls.append(number)
        clock.now += 0.125

    found = measure_in_turns({'a': Case(run, 1.0, 1, torch.float32)}, {}, lambda: None, lambda line: None,
                             repetitions=3, warm_ups=1)
    assert len(calls) == 1 + 3 * 4  # 0.4 s take four calls
    assert found['cases']['a']['seconds'] == [0.125] * 3


def test_every_time_is_read_with_the_device_at_rest(monkeypatch):
    """Work that is only queued counts where it is waited for, as on a GPU."""
    clock, queued = Clock(monkeypatch), []

    def synchronize():
        clock.now += sum(queued)
        queued.clear()

    found = measure_in_turns({'a': Case(lambda _: queued.append(2.0), 1.0, 1, torch.float32)}, {}, synchronize,
                             lambda line: None, repetitions=1, warm_ups=1)
    assert found['cases']['a']['seconds'] == [2.0]


@pytest.mark.parametrize('repetitions, done, seconds, expected', [
    (None, 2, 1000.0, True), (None, 3, 1000.0, False), (None, 4, 1.0, True), (None, 5, 1.0, False),
    (2, 1, 1000.0, True), (2, 2, 0.0, False), (9, 8, 1000.0, True)])
def test_number_of_rounds(repetitions, done, seconds, expected):
    assert another_round(repetitions, done, seconds) is expected


# Figures

def test_ratios_are_taken_within_a_round():
    drifting = group(a=[2.0, 20.0, 60.0], b=[1.0, 10.0, 20.0])
    assert ratio(drifting, 'a', 'b') == (2.0, 2.0, 3.0)
    assert added_share(drifting, 'a', 'b') == (0.5, 0.5, pytest.approx(2 / 3))


def test_share_of_the_rate_uses_the_rate_of_its_round():
    assert rate_share(group(rate=[1.0, 4.0, 10.0], a=[4.0, 1.0, 1.0]), 'a') == (0.5, 0.2, 0.5)


def test_floors_take_the_median_rates_and_each_case_its_own_precision():
    measured = group(rate=[1.0, 2.0, 8.0], a=[1.0] * 3, b=[1.0] * 3)
    measured['rates']['bfloat16'] = [16.0, 20.0, 40.0]
    measured['cases']['b'].update(dtype='bfloat16', bytes=6.0)
    assert floors(measured, 'a') == (1.0, None)
    assert floors(measured, 'b') == (0.1, 1.5)
    assert rate_share(measured, 'b') == (0.1, 0.05, 0.125)
    # rounds: 2 / 16 + 6 / 1, 2 / 20 + 6 / 4 and 2 / 40 + 6 / 16; and 2 over the rate alone
    assert gap(measured, 'b') == pytest.approx((1 / 1.6, 1 / 6.125, 1 / 0.425))
    assert gap(measured, 'a') == (1.0, 0.5, 4.0)


def test_each_ratio_compares_what_its_name_says():
    entry = {'training': group(causal=[1.0] * 3, **{'stage 1': [2.0] * 3, 'stage 2': [2.5] * 3, 'stage 3': [5.0] * 3}),
             'fill': group(**{'trunk call': [4.0] * 3, 'wavefront fill': [1.0] * 3}),
             'sampling': group(**{'diffusion, batch 1': [2.0] * 3, 'standard, batch 1': [8.0] * 3}),
             'decode': group(**{'causal_decode, batch 1, float32': [6.0] * 3,
                                'diffusion K=4, batch 1, float32': [2.0] * 3,
                                'causal_decode, batch 1, bfloat16': [8.0] * 3,
                                'diffusion K=4, batch 1, bfloat16': [1.0, 1.5, 9.0],
                                'causal_decode, batch 16, float32': [50.0] * 3,
                                'diffusion K=4, batch 16, float32': [25.0] * 3})}
    assert fastest(entry['decode'], 'causal_decode, batch 1, ') == 'causal_decode, batch 1, float32'
    entry['training']['cases'] |= {'baseline, float32, eager': {'seconds': [6.0] * 3},
                                   'baseline, bfloat16, eager': {'seconds': [9.0] * 3}}
    assert {name: write(one.median) for name, (one, write) in ratios(entry).items()} == {
        'diffusion step / causal step': '2.000', 'stage 2 / stage 1': '1.250', 'stage 3 / stage 1': '2.500',
        'sampler head, share of a stage 2 step': '20.0%', 'critic, share of a stage 3 step': '50.0%',
        'wavefront fill / trunk call': '0.250', 'tokens/s of diffusion / of standard, batch 1': '4.000',
        'tokens/s of the causal step / of the baseline': '6.000',
        'tokens/s of the diffusion step / of the baseline': '3.000',
        'tokens/s of diffusion K=4 / of causal_decode, batch 1': '4.000',
        'tokens/s of diffusion K=4 / of causal_decode, batch 16': '2.000'}


def test_overhead_is_the_time_outside_the_network_per_round():
    assert overhead({'seconds': [11.0, 24.0, 6.0], 'network_seconds': [10.0, 20.0, 5.0]}) == (
        pytest.approx(0.2), pytest.approx(0.1), pytest.approx(0.2))


# Policies

def test_a_runs_overhead_is_what_happens_beside_its_network_calls(monkeypatch):
    """A trunk call of 2 s, a critic call of 1 s, a quarter of a second of choosing: all three in one run."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr('core.common.timing.time', benchmark_module.time)

    def taking(seconds, of):
        def slow(*given):
            clock.now += seconds
            return of(*given)
        return slow

    model = GPT(model_config(TINY, add_critic_head=True)).eval()
    monkeypatch.setattr(model, 'critic_scores', taking(1.0, model.critic_scores))
    run = policy_runs(TINY)['token_critic']
    run = run._replace(policy=dataclasses.replace(run.policy, reveal=taking(0.25, run.policy.reveal)))
    network = Network(model, TimingAccumulator(), encode=taking(2.0, model.encode))
    found = measure_policies({'one': run}, network, lambda line: None, repetitions=2)
    assert found == {'bare_seconds': [2.0, 2.0], 'runs': {'one': {
        'tokens': POLICY_ROWS * 16, 'trunk_calls': 3, 'network_calls': 5, 'seconds': [8.75] * 2,
        'trunk_seconds': [6.0] * 2, 'network_seconds': [8.0] * 2}}}


def test_every_policy_is_measured_at_the_same_number_of_trunk_calls():
    network = Network(GPT(model_config(TINY, add_sampler_head=True, add_critic_head=True)).eval(), TimingAccumulator())
    runs = policy_runs(TINY)
    assert set(runs) == {*POLICIES, *(f'{name} with sampler head' for name in WITH_HEAD)}
    found = measure_policies(runs, network, lambda line: None, repetitions=1)['runs']
    assert {name for name, run in found.items() if run['trunk_calls'] != POLICY_CALLS} <= {'fast_dllm_threshold'}
    assert {name for name, run in found.items() if run['network_calls'] != run['trunk_calls']} == {
        name for name, row in POLICIES.items() if row.needs_critic}
    tokens = {name: run['tokens'] / POLICY_ROWS for name, run in found.items()}
    assert {name: count for name, count in tokens.items() if count != TINY.block_size} == {
        'first_hitting': POLICY_CALLS, 'dilated': 2 ** POLICY_CALLS}


# Operations, against torch's own count

def counted(config, stage):
    """(operations of forward and backward as torch counts them, predicted positions with padding)."""
    plan = toy_plan(block_size=TINY.block_size, batch_size=TINY.batch_size, mask_token_id=TINY.base_size,
                    sampler_context=config.sampler_context if stage.heads else 0)
    make = causal_batches if config.attention_type == 'causal' else unmasking_batches
    batch, = make(plan, 0, lambda count: count)
    objective = Objective(GPT(config), base_vocabulary(config, torch.device('cpu')))
    # the counter does not see the attention kernel of a CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective(batch, stage, keyed(1, 0, 0, TINY.batch_size)).total.backward()
    return counter.get_total_flops(), len(batch.positions)


def test_trunk_operations_are_what_torch_counts():
    config = model_config(TINY, attention_type='causal')
    assert counted(config, Stage({})) == (step_operations(config, TINY), TINY.tokens)


@pytest.mark.parametrize('output', ['own', 'shared_detached'])
def test_sampler_head_operations_are_what_torch_counts(output):
    config = model_config(dataclasses.replace(TINY, sampler_output=output), add_sampler_head=True)
    without, _ = counted(config, Stage({}))
    whole, predicted = counted(config, Stage({'sampler': 1.0}))
    ours = step_operations(config, TINY) - step_operations(model_config(TINY), TINY)
    assert (whole - without) / predicted == ours / (TINY.tokens / 2)


@pytest.mark.parametrize('stride', [1, 3])
def test_critic_operations_are_a_trunk_pass_of_its_rows(stride):
    heads = {'add_sampler_head': True, 'critic_row_stride': stride}
    ours = step_operations(model_config(TINY, **heads, add_critic_head=True), TINY) - \
        step_operations(model_config(TINY, **heads), TINY)
    rows = {1: 4, 3: 2}[stride]
    trunk = 3 * GPT(model_config(TINY)).operations_per_token()
    assert ours == rows * TINY.block_size * (trunk + fill_operations(model_config(TINY)) / 2)


def test_fill_operations_are_needed_and_nearly_all():
    config = model_config(TINY, add_sampler_head=True)
    model, tokens = GPT(config), torch.full((64, TINY.block_size), TINY.base_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden_states = torch.zeros(64, TINY.block_size, TINY.n_embd)
        rule = DrawRule(base_vocabulary(config, torch.device('cpu')))
        Filler(model, 'wave').fill(FillTask(tokens, hidden_states, rule, RowRandom(1, 0, torch.arange(64))))
    ours = fill_operations(config) * tokens.numel()
    assert 0.8 * ours < counter.get_total_flops() < 1.6 * ours  # bootstrap reads all logits and spares the head its row


# Bytes, against what the optimizers keep and what an eager step moves

class Moved(TorchDispatchMode):
    """Adds up the bytes that operations other than matrix products and views read and write."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        if not function.is_view and not any(word in str(function) for word in ('mm', '_unsafe_view', 'attention')):
            self.bytes += sum(one.numel() * one.itemsize for one in tree_leaves((arguments, result))
                              if isinstance(one, torch.Tensor))
        return result


@pytest.mark.parametrize('heads', [{}, {'add_sampler_head': True}, {'attention_type': 'causal'}])
def test_every_value_that_the_optimizer_keeps_is_read_and_written_and_gradients_read_twice(heads):
    config = model_config(TINY, **heads)
    state = TrainingState(GPT(config), base_vocabulary(config, torch.device('cpu')), Runtime(torch.device('cpu'),
                          torch.float32, False), toy_plan(), CheckpointKind.UNMASKING, benchmark_training.TRAINING)
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in state.optimizers:
        optimizer.step()
    kept = [*state.model.parameters(), *state.averaged.parameters(),
            *(value for optimizer in state.optimizers for held in optimizer.state.values()
              for value in held.values() if value.ndim > 0)]
    values = 2 * sum(one.numel() for one in kept) + 2 * state.model.parameter_count()
    assert step_bytes(config, dataclasses.replace(TINY, batch_size=0), torch.bfloat16) == 4 * values


def test_a_fused_step_moves_less_than_the_eager_baseline_but_not_much_less():
    model = Baseline(TINY.block_size, 67, 2, 2, 32)
    tokens = torch.randint(60, (TINY.batch_size, TINY.block_size))
    shape = Shape(2, 2, 32, TINY.block_size, TINY.batch_size)
    weights = sum(one.numel() for one in model.parameters())
    with Moved() as moved:
        model(tokens, tokens)[1].backward()
    activations = baseline_bytes(model, shape) - baseline_bytes(model, dataclasses.replace(shape, batch_size=0))
    # besides the activations, an eager step adds up and fills the gradients of the embeddings
    assert 0.4 * (moved.bytes - 24 * weights) < activations < moved.bytes
    assert baseline_bytes(model, dataclasses.replace(shape, batch_size=0)) == 4 * 8 * weights


def test_bytes_grow_with_what_a_step_does():
    def activations(dtype=torch.float32, batch_size=4, **heads):
        full, none = (dataclasses.replace(TINY, batch_size=size) for size in (batch_size, 1))
        return (step_bytes(model_config(TINY, **heads), full, dtype)
                - step_bytes(model_config(TINY, **heads), none, dtype)) / (batch_size - 1)

    per_row = 16 * (1 * 46 * 16)  # positions, and the layer's passes of 16 channels each
    assert activations() == 4 * (per_row + 16 * 3 * 67 / 2)
    assert activations(attention_type='causal') == 4 * (per_row + 16 * 3 * 67)
    assert activations(torch.bfloat16) == activations() / 2 == activations(batch_size=8) / 2
    head = 8 * (6 * 16 + 10 * 16 + 3 * 67)  # masked positions; the gathered slots, two norms, logits
    assert activations(add_sampler_head=True) == activations() + 4 * head
    judged = activations(add_sampler_head=True, add_critic_head=True)
    assert judged == activations(add_sampler_head=True) + 4 * per_row


# End to end

@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(benchmark_module, 'SHORTEST', 0.0)
    monkeypatch.setattr(benchmark_module, 'COPIED', 2 ** 16)
    monkeypatch.setattr(benchmark_training, 'TOKENS', 1000)
    monkeypatch.setattr('core.bench.report.SHAPES', {'small': TINY, 'large': TINY})
    monkeypatch.setattr(benchmark_module, 'measure_matrix_rate', lambda device, dtype: 1e9)


def test_sampling_cases_write_every_token():
    cases = sampling_cases(TINY, torch.device('cpu'), None) | decode_cases(TINY, torch.device('cpu'),
                                                                            [None, torch.bfloat16])
    blocks = [name for name in cases if 'per block of' in name]
    assert len(blocks) == 4 * len(BLOCKS) and len(cases) == 4 + 12 + len(blocks)
    for name, case in cases.items():
        assert (case.dtype is torch.bfloat16) == name.endswith('bfloat16'), name
        written = case.run(3)
        assert isinstance(written, Generation) and written.tokens.numel() == case.tokens, name
        assert (written.tokens < TINY.base_size).all(), name
        assert (written.waves > 0) == (name.startswith('diffusion') or name in blocks), name


def test_record_report_and_files(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / 'page.md'
    page.write_text(f'before\n{BEGIN}\nold\n{END}\nafter\n')
    main(['--shapes=small', '--repetitions=2', '--device=cpu', '--dtype=float32', '--compile=False',
          '--json=record.json', '--report=page.md'])
    record = read_record(tmp_path / 'record.json')
    entry, = record['shapes'].values()
    assert set(GROUPS) < set(entry)
    assert {one: {name: len(rates) for name, rates in entry[one]['rates'].items()}
            for one in ('training', 'fill', 'sampling')} == {
                'training': {'float32': 2, COPY: 2}, 'fill': {'float32': 2}, 'sampling': {'float32': 2}}
    assert 'decode' not in entry, 'a yardstick is measured only where it is asked for'
    assert list(entry['training']['cases']) == ['causal', 'stage 1', 'stage 2', 'stage 3', 'block']
    assert all(len(case['seconds']) == 2 and min(case['seconds']) > 0 and case['operations'] > 0 and case['tokens'] > 0
               for one in ('training', 'fill', 'sampling') for case in entry[one]['cases'].values())
    assert len(entry['policies']['bare_seconds']) == 2 and set(entry['policies']['runs']) == set(policy_runs(TINY))
    assert record['machine']['versions']['torch'] and 'command_line' not in record['machine']
    text = report(record)
    assert page.read_text() == f'before\n{BEGIN}\n\n{text}\n\n{END}\nafter\n'
    printed = capsys.readouterr().out
    assert text in printed and 'small training: round 2 done' in printed
    main(['--from_json=record.json', '--report=page.md'])
    assert page.read_text() == f'before\n{BEGIN}\n\n{text}\n\n{END}\nafter\n'


@pytest.mark.parametrize('content', ['{"mine": 1}', 'words', '[1]', '{"format": "masked-diffusion-scaling", "version": 1}'])
def test_a_file_that_holds_no_record_is_not_replaced(content, quick, tmp_path):
    path = tmp_path / 'mine.json'
    path.write_text(content)
    with pytest.raises(UserError, match='mine.json.*which holds something other than a record of bench.py.*stays'):
        main(['--shapes=small', '--groups=fill', '--repetitions=1', '--device=cpu', f'--json={path}'])
    assert path.read_text() == content
    path.write_text('')  # as mktemp leaves it
    for _ in range(2):
        main(['--shapes=small', '--groups=fill', '--repetitions=1', '--device=cpu', f'--json={path}'])
        assert list(read_record(path)['shapes']) == ['small']


def test_yardsticks_are_measured_beside_on_demand_however_long_they_take(quick, tmp_path, monkeypatch, capsys):
    for name, value in (('FEWEST', 1), ('USUAL', 2), ('PATIENCE', 0.0)):
        monkeypatch.setattr(benchmark_module, name, value)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)
    main(['--shapes=small', '--groups=training,sampling', '--baseline', '--device=cpu', '--compile=False',
          f'--json={tmp_path}/record.json'])
    entry, = read_record(tmp_path / 'record.json')['shapes'].values()
    assert list(entry['training']['cases'])[:2] == ['baseline, float32, eager', 'causal']
    assert {name: {len(case['seconds']) for case in entry[name]['cases'].values()}
            for name in ('training', 'sampling', 'decode')} == {'training': {2}, 'sampling': {1}, 'decode': {2}}
    baseline, causal = (entry['training']['cases'][name] for name in ('baseline, float32, eager', 'causal'))
    assert baseline['dtype'] == 'float32' and baseline['operations'] == causal['operations']
    assert baseline['bytes'] < causal['bytes'] and baseline['tokens'] == causal['tokens'] == TINY.tokens
    shown = {name for name in ratios(entry) if 'baseline' in name or 'causal_decode' in name}
    assert len(shown) == 2 + 2 * len(DECODE_PREDICTIONS) + 2 * len(BLOCKS)
    printed = capsys.readouterr().out
    assert all(f'| {name}' in printed for name in shown) and '| baseline: float32, eager causal step' in printed


@pytest.mark.parametrize('dtype, fast, expected', [
    ('auto', True, [None, torch.bfloat16]), ('auto', False, [None]), ('bfloat16', False, [torch.bfloat16]),
    ('float32', True, [None])])
def test_each_side_of_the_sampling_yardstick_tries_what_may_be_fast(dtype, fast, expected, monkeypatch):
    monkeypatch.setattr(benchmark_module, 'has_fast_bfloat16', lambda device: False)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: fast)
    assert benchmark_module.decode_precisions(dtype, torch.device('cpu')) == expected


def test_the_copy_rate_counts_bytes_read_and_written(monkeypatch):
    clock = Clock(monkeypatch)
    copy = torch.Tensor.copy_

    def slow(target, source):
        clock.now += 0.125
        return copy(target, source)

    monkeypatch.setattr(benchmark_module, 'COPIED', 4096)
    monkeypatch.setattr(torch.Tensor, 'copy_', slow)
    assert benchmark_module.measure_copy_rate(torch.device('cpu')) == 2 * 4096 / 0.125


def test_a_group_alone_is_measured_and_shown(quick, tmp_path, capsys):
    main(['--shapes=small', '--groups=policies', '--repetitions=1', '--device=cpu', f'--json={tmp_path}/record.json'])
    record = read_record(tmp_path / 'record.json')
    entry, = record['shapes'].values()
    assert 'policies' in entry and not {'training', 'fill', 'sampling'} & set(entry)
    run = entry['policies']['runs']['left_to_right']
    run.update(seconds=[2.5, 1.1, 1.2], network_seconds=[2.0, 1.0, 1.0], trunk_calls=3, network_calls=4, tokens=5000)
    row, = (line for line in report(record).splitlines() if line.startswith('| left_to_right'))
    assert [cell.strip() for cell in row.strip('|').split('|')][1:] == [
        '3', '4', '5,000', '1.20 (1.10 - 2.50)', '4,167', '20.0% (10.0% - 25.0%)']


def test_report_shows_medians_and_floors():
    def cases(*names):
        return {'rates': {'bfloat16': [1e9, 2e9, 4e9]}, 'cases': {name: {
            'seconds': [0.5, 0.25, 1.0], 'first_seconds': 6.5, 'operations': 1e8, 'tokens': 1000, 'dtype': 'bfloat16',
            'bytes': None} for name in names}}

    entry = {'shape': vars(TINY), 'device': 'cpu', 'dtype': 'bfloat16', 'sampling_dtype': 'float32', 'compile': True,
             'critic_row_stride': 4, 'parameters': 5, 'training': cases('causal', 'stage 1', 'stage 2', 'stage 3'),
             'fill': cases('trunk call', 'wavefront fill'),
             'sampling': cases('diffusion, batch 1', 'standard, batch 1')}
    entry['training']['rates'][COPY] = [5e9, 1e9, 1e9]
    for case in entry['training']['cases'].values():
        case['bytes'] = 2e8
    machine = {'versions': {'python': '3', 'torch': '2', 'numpy': '1'}, 'processor': 'P', 'processors': 2, 'threads': 2,
               'devices': [], 'fast_bfloat16': False, 'load_average': 0.0, 'platform': 'X', 'git_revision': None}
    lines = report({'machine': machine, 'shapes': {'tiny': entry}}).splitlines()
    causal = [cell.strip() for line in lines if line.startswith('| causal') for cell in line.strip('|').split('|')]
    # floors 1e8 / 2e9 and 2e8 / 1e9; gaps 0.5 / 0.14, 0.25 / 0.25 and 1 / 0.225; shares 0.2, 0.2 and 0.025; 1000 tokens
    # and 1e8 operations in half a second; 6.5 - 0.5
    assert causal[1:] == ['50.0', '200.0', '3.571', '500.0 (250.0 - 1000.0)', '2,000', '0', '20.0% (2.5% - 20.0%)',
                          '6.0']
    trunk = [cell.strip() for line in lines if line.startswith('| trunk') for cell in line.strip('|').split('|')]
    assert trunk[1:3] == ['50.0', '5.000']
    assert 'bfloat16 matrix rate 2 (1 - 4) GFLOP/s, 3 interleaved rounds:' in lines
    assert 'bfloat16 matrix rate 2 (1 - 4) GFLOP/s, copy rate 1 (1 - 5) GB/s, 3 interleaved rounds:' in lines
    widths = {len(line) for line in lines if line.startswith('|')}
    assert len(widths) == 4  # four tables, each in columns


def test_written_page_follows_the_written_record():
    """docs/results/performance.md holds nothing typed by hand between its markers."""
    path = ROOT / 'docs' / 'results' / 'performance.json'
    page = path.with_suffix('.md').read_text()
    between = page.split(BEGIN)[1].split(END)[0].strip()
    assert between == (report(read_record(path)) if path.exists() else 'Not measured yet.')


# Wrong input

@pytest.mark.parametrize('arguments, words', [
    (['--shapes=small,huge'], ["'huge'", 'small and large', '--shapes=small,large']),
    (['--shapes='], ["''", '--shapes=small,large']),
    (['--shapes=small,small'], ["'small' twice"]),
    (['--groups=policies,fil'], ["'fil'", '--groups=training,fill,sampling,policies']),
    (['--repetitions=0', '--critic_row_stride=0'], ['repetitions is 0', 'critic_row_stride is 0', 'at least 1']),
    (['--json=nowhere/record.json'], ['nowhere/record.json', 'create it first']),
    (['--report=absent.md'], ['absent.md', '--report=docs/results/performance.md']),
    (['--report=unmarked.md'], ['unmarked.md', BEGIN, END]),
    (['--from_json=unmarked.md'], ['unmarked.md', 'not JSON']),
    (['--from_json=absent.json'], ['absent.json', 'cannot read', '--json=absent.json']),
    (['--from_json=other.json'], ['other.json', 'not a record', 'make it with']),
    (['--from_json=other.json', '--repetitions=3'], ['repetitions', '--from_json measures nothing']),
    (['--repetition=3'], ['repetitions']),
    (['--baseline', '--groups=fill,policies'], ['baseline adds rows to training and sampling', "'fill,policies'"]),
    (['--baseline', '--from_json=other.json'], ['baseline', '--from_json measures nothing']),
    (['--compare'], ['two records', 'bench.py --compare before.json after.json']),
    (['--compare', 'other.json'], ['two records']),
    (['--compare=other.json', 'other.json', 'other.json'], ['two records']),
    (['--shapes=small', '--compare', 'other.json', 'other.json'], ['takes two records and no other option']),
    (['--compare', 'other.json', '--shapes=small'], ['takes two records and no other option']),
    (['--compare', 'absent.json', 'other.json'], ['absent.json', 'cannot read']),
    (['--compare', 'other.json', 'other.json'], ['other.json', 'not a record']),
    (['--compare', 'unmarked.md', 'other.json'], ['unmarked.md', 'not JSON']),
])
def test_wrong_input_is_named_before_anything_is_measured(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('core.bench.report.benchmark', lambda *_, **__: pytest.fail('measured'))
    (tmp_path / 'unmarked.md').write_text(f'{END} {BEGIN}')
    (tmp_path / 'other.json').write_text(json.dumps({'format': 'something'}))
    with pytest.raises(UserError) as raised:
        main(arguments)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_a_page_without_markers_stays_as_it_is(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text(f'{BEGIN}\n{BEGIN}\n{END}\n')
    with pytest.raises(UserError):
        write_between(page, BEGIN, END, 'text', 'docs/results/performance.md')
    assert page.read_text() == f'{BEGIN}\n{BEGIN}\n{END}\n'


def test_precision_and_stride_reach_training_and_sampling(quick, monkeypatch):
    rates = []
    monkeypatch.setattr(benchmark_module, 'measure_matrix_rate', lambda device, dtype: rates.append(dtype) or 1e9)
    strides = []
    whole = benchmark_training.step_operations
    monkeypatch.setattr(benchmark_training, 'step_operations',
                        lambda config, shape: strides.append(config.critic_row_stride) or whole(config, shape))
    record = benchmark({'one': TINY}, ('training', 'fill', 'sampling'), lambda line: None, device='cpu',
                       dtype='bfloat16', compile=False, repetitions=1, critic_row_stride=2)
    assert (record['shapes']['one']['dtype'], record['shapes']['one']['sampling_dtype']) == ('bfloat16', 'bfloat16')
    assert rates == [torch.bfloat16] * 3 and strides == [1, 1, 1, 2, 1]


def test_automatic_precision_is_that_of_sampling(quick):
    """On a CPU sampling runs in float32 whatever training takes, unless a precision is asked for."""
    record = benchmark({'one': TINY}, ('fill',), lambda line: None, device='cpu', dtype='auto', compile=False,
                       repetitions=1, critic_row_stride=1)
    assert record['shapes']['one']['sampling_dtype'] == 'float32'
