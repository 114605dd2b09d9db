"""What must hold on a CUDA GPU, as checks that fail loudly: `bench.py --gpu_checks`.

They take a few minutes, need no corpus and train new models on made-up tokens. They do not measure speed; the other
tables of bench.py do. docs/gpu.md says what each check asks for and what it found.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
from torch import nn

from core.batches import BatchPlan, RowShare
from core.bench.cases import SHAPES, SPECIAL, Shape, base_vocabulary, model_config
from core.bench.measuring import describe_machine
from core.bench.options import BenchConfig
from core.bench.records import name_problems
from core.bench.sampling_cases import FILL_ROWS, TEMPERATURE, sampling_network
from core.bench.scaling import SIZES, Size, peak_bytes
from core.bench.training_cases import TOKENS, TRAINING, made_up_tokens, training_plan
from core.checkpoints.kinds import CheckpointKind
from core.checkpoints.run_folder import LATEST
from core.common.drawing import DrawRule
from core.common.errors import UserError, raise_problems
from core.common.files import write_whole
from core.common.randomness import RowRandom
from core.common.runtime import Runtime, measure_matrix_rate, resolve_device, start_runtime
from core.noise import Masking, seen_neighbours
from core.sampling.recorded_waves import RecordedWaves
from core.training_step import StepSettings, TrainingState, losses_with_gradients, training_step
from model import GPT, GPTConfig
from sample_utils import FillTask, Filler

Say = Callable[[str], None]
Facts = dict[str, Any]

LEARNING_RATE = 3e-3
STEPS = 20  # of a short training
COMPILED = (False, True)
BF16_TOLERANCE = 0.01  # of a loss in nats, relative
GRADIENT_TOLERANCE = 1e-3  # of a float32 gradient, relative to its norm
LONG_ROWS = {1024: 8, 2048: 4}  # rows of a batch, by the length of each of their two streams
FORMULA = (0.75, 1.1)  # measured peak over that of the formula, which counts what a processor keeps
# Host waits that a step needs: the fill of the critic's text must know how many positions each wave has.
WAITS = {'stage 3': 2}


class CheckFailed(Exception):
    """A check failed; the message says what was found and what was expected."""


def require(holds: bool, words: str) -> None:
    """Raise `CheckFailed` unless it holds."""
    if not holds:
        raise CheckFailed(words)


def run_gpu_checks(config: BenchConfig, say: Say) -> None:
    """Run every check, print a line of each, write --json. UserError if there is no GPU; exit code 1 if one failed."""
    device = torch.device(resolve_device(config.device))
    if device.type != 'cuda':
        raise UserError(f'gpu_checks needs a CUDA GPU, but the device is {device}; leave it out on this machine')
    found: dict[str, Facts] = {}
    for name in asked_checks(config):
        check = CHECKS[name]
        start = time.perf_counter()
        try:
            facts: Facts = {'passed': True, **check(device)}
        except Exception as error:  # a check that raises has failed, and the others still run
            facts = {'passed': False, 'problem': f'{type(error).__name__}: {error}'}
        found[name] = facts | {'seconds': round(time.perf_counter() - start, 1)}
        say(f'{name}: {"passed" if facts["passed"] else "FAILED"} {json.dumps(found[name])}')
        torch.cuda.empty_cache()
        if config.json is not None:
            write_whole(Path(config.json), json.dumps({'machine': describe_machine(), 'checks': found}, indent=1) + '\n')
    failed = [name for name, facts in found.items() if not facts['passed']]
    say(f'{len(found) - len(failed)} of {len(found)} checks passed' + (f'; failed: {", ".join(failed)}' if failed else ''))
    if failed:
        raise SystemExit(1)


def asked_checks(config: BenchConfig) -> list[str]:
    """The names in --gpu_checks; UserError for an unknown name."""
    names = list(CHECKS) if config.gpu_checks == 'all' else (config.gpu_checks or '').split(',')
    raise_problems(name_problems('gpu_checks', names, CHECKS))
    return names


# What is trained ----------------------------------------------------------------------------------------------------

def _configs(shape: Shape) -> dict[str, GPTConfig]:
    """The models whose steps are checked, by name."""
    sampler = {'add_sampler_head': True}
    return {'causal': model_config(shape, attention_type='causal'), 'stage 1': model_config(shape),
            'stage 2': model_config(shape, **sampler),
            'stage 3': model_config(shape, **sampler, add_critic_head=True, critic_row_stride=4),
            'block': model_config(shape, attention_type='block', block_length=(8,), sampler_order='left_to_right',
                                  sampler_context_left=7, sampler_context_right=0, sampler_gate=True,
                                  sampler_gradient='trunk', **sampler)}


def _state(config: GPTConfig, shape: Shape, runtime: Runtime, settings: StepSettings = TRAINING) -> TrainingState:
    model = GPT(config).to(runtime.device)
    kind, plan = training_plan(config, shape)
    return TrainingState(model, base_vocabulary(config, runtime.device), runtime,
                         plan._replace(tokens=_learnable_tokens(shape.base_size)), kind, settings)


def _learnable_tokens(base_size: int) -> np.ndarray:
    """uint16 [TOKENS]: a walk whose steps are small, so that losses fall."""
    steps = np.random.default_rng(0).integers(0, 4, TOKENS)
    return (np.cumsum(steps) % base_size).astype(np.uint16)


def _losses(state: TrainingState, steps: int) -> list[float]:
    found = [training_step(state, number, LEARNING_RATE).total for number in range(steps)]
    return torch.stack(found).tolist()


def _runtime(device: torch.device, dtype: str, compile: bool) -> Runtime:
    return start_runtime(str(device), dtype, compile, width=1024, iterations=10_000)


# Checks of the training step -------------------------------------------------------------------------------------------

def check_compiled_steps(device: torch.device) -> Facts:
    """Every kind of step compiles without a graph break, and its losses are those of eager steps within bfloat16."""
    from torch._dynamo.utils import counters

    facts: Facts = {}
    for name, config in _configs(SHAPES['small']).items():
        torch.compiler.reset()
        counters.clear()
        compiled = _losses(_state(config, SHAPES['small'], _runtime(device, 'bfloat16', True)), STEPS)
        breaks = dict(counters['graph_break'])
        eager = _losses(_state(config, SHAPES['small'], _runtime(device, 'bfloat16', False)), STEPS)
        apart = max(abs(one / other - 1) for one, other in zip(compiled, eager))
        facts[name] = {'graphs': counters['stats']['unique_graphs'], 'breaks': breaks, 'apart': apart}
        require(not breaks, f'{name}: graph breaks {breaks}')
        require(apart < BF16_TOLERANCE, f'{name}: compiled losses {compiled} but eager {eager}')
    return facts


def check_recorded_steps(device: torch.device) -> Facts:
    """Steps that are recorded as CUDA graphs give the same losses and weights as other steps, bit for bit, also with
    dropout. In recorded steps the host never waits."""
    facts: Facts = {}
    for name, config in _configs(SHAPES['small']).items():
        if config.add_critic_head:
            continue
        config, runs = replace(config, dropout=0.1), []
        for records in (True, False):
            state = _state(config, SHAPES['small'], _runtime(device, 'bfloat16', True), replace(TRAINING, cuda_graphs=True))
            state.recorder.works = records
            losses = _losses(state, STEPS)
            waits = _counted_waits(lambda: training_step(state, STEPS, LEARNING_RATE))
            require(not records or state.recorder.works, f'{name}: cannot be recorded')
            require(not waits, f'{name}: the host waits {waits}')
            runs.append((losses, [weight.detach().clone() for weight in
                                  (*state.model.parameters(), *state.averaged.parameters())], state.recorder.recorded))
        (losses, weights, recorded), (others, other_weights, none) = runs
        different = sum(not torch.equal(*pair) for pair in zip(weights, other_weights))
        facts[name] = {'recorded': recorded, 'losses apart': _most_apart(losses, others), 'different': different}
        require(recorded > 0 and none == 0, f'{name}: {recorded} and {none} kinds of steps recorded')
    require(not any(one['different'] or one['losses apart'] for one in facts.values()), f'{facts}')
    return facts


def check_streams(device: torch.device) -> Facts:
    """A compiled step of a block model with long rows reads tiles (FlexAttention), and has the losses and gradients
    that a dense mask gives. The host does not wait for the tiles of rows, and the step can be recorded with them. Also
    measures how long each takes."""
    facts: Facts = {}
    for length, rows in LONG_ROWS.items():
        shape = replace(SHAPES['medium'], n_layer=4, block_size=length, batch_size=rows)
        lengths = (8,) if not facts else (1, 8, length)  # tiles that are kept, and tiles of each batch
        config = model_config(shape, attention_type='block', block_length=lengths)
        torch.compiler.reset()
        apart = _apart_by_tiles(config, shape, device)
        state = _state(config, shape, _runtime(device, 'bfloat16', True))
        milliseconds, waits = {}, []
        for state.objective.tiled in (False, True):
            name = 'tiles' if state.objective.tiled else 'dense'
            milliseconds[name] = _milliseconds(state)
            waits = _counted_waits(lambda: training_step(state, 3, LEARNING_RATE))
        facts[f'{length}'] = {'block lengths': lengths, 'milliseconds': milliseconds, **apart,
                              'recorded apart': _apart_if_recorded(config, shape, device)}
        require(not waits, f'{length}: the host waits {waits}')
    off = {name: one for name, one in facts.items() if one['loss'] > GRADIENT_TOLERANCE or one['recorded apart']
           or one['gradient'] > GRADIENT_TOLERANCE}
    require(not off, f'apart: {off}; all: {facts}')
    return facts


def _apart_by_tiles(config: GPTConfig, shape: Shape, device: torch.device) -> Facts:
    """How far loss and gradients by tiles are from those by a dense mask, relative, in float32 without TF32."""
    torch.set_float32_matmul_precision('highest')
    state = _state(config, shape, Runtime(device, torch.float32, True))
    require(state.objective.tiled, 'the step does not read tiles')
    _losses(state, 3)  # at first the layers write nothing, and attention has no gradient
    batch, = state.training.batches(state.plan, 3, lambda count: count)
    found = []
    for state.objective.tiled in (False, True):
        state.model.zero_grad()
        losses = losses_with_gradients(state, batch.to(device), state.stage, 3)
        found.append((losses.total.item(), [weight.grad.clone() for weight in state.model.parameters()]))
    torch.set_float32_matmul_precision('high')
    (loss, gradients), (other_loss, others) = found
    return {'loss': abs(other_loss / loss - 1),
            'gradient': max(((other - one).norm() / one.norm()).item() for one, other in zip(gradients, others))}


def _milliseconds(state: TrainingState) -> float:
    """Of one step, after some that compile it."""
    _losses(state, 3)
    state.runtime.synchronize()
    start = time.perf_counter()
    _losses(state, STEPS)
    state.runtime.synchronize()
    return round(1000 * (time.perf_counter() - start) / STEPS, 2)


def _apart_if_recorded(config: GPTConfig, shape: Shape, device: torch.device) -> float:
    """How far the losses of recorded steps are from those of other steps, relative."""
    runs = []
    for records in (True, False):
        state = _state(config, shape, _runtime(device, 'bfloat16', True), replace(TRAINING, cuda_graphs=True))
        state.recorder.works = records
        runs.append(_losses(state, 8))
        require(state.recorder.works is records, 'cannot be recorded')
    return _most_apart(*runs)


def check_waits(device: torch.device) -> Facts:
    """The host waits for the device in no step, except as `WAITS` says."""
    facts: Facts = {}
    for name, config in _configs(SHAPES['small']).items():
        state = _state(config, SHAPES['small'], _runtime(device, 'bfloat16', False))
        _losses(state, 3)
        waits = _counted_waits(lambda: training_step(state, 3, LEARNING_RATE))
        facts[name] = waits
        require(len(waits) <= WAITS.get(name, 0), f'{name}: the host waits {len(waits)} times: {waits}')
    return facts


def _counted_waits(run: Callable[[], object]) -> list[str]:
    """Where `run` makes the host wait for the device: file and line of each wait, as torch reports it."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            run()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    root = str(Path(__file__).resolve().parents[2]) + os.sep
    return [f'{one.filename.removeprefix(root)}:{one.lineno}' for one in caught if 'synchroniz' in str(one.message)]


def check_precision(device: torch.device) -> Facts:
    """The losses of a short training in bfloat16 and in TF32 are those in float32."""
    facts: Facts = {}
    for name, config in _configs(SHAPES['small']).items():
        losses = {dtype: _losses(_state(config, SHAPES['small'], _runtime(device, dtype, False)), STEPS)
                  for dtype in ('float32', 'bfloat16')}
        torch.set_float32_matmul_precision('highest')
        state = _state(config, SHAPES['small'], Runtime(device, torch.float32, False))
        exact = _losses(state, STEPS)
        torch.set_float32_matmul_precision('high')
        facts[name] = {dtype: max(abs(one / other - 1) for one, other in zip(values, exact))
                       for dtype, values in losses.items()}
        require(max(facts[name].values()) < BF16_TOLERANCE, f'{name}: {facts[name]} from float32 without TF32')
    return facts


def check_memory(device: torch.device) -> Facts:
    """The peak of a step is what the formulas of core/bench/scaling.py give."""
    facts: Facts = {}
    wanted = [name for name, size in SIZES.items() if size.ranks == 1]
    for name, bfloat16 in [(name, one) for name in wanted for one in (False, True)]:
        size = replace(SIZES[name], bfloat16=bfloat16, device='cuda')
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        positions = _train_size(size, device)
        ratio = (torch.cuda.max_memory_allocated() - before) / peak_bytes(size, positions)
        facts[f'{name} {"bfloat16" if bfloat16 else "float32"}'] = {
            'MB': round((torch.cuda.max_memory_allocated() - before) / 1e6), 'over formula': round(ratio, 3)}
    off = {name: one for name, one in facts.items() if not FORMULA[0] <= one['over formula'] <= FORMULA[1]}
    require(not off, f'beyond {FORMULA} of the formula: {off}; all: {facts}')
    return facts


def _train_size(size: Size, device: torch.device) -> int:
    """Train it for three steps. Returns the most positions that a micro-step predicted."""
    config, base = size.config, size.vocab_size - SPECIAL
    runtime = _runtime(device, 'bfloat16' if size.bfloat16 else 'float32', False)
    masking = Masking(base, 'masked_mean', seen_neighbours(config), config.critic_row_stride,
                      config.critic_target_scope)
    plan = BatchPlan(made_up_tokens(base), 1, size.block_size, RowShare(size.rows, size.micro_steps), masking)
    settings = replace(TRAINING, optimizer=size.optimizer, activation_checkpointing=size.recompute)
    state = TrainingState(GPT(config).to(device), base_vocabulary(config, device), runtime, plan,
                          CheckpointKind.UNMASKING, settings)
    for step in range(3):
        training_step(state, step, LEARNING_RATE)
    return max(len(batch.positions) for step in range(3)
               for batch in state.training.batches(plan, step, runtime.total_count))


def check_repeats(device: torch.device) -> Facts:
    """Two trainings from one seed end with the same weights, bit for bit, eager and compiled."""
    facts: Facts = {}
    for name, config in _configs(SHAPES['small']).items():
        for compile in COMPILED:
            torch.compiler.reset()
            ends = []
            for _ in range(2):
                state = _state(config, SHAPES['small'], _runtime(device, 'bfloat16', compile))
                _losses(state, STEPS)
                ends.append({key: value.clone() for key, value in state.model.state_dict().items()})
            different = [key for key, value in ends[0].items() if not torch.equal(value, ends[1][key])]
            most = max((ends[0][key] - ends[1][key]).abs().max().item() for key in ends[0])
            facts[f'{name}, {"compiled" if compile else "eager"}'] = {'different': len(different), 'most': most}
    require(not any(one['different'] for one in facts.values()), f'{facts}')
    return facts


# Checks of sampling -----------------------------------------------------------------------------------------------------

def check_recorded_waves(device: torch.device) -> Facts:
    """A fill whose waves are recorded as a CUDA graph writes the same tokens as a plain fill. Also measures how long
    each takes, and how often the host waits."""
    facts: Facts = {}
    for name in ('small', 'large', 'medium'):
        shape = SHAPES[name]
        network = sampling_network(model_config(shape, add_sampler_head=True), device, torch.bfloat16)
        tokens = torch.full((FILL_ROWS, shape.block_size), shape.base_size, device=device)
        rule = DrawRule(base_vocabulary(network.model.config, device), TEMPERATURE)
        fills, seconds, waits, recorder = [], {}, {}, RecordedWaves()
        for kind in ('plain', 'recorded'):
            filler = Filler(network.model, 'wave', recorder=recorder if kind == 'recorded' else None)
            with network.precision():
                task = FillTask(tokens, network.encode(tokens), rule,
                                RowRandom(1, 0, torch.arange(FILL_ROWS, device=device)))
                fills.append(filler.fill(task))
                waits[kind] = _counted_waits(lambda: filler.fill(task))
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(5):
                    filler.fill(task)
                torch.cuda.synchronize()
                seconds[kind] = (time.perf_counter() - start) / 5
        same = (fills[0].tokens == fills[1].tokens).float().mean().item()
        facts[name] = {'same': same, 'milliseconds': {key: round(1000 * value, 2) for key, value in seconds.items()},
                       'waves': fills[0].statistics.waves, 'waits': waits}
        require(recorder.works and recorder.recorded > 0, f'{name}: cannot be recorded')
        require(same > 0.99, f'{name}: {same:.4f} of the tokens are the same; all: {facts}')
        require(len(waits['recorded']) <= 2, f'{name}: the host waits {waits}')
    return facts


# Checks of several processes and of whole runs ---------------------------------------------------------------------------

@contextmanager
def _one_rank() -> Iterator[None]:
    """A process group over NCCL that holds only this process."""
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group('nccl', init_method=f'file://{folder}/meeting', rank=0, world_size=1)
        try:
            yield
        finally:
            distributed.destroy_process_group()


def check_nccl(device: torch.device) -> Facts:
    """One rank over NCCL adds up correctly. Its steps with DistributedDataParallel and with cut weights (FSDP) give the
    losses of a plain run."""
    torch.cuda.set_device(device if device.index is not None else 0)
    config = _configs(SHAPES['small'])['stage 2']
    plain = _losses(_state(config, SHAPES['small'], _runtime(device, 'float32', False)), STEPS)
    with _one_rank():
        total = torch.ones(3, device=device)
        distributed.all_reduce(total)
        require(total.tolist() == [1.0] * 3, f'a sum over one rank is {total.tolist()}')
        state = _state(config, SHAPES['small'], _runtime(device, 'float32', False))
        state.enter(_first_stage(state))
        state.parallel = nn.parallel.DistributedDataParallel(state.objective)
        parallel = _losses(state, STEPS)
        settings = replace(TRAINING, optimizer='adamw', sharded=True)
        cut = _losses(_state(config, SHAPES['small'], _runtime(device, 'float32', False), settings), STEPS)
        whole = _losses(_state(config, SHAPES['small'], _runtime(device, 'float32', False),
                               replace(TRAINING, optimizer='adamw')), STEPS)
        state.leave_ranks()
    facts = {'parallel': _most_apart(parallel, plain), 'cut': _most_apart(cut, whole)}
    require(max(facts.values()) < 1e-3, f'{facts}')
    return facts


def _first_stage(state: TrainingState) -> Any:
    from core.stages import stage_at

    return stage_at(state.model.config, 0)


def _most_apart(values: list[float], others: list[float]) -> float:
    return max(abs(one / other - 1) for one, other in zip(values, others))


def check_resume(device: torch.device) -> Facts:
    """A run of train.py that is stopped and resumed ends like a run that was never stopped. Two calls of sample.py
    write the same samples."""
    root, facts = Path(__file__).resolve().parents[2], {}
    shape = ['--n_layer=2', '--n_head=2', '--n_embd=64', '--block_size=64', '--batch_size=16', '--warmup_iters=5',
             '--eval_interval=20', '--eval_iters=2', '--start_sampler_iteration=10', '--start_critic_iteration=20',
             '--end_critic_iteration=30', '--lr_decay_iters=40', f'--device={device}']
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / 'data'
        (Path(folder) / 'text.txt').write_text(_made_up_text(), encoding='utf-8')

        def run(*command: str) -> str:
            result = subprocess.run([sys.executable, *command], cwd=root, capture_output=True, encoding='utf-8',
                                    env={**os.environ, 'MASKED_DIFFUSION_DATA_DIR': str(data)})
            require(result.returncode == 0, f'{" ".join(command)} ended with {result.returncode}: '
                                            f'{result.stderr.strip()[-600:]}')
            return result.stdout

        run('data/custom/prepare.py', f'{folder}/text.txt')
        for compile in (False, True):
            ends = []
            for name, lengths in (('whole', (40,)), ('stopped', (20, 40))):
                out = f'{folder}/{name}-{compile}'
                for number, length in enumerate(lengths):
                    resumed = ['--init_from=resume'] if number else []
                    run('train.py', 'config/train_char_diffusion_sampler.py', '--dataset=custom', f'--out_dir={out}',
                        f'--compile={compile}', f'--max_iters={length}', *shape, *resumed)
                ends.append(torch.load(f'{out}/{LATEST}', map_location='cpu', weights_only=True)['model'])
            facts[f'apart, {"compiled" if compile else "eager"}'] = max(
                (ends[1][key] - value).abs().max().item() for key, value in ends[0].items())
        texts = [run('sample.py', f'--out_dir={folder}/whole-False', '--num_samples=2', '--iterations=8',
                     f'--device={device}') for _ in range(2)]
        facts['samples are the same'] = _without_times(texts[0]) == _without_times(texts[1])
    require(facts['samples are the same'], f'samples of one seed differ: {texts}')
    require(not any(value for name, value in facts.items() if 'apart' in name), f'{facts}')
    return facts


def _without_times(text: str) -> str:
    return text.partition('\n---\n')[0]


def _made_up_text() -> str:
    """Lines of words that follow each other by a rule, so that there is something to learn."""
    random, words = np.random.default_rng(0), ['sun', 'moon', 'rises', 'falls', 'over', 'the', 'old', 'sea', 'and', 'hill']
    order = random.integers(0, len(words), (20_000,))
    return '\n'.join(' '.join(words[one] for one in line) for line in order.reshape(-1, 8))


def check_rates(device: torch.device) -> Facts:
    """The machine's rates, for the record; tables show shares of them."""
    return {'TFLOP/s': {name: round(measure_matrix_rate(device, dtype) / 1e12, 1)
                        for name, dtype in (('bfloat16', torch.bfloat16), ('float32 as TF32', torch.float32))}}


CHECKS: Mapping[str, Callable[[torch.device], Facts]] = {
    'rates': check_rates, 'host waits': check_waits, 'precision': check_precision,
    'compiled steps': check_compiled_steps,
    'recorded steps': check_recorded_steps, 'streams': check_streams, 'repeats': check_repeats, 'memory': check_memory,
    'recorded waves': check_recorded_waves, 'nccl': check_nccl, 'resume': check_resume}
