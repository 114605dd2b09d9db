"""What sample.py does: check the options, load the checkpoint, generate in batches, save files, then report.

Finished texts are kept, whatever stops the run: Ctrl-C, lack of memory, a network that gives NaN, a broken terminal.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict

import torch
from torch import Tensor

from core.common.errors import UserError, raise_problems
from core.common.expressions import unknown_choice
from core.common.precision import exact_device
from core.common.printing import counted, say
from core.common.randomness import RowRandom
from core.common.timing import TimingAccumulator, get_global_timer
from core.sampling.animation import TerminalAnimation
from core.sampling.generation import generate, parts_of, reads_blocks
from core.sampling.loading import Loaded, lay_out, load, make_network, read_prompts, require_blocks
from core.sampling.network import Network
from core.sampling.options import QualityMetric, SampleConfig
from core.sampling.outputs import OUTPUTS, Outputs, holds_all, output_problems, records
from core.sampling.policy_options import option_problems
from core.sampling.presets import with_preset
from core.sampling.progress import Progress
from core.sampling.prompt import Layout
from core.sampling.quality_metrics import QUALITY_METRICS, Finished
from core.sampling.result import Batch, SamplingResult, tell_samples, tell_totals
from core.sampling.trace import Trace
from core.sampling.verified import write_verified

Say = Callable[[str], None]


def run_sampling(config: SampleConfig, explicit: Mapping[str, str], say: Say = say) -> SamplingResult:
    """Sample as `config` says, write the files, and report through `say`; `explicit` names the options given.

    If something stops the run early, the finished texts are saved and reported first; then it is raised.
    """
    config, preset = with_preset(config, explicit)
    metrics = (*QUALITY_METRICS, QualityMetric.NONE)
    raise_problems([*option_problems(config, explicit), *unknown_choice('quality_metric', config.quality_metric, metrics),
                    *output_problems(config)])
    config = read_prompts(config)
    loaded = load(config, explicit)
    voice = Voice(say, patient=any(getattr(config, option) is not None for option in OUTPUTS))
    for line in (*preset, *loaded.said):
        voice(line)
    timer = get_global_timer()
    timer.device = loaded.device
    timer.reset()
    trace = Trace(asdict(config), torch.zeros(0, dtype=torch.bool)) if records(config) else None
    result, outputs = SamplingResult(holds_all(config), trace, config.quality_metric), Outputs(config, loaded.vocabulary.decode)
    problem: BaseException | None = None
    try:
        _sample(config, loaded, timer, result, outputs, voice)
    except BaseException as error:  # Ctrl-C too
        problem = error
        if result.samples == 0:
            outputs.discard()
            raise
        if trace is not None:
            trace.cut(result.samples)
    _save_and_tell(config, loaded, timer, result, outputs, voice)
    if problem is not None:
        voice(f'{result.samples} of {counted(config.num_samples, "sample")} {"was" if result.samples == 1 else "were"} finished')
    for problem in (problem, voice.problem):
        if problem is not None:
            raise problem
    return result


class Voice:
    """A `Say` that may fail. A patient one keeps its first failure until the end, because files must be saved first."""

    def __init__(self, say: Say, patient: bool) -> None:
        self._say, self._patient = say, patient
        self.problem: Exception | None = None

    def __call__(self, line: str) -> None:
        if self.problem is not None:
            return
        try:
            self._say(line)
        except (OSError, ValueError) as error:  # ValueError: a character that the terminal lacks, a closed stream
            if not self._patient:
                raise
            self.problem = error


def _save_and_tell(config: SampleConfig, loaded: Loaded, timer: TimingAccumulator, result: SamplingResult,
                   outputs: Outputs, voice: Voice) -> None:
    """Save the files, then report: a broken terminal loses no file. What could not be saved is raised at the end."""
    unsaved, said = None, []
    try:
        said = outputs.save(result)
    except UserError as error:
        unsaved = error
    number = 0
    for batch in result.batches:
        tell_samples(batch, result.metric, number, voice)
        number += len(batch.texts)
    tell_totals(config, loaded, result, timer, voice)
    for line in said:
        voice(line)
    if unsaved is not None:
        raise unsaved


def _sample(config: SampleConfig, loaded: Loaded, timer: TimingAccumulator, result: SamplingResult, outputs: Outputs,
            voice: Voice) -> None:
    """Add finished batches to `result` and to `outputs` until all are made."""
    network, vocabulary = make_network(config, loaded, timer), loaded.vocabulary
    first_rows = _rows(config, loaded, 0)
    layout = lay_out(config, vocabulary, loaded.usual_length, first_rows)
    length = layout.tokens.size(1)
    require_blocks(config, loaded, length)
    if config.use_verbose_logging:
        _say_checks(config, loaded, layout, voice)
    animation = TerminalAnimation(vocabulary.decode, vocabulary.mask_token_id, layout.protected.cpu()) \
        if config.animate else None
    batches = -(-config.num_samples // config.batch_size)
    blocks = parts_of(length, loaded.model.config, loaded.settings.block_length)
    with animation or nullcontext(), \
            Progress(config, vocabulary, batches, blocks, result.trace, animation, voice) as progress:
        for first in range(0, config.num_samples, config.batch_size):
            rows = _rows(config, loaded, first)
            layout = lay_out(config, vocabulary, loaded.usual_length, rows)
            progress.begin_batch(first, layout.protected.cpu())
            shown, start = animation.seconds if animation is not None else 0.0, time.perf_counter()
            write = write_verified if loaded.settings.verify_drafts else generate
            made = write(network, layout, loaded.settings, rows, progress.see if progress.wanted else None)
            tokens = made.tokens.cpu()  # waits for the device
            result.seconds += time.perf_counter() - start
            if animation is not None:
                result.seconds -= animation.seconds - shown
            result.waves += made.waves
            batch = _scored(config, loaded, network, layout, rows, made.tokens, tokens)
            result.trunk_calls, result.network_calls = network.trunk_calls, network.network_calls
            result.judge_seconds = timer.totals.get('judge', 0.0)
            outputs.add(batch.texts)
            result.add(batch)
            progress.end_batch()
            if not result.keeps:
                tell_samples(batch, result.metric, first, progress.say_line)


def _rows(config: SampleConfig, loaded: Loaded, first: int) -> RowRandom:
    """The random numbers of the batch that begins with sample number `first`."""
    last = min(first + config.batch_size, config.num_samples)
    return RowRandom(config.seed, 0, torch.arange(first, last, device=exact_device(loaded.device)))


def _scored(config: SampleConfig, loaded: Loaded, network: Network, layout: Layout, rows: RowRandom, made: Tensor,
            tokens: Tensor) -> Batch:
    """The batch of the samples made int64 [B, L], which `tokens` holds on the CPU, with their scores."""
    texts = [loaded.vocabulary.decode(row) for row in tokens.tolist()]
    scores = None if config.quality_metric == QualityMetric.NONE else QUALITY_METRICS[config.quality_metric].score(
        Finished(config, loaded, network, layout, rows, made, texts))
    return Batch(texts, tokens, layout.protected.cpu(), scores)


def _say_checks(config: SampleConfig, loaded: Loaded, layout: Layout, say: Say) -> None:
    """Sanity checks before the start; layout: of the first batch."""
    model, length = loaded.model, layout.tokens.size(1)
    masked = layout.tokens == loaded.vocabulary.mask_token_id
    block_length = loaded.settings.block_length
    most = block_length if reads_blocks(model.config, block_length) else model.config.block_size
    parts = parts_of(length, model.config, block_length)
    say(f'{counted(config.num_samples, "sample")} of {counted(length, "token")} in {counted(parts, "block")} of '
        f'at most {most}; {int(layout.protected[0].sum())} protected, '
        f'{masked.float().mean():.1%} masked')
    say(f'{model.parameter_count():,} parameters on {loaded.device}, {int(loaded.settings.rule.allowed.sum())} tokens '
        f'may be drawn, the other {model.config.vocab_size - loaded.vocabulary.base_size} ids never')
    critic = 'replaced by the remasking model' if loaded.remasking_model is not None else \
        'on' if loaded.settings.use_critic else 'off'
    say(f'sampler head {"off" if loaded.settings.head == "none" else "on"}, critic {critic}, seed {config.seed}')
