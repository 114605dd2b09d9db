"""What the arena measures of one sampler head: exact nats, operations and seconds at a few trunk calls.

core/study/arena.py compares heads that share one trunk.

Letters: W windows, T window length.
"""

import math
import time
from collections.abc import Sequence
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from core.checkpoints.kinds import CheckpointKind
from core.common.drawing import DrawRule
from core.common.errors import UserError, raise_problems
from core.common.precision import exact_device
from core.common.randomness import keyed
from core.common.timing import TimingAccumulator
from core.common.typed_json import Seconds
from core.evaluation.likelihood import (WINDOWS, asked_calls, call_problems, policy_problems, split_names,
                                        window_likelihoods)
from core.evaluation.measure import Cell, Evaluation, Result
from core.sampling.generation import GenerationSettings, generate
from core.sampling.network import Network
from core.sampling.path_likelihood import Scorer
from core.sampling.policies import POLICIES
from core.sampling.prompt import Layout
from core.validation import fixed_windows
from model import GPTConfig
from sample_utils import Head

ARENA = 'arena'  # the name of the measure
SUMMARY = 'sampler heads on one trunk: exact nats against operations and seconds (--checkpoints=...)'
POLICIES_SHOWN, CALLS_SHOWN = 'random,strided,left_to_right', (1.0, 2.0, 4.0, 8.0, 16.0)


class ArenaResult(TypedDict):
    """window_nats: exact nats per token of each window. trunk, head: multiply-adds for each token of a text. seconds:
    for each of several texts that are drawn at once. head_calls: for all of them together. verified_...: the same with
    verified drafts, for heads that read rows."""

    nats: float
    standard_error: float
    window_nats: list[float]
    trunk: float
    head: float
    seconds: Seconds
    head_calls: int
    verified_seconds: NotRequired[Seconds]
    verified_calls: NotRequired[int]


def arena_cells(evaluation: Evaluation, head: Head) -> list[Cell]:
    """One cell for each policy and number of trunk calls. head: the checkpoint's own, or 'none'."""
    config, T = evaluation.config, evaluation.model.config.block_size
    if evaluation.checkpoint.kind != CheckpointKind.UNMASKING:
        raise UserError(f'the arena compares heads of diffusion checkpoints, but {config.checkpoint_name} is '
                        f'{evaluation.checkpoint.kind}; leave it out')
    policies = split_names(config.policies or POLICIES_SHOWN)
    calls = asked_calls(config.trunk_calls or [number for number in CALLS_SHOWN if number <= T], T)
    raise_problems([*policy_problems(policies), *call_problems(calls, T)])
    count = config.windows or WINDOWS
    windows = fixed_windows(evaluation.corpus.tokens(config.split, T), count, T)

    def cell(policy: str, trunk_calls: int) -> Cell:
        settings = evaluation.settings(policy=policy, trunk_calls=trunk_calls, head=head, windows=count,
                                       seed=config.seed, texts=config.num_samples)
        return Cell(settings, ArenaResult, lambda: _result(evaluation, windows, settings), cost=trunk_calls)

    return [cell(policy, int(number)) for policy in policies for number in calls]


def multiply_adds(config: GPTConfig, trunk_operations: int, trunk_calls: int, head: Head) -> tuple[float, float]:
    """Multiply-adds (of the trunk, of the head) for each token of a text that is written in `trunk_calls` calls. The
    trunk reads every token in each call, and so does a head that reads rows. A head draws each token once."""
    shape = config.sampler_shape
    of_head = shape.operations_per_token() + trunk_calls * shape.operations_per_read_token()
    return trunk_calls * trunk_operations / 2, 0.0 if head == 'none' else of_head / 2


def _result(evaluation: Evaluation, windows: Tensor, settings: Result) -> Result:
    model, head, calls = evaluation.model, settings['head'], settings['trunk_calls']
    policy, runtime = POLICIES[settings['policy']].make(iterations=calls), evaluation.runtime
    autocast = None if runtime.dtype is torch.float32 else runtime.dtype
    found = window_likelihoods(Network(model, TimingAccumulator(), autocast), windows,
                               Scorer(policy, head, evaluation.allowed), seed=evaluation.config.seed,
                               batch_size=evaluation.config.batch_size)
    trunk, of_head = multiply_adds(model.config, model.operations_per_token(), calls, head)
    result = {'nats': found.nats.mean().item(), 'trunk': trunk, 'head': of_head,
              'standard_error': (found.nats.std() / math.sqrt(len(windows))).item(),
              'window_nats': [round(value, 5) for value in found.nats.tolist()]}
    for prefix, verified in (('', False), ('verified_', True)):
        if not verified or head != 'none' and model.config.reads_row:
            network = Network(model, TimingAccumulator(), autocast, verified=verified)
            seconds, waves = drawing_seconds(network, GenerationSettings(
                'diffusion', DrawRule(evaluation.allowed), policy, head=head), settings['texts'], settings['seed'])
            result |= {f'{prefix}seconds': seconds, 'verified_calls' if verified else 'head_calls': waves}
    return result


def drawing_seconds(network: Network, settings: GenerationSettings, texts: int, seed: int) -> tuple[float, int]:
    """Draw `texts` texts of the block size at once: (seconds for each text, calls of the head for all of them).
    An untimed text is drawn first, so that the seconds include no set-up."""
    config = network.model.config
    device = exact_device(settings.rule.allowed.device)

    def drawn(count: int) -> int:
        tokens = torch.full((count, config.block_size), config.mask_token_id, device=device)
        made = generate(network, Layout(tokens, torch.zeros_like(tokens, dtype=torch.bool)), settings,
                        keyed(seed, 0, 0, count, device))
        made.tokens.cpu()  # waits for the device
        return made.waves

    drawn(1)
    start = time.perf_counter()
    waves = drawn(texts)
    return (time.perf_counter() - start) / texts, waves


def label(config: GPTConfig) -> str:
    """A few words that tell a sampler head from others on the same trunk."""
    kind, window = config.sampler_shape.kind, config.sampler_window
    parts: Sequence[str] = [
        ('blind ' if config.sampler_zero_hidden else '') + config.sampler_kind.replace('_', ' + '),
        *([f'window {window.left}, {window.right}'] if kind.window and tuple(window) != (1, 1) else []),
        f'W {config.sampler_shape.width}', *([f'A {config.sampler_shape.attention_width}'] if kind.reads_row else []),
        *(['gate'] if config.sampler_gate else []), *(['wave order'] if kind.reads_row and
                                                      config.sampler_order == 'wave' else []),
        *(['left to right'] if not kind.reads_row and config.sampler_order == 'left_to_right' else []),
        *(['no residual'] if not config.sampler_residual else []),
        *(['shared output'] if config.sampler_output == 'shared_detached' else [])]
    return ', '.join(parts)
