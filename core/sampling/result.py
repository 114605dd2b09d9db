"""The results of a sampling run, batch by batch, and the report at the end."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.common.printing import counted
from core.common.timing import TimingAccumulator
from core.data.text_figures import figures_of, windows_of
from core.sampling.generation import reads_blocks
from core.sampling.loading import Loaded
from core.sampling.options import QualityMetric, SampleConfig
from core.sampling.policy_options import DIFFUSION
from core.sampling.quality_metrics import QUALITY_METRICS
from core.sampling.trace import Trace

PATTERN_LENGTH = 3  # characters
MOST = 10  # characters and patterns shown


class Batch(NamedTuple):
    """Finished samples: tokens int64 and protected bool [B, L] on the CPU; scores: of each by the quality metric, None
    where none was asked for."""

    texts: list[str]
    tokens: Tensor
    protected: Tensor
    scores: list[float] | None


class TextStatistics:
    """Characters and groups of characters of all texts."""

    def __init__(self) -> None:
        self._characters: Counter[str] = Counter()
        self._patterns: Counter[str] = Counter()

    def add(self, texts: Sequence[str]) -> None:
        """Count the characters of `texts`, and the patterns inside each."""
        self._characters.update(character for text in texts for character in text)
        self._patterns.update(text[start:start + PATTERN_LENGTH] for text in texts
                              for start in range(len(text) - PATTERN_LENGTH + 1))

    def characters(self) -> list[tuple[str, float]]:
        """The most frequent characters and their shares of all texts."""
        return [(character, count / self._characters.total())
                for character, count in self._characters.most_common(MOST)]

    def patterns(self) -> list[tuple[str, int]]:
        """The most frequent patterns that occur more than once, and how often."""
        return [(pattern, count) for pattern, count in self._patterns.most_common(MOST) if count > 1]


@dataclass
class SamplingResult:
    """The finished samples of a run, counts and seconds.

    batches: those that are held in memory, all or none (`keeps`); samples, new_tokens and tokens_judged: of all;
    trace: None where nobody reads it; metric: the quality metric that was asked for.
    """

    keeps: bool
    trace: Trace | None
    metric: str = QualityMetric.NONE
    batches: list[Batch] = field(default_factory=list)
    samples: int = 0
    new_tokens: int = 0
    tokens_judged: int = 0
    score_total: float = 0.0  # of the asked quality metric
    waves: int = 0
    trunk_calls: int = 0
    network_calls: int = 0
    seconds: float = 0.0
    judge_seconds: float = 0.0
    only_text: str | None = None  # the text that all samples have, None where they differ
    statistics: TextStatistics = field(default_factory=TextStatistics)

    def add(self, batch: Batch) -> None:
        """One more finished batch."""
        if self.keeps:
            self.batches.append(batch)
        first = batch.texts[0] if self.samples == 0 else self.only_text
        self.only_text = first if all(text == first for text in batch.texts) else None
        self.samples += len(batch.texts)
        self.new_tokens += int((~batch.protected).sum())
        self.tokens_judged += batch.tokens.numel() + len(batch.texts)  # with CLS
        self.score_total += sum(batch.scores or ())
        self.statistics.add(batch.texts)

    @property
    def texts(self) -> list[str]:
        """Of the batches that are held."""
        return [text for batch in self.batches for text in batch.texts]

    @property
    def tokens(self) -> Tensor:
        """int64 [samples, L] of the batches that are held."""
        return torch.cat([batch.tokens for batch in self.batches])

    @property
    def scores(self) -> list[float] | None:
        """Of the samples that are held by the quality metric, None where none was asked for."""
        parts = [batch.scores for batch in self.batches]
        return None if None in parts else [score for part in parts for score in part]

    def to_builtins(self, decode: Callable[[list[int]], str]) -> dict[str, Any]:
        """The run with its trace in built-in types for JSON."""
        assert self.trace is not None
        scores = {row.key: self.scores if name == self.metric else None for name, row in QUALITY_METRICS.items()}
        return {**self.trace.to_builtins(decode), 'texts': self.texts, 'tokens': self.tokens.tolist(), **scores,
                'trunk_calls': self.trunk_calls, 'network_calls': self.network_calls, 'seconds': self.seconds}


# The report -----------------------------------------------------------------------------------------------------------

def tell_samples(batch: Batch, metric: str, first: int, say: Callable[[str], None]) -> None:
    """The texts of a batch whose first sample has number `first`, with their scores by the quality metric."""
    for index, text in enumerate(batch.texts):
        score = '' if batch.scores is None else f' ({_told(metric, batch.scores[index])})'
        say(f'--- sample {first + index}{score}')
        say(text)


def _told(metric: str, score: float) -> str:
    row = QUALITY_METRICS[metric]
    return f'{row.title} {score:.3f}{row.unit}'


STANDARD_ERRORS, DEVIATIONS = 3.0, 1.5  # from the corpus's mean, beyond which texts are unlike it


def variety_lines(config: SampleConfig, loaded: Loaded, result: SamplingResult) -> list[str]:
    """One line if the texts repeat themselves more than the corpus does, or are wilder, with the option to try.

    There is no line if they do neither, or if nothing is known: texts shorter than a window, a checkpoint without
    figures, texts no longer held.
    """
    corpus = loaded.text_figures
    windows = [] if corpus is None or not result.batches else \
        windows_of(result.tokens.tolist(), corpus.length, loaded.vocabulary.decode)
    if not windows:
        return []
    found, most = figures_of(windows, corpus.length), max(STANDARD_ERRORS / len(windows) ** 0.5, DEVIATIONS)
    entropy, repetition = ((mine.mean - theirs.mean) / max(theirs.deviation, 1e-9) for mine, theirs in (
        (found.entropy, corpus.entropy), (found.repetition, corpus.repetition)))
    told = (f'{found.repetition.mean:.0%} of their 4-grams repeat earlier ones (corpus: {corpus.repetition.mean:.0%}), '
            f'bigram entropy {found.entropy.mean:.2f} (corpus: {corpus.entropy.mean:.2f})')
    presets = config.sampling_method in DIFFUSION and not reads_blocks(
        loaded.model.config, loaded.settings.block_length)
    if repetition > most or entropy < -most:
        other = ' or --preset=varied' if presets and config.preset != 'varied' else ''
        return [f'the texts repeat themselves: {told}; try a --temperature above {config.temperature:g}{other}']
    if entropy > most:
        other = ' or --preset=careful' if presets and config.preset != 'careful' else ''
        return [f'the texts are wilder than the corpus: {told}; try a --temperature below {config.temperature:g}{other}']
    return []


def tell_totals(config: SampleConfig, loaded: Loaded, result: SamplingResult, timer: TimingAccumulator,
                say: Callable[[str], None]) -> None:
    """Counts, times, mean scores, characters and patterns of all samples."""
    say('---')
    for line in variety_lines(config, loaded, result):
        say(line)
    waves = '' if loaded.settings.head == 'none' else f', {counted(result.waves, "wave")}'
    say(f'{counted(result.new_tokens, "token")} in {result.seconds:.2f} s ({result.new_tokens / result.seconds:.0f} tokens/s), '
        f'{counted(result.trunk_calls, "trunk call")}, {counted(result.network_calls, "network call")}{waves}')
    if result.samples > 1 and result.only_text is not None:
        say(f'all {result.samples} samples are the same text: ' + (
            'at temperature 0 nothing is left to chance; raise --temperature' if config.temperature == 0 else
            f'every open position has one likely token at temperature {config.temperature}, top_p {config.top_p} and '
            f'top_k {config.top_k}; raise --temperature, or leave out top_p and top_k'))
    if result.metric != QualityMetric.NONE:
        rate = f', {result.tokens_judged / result.judge_seconds:.0f} tokens/s' if result.judge_seconds else ''
        say(_told(result.metric, result.score_total / result.samples)
            + QUALITY_METRICS[result.metric].remark(config, loaded) + rate)
    say('characters: ' + ', '.join(f'{character!r} {share:.1%}'
                                   for character, share in result.statistics.characters()))
    patterns = ', '.join(f'{pattern!r} {count}' for pattern, count in result.statistics.patterns())
    say(f'patterns: {patterns or "none"}')
    say(timer.summary())
