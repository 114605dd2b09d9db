"""What sample.py does: check the options, load the checkpoint, generate in batches, report and write files.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from core.checkpoints.checkpoint import build_model, load_checkpoint, model_config_from_dict
from core.checkpoints.heads import started_heads
from core.checkpoints.helpers import load_judge, load_remasking_model, require_block
from core.checkpoints.kinds import CheckpointKind
from core.common.drawing import DrawRule, allowed_ids
from core.common.errors import UserError, raise_problems
from core.common.files import write_whole
from core.common.randomness import RowRandom
from core.common.runtime import DTYPES, resolve_device
from core.common.timing import TimingAccumulator, get_global_timer
from core.data.vocabulary import Vocabulary
from core.sampling.animation import TerminalAnimation
from core.sampling.calibration import find_calibration
from core.sampling.generation import GenerationSettings, generate, score_confidence, windows
from core.sampling.network import Network
from core.sampling.options import SampleConfig
from core.sampling.policy_options import (DIFFUSION, build_policy, guidance_problems, model_problems, option_problems,
                                          reads_thresholds)
from core.sampling.prompt import Layout, lay_out_infill, lay_out_prompt, split_infill, start_token
from core.sampling.replay import write_html
from core.sampling.trace import Trace, TraceStep
from model import GPT
from sample_utils import draw_wave, judge_scores

PREVIEW = 100  # characters of a preview


# From options to what generation takes -------------------------------------------------------------------------------

def choose_autocast(dtype: str, device: torch.device) -> torch.dtype | None:
    """The precision of autocast, None for float32 throughout."""
    if dtype == 'auto':
        return torch.bfloat16 if device.type == 'cuda' and torch.cuda.is_bf16_supported() else None
    return None if dtype == 'float32' else DTYPES[dtype]


def lay_out(config: SampleConfig, vocabulary: Vocabulary, block_size: int, generator: RowRandom) -> Layout:
    """The start of the rows of `generator`: prompt or infill text, masks elsewhere."""
    mask = vocabulary.mask_token_id
    if config.infill_text:
        pieces = [piece if isinstance(piece, int) else vocabulary.encode(piece)
                  for piece in split_infill(config.infill_text, config.infill_char)]
        size = sum(piece if isinstance(piece, int) else len(piece) for piece in pieces)
        return lay_out_infill(pieces, config.sequence_length or size, mask, generator)
    prompt = vocabulary.encode(config.start_text) if config.start_text else []
    length = len(prompt) + config.max_new_tokens if config.max_new_tokens else config.sequence_length or block_size
    return lay_out_prompt(prompt, length, mask, generator, config.seed_placement)


@dataclass(frozen=True)
class _Loaded:
    """A checkpoint ready to sample from, its helpers, and what is to be said about it."""

    model: GPT
    remasking_model: GPT | None
    judge: GPT | None
    vocabulary: Vocabulary
    settings: GenerationSettings
    device: torch.device
    said: list[str]


def _load(config: SampleConfig, explicit: Mapping[str, str]) -> _Loaded:
    device, path = torch.device(resolve_device(config.device)), Path(config.out_dir) / config.checkpoint_name
    checkpoint = load_checkpoint(path, device='cpu')
    model_config = model_config_from_dict(checkpoint.model_config, config.checkpoint_name)
    raise_problems(model_problems(config, explicit, model_config, CheckpointKind(checkpoint.kind)))
    sampler, critic, said = started_heads(model_config, checkpoint.iteration)
    if config.sampling_method == 'sampler' and not sampler:
        raise UserError(f'sampling_method is sampler, but {said[0]}; train longer or take --sampling_method=diffusion')
    why = said[-1] if model_config.add_critic_head and not critic else 'the checkpoint has none'
    raise_problems(guidance_problems(config, critic, why))
    vocabulary = Vocabulary.from_meta(checkpoint.vocabulary)
    model = build_model(checkpoint, device).requires_grad_(False)
    remasking_model = judge = None
    if config.remasking_checkpoint_name:
        remasking_model = load_remasking_model(config.remasking_checkpoint_name, config.out_dir, vocabulary, device)
    if config.judge_checkpoint_name:
        judge = load_judge(config.judge_checkpoint_name, config.out_dir, vocabulary, device)
    rule = DrawRule(allowed_ids(model_config.vocab_size, vocabulary.base_size, device), config.temperature,
                    config.top_k, config.top_p, config.repetition_penalty)
    diffusing, calibrate = config.sampling_method in DIFFUSION, None
    if diffusing and critic and remasking_model is None and reads_thresholds(config):
        calibration, line = find_calibration(path)
        said.append(line)
        calibrate = None if calibration is None else calibration.to(device).error_rate
    settings = GenerationSettings(config.sampling_method, rule, build_policy(config, calibrate) if diffusing else None,
                                  config.iterations,
                                  'wave' if diffusing and sampler and config.use_sampler_head else 'none',
                                  diffusing and (critic or remasking_model is not None), start_token(vocabulary),
                                  config.block_length)
    return _Loaded(model, remasking_model, judge, vocabulary, settings, device, said)


# The run ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class SamplingResult:
    """What a run made: texts, tokens int64 [samples, L], self-confidence in nats per token and the judge's scores in
    0..1 (None: not asked for), counts and seconds, and the trace (None: nobody reads it)."""

    texts: list[str]
    tokens: Tensor
    protected: Tensor
    self_confidence: list[float] | None
    judge_scores: list[float] | None
    trunk_calls: int
    network_calls: int
    waves: int
    seconds: float
    judge_seconds: float
    trace: Trace | None


def run_sampling(config: SampleConfig, explicit: Mapping[str, str], say: Callable[[str], None] = print) -> SamplingResult:
    """Sample as `config` says, tell it through `say`, write the asked files; `explicit` names the options given."""
    raise_problems(option_problems(config, explicit))
    for name in (config.output_file, config.save_json, config.save_html):
        if name is not None and not Path(name).absolute().parent.is_dir():
            raise UserError(f'cannot write {name}: the folder {Path(name).parent} does not exist; create it first')
    loaded = _load(config, explicit)
    for line in loaded.said:
        say(line)
    timer = get_global_timer()
    timer.device = loaded.device
    timer.reset()
    result = _sample(config, loaded, timer, say)
    _report(config, loaded, result, timer, say)
    if config.output_file is not None:
        write_whole(Path(config.output_file), '\n\n'.join(result.texts) + '\n')
        say(f'texts written to {config.output_file}')
    if config.save_json is not None:
        write_whole(Path(config.save_json), json.dumps(_as_builtins(result, loaded), ensure_ascii=False) + '\n')
        say(f'run written to {config.save_json}')
    if config.save_html is not None:
        write_html(result.trace, loaded.vocabulary.decode, Path(config.save_html))
        say(f'replay written to {config.save_html}; open it in a browser')
    return result


def _sample(config: SampleConfig, loaded: _Loaded, timer: TimingAccumulator, say: Callable[[str], None]) -> SamplingResult:
    model, vocabulary = loaded.model, loaded.vocabulary
    encode, wave = (torch.compile(model.encode), torch.compile(draw_wave, dynamic=True)) if config.compile else \
        (None, draw_wave)
    network = Network(model, timer, choose_autocast(config.dtype, loaded.device), encode, loaded.remasking_model, wave)
    everyone = RowRandom(config.seed, 0, torch.arange(config.num_samples, device=loaded.device))
    layout = lay_out(config, vocabulary, model.config.block_size, everyone)
    _require_blocks(config, loaded, layout.tokens.size(1))
    recorded = config.save_json is not None or config.save_html is not None
    trace = Trace(asdict(config), layout.protected.cpu()) if recorded else None
    animation = TerminalAnimation(vocabulary.decode, vocabulary.mask_token_id, layout.protected.cpu()) \
        if config.animate else None
    if config.use_verbose_logging:
        _say_checks(config, loaded, layout, say)
    batches = torch.arange(config.num_samples, device=loaded.device).split(config.batch_size)
    tokens, waves, start = [], 0, time.perf_counter()
    blocks = len(windows(layout.tokens.size(1), model.config.block_size))
    with animation or nullcontext(), \
            _Progress(config, vocabulary, len(batches), blocks, trace, animation, say) as progress:
        for rows in batches:
            generator = RowRandom(config.seed, 0, rows)
            made = generate(network, Layout(layout.tokens[rows], layout.protected[rows]), loaded.settings, generator,
                            progress.see if progress.wanted else None)
            tokens.append(made.tokens)
            waves += made.waves
            progress.end_batch()
    seconds = time.perf_counter() - start - (animation.seconds if animation is not None else 0.0)
    self_scores = judged = None
    if config.quality_metric == 'self':
        self_scores = _score_themselves(config, loaded, network, layout, zip(batches, tokens))
    elif config.quality_metric == 'judge':
        with network.precision(), timer.measure('judge'):
            judged = [score for made in tokens for score in judge_scores(loaded.judge, made).tolist()]
    made = torch.cat(tokens).cpu()
    return SamplingResult([vocabulary.decode(row) for row in made.tolist()], made, layout.protected.cpu(), self_scores,
                          judged, network.trunk_calls, network.network_calls, waves, seconds,
                          timer.totals.get('judge', 0.0), trace)


def _require_blocks(config: SampleConfig, loaded: _Loaded, length: int) -> None:
    """The helpers must be able to read what they are to judge: a window of text, or all of it behind the CLS token."""
    window = min(length, loaded.model.config.block_size)
    if loaded.remasking_model is not None:
        require_block(loaded.remasking_model, f'remasking_checkpoint_name={config.remasking_checkpoint_name}', window,
                      'a window of the generator')
    if loaded.judge is not None:
        require_block(loaded.judge, f'judge_checkpoint_name={config.judge_checkpoint_name}', length + 1,
                      f'the CLS token and {length} of text')


def _score_themselves(config: SampleConfig, loaded: _Loaded, network: Network, layout: Layout,
                      batches: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    """Self-confidence of every sample in nats per token; `batches` are rows and their tokens."""
    scores: list[float] = []
    for rows, made in batches:
        scored = score_confidence(network, made, layout.protected[rows], loaded.settings.rule.allowed,
                                  RowRandom(config.seed, 0, rows), config.confidence_groups)
        scores += (scored.total / scored.count.clamp(min=1)).tolist()
    return scores


class _Progress:
    """The terminal's reader of a run's steps: progress bar or animation, verbose lines; feeds the trace as well."""

    def __init__(self, config: SampleConfig, vocabulary: Vocabulary, batches: int, blocks: int, trace: Trace | None,
                 animation: TerminalAnimation | None, say: Callable[[str], None]) -> None:
        self.config, self.vocabulary, self.trace, self.say = config, vocabulary, trace, say
        self.animation = animation
        self.bar_wanted = config.show_progress and sys.stderr.isatty() and animation is None
        self.wanted = (self.bar_wanted or trace is not None or animation is not None or config.use_verbose_logging
                       or config.log_debug)
        self.batches, self.blocks, self.batch, self.last = batches, blocks, 0, None
        self.bar: tqdm | None = None

    def __enter__(self) -> '_Progress':
        if self.bar_wanted:
            self.bar = tqdm(total=1.0, desc='sampling',
                            bar_format='{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}')
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def see(self, step: TraceStep) -> None:
        """A `Watch`."""
        if self.trace is not None:
            self.trace.add(step)
        done = (step.window + (step.step + (step.event != 'start')) / step.steps) / self.blocks if step.steps else 1.0
        self._move((self.batch + done) / self.batches)
        self.log_iteration_progress(step)
        if self.animation is not None:
            self.animation(step)

    def end_batch(self) -> None:
        """All windows of a batch are written; a run that ended early moves the bar the rest of the way."""
        if self.config.use_verbose_logging and self.last is not None:
            self._say(f'last preview: {self._preview(self.last)}')
        self.batch += 1
        self._move(self.batch / self.batches)

    def log_iteration_progress(self, step: TraceStep) -> None:
        """Mask shares, the first preview, and with log_debug a line per step."""
        masked = (step.tokens == self.vocabulary.mask_token_id).float().mean()
        if self.config.log_debug:
            mean = step.confidence[step.changed].mean() if step.event == 'predict' and step.changed.any() else None
            self._say(f'block {step.window} step {step.step} {step.event}: {int(step.changed.sum())} positions '
                      f'changed, {masked:.1%} masked' + ('' if mean is None else f', mean log-probability {mean:.3f}'))
        elif self.config.use_verbose_logging:
            self._say(f'block {step.window} step {step.step} {step.event}: {masked:.1%} masked')
        if self.config.use_verbose_logging and step.event == 'predict' and step.step == 0:
            self._say(f'first preview: {self._preview(step)}')
        self.last = step

    def _preview(self, step: TraceStep) -> str:
        return repr(self.vocabulary.decode(step.tokens[0].tolist())[:PREVIEW])

    def _say(self, line: str) -> None:
        if self.animation is not None:
            self.animation.clear()
        if self.bar is not None:
            self.bar.clear()
        self.say(line)

    def _move(self, share: float) -> None:
        if self.bar is not None:
            self.bar.update(max(0.0, share - self.bar.n))


def _say_checks(config: SampleConfig, loaded: _Loaded, layout: Layout, say: Callable[[str], None]) -> None:
    """Sanity checks before the start."""
    model, (rows, length) = loaded.model, layout.tokens.shape
    masked = layout.tokens == loaded.vocabulary.mask_token_id
    say(f'{rows} samples of {length} tokens in {len(windows(length, model.config.block_size))} blocks of at most '
        f'{model.config.block_size}; {int(layout.protected[0].sum())} protected, {masked.float().mean():.1%} masked')
    say(f'{model.parameter_count():,} parameters on {loaded.device}, {int(loaded.settings.rule.allowed.sum())} tokens '
        f'may be drawn, special ids {loaded.vocabulary.base_size} to {model.config.vocab_size - 1} never')
    critic = 'replaced by the remasking model' if loaded.remasking_model is not None else \
        'on' if loaded.settings.use_critic else 'off'
    say(f'sampler head {"off" if loaded.settings.head == "none" else "on"}, critic {critic}, seed {config.seed}')


# The report ---------------------------------------------------------------------------------------------------------

def character_distribution(texts: Sequence[str], most: int = 10) -> list[tuple[str, float]]:
    """The most frequent characters and their shares of all texts."""
    counts = Counter(character for text in texts for character in text)
    return [(character, count / counts.total()) for character, count in counts.most_common(most)]


def frequent_patterns(texts: Sequence[str], size: int = 3, most: int = 10) -> list[tuple[str, int]]:
    """The most frequent groups of `size` characters that occur more than once, and how often."""
    counts = Counter(text[start:start + size] for text in texts for start in range(len(text) - size + 1))
    return [(pattern, count) for pattern, count in counts.most_common(most) if count > 1]


def _report(config: SampleConfig, loaded: _Loaded, result: SamplingResult, timer: TimingAccumulator,
            say: Callable[[str], None]) -> None:
    for index, text in enumerate(result.texts):
        score = ''
        if result.self_confidence is not None:
            score = f' (self-confidence {result.self_confidence[index]:.3f} nats per token)'
        elif result.judge_scores is not None:
            score = f' (judge score {result.judge_scores[index]:.3f})'
        say(f'--- sample {index}{score}')
        say(text)
    say('---')
    new = int((~result.protected).sum())
    waves = f', {result.waves} waves' if loaded.settings.head != 'none' else ''
    say(f'{new} tokens in {result.seconds:.2f} s ({new / result.seconds:.0f} tokens/s), {result.trunk_calls} trunk '
        f'calls, {result.network_calls} network calls{waves}')
    if result.self_confidence is not None:
        way = 'left to right' if loaded.model.config.attention_type == 'causal' else \
            f'masked pseudo-likelihood in {config.confidence_groups} groups'
        say(f'self-confidence {sum(result.self_confidence) / len(result.texts):.3f} nats per token ({way})')
    if result.judge_scores is not None:
        rate = (result.tokens.numel() + len(result.texts)) / result.judge_seconds
        say(f'judge score {sum(result.judge_scores) / len(result.texts):.3f} (1 - evaluation; 1 is real text), '
            f'{rate:.0f} tokens/s')
    say('characters: ' + ', '.join(f'{character!r} {share:.1%}'
                                   for character, share in character_distribution(result.texts)))
    patterns = ', '.join(f'{pattern!r} {count}' for pattern, count in frequent_patterns(result.texts))
    say(f'patterns: {patterns or "none"}')
    say(timer.summary())


def _as_builtins(result: SamplingResult, loaded: _Loaded) -> dict[str, Any]:
    assert result.trace is not None
    return {**result.trace.to_builtins(loaded.vocabulary.decode), 'texts': result.texts,
            'tokens': result.tokens.tolist(), 'self_confidence': result.self_confidence,
            'judge_scores': result.judge_scores,
            'trunk_calls': result.trunk_calls, 'network_calls': result.network_calls, 'seconds': result.seconds}
