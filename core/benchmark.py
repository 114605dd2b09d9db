"""Speed: what bench.py measures. Raw seconds go into one record of built-in types; core/benchmark_report.py reads it.

A noisy machine drifts, so the cases of a group run in turns (A B C A B C) together with the machine's matrix rate, and
every ratio is taken within a round. The model is untrained and the corpus is random: time depends on shapes only.

Letters: B rows, T sequence length, V vocabulary, D width, C sampler_context.
"""

import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.batches import BatchPlan
from core.generation import GenerationSettings, Network, generate
from core.policies import POLICIES, Policy, remask_policy
from core.prompt import Layout
from core.randomness import RowRandom
from core.run_folder import environment
from core.runtime import Runtime, has_fast_bfloat16, measure_matrix_rate, start_runtime
from core.sampling_run import choose_autocast
from core.timing import TimingAccumulator
from core.training_step import TrainingState, training_step
from model import GPT, GPTConfig
from sample_utils import DrawRule, allowed_ids, linear_remasking_schedule, sampler_wavefront_fill

Say = Callable[[str], None]

FORMAT, VERSION = 'masked-diffusion-benchmark', 1
BASE_SIZE, VOCABULARY_SIZE = 63, 67  # characters of shakespeare_char; with the four special ids
TOKENS = 1_000_000  # of the made-up corpus
FEWEST, USUAL = 3, 5  # repetitions, where none are asked for: at least the first, and the second if
PATIENCE = 75.0  # seconds are not over by then
SHORTEST = 0.4  # seconds: a quicker call is made several times in a row, so that a clock's tick does not count
MOST_CALLS = 50
FILL_ROWS = 16
SAMPLING_ROWS = (1, 16)
PREDICTIONS = 16
TEMPERATURE = 0.8
POLICY_ROWS = 16
POLICY_CALLS = 3  # trunk calls of a policy's run, as far as it lets that be said
WITH_HEAD = ('remask', 'random')  # shown with the sampler head too: whole rows, and groups of positions
GROUPS = ('training', 'fill', 'sampling', 'policies')
TRAINING = {'optimizer': 'muon', 'learning_rate': 1e-3, 'weight_decay': 0.05, 'betas': (0.9, 0.99), 'grad_clip': 1.0,
            'ema_decay': 0.995}


@dataclass(frozen=True)
class Shape:
    """A model and its batch."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int

    @property
    def tokens(self) -> int:
        """Tokens of one training step."""
        return self.batch_size * self.block_size


SHAPES = {'small': Shape(4, 4, 128, 128, 64), 'large': Shape(6, 6, 384, 256, 32)}


class Case(NamedTuple):
    """Something to measure. run takes the number of the call, so that no two calls do the same; operations: floating
    point, two per multiply-add, that a call cannot do without; tokens: trained on or written by a call."""

    run: Callable[[int], object]
    operations: float
    tokens: int


# The measurement ----------------------------------------------------------------------------------------------------

def benchmark(shapes: Mapping[str, Shape], groups: Sequence[str], say: Say, *, device: str, dtype: str,
              compile: bool | None, repetitions: int | None, critic_row_stride: int) -> dict[str, Any]:
    """The record of `groups` (of `GROUPS`) of all `shapes`, in built-in types. repetitions None: `USUAL`, at least
    `FEWEST` where they take long.

    dtype 'auto' and compile None choose as train.py and sample.py do.
    """
    found = {'format': FORMAT, 'version': VERSION, 'machine': describe_machine(), 'shapes': {}}
    for name, shape in shapes.items():
        runtime = start_runtime(device, dtype, compile, width=shape.n_embd, iterations=10_000)  # as for a real run
        for reason in runtime.reasons:
            say(f'{name}: {reason}')
        torch.compiler.reset()  # graphs of the shape before are of no use
        found['shapes'][name] = measure_shape(name, shape, groups, runtime, choose_autocast(dtype, runtime.device),
                                              say, repetitions=repetitions, critic_row_stride=critic_row_stride)
    return found


def describe_machine() -> dict[str, Any]:
    """Versions and machine; the load average tells whether something else was running."""
    described = environment()
    del described['command_line']
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
        processor = next(line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return {**described, 'processor': processor, 'fast_bfloat16': has_fast_bfloat16(torch.device('cpu')),
            'load_average': round(os.getloadavg()[0], 2)}


def measure_shape(name: str, shape: Shape, groups: Sequence[str], runtime: Runtime, autocast: torch.dtype | None,
                  say: Say, *, repetitions: int | None, critic_row_stride: int) -> dict[str, Any]:
    """Training in `runtime`'s precision, then what belongs to sampling under `autocast` (None: float32)."""
    sampling_dtype = autocast or torch.float32
    in_turns = {
        'training': (lambda: training_cases(shape, runtime, critic_row_stride), runtime.dtype, runtime.compile),
        'fill': (lambda: fill_cases(shape, runtime.device, autocast), sampling_dtype, False),
        'sampling': (lambda: sampling_cases(shape, runtime.device, autocast), sampling_dtype, False)}
    full = GPT(model_config(shape, add_sampler_head=True, add_critic_head=True))
    found: dict[str, Any] = {
        'shape': asdict(shape), 'device': str(runtime.device), 'dtype': short_name(runtime.dtype),
        'sampling_dtype': short_name(sampling_dtype), 'compile': runtime.compile,
        'critic_row_stride': critic_row_stride, 'parameters': full.parameter_count()}
    for group, (cases, dtype, compiled) in in_turns.items():
        if group not in groups:
            continue

        def rate(dtype: torch.dtype = dtype) -> float:
            return measure_matrix_rate(runtime.device, dtype)

        warm_ups = 2 if compiled or runtime.device.type == 'cuda' else 1  # the last one shows how long a call takes
        found[group] = measure_in_turns(cases(), rate, runtime.synchronize, lambda line: say(f'{name} {group}: {line}'),
                                        repetitions=repetitions, warm_ups=warm_ups)
    if 'policies' in groups:
        network = _network(model_config(shape, add_sampler_head=True, add_critic_head=True), runtime.device, autocast)
        found['policies'] = measure_policies(policy_runs(shape), network, lambda line: say(f'{name} policies: {line}'),
                                             repetitions=repetitions)
    return found


def measure_in_turns(cases: Mapping[str, Case], rate: Callable[[], float], synchronize: Callable[[], None], say: Say, *,
                     repetitions: int | None, warm_ups: int) -> dict[str, Any]:
    """Rounds of the matrix rate and every case once: {'rate': per round, 'cases': {name: {'seconds': of one call, per
    round; 'first_seconds': of the very first call; 'operations' and 'tokens' of a call}}}."""
    numbers = iter(range(10 ** 9))

    def seconds_a_call(case: Case, calls: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            case.run(next(numbers))
        synchronize()
        return (time.perf_counter() - start) / calls

    calls, found = {}, {}
    for name, case in cases.items():
        warm = [seconds_a_call(case, 1) for _ in range(warm_ups)]
        calls[name] = min(MOST_CALLS, max(1, math.ceil(SHORTEST / warm[-1])))
        found[name] = {'seconds': [], 'first_seconds': warm[0], 'operations': case.operations, 'tokens': case.tokens}
        say(f'{name}: first call {warm[0]:.2f} s')
    rates: list[float] = []
    begin = time.perf_counter()
    while another_round(repetitions, len(rates), time.perf_counter() - begin):
        rates.append(rate())
        for name, case in cases.items():
            found[name]['seconds'].append(seconds_a_call(case, calls[name]))
        say(f'round {len(rates)} done after {time.perf_counter() - begin:.1f} s')
    return {'rate': rates, 'cases': found}


def another_round(repetitions: int | None, done: int, seconds: float) -> bool:
    """Whether to go on: up to `repetitions`, or where that is None as `benchmark` says."""
    if repetitions is not None:
        return done < repetitions
    return done < FEWEST or (done < USUAL and seconds < PATIENCE)


def short_name(dtype: torch.dtype) -> str:
    """'float32' for torch.float32."""
    return str(dtype).removeprefix('torch.')


# What is measured ---------------------------------------------------------------------------------------------------

def model_config(shape: Shape, **changes: Any) -> GPTConfig:
    """The model of `shape` with the special ids of shakespeare_char; `changes` add heads or make it causal."""
    return GPTConfig(block_size=shape.block_size, vocab_size=VOCABULARY_SIZE, n_layer=shape.n_layer,
                     n_head=shape.n_head, n_embd=shape.n_embd, mask_token_id=BASE_SIZE, wrong_token_id=BASE_SIZE + 1,
                     pad_token_id=BASE_SIZE + 2, cls_token_id=BASE_SIZE + 3, **changes)


def training_cases(shape: Shape, runtime: Runtime, critic_row_stride: int) -> dict[str, Case]:
    """One training step of each kind, on models of their own: causal, stage 1 (main loss, no heads), stage 2 (with the
    sampler head) and stage 3 (with the critic too)."""
    sampler = {'add_sampler_head': True}
    critic = {**sampler, 'add_critic_head': True, 'critic_row_stride': critic_row_stride}
    configs = {'causal': model_config(shape, attention_type='causal'), 'stage 1': model_config(shape),
               'stage 2': model_config(shape, **sampler), 'stage 3': model_config(shape, **critic)}
    return {name: Case(_training_run(config, shape, runtime), step_operations(config, shape), shape.tokens)
            for name, config in configs.items()}


def _training_run(config: GPTConfig, shape: Shape, runtime: Runtime) -> Callable[[int], object]:
    tokens = np.random.default_rng(0).integers(0, BASE_SIZE, TOKENS, dtype=np.uint16)
    plan = BatchPlan(tokens=tokens, seed=1, block_size=shape.block_size, batch_size=shape.batch_size, micro_steps=1,
                     rank=0, world_size=1, mask_token_id=BASE_SIZE, loss_weighting='elbo',
                     sampler_context=config.sampler_context if config.add_sampler_head else 0,
                     critic_row_stride=config.critic_row_stride, critic_scope=config.critic_target_scope)
    kind = 'causal' if config.attention_type == 'causal' else 'unmasking'
    state = TrainingState(GPT(config).to(runtime.device), _allowed(runtime.device), runtime, plan, kind, **TRAINING)
    return lambda iteration: training_step(state, iteration, TRAINING['learning_rate'])


def fill_cases(shape: Shape, device: torch.device, autocast: torch.dtype | None) -> dict[str, Case]:
    """One trunk call on fully masked rows, and the wavefront fill of all of them from its hidden states."""
    network = _network(model_config(shape, add_sampler_head=True), device, autocast)
    model, tokens = network.model, _masked(FILL_ROWS, shape, device)
    rows, rule = torch.arange(FILL_ROWS, device=device), DrawRule(_allowed(device), TEMPERATURE)
    with network.precision():
        hidden_states = network.encode(tokens)  # [B, T, D]

    def trunk(_: int) -> None:
        with network.precision():
            network.encode(tokens)

    def fill(number: int) -> None:
        with network.precision():
            sampler_wavefront_fill(model, tokens, hidden_states, rule, RowRandom(number, 0, rows))

    return {'trunk call': Case(trunk, tokens.numel() * model.operations_per_token(), tokens.numel()),
            'wavefront fill': Case(fill, tokens.numel() * fill_operations(model.config), tokens.numel())}


def sampling_cases(shape: Shape, device: torch.device, autocast: torch.dtype | None) -> dict[str, Case]:
    """Whole texts: by diffusion with the sampler head, guided by self-confidence, and left to right by a causal model
    of the same trunk with its key-value cache."""
    levels = linear_remasking_schedule(PREDICTIONS - 1, 0.95, 0.05)
    rule = DrawRule(_allowed(device), TEMPERATURE)
    diffusion = GenerationSettings('diffusion', rule, remask_policy(levels, 'ratio', 0.4, True), use_sampler_head=True)
    networks = {'diffusion': (_network(model_config(shape, add_sampler_head=True), device, autocast), diffusion),
                'standard': (_network(model_config(shape, attention_type='causal'), device, autocast),
                             GenerationSettings('standard', rule))}
    cases = {}
    for rows in SAMPLING_ROWS:
        written = rows * shape.block_size
        for name, (network, settings) in networks.items():
            operations = network.model.operations_per_token()
            if name == 'diffusion':
                operations = PREDICTIONS * operations + (1 + sum(levels)) * fill_operations(network.model.config)
            cases[f'{name}, batch {rows}'] = Case(_sampling_run(network, settings, _masked(rows, shape, device)),
                                                  written * operations, written)
    return cases


def _sampling_run(network: Network, settings: GenerationSettings, tokens: Tensor) -> Callable[[int], object]:
    layout = Layout(tokens, torch.zeros_like(tokens, dtype=torch.bool))
    rows = torch.arange(len(tokens), device=tokens.device)
    return lambda number: generate(network, layout, settings, RowRandom(number, 0, rows))


def _network(config: GPTConfig, device: torch.device, autocast: torch.dtype | None) -> Network:
    model = GPT(config).to(device).eval().requires_grad_(False)
    return Network(model, TimingAccumulator(device), autocast)


def _masked(rows: int, shape: Shape, device: torch.device) -> Tensor:
    """int64 [rows, T], nothing but masks."""
    return torch.full((rows, shape.block_size), BASE_SIZE, device=device)


def _allowed(device: torch.device) -> Tensor:
    return allowed_ids(VOCABULARY_SIZE, BASE_SIZE, device)


# Policies -----------------------------------------------------------------------------------------------------------

class PolicyRun(NamedTuple):
    """A policy at work on `POLICY_ROWS` rows of tokens int64 [rows, T], some or all of them masks."""

    policy: Policy
    tokens: Tensor
    use_sampler_head: bool
    use_critic: bool


def policy_runs(shape: Shape) -> dict[str, PolicyRun]:
    """Every policy without the sampler head, and those `WITH_HEAD` with it, for about `POLICY_CALLS` trunk calls.

    Where the number of positions decides the calls, so many are masked. An untrained model finds all tokens about
    equally probable, which says where the adaptive policies' bounds lie; that by threshold reveals half of what is
    masked at each call, so it takes some calls more.
    """
    T, calls = shape.block_size, POLICY_CALLS
    group = math.ceil(T / calls)  # positions a call
    options = {'iterations': calls, 'idle_cache': True, 'choice_temperature': 4.5, 'remdm_eta': None, 'loop_on': 0.55,
               'loop_off': 0.05, 'loop_alpha': 0.9, 'planner_eta': 1.0, 'selection_noise': 0.5,
               'entropy_bound': (group - 0.5) * math.log(BASE_SIZE), 'parallel_factor': group + 1.0,
               'confidence_threshold': 1 / BASE_SIZE}
    masks = {'first_hitting': calls, 'dilated': 2 ** calls}
    found = {}
    for name, row in POLICIES.items():
        policy = remask_policy(linear_remasking_schedule(calls - 1, 0.95, 0.05), 'ratio', 0.4, True) \
            if name == 'remask' else row.make(**{option: options[option] for option in row.options})
        tokens = torch.zeros(POLICY_ROWS, T, dtype=torch.int64)
        tokens[:, :masks.get(name, T)] = BASE_SIZE
        found[name] = PolicyRun(policy, tokens, False, row.needs_critic)
        if name in WITH_HEAD:
            found[f'{name} with sampler head'] = found[name]._replace(use_sampler_head=True)
    return found


def measure_policies(runs: Mapping[str, PolicyRun], network: Network, say: Say, *,
                     repetitions: int | None) -> dict[str, Any]:
    """Rounds of one trunk call alone and every run once: {'bare_seconds': of that call, per round; 'runs': {name:
    {'tokens' written, 'trunk_calls' and 'network_calls' of a run; 'seconds' of it and 'trunk_seconds' and
    'network_seconds' spent inside these calls, per round}}}.

    The calls are timed where they are made, so what a run takes beside the network comes from that run alone.
    """
    device = next(network.model.parameters()).device
    bare: list[float] = []
    found: dict[str, Any] = {}

    def call(tokens: Tensor) -> float:
        network.timer.reset()
        with network.precision():
            network.encode(tokens)
        return network.timer.totals['trunk']

    tokens = next(iter(runs.values())).tokens.to(device)
    say(f'first call {call(tokens):.2f} s')
    begin = time.perf_counter()
    while another_round(repetitions, len(bare), time.perf_counter() - begin):
        bare.append(call(tokens))
        for name, run in runs.items():
            one = _timed_run(network, run, RowRandom(len(bare), 0, torch.arange(POLICY_ROWS, device=device)))
            seen = found.setdefault(name, {'tokens': int((run.tokens == BASE_SIZE).sum()), 'seconds': [],
                                           'trunk_seconds': [], 'network_seconds': []})
            seen.update(trunk_calls=network.trunk_calls, network_calls=network.network_calls)
            for key, value in one.items():
                seen[key].append(value)
        say(f'round {len(bare)} done after {time.perf_counter() - begin:.1f} s')
    return {'bare_seconds': bare, 'runs': found}


def _timed_run(network: Network, run: PolicyRun, generator: RowRandom) -> dict[str, float]:
    """Seconds of one run, and of these inside the trunk and inside the network; the network counts this run alone."""
    tokens, device = run.tokens.to(generator.rows.device), generator.rows.device
    settings = GenerationSettings('diffusion', DrawRule(_allowed(device), TEMPERATURE), run.policy,
                                  use_sampler_head=run.use_sampler_head, use_critic=run.use_critic)
    network.timer.reset()
    network.trunk_calls = network.network_calls = 0
    with network.timer.measure('run'):
        generate(network, Layout(tokens, tokens != BASE_SIZE), settings, generator)
    inside = {stage: network.timer.totals.get(stage, 0.0) for stage in ('trunk', 'critic')}
    return {'seconds': network.timer.measured, 'trunk_seconds': inside['trunk'],
            'network_seconds': sum(inside.values())}


# Operations ---------------------------------------------------------------------------------------------------------

def step_operations(config: GPTConfig, shape: Shape) -> float:
    """Operations of a training step's matrix products: three trunk calls' worth (forward, and twice that backward) and
    the heads. The optimizer's own products are left out; half the positions count as masked.

    A causal step counts like a bidirectional one, as is usual.
    """
    with torch.device('meta'):
        trunk = GPT(config).operations_per_token()
    D, V, masked = config.n_embd, config.vocab_size, shape.tokens / 2
    operations = 3.0 * trunk * shape.tokens
    if config.add_sampler_head:  # its input is detached, so the first matrix has one product less to take back
        first, rest = (2 * config.sampler_context + 1) * D * D, D * D + D * V
        operations += masked * 2 * (2 * first + 3 * rest)
    if config.add_critic_head:  # the filled-in text is read by the trunk once more, on a share of the rows
        share = math.ceil(shape.batch_size / config.critic_row_stride) / shape.batch_size
        operations += share * (masked * fill_operations(config) + 3.0 * trunk * shape.tokens)
    return operations


def fill_operations(config: GPTConfig) -> int:
    """Operations that the sampler head and `lm_head` need per position drawn in a wavefront fill."""
    D, V, W = config.n_embd, config.vocab_size, config.sampler_n_embd or config.n_embd
    return 2 * (D * W + W * W + W * V + D * V)
