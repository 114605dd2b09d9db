"""Samples of many settings. A setting is a policy, a number of trunk calls and a temperature.

`write` makes the texts of a setting with the loop of sample.py (core/sampling/generation.py);
core/evaluation/text_metrics.py measures them. Controls have the same number and length of texts. A lower temperature
alone improves the bits under a reference model. So policies and budgets are compared at equal trigram entropy: texts
are written at several temperatures, and every figure is interpolated to the entropy of real text of the same size.

Letters: B rows of a batch, L tokens of a text.
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.checkpoints.checkpoint import load_checkpoint
from core.checkpoints.kinds import CheckpointKind
from core.checkpoints.weights import build_model
from core.common.drawing import DrawRule
from core.common.errors import UserError
from core.common.randomness import keyed
from core.common.runtime import Runtime
from core.common.timing import TimingAccumulator
from core.data.corpus import Corpus
from core.data.vocabulary import Vocabulary
from core.evaluation.text_metrics import Reference
from core.noise import LINEAR, NoiseSchedule
from core.sampling.generation import GenerationSettings, generate, score_confidence
from core.sampling.network import Network
from core.sampling.options import SampleConfig
from core.sampling.policies import POLICIES, Policy
from core.sampling.policy_options import block_length_of, make_policy
from core.sampling.prompt import lay_out_prompt, start_token
from core.validation import fixed_windows
from model import GPT

TRIALS = 9  # most trials of a dial for one number of trunk calls
DIALS: dict[str, tuple[str, Callable[[float], float]]] = {  # an adaptive policy's option at x in [0, 1]; 0 is fastest
    'entropy_bounded': ('entropy_bound', lambda x: 10 ** (3 - 6 * x)),
    'fast_dllm_threshold': ('confidence_threshold', lambda x: x ** 3),
    'fast_dllm_factor': ('parallel_factor', lambda x: 10 ** (3 - 6 * x)),
}


# Writing ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Writer:
    """A model and what all its settings have in common. sampler_head, critic: whether they are used. allowed bool [V].
    samples: the number of texts, each of `length` tokens, in batches of at most batch_size. Text i depends on seed and
    i. remasking_model: is the critic instead of the model's own head. schedule: the model's."""

    model: GPT
    vocabulary: Vocabulary
    runtime: Runtime
    allowed: Tensor
    sampler_head: bool
    critic: bool
    samples: int
    length: int
    batch_size: int
    seed: int
    remasking_model: GPT | None = None
    schedule: NoiseSchedule = LINEAR


class Written(NamedTuple):
    """The texts of a setting and their cost. trunk_calls, network_calls: per batch, the mean over batches; one call
    serves all rows of a batch. seconds: for all batches, without scoring. self_confidence: nats per token, the mean
    over the texts."""

    texts: list[str]
    trunk_calls: float
    network_calls: float
    seconds: float
    self_confidence: float


def write(writer: Writer, policy: Policy | None, temperature: float) -> Written:
    """Write texts without a prompt, by `policy`. policy None: a causal model writes left to right."""
    model, vocabulary, device = writer.model, writer.vocabulary, writer.runtime.device
    autocast = None if writer.runtime.dtype is torch.float32 else writer.runtime.dtype
    network = Network(model, TimingAccumulator(device), autocast, remasking_model=writer.remasking_model)
    settings = GenerationSettings('diffusion' if policy else 'standard', DrawRule(writer.allowed, temperature), policy,
                                  head=model.config.sampler_order if writer.sampler_head else 'none',
                                  use_critic=writer.critic, start_token=start_token(vocabulary),
                                  block_length=block_length_of(SampleConfig(), model.config))
    texts, confidence, seconds = [], 0.0, 0.0
    firsts = range(0, writer.samples, writer.batch_size)
    for first in firsts:
        generator = keyed(writer.seed, 0, first, min(writer.batch_size, writer.samples - first), device)
        layout = lay_out_prompt([], writer.length, vocabulary.mask_token_id, generator)
        writer.runtime.synchronize()
        start = time.perf_counter()
        made = generate(network, layout, settings, generator)
        writer.runtime.synchronize()
        seconds += time.perf_counter() - start
        scored = score_confidence(network, made.tokens, layout.protected, writer.allowed, generator,
                                  SampleConfig.confidence_groups, settings.block_length)
        confidence += float((scored.total / scored.count.clamp(min=1)).sum())
        texts += [vocabulary.decode(row) for row in made.tokens.tolist()]
    return Written(texts, network.trunk_calls / len(firsts), network.network_calls / len(firsts), seconds,
                   confidence / writer.samples)


# Budgets ------------------------------------------------------------------------------------------------------------

class Budgeted(NamedTuple):
    """options: those that came nearest to the wanted trunk calls. written: the texts at these."""

    options: dict[str, Any]
    written: Written


def nearest_setting(calls: Callable[[float], float], wanted: float, most: float, known: dict[float, float]) -> float:
    """Of all x in [0, 1] that were tried, the one whose calls(x) is nearest to `wanted`.

    calls grows with x, from 1 to `most`. known: calls of earlier trials; new trials are added to it. The trials narrow
    an interval around `wanted`. They alternate between its middle and the point where a line through the logarithms of
    the calls at both ends reaches `wanted`. The search ends within a sixteenth of `wanted`, or after `TRIALS` trials.
    """
    def distance(x: float) -> float:
        return abs(known[x] - wanted)

    for trial in range(TRIALS):
        if known and min(map(distance, known)) <= wanted // 16:
            break
        ends = {0.0: 1.0, 1.0: most, **known}
        low = max(x for x in ends if ends[x] < wanted or x == 0)
        high = min(x for x in ends if (ends[x] > wanted or x == 1) and x > low)
        rise = math.log(max(ends[high], ends[low]) / ends[low])
        share = math.log(max(wanted, ends[low]) / ends[low]) / rise if trial % 2 == 0 and rise > 0 else 0.5
        x = low + (high - low) * min(0.9, max(0.1, share))
        known[x] = calls(x)
    return min(known, key=lambda x: (distance(x), x))


class Budget:
    """Writes the texts of one writer by policy, trunk calls and temperature. Trials of a dial serve every budget.
    options: for every policy, in addition to those of a setting."""

    def __init__(self, writer: Writer, **options: Any) -> None:
        self.writer, self.options = writer, options
        self._trials: dict[tuple[str, float], dict[float, Written]] = {}

    def write(self, name: str, calls: int | None, temperature: float) -> Budgeted:
        """Write at about `calls` trunk calls, if the policy has `iterations` or a dial. None: the policy's defaults."""
        if name not in DIALS or calls is None:
            options = {} if calls is None else {'iterations': calls}
            return Budgeted(options, write(self.writer, self._policy(name, **options), temperature))
        option, value = DIALS[name]
        trials = self._trials.setdefault((name, temperature), {})

        def try_out(x: float) -> float:
            trials[x] = write(self.writer, self._policy(name, **{option: value(x)}), temperature)
            return trials[x].trunk_calls

        x = nearest_setting(try_out, calls, self.writer.length, {x: one.trunk_calls for x, one in trials.items()})
        return Budgeted({option: value(x)}, trials[x])

    def _policy(self, name: str, **options: float) -> Policy:
        return make_policy(name, self.writer.schedule, **self.options, **options)


def budgets_of(name: str, trunk_calls: Sequence[int]) -> list[int | None]:
    """The budgets that a policy can follow; [None] if no option sets its number of calls."""
    return list(trunk_calls) if 'iterations' in POLICIES[name].options or name in DIALS else [None]


# Controls -----------------------------------------------------------------------------------------------------------

def held_out_texts(corpus: Corpus, split: str, samples: int, length: int) -> list[str]:
    """Real text: `samples` windows of `length` tokens spread over a split."""
    return [corpus.vocabulary.decode(row) for row in
            fixed_windows(corpus.tokens(split, length), samples, length).tolist()]


def shuffled_characters(texts: Sequence[str], seed: int) -> list[str]:
    """The characters of each text in random order: right frequencies, no spelling."""
    generator = np.random.default_rng(seed)
    return [''.join(generator.permutation(list(text))) for text in texts]


def shuffled_words(texts: Sequence[str], seed: int) -> list[str]:
    """The words of each text in random order: spelling without grammar. White space stays in place."""
    generator, found = np.random.default_rng(seed), []
    for text in texts:
        pieces = re.split(r'(\s+)', text)  # words at even places
        pieces[::2] = generator.permutation(pieces[::2]).tolist()
        found.append(''.join(pieces))
    return found


def load_causal(path: Path, runtime: Runtime, cure: str) -> tuple[Reference, dict[str, object]]:
    """Load a causal checkpoint with its vocabulary, and its training options. UserError for another kind."""
    checkpoint = load_checkpoint(path)
    if checkpoint.kind != CheckpointKind.CAUSAL:
        raise UserError(f'{path} is a checkpoint of kind {checkpoint.kind!r}, but a causal one is needed; make it '
                        f'with: {cure}')
    model = build_model(checkpoint, runtime.device).eval().requires_grad_(False)
    return Reference(model, Vocabulary.from_meta(checkpoint.vocabulary)), checkpoint.config


# Equal entropy ------------------------------------------------------------------------------------------------------

def at_entropy(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """The figure at entropy `target`, interpolated linearly between points (entropy, figure).

    None if no two points have the target between them: there is no extrapolation.
    """
    entropies, figures = np.array(sorted(points), dtype=np.float64).reshape(-1, 2).T
    if not len(entropies) or not entropies[0] <= target <= entropies[-1]:
        return None
    return float(np.interp(target, entropies, figures))
