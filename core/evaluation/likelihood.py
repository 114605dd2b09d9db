"""The measure likelihood: exact negative log-likelihood of held-out windows under deterministic reveal policies.

core/sampling/path_likelihood.py defines it.

Letters: W windows, T window length, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict, get_args

import torch
from torch import Tensor

from core.checkpoints.kinds import CheckpointKind
from core.common.errors import UserError, raise_problems
from core.common.expressions import closest
from core.common.precision import exact_device
from core.common.randomness import keyed
from core.common.timing import TimingAccumulator
from core.common.typed_json import Seconds
from core.evaluation.likelihood_plots import plot_likelihood
from core.evaluation.measure import Cell, Evaluation, Measure, Result
from core.sampling.network import Network
from core.sampling.path_likelihood import Scorer, log_likelihood
from core.sampling.policies import POLICIES
from core.validation import bits_of, fixed_windows
from sample_utils import Head

HEADS: tuple[Head, ...] = get_args(Head)
SCORING = tuple(name for name, row in POLICIES.items() if row.deterministic)
POLICIES_SHOWN = 'random,left_to_right,strided'
WINDOWS = 64
PICTURE_NAME = 'likelihood.png'


class Likelihood(NamedTuple):
    """nats float64 [W]: -log p per token of each window. trunk_calls: per window. seconds: for all windows."""

    nats: Tensor
    trunk_calls: int
    seconds: float


def window_likelihoods(network: Network, windows: Tensor, scorer: Scorer, *, seed: int, batch_size: int) -> Likelihood:
    """`Likelihood` of windows int64 [W, T]. Window i uses the random order of row i."""
    start, calls, parts, device = time.perf_counter(), network.trunk_calls, [], exact_device(scorer.allowed.device)
    for first in range(0, len(windows), batch_size):
        rows = windows[first:first + batch_size].to(device)
        parts.append(log_likelihood(network, rows, scorer, keyed(seed, 0, first, len(rows), device)))
    nats = -torch.cat(parts).cpu() / windows.size(1)  # waits for the device
    return Likelihood(nats, (network.trunk_calls - calls) // len(parts), time.perf_counter() - start)


# The measure --------------------------------------------------------------------------------------------------------

class LikelihoodResult(TypedDict):
    """bits: per `unit`. seconds: for all windows. window_nats: of each window, per token."""

    nats: float
    standard_error: float
    bits: float
    unit: str
    seconds: Seconds
    window_nats: list[float]
    head_share: float


def likelihood_cells(evaluation: Evaluation) -> list[Cell]:
    """One cell for each policy, number of trunk calls and head that the options name. For a block model also one for
    each block length; its trunk calls are per block."""
    config, T = evaluation.config, evaluation.model.config.block_size
    if evaluation.checkpoint.kind not in (CheckpointKind.UNMASKING, CheckpointKind.BLOCK):
        raise UserError(f'the exact likelihood of reveal policies needs a diffusion checkpoint, but this one is '
                        f'{evaluation.checkpoint.kind}; --measure=nelbo gives the likelihood of a causal one')
    lengths = evaluation.model.config.block_length or (T,)
    policies, calls = split_names(config.policies or POLICIES_SHOWN), asked_calls(config.trunk_calls, max(lengths))
    trained = evaluation.model.config
    ways = HEADS if trained.sampler_order == 'wave' and not trained.reads_row else ('none', trained.sampler_order)
    heads = split_names(config.heads) if config.heads is not None else \
        list(ways) if evaluation.sampler_head else ['none']
    raise_problems([*policy_problems(policies), *call_problems(calls, max(lengths)),
                    *head_problems(heads, evaluation.sampler_head)])
    count = config.windows or WINDOWS
    windows = fixed_windows(evaluation.corpus.tokens(config.split, T), count, T)

    def cell(policy: str, trunk_calls: int, head: Head, length: int) -> Cell:
        blocks = {'block_length': length} if evaluation.model.config.block_length else {}
        settings = evaluation.settings(policy=policy, trunk_calls=trunk_calls, head=head, windows=count,
                                       seed=config.seed, **blocks)
        scorer = Scorer(POLICIES[policy].make(iterations=trunk_calls), head, evaluation.allowed,
                        length if length < T else None)
        return Cell(settings, LikelihoodResult, lambda: _result(evaluation, windows, scorer), cost=trunk_calls)

    return [cell(policy, int(number), head, length) for length in lengths for policy in policies for number in calls
            for head in heads if number <= length]


def _result(evaluation: Evaluation, windows: Tensor, scorer: Scorer) -> Result:
    """The result of one cell: the mean over windows with its standard error, and the cost."""
    runtime, config = evaluation.runtime, evaluation.config
    network = Network(evaluation.model, TimingAccumulator(),
                      None if runtime.dtype is torch.float32 else runtime.dtype)
    found = window_likelihoods(network, windows, scorer, seed=config.seed, batch_size=config.batch_size)
    nats = found.nats.mean().item()
    bits, unit = bits_of(nats, evaluation.corpus, config.split)
    return {'nats': nats, 'standard_error': (found.nats.std() / math.sqrt(len(windows))).item(), 'bits': bits,
            'unit': unit, 'seconds': found.seconds, 'window_nats': [round(value, 5) for value in found.nats.tolist()],
            'head_share': head_share(evaluation)}


def head_share(evaluation: Evaluation) -> float:
    """The head's multiply-adds per token divided by the trunk's; 0 without a head. Neighbours come from a table."""
    model = evaluation.model
    return model.sampler_operations_per_token() / model.operations_per_token() if evaluation.sampler_head else 0.0


def split_names(text: str) -> list[str]:
    """The names of a comma-separated list, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(',') if name.strip()))


def asked_calls(trunk_calls: Sequence[float] | None, length: int) -> list[float]:
    """The given numbers of trunk calls, each once. Default: the powers of two up to `length`, and `length` itself."""
    powers = [2 ** power for power in range(length.bit_length())]
    return list(dict.fromkeys(trunk_calls if trunk_calls is not None else [*powers, length]))


def policy_problems(policies: Sequence[str]) -> list[str]:
    """Messages about policies that are unknown, or under which a text has no exact likelihood."""
    problems = [] if policies else [f'policies is empty; name some of {", ".join(SCORING)}']
    for name in policies:
        if name not in POLICIES:
            nearest = closest(name, SCORING)
            problems.append(f'policies holds {name!r}, but must be of {", ".join(SCORING)}'
                            + (f"; did you mean '{nearest}'?" if nearest else ''))
        elif name not in SCORING:
            problems.append(f'text has no exact likelihood at a given number of trunk calls under the policy {name}, '
                            f'which chooses by what it draws, masks again, or decides the number itself; take '
                            f'{", ".join(SCORING)}')
    return problems


def call_problems(calls: Sequence[float], length: int) -> list[str]:
    """Messages about impossible numbers of trunk calls."""
    problems = [] if calls else ['trunk_calls is empty; give numbers such as [1,2,4,8]']
    return problems + [f'trunk_calls holds {number:g}, but must hold whole numbers from 1 to the window length '
                       f'({length}): each call reveals at least one token' for number in calls
                       if number != int(number) or not 1 <= number <= length]


def head_problems(heads: Sequence[str], sampler_head: bool) -> list[str]:
    """Messages about heads that are unknown or that the checkpoint lacks."""
    problems = [f'heads holds {name!r}, but must be of {", ".join(HEADS)}' for name in heads if name not in HEADS]
    if not heads:
        problems.append(f'heads is empty; name some of {", ".join(HEADS)}')
    if not sampler_head and set(heads) & {'wave', 'left_to_right'}:
        problems.append('the checkpoint has no trained sampler head; take --heads=none, or a checkpoint trained with '
                        'add_sampler_head=True')
    return problems


def arranged(rows: Sequence[Result]) -> list[Result]:
    """Table rows by policy and trunk calls, with nats and standard error of each head side by side."""
    table: dict[tuple[int | None, str, int], Result] = {}
    for row in rows:
        line = table.setdefault((row.get('block_length'), row['policy'], row['trunk_calls']), {
            'policy': _way(row), **{key: row[key] for key in ('trunk_calls', 'windows', 'unit')}})
        line[row['head']] = f'{row["nats"]:.4f} ({row["standard_error"]:.4f})'
    return list(table.values())


def _way(row: Result) -> str:
    """The policy of a row, and its block length if it has one."""
    return f'{row["policy"]}, blocks of {row["block_length"]}' if 'block_length' in row else row['policy']


def finish(evaluation: Evaluation, rows: Sequence[Result]) -> None:
    """Report what the head costs, and draw the picture."""
    if evaluation.sampler_head:
        evaluation.say(f"the sampler head takes {head_share(evaluation):.1%} of the trunk's multiply-adds per token "
                       f'(neighbours come from a table)')
    token = 'character' if evaluation.vocabulary.kind == 'characters' else 'token'
    path = evaluation.out_dir / PICTURE_NAME
    per = f'{evaluation.model.config.block_size} {token}s' if not evaluation.model.config.block_length else 'block'
    draw(rows, f'trunk calls per {per}', f'nats per {token}', path, evaluation.say)


def draw(rows: Sequence[Result], x_label: str, y_label: str, picture: Path, say: Callable[[str], object]) -> None:
    """Nats per token against trunk calls: one panel for each policy, one line for each head."""
    panels: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for row in rows:
        name = {'none': 'without sampler head', 'wave': 'head, wave order',
                'left_to_right': 'head, left to right'}[row['head']]
        panels.setdefault(_way(row), {}).setdefault(name, []).append(
            (row['trunk_calls'], row['nats'], row['standard_error']))
    plot_likelihood(panels, picture, x_label, y_label, say)


LIKELIHOOD = Measure(likelihood_cells, ('policy', 'trunk_calls', *HEADS, 'windows'),
                     'exact negative log-likelihood of reveal policies, nats per token (standard error)',
                     finish=finish, arrange=arranged)
