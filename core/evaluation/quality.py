"""The measures of evaluate.py that look at samples: quality, policies and curves.

Their cells write texts (core/evaluation/written_samples.py) and measure them (core/evaluation/text_metrics.py).
core/evaluation/quality_tables.py reports all cells together. A result holds each metric as `name`, and its 95 %
interval as `name_interval`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

from core.checkpoints.checkpoint import checkpoint_hash
from core.checkpoints.heads import started_heads
from core.checkpoints.helpers import helper_path, load_remasking_model, require_block
from core.checkpoints.kinds import CheckpointKind
from core.common.errors import UserError, raise_problems
from core.common.expressions import closest
from core.common.typed_json import Interval, Range, Seconds
from core.evaluation.copied_spans import CopyIndex
from core.evaluation.measure import Cell, Evaluation, Measure, Result
from core.evaluation.quality_tables import CAUSAL, REAL, check_page, draw_quality, report_policies, tell_curves
from core.evaluation.text_metrics import (FEWEST_TEXTS, METRICS, Yardstick, make_yardstick, measure_texts,
                                          reference_doubts)
from core.evaluation.written_samples import (Budget, Writer, Written, budgets_of, held_out_texts, load_causal,
                                             shuffled_characters, shuffled_words, write)
from core.sampling.policies import GUIDES, POLICIES
from core.sampling.policy_options import make_policy

TRUNK_CALLS = (8, 16, 32, 64)
REFERENCE_CURE = 'python train.py config/train_char_reference.py'
CAUSAL_CURE = 'python train.py config/train_char_ar.py'
REMASKING_CURE = CheckpointKind.REMASKING.command
GREEDY_POLICY, GREEDY_CALLS = 'llada', 64
MOST_EXPENSIVE = 64.0  # cost of a cell whose trunk calls are not known in advance


Metrics = TypedDict('Metrics', {
    name: NotRequired[kind] if metric == 'reference_bits' else kind for metric in METRICS
    for name, kind in ((metric, float | None), (f'{metric}_interval', Interval | None))})


class TextResult(Metrics):
    """Metrics of texts. Reference bits need a reference model. sample: the first text."""

    sample: NotRequired[str]


class WrittenResult(TextResult):
    """Metrics and cost of generated texts. Calls are per batch, seconds for all texts."""

    trunk_calls: Annotated[float, Range(0.0)]
    network_calls: Annotated[float, Range(0.0)]
    seconds: Seconds
    self_confidence: float


class SettingResult(WrittenResult):
    """options: the policy's options that set its trunk calls."""

    options: dict[str, float]


class Study:
    """What the cells of one run share. Each part is made when it is first needed."""

    def __init__(self, evaluation: Evaluation) -> None:
        config, checkpoint = evaluation.config, evaluation.checkpoint
        if checkpoint.kind not in (CheckpointKind.UNMASKING, CheckpointKind.BLOCK):
            raise UserError(f'{config.checkpoint_name} is a checkpoint of kind {checkpoint.kind!r}, but policies write '
                            f'with a diffusion model; a causal one is compared with by --causal_checkpoint=...')
        raise_problems(_option_problems(evaluation))
        self.evaluation, self.config = evaluation, config
        _, critic, _ = started_heads(evaluation.model.config, checkpoint.iteration)
        self.writer = Writer(evaluation.model, evaluation.vocabulary, evaluation.runtime, evaluation.allowed,
                             evaluation.sampler_head and config.use_sampler_head, critic, config.num_samples,
                             config.sequence_length or evaluation.model.config.block_size,
                             min(config.batch_size, config.num_samples), config.seed,
                             schedule=checkpoint.noise_schedule())
        self.reference_path = self._optional('reference_checkpoint', 'no figure of reference bits', REFERENCE_CURE)
        self.causal_path = self._optional('causal_checkpoint', 'no causal control', CAUSAL_CURE)
        self.guidance = self._guidance(critic)
        self.budgets = {None: Budget(self.writer)} | {name: self._guided(name) for name in self.guidance}

    def _guidance(self, critic: bool) -> list[str]:
        """The names in --guidance. Default: the guide that sample.py takes."""
        config = self.config
        names = [] if config.guidance is None else list(dict.fromkeys(config.guidance.split(',')))
        problems = [f'guidance names {name!r}, but must be some of {",".join(GUIDES)}' for name in names
                    if name not in GUIDES]
        given = {'guidance': bool(names), 'randomness_strength': config.randomness_strength is not None}
        if 'remask' not in (config.policies or 'remask').split(','):
            problems += [f'{option} is of the policy remask, but policies is {config.policies}; leave it out'
                         for option, here in given.items() if here]
        if 'critic' in names and not critic:
            problems.append(f'guidance names critic, but {config.checkpoint_name} has no trained one; leave it out')
        if 'model' in names and config.remasking_checkpoint_name is None:
            problems.append(f'guidance names model, but no remasking model is given; give '
                            f'--remasking_checkpoint_name=..., trained with: {REMASKING_CURE}')
        raise_problems(problems)
        return names or ['self']

    def _guided(self, name: str) -> Budget:
        """Settings in which `name` guides the policy remask."""
        model, config = None, self.config
        if name == 'model':
            model = load_remasking_model(config.remasking_checkpoint_name, config.out_dir, self.evaluation.vocabulary,
                                         self.evaluation.runtime.device)
            require_block(model, f'remasking_checkpoint_name={config.remasking_checkpoint_name}',
                          min(self.writer.length, self.evaluation.model.config.block_size), 'a window of the generator')
        writer = replace(self.writer, critic=GUIDES[name].asks_critic, remasking_model=model)
        return Budget(writer, guidance=name, **self.randomness)

    @property
    def randomness(self) -> dict[str, float]:
        """The option --randomness_strength for every setting of the policy remask; empty if it was not given."""
        given = self.config.randomness_strength
        return {} if given is None else {'randomness_strength': given}

    def _optional(self, name: str, without: str, cure: str) -> Path | None:
        """The path that an option names. If it does not exist: None for the default, UserError for a given path."""
        path = Path(getattr(self.config, name))
        if path.exists():
            return path
        if name in self.evaluation.explicit:
            raise UserError(f'{path} does not exist; make it with: {cure}, or leave {name} out')
        self.evaluation.say(f'{path} does not exist, so there is {without}; make it with: {cure}')
        return None

    @cached_property
    def yardstick(self) -> Yardstick:
        if self.reference_path is None:
            return make_yardstick(self.evaluation.corpus, self.config.split)
        reference, trained = load_causal(self.reference_path, self.evaluation.runtime, REFERENCE_CURE)
        own, say = self.evaluation.checkpoint.config, self.evaluation.say
        split = str(trained.get('train_split', 'train'))
        if trained.get('dataset') == own.get('dataset') and split == own.get('train_split', 'train'):
            say(f'warning: {self.reference_path} was trained on the same split ({split}) as the model that it scores')
        if trained.get('seed') == own.get('seed'):
            say(f'warning: {self.reference_path} shares its seed with the model that it scores')
        return make_yardstick(self.evaluation.corpus, self.config.split, reference)

    @cached_property
    def reference_text(self) -> CopyIndex | None:
        """The reference model's training text; None if there is no such model, or the corpus does not hold the text."""
        corpus = self.evaluation.corpus
        if self.reference_path is None or 'ref' not in corpus.sizes:
            return None
        return CopyIndex(corpus.vocabulary.decode(corpus.tokens('ref').tolist()))

    @cached_property
    def _common(self) -> Result:
        writer = self.writer
        return self.evaluation.settings(
            samples=writer.samples, length=writer.length, batch_size=writer.batch_size, seed=writer.seed,
            sampler_head=writer.sampler_head, critic=writer.critic,
            reference=None if self.reference_path is None else checkpoint_hash(self.reference_path))

    def cell(self, name: str, wanted: int | None, temperature: float, guidance: str | None) -> Cell:
        """The cell of a policy at a number of trunk calls. guidance: None for a policy that has no guide."""
        def compute() -> Result:
            options, written = self.budgets[guidance].write(name, wanted, temperature)
            return {'options': options, **self.measured(written)}

        settings = {**self._common, 'policy': name, 'wanted_calls': wanted, 'temperature': temperature}
        if guidance is not None:
            settings |= {**self.randomness, 'guidance': guidance, 'remasking': checkpoint_hash(helper_path(
                self.config.remasking_checkpoint_name, self.config.out_dir)) if guidance == 'model' else None}
        return Cell(settings, SettingResult, compute, float(wanted or MOST_EXPENSIVE))

    def measured(self, written: Written) -> Result:
        """Counts, seconds, metrics and the first text."""
        return {'trunk_calls': written.trunk_calls, 'network_calls': written.network_calls, 'seconds': written.seconds,
                'self_confidence': written.self_confidence, **self.metrics(written.texts), 'sample': written.texts[0]}

    def metrics(self, texts: Sequence[str]) -> Result:
        """Every metric and its interval. None if it is not a number, such as a share of no words."""
        found: Result = {}
        for name, estimate in measure_texts(texts, self.yardstick, self.config.seed).items():
            found[name] = estimate.value if math.isfinite(estimate.value) else None
            found[f'{name}_interval'] = [estimate.low, estimate.high] if math.isfinite(estimate.low) else None
        if self.reference_text is not None:
            for doubt in reference_doubts(texts, self.reference_text):
                self.evaluation.say(f'warning: {doubt}')
        return found

    def controls(self) -> list[Cell]:
        """Real text, two ways of shuffling it, the causal model's own samples, and greedy decoding."""
        corpus, config, writer = self.evaluation.corpus, self.config, self.writer

        def real() -> list[str]:
            return held_out_texts(corpus, config.split, writer.samples, writer.length)

        made: dict[str, tuple[type, Callable[[], Result]]] = {
            REAL: (TextResult, lambda: {**self.metrics(real()), 'sample': real()[0]}),
            'shuffled words': (TextResult, lambda: self.metrics(shuffled_words(real(), config.seed))),
            'shuffled characters': (TextResult, lambda: self.metrics(shuffled_characters(real(), config.seed))),
            f'greedy ({GREEDY_POLICY})': (WrittenResult, lambda: self.measured(
                write(writer, make_policy(GREEDY_POLICY, iterations=min(GREEDY_CALLS, writer.length)), 0.0))),
        }
        if self.causal_path is not None:
            made[CAUSAL] = WrittenResult, self.causal_samples
        return [Cell({**self._common, 'control': name,
                      'causal': checkpoint_hash(self.causal_path) if name == CAUSAL else None}, kind, compute)
                for name, (kind, compute) in made.items()]

    def causal_samples(self) -> Result:
        """The causal model's own samples at temperature 1."""
        causal, _ = load_causal(self.causal_path, self.evaluation.runtime, CAUSAL_CURE)
        if causal.vocabulary.hash != self.writer.vocabulary.hash:
            raise UserError(f'{self.causal_path} has another vocabulary ({causal.vocabulary.base_size} tokens) than '
                            f'{self.config.checkpoint_name} ({self.writer.vocabulary.base_size}), so its samples are '
                            f'of another length; take one of the same corpus')
        values = {**vars(self.writer), 'model': causal.model, 'sampler_head': False, 'critic': False}
        return self.measured(write(Writer(**values), None, 1.0))

    @cached_property
    def trunk_calls(self) -> list[int]:
        """The budgets: --trunk_calls, or those of `TRUNK_CALLS` that do not exceed the tokens of a text."""
        length = self.writer.length
        asked = self.config.trunk_calls
        if asked is None:
            return [calls for calls in TRUNK_CALLS if calls <= length] or [length]
        for calls in asked:
            if calls != int(calls) or not 1 <= calls <= length:
                raise UserError(f'trunk_calls holds {calls:g}, but must be whole numbers from 1 to {length}, the '
                                f'tokens of a text; leave it out or raise sequence_length')
        return [int(calls) for calls in asked]

    def policies(self, usual: Sequence[str]) -> list[str]:
        """--policies, or those of `usual` that work with the checkpoint."""
        if self.config.policies is None:
            return [name for name in usual if self.writer.critic or not POLICIES[name].needs_critic]
        asked = self.config.policies.split(',')
        for name in asked:
            if name not in POLICIES:
                nearest = closest(name, POLICIES)
                raise UserError(f'policies names {name!r}, but must be some of {",".join(POLICIES)}'
                                + (f"; did you mean '{nearest}'?" if nearest else ''))
            if POLICIES[name].needs_critic and not self.writer.critic:
                raise UserError(f'policies names {name}, which needs a critic, but the checkpoint has no trained one; '
                                f'leave it out')
        return asked

    def grid(self, usual: Sequence[str], temperatures: Sequence[float]) -> list[Cell]:
        """A cell per policy, budget and temperature."""
        return [self.cell(name, wanted, temperature, guidance) for name in self.policies(usual)
                for guidance in (self.guidance if name == 'remask' else [None])
                for wanted in budgets_of(name, self.trunk_calls) for temperature in temperatures]


def _option_problems(evaluation: Evaluation) -> list[str]:
    """Messages about the options that concern samples."""
    config, problems = evaluation.config, []
    if config.num_samples < FEWEST_TEXTS:
        problems.append(f'num_samples is {config.num_samples}, but an interval needs at least {FEWEST_TEXTS}')
    if config.sequence_length is not None and config.sequence_length < 1:
        problems.append(f'sequence_length is {config.sequence_length}, but must be at least 1')
    if min([config.temperature, *config.temperatures]) < 0:
        problems.append('temperature and temperatures must not be negative; 0 is greedy')
    if 'use_sampler_head' in evaluation.explicit and config.use_sampler_head and not evaluation.sampler_head:
        problems.append(f'use_sampler_head is True, but {config.checkpoint_name} has no trained sampler head; leave it '
                        f'out')
    return problems


def quality_cells(evaluation: Evaluation) -> list[Cell]:
    """All metrics of a few settings: the default policy unless others are named."""
    study = Study(evaluation)
    return [*study.controls(), *study.grid(('remask',), [evaluation.config.temperature])]


def policies_cells(evaluation: Evaluation) -> list[Cell]:
    """Every policy at every budget, at one temperature."""
    check_page(evaluation, 'policies')
    study = Study(evaluation)
    return [*study.controls(), *study.grid(tuple(POLICIES), [evaluation.config.temperature])]


def curves_cells(evaluation: Evaluation) -> list[Cell]:
    """Every policy at every budget and every temperature."""
    study = Study(evaluation)
    if study.reference_path is None:
        raise UserError(f'curves compare bits under a reference model, and {evaluation.config.reference_checkpoint} '
                        f'does not exist; make it with: {REFERENCE_CURE}')
    if len(evaluation.config.temperatures) < 2:
        raise UserError('temperatures must hold at least two, or nothing can be interpolated to equal entropy')
    return [*study.controls(), *study.grid(tuple(POLICIES), evaluation.config.temperatures)]


_WHO = ('control', 'policy', 'guidance', 'wanted_calls', 'temperature')
_COST = ('trunk_calls', 'network_calls', 'seconds')
QUALITY_MEASURES = {
    'quality': Measure(quality_cells, (*_WHO, *_COST, 'reference_bits', 'entropy_3', 'divergence_3', 'distinct_3',
                                       'known_words', 'copied_span', 'repetition'),
                       'all metrics of samples, with controls: real, shuffled, causal and greedy text', draw_quality),
    'policies': Measure(policies_cells, (*_WHO, *_COST, 'self_confidence', 'entropy_3', 'known_words'),
                        'every sampling policy at 8, 16, 32 and 64 trunk calls', report_policies),
    'curves': Measure(curves_cells, (*_WHO, *_COST, 'reference_bits', 'entropy_3'),
                      'quality against trunk calls, network calls and seconds, at equal entropy', tell_curves),
}
