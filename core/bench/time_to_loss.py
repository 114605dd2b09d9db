"""Seconds of training until a validation loss is reached: `bench.py --time_to_nelbo`.

The yardstick (core/bench/yardstick.py), a plain causal GPT with AdamW, and this program's own recipes train on one
corpus, with the shape, the batch and the number of iterations of config/train_char_diffusion.py. Each side has its own
usual learning rate and schedule. The sides take turns, seed by seed. Seconds are those of training steps, including
compilation and without validations. Between two validations the loss is taken to be a straight line.

The loss is in nats per token: the exact negative log-likelihood of a causal model, or the NELBO (a bound) of diffusion.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch

from configurator import bound_problems, configure
from core.bench.measuring import describe_machine
from core.bench.options import TIME_TO_NELBO, BenchConfig
from core.bench.training_cases import baseline_forms
from core.bench.yardstick import LEARNING_RATE, Baseline, BaselineTraining, Form
from core.checkpoints.run_folder import METRICS
from core.common.errors import raise_problems
from core.common.files import why_unwritable, write_whole
from core.common.runtime import Runtime, resolve_device, start_runtime, stop_runtime, synchronize
from core.common.tables import markdown_table
from core.data.corpus import Corpus
from core.data.folders import data_folder
from core.data.prepare import ensure_corpus
from core.logger import read_metrics
from core.optimizer import learning_rate_at
from core.options import TrainConfig
from core.trainer import train
from core.validation import fixed_windows

SEEDS = (1337, 1338, 1339)
VALIDATIONS = 20  # of a training
RECIPES = {'causal': 'config/train_char_ar.py', 'diffusion': 'config/train_char_diffusion.py'}
YARDSTICK = 'plain GPT'
WARM_UP, LEAST = 100, 0.1  # iterations, and the last learning rate as a share of the first, as in nanoGPT
TRIAL_STEPS = 5  # of each form of the yardstick, after its first step

Say = Callable[[str], None]


class Point(NamedTuple):
    """A validation: seconds of training before it, and its loss in nats per token."""

    seconds: float
    loss: float


def seconds_until(points: Sequence[Point], target: float) -> float | None:
    """Seconds of training until the loss has fallen to `target`, on straight lines between validations; None if it
    never falls so far."""
    for before, after in zip(points, points[1:]):
        if after.loss <= target < before.loss:
            return before.seconds + (after.seconds - before.seconds) * (before.loss - target) / (
                before.loss - after.loss)
    return points[0].seconds if points[0].loss <= target else None


def run_time_to_nelbo(config: BenchConfig, explicit: Mapping[str, str], say: Say) -> None:
    """Train every side with every seed and print the table. Writes --json after each training."""
    targets = asked_targets(config, explicit)
    device, root = resolve_device(config.device), data_folder(None)
    recipes = {name: recipe_options(path, config, device) for name, path in RECIPES.items()}
    corpus = ensure_corpus(config.dataset, say, root)
    runs: dict[str, list[list[Point]]] = {name: [] for name in (YARDSTICK, *RECIPES)}
    form = None
    for seed in SEEDS[:config.repetitions or len(SEEDS)]:
        shape = recipes['causal']
        runtime = start_runtime(device, config.dtype, config.compile, width=shape.n_embd, iterations=shape.max_iters)
        try:
            form = form or fastest_form(shape, corpus, runtime, say)
            runs[YARDSTICK].append(train_yardstick(shape, corpus, runtime, form, seed))
        finally:
            stop_runtime(runtime)
        say(f'{YARDSTICK}, seed {seed}: {said(runs[YARDSTICK][-1])}')
        for name, options in recipes.items():
            runs[name].append(train_recipe(options, seed, say))
            say(f'{name}, seed {seed}: {said(runs[name][-1])}')
        record = {'machine': describe_machine(), 'dataset': config.dataset, 'form': form.name, 'targets': targets,
                  'iterations': shape.max_iters, 'runs': {name: [[list(point) for point in run] for run in found]
                                                          for name, found in runs.items()}}
        if config.json is not None:
            write_whole(Path(config.json), json.dumps(record, indent=1) + '\n')
    say('\n' + '\n'.join(table(runs, targets)))


def asked_targets(config: BenchConfig, explicit: Mapping[str, str]) -> list[float]:
    """The losses in --time_to_nelbo, from high to low. UserError lists what is wrong with the options."""
    problems, targets = bound_problems(config), []
    for text in (config.time_to_nelbo or '').split(','):
        try:
            targets.append(float(text))
        except ValueError:
            problems.append(f'time_to_nelbo holds {text!r}, which is no number; give losses in nats per token, as in '
                            f'--time_to_nelbo={TIME_TO_NELBO}')
    problems += [f'time_to_nelbo holds {target:g}, but a loss is above 0; leave it out'
                 for target in targets if not target > 0]
    applies = ('time_to_nelbo', 'dataset', 'iterations', 'repetitions', 'device', 'dtype', 'compile', 'json')
    problems += [f'{name} does not apply to time_to_nelbo; leave one of them out'
                 for name in explicit if name not in applies]
    if (config.repetitions or 1) > len(SEEDS):
        problems.append(f'repetitions is {config.repetitions}, but time_to_nelbo has {len(SEEDS)} seeds; lower it')
    if config.json is not None and (reason := why_unwritable(config.json)) is not None:
        problems.append(f'json is {config.json!r}, but {reason}')
    raise_problems(problems)
    return sorted(targets, reverse=True)


def recipe_options(path: str, config: BenchConfig, device: str) -> TrainConfig:
    """The options of train.py for a recipe on the corpus that was asked for."""
    arguments = [path, f'--dataset={config.dataset}', f'--device={device}', f'--dtype={config.dtype}',
                 f'--compile={config.compile}', '--sample_length=0', '--eval_iters=8', '--overwrite=True']
    if config.iterations is not None:
        arguments += [f'--max_iters={config.iterations}', f'--lr_decay_iters={config.iterations}']
    options = configure(TrainConfig, arguments, resolve_device=resolve_device).config
    options.eval_interval = max(1, options.max_iters // VALIDATIONS)
    return options


# The sides ----------------------------------------------------------------------------------------------------------

def train_recipe(options: TrainConfig, seed: int, say: Say) -> list[Point]:
    """Train as `options` say, in a folder that is removed afterwards. Returns the validations."""
    torch.compiler.reset()  # each run compiles for itself, as a run of train.py does
    with tempfile.TemporaryDirectory() as folder:
        options.seed, options.out_dir = seed, str(Path(folder) / 'run')
        train(options, [])
        lines = read_metrics(Path(options.out_dir) / METRICS)
    return [Point(line['train_seconds'], line.get('val/nelbo', line.get('val/loss')))
            for line in lines if line['kind'] == 'evaluation']


def train_yardstick(shape: TrainConfig, corpus: Corpus, runtime: Runtime, form: Form, seed: int) -> list[Point]:
    """Train the yardstick in `form` with its own learning rate for the iterations of `shape`. Returns its validations.
    """
    torch.compiler.reset()
    training = _yardstick(shape, corpus, runtime, form, seed)
    held_out = fixed_windows(corpus.tokens('val', shape.block_size + 1), shape.eval_iters * shape.batch_size,
                             shape.block_size + 1)  # [W, T + 1]
    points, seconds = [Point(0.0, training.validate(held_out))], 0.0
    for first in range(0, shape.max_iters, shape.eval_interval):
        start = time.perf_counter()
        for iteration in range(first, min(first + shape.eval_interval, shape.max_iters)):
            training.step(learning_rate_at(iteration, learning_rate=LEARNING_RATE, min_lr=LEAST * LEARNING_RATE,
                                           warmup_iters=min(WARM_UP, shape.max_iters // 2),
                                           lr_decay_iters=shape.max_iters, decay_lr=True))
        synchronize(runtime.device)
        seconds += time.perf_counter() - start
        points.append(Point(seconds, training.validate(held_out)))
    return points


def fastest_form(shape: TrainConfig, corpus: Corpus, runtime: Runtime, say: Say) -> Form:
    """The form of the yardstick that finishes all iterations of `shape` first, including compilation."""
    projected: dict[Form, float] = {}
    for form in baseline_forms(runtime):
        torch.compiler.reset()
        training, spent = _yardstick(shape, corpus, runtime, form, SEEDS[0]), []
        for _ in range(1 + TRIAL_STEPS):
            start = time.perf_counter()
            training.step()
            synchronize(runtime.device)
            spent.append(time.perf_counter() - start)
        projected[form] = spent[0] + median(spent[1:]) * (shape.max_iters - 1)
        say(f'{form.name}: first step {spent[0]:.1f} s, then {1000 * median(spent[1:]):.0f} ms')
    return min(projected, key=projected.__getitem__)


def _yardstick(shape: TrainConfig, corpus: Corpus, runtime: Runtime, form: Form, seed: int) -> BaselineTraining:
    model = Baseline(shape.block_size, corpus.vocabulary.size, shape.n_layer, shape.n_head, shape.n_embd, seed=seed)
    return BaselineTraining(model.to(runtime.device), corpus.tokens('train', shape.block_size + 1), shape.batch_size,
                            shape.block_size, form, seed)


# The report ---------------------------------------------------------------------------------------------------------

def said(points: Sequence[Point]) -> str:
    """'1.512 nats after 310 s'"""
    return f'{points[-1].loss:.3f} nats after {points[-1].seconds:.0f} s'


def table(runs: Mapping[str, Sequence[Sequence[Point]]], targets: Sequence[float]) -> list[str]:
    """Seconds until each loss for each side: the mean over seeds (lowest to highest). Then, seed by seed, how many
    times as fast the causal recipe is as the yardstick. A dash if a seed never gets there."""
    body = []
    for target in targets:
        found = {name: [seconds_until(run, target) for run in seeds] for name, seeds in runs.items()}
        ratios = [theirs / ours for theirs, ours in zip(found[YARDSTICK], found['causal'])
                  if theirs is not None and ours]
        body.append([f'{target:g}', *(spread(values, '{:.0f}') for values in found.values()),
                     spread(ratios if len(ratios) == len(found['causal']) else [None], '{:.2f}')])
    last = [spread([run[-1].loss for run in seeds], '{:.3f}') for seeds in runs.values()]
    return markdown_table(['nats per token', *(f'{name}, seconds' for name in runs),
                           f'{YARDSTICK} / causal'], [*body, ['loss at the end', *last, '']])


def spread(values: Sequence[float | None], shown: str) -> str:
    """'mean (lowest to highest)', or a dash if a value is missing."""
    known: list[Any] = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return '-'
    return f'{shown.format(mean(known))} ({shown.format(min(known))} to {shown.format(max(known))})'
