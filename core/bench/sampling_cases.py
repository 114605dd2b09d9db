"""Rows of a benchmark that sample: parts of a prediction, whole texts, the yardstick, and a run of every policy.

The model is untrained: time depends on shapes only.

Letters: B rows, T sequence length, V vocabulary, D width, W width of the sampler head.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.bench.cases import Case, Shape, base_vocabulary, model_config, short_name
from core.common.drawing import DrawRule
from core.common.randomness import RowRandom
from core.common.timing import TimingAccumulator
from core.sampling.generation import GenerationSettings, Method, generate
from core.sampling.held_weights import with_held_weights
from core.sampling.network import Network
from core.sampling.options import SampleConfig
from core.sampling.policies import POLICIES, Policy
from core.sampling.policy_options import build_policy, make_policy, remasking_levels
from core.sampling.prompt import Layout
from model import GPT, GPTConfig
from sample_utils import FillTask

FILL_ROWS = 16
SAMPLING_ROWS = (1, 16)
PREDICTIONS = 16
DECODE_PREDICTIONS = (4, 8)  # against the yardstick of sampling
BLOCKS = ((1, 8), (4, 16), (1, 4))  # trunk calls a block, and its length: also against the yardstick
TEMPERATURE = SampleConfig.temperature
POLICY_ROWS = 16
POLICY_CALLS = 3  # trunk calls of a policy's run, if the policy lets us choose
WITH_HEAD = ('remask', 'random')  # also measured with the sampler head: whole rows, and groups of positions


def fill_cases(shape: Shape, device: torch.device, autocast: torch.dtype | None) -> dict[str, Case]:
    """One trunk call on fully masked rows, and the wavefront fill of all of them from its hidden states."""
    network = sampling_network(model_config(shape, add_sampler_head=True), device, autocast)
    model, tokens = network.model, _masked(FILL_ROWS, shape, device)
    rows, rule = torch.arange(FILL_ROWS, device=device), DrawRule(base_vocabulary(model.config, device), TEMPERATURE)
    with network.precision():
        hidden_states = network.encode(tokens)  # [B, T, D]

    def trunk(_: int) -> None:
        with network.precision():
            network.encode(tokens)

    def fill(number: int) -> None:
        with network.precision():
            network.filler('wave').fill(FillTask(tokens, hidden_states, rule, RowRandom(number, 0, rows)))

    dtype = autocast or torch.float32
    return {'trunk call': Case(trunk, tokens.numel() * model.operations_per_token(), tokens.numel(), dtype),
            'wavefront fill': Case(fill, tokens.numel() * fill_operations(model.config), tokens.numel(), dtype)}


def sampling_cases(shape: Shape, device: torch.device, autocast: torch.dtype | None) -> dict[str, Case]:
    """Whole texts: by diffusion with the sampler head, guided by self-confidence; and from left to right, by a causal
    model with the same trunk and a key-value cache."""
    diffusion, causal = _both_networks(shape, device, autocast)
    cases = {}
    for rows in SAMPLING_ROWS:
        cases[f'diffusion, batch {rows}'] = _diffusion_case(diffusion, shape, rows, PREDICTIONS)
        cases[f'standard, batch {rows}'] = _causal_case(causal, shape, rows)
    return cases


def decode_cases(shape: Shape, device: torch.device, autocasts: Sequence[torch.dtype | None]) -> dict[str, Case]:
    """Whole texts in each of the precisions `autocasts` (None: float32): by the yardstick of sampling, the causal model
    with its key-value cache; by diffusion with the sampler head at few trunk calls; and by block diffusion with a cache
    and the head."""
    networks = {short_name(autocast or torch.float32): _both_networks(shape, device, autocast)
                for autocast in autocasts}
    cases = {}
    for rows in SAMPLING_ROWS:
        for dtype, (diffusion, causal) in networks.items():
            cases[f'causal_decode, batch {rows}, {dtype}'] = _causal_case(causal, shape, rows)
            for predictions in DECODE_PREDICTIONS:
                cases[f'diffusion K={predictions}, batch {rows}, {dtype}'] = _diffusion_case(diffusion, shape, rows,
                                                                                           predictions)
    for calls, length in BLOCKS:
        for autocast in autocasts:
            network, dtype = _block_network(shape, length, device, autocast), short_name(autocast or torch.float32)
            for rows in SAMPLING_ROWS:
                name = f'{calls} {"call" if calls == 1 else "calls"} per block of {length}'
                cases[f'{name}, batch {rows}, {dtype}'] = _block_case(network, shape, rows, calls)
    return cases


def _block_network(shape: Shape, length: int, device: torch.device, autocast: torch.dtype | None) -> Network:
    """Of a block model whose head sees all earlier tokens of a block of `length`."""
    return sampling_network(model_config(
        shape, attention_type='block', block_length=(length,), add_sampler_head=True, sampler_context_left=length - 1,
        sampler_context_right=0, sampler_order='left_to_right', sampler_gate=True), device, autocast)


def _block_case(network: Network, shape: Shape, rows: int, calls: int) -> Case:
    """`rows` texts of a block model in `calls` trunk calls a block. The first of them also reads the block before."""
    model, (length,) = network.model, network.model.config.block_length
    operations = (calls + 1) * model.operations_per_token() + fill_operations(model.config)
    return _text_case(network, 'diffusion', shape, rows, operations, policy=make_policy('strided', iterations=calls),
                      head='left_to_right', block_length=length)


def _both_networks(shape: Shape, device: torch.device, autocast: torch.dtype | None) -> tuple[Network, Network]:
    """The networks of diffusion with the sampler head and of the causal model."""
    return (sampling_network(model_config(shape, add_sampler_head=True), device, autocast),
            sampling_network(model_config(shape, attention_type='causal'), device, autocast))


def _diffusion_case(network: Network, shape: Shape, rows: int, predictions: int) -> Case:
    """`rows` texts of a block in `predictions` trunk calls. After each call the sampler head fills every mask."""
    config = SampleConfig(iterations=predictions)
    levels = remasking_levels(config)
    operations = predictions * network.model.operations_per_token() + \
        (1 + sum(levels)) * fill_operations(network.model.config)
    return _text_case(network, 'diffusion', shape, rows, operations,
                      policy=build_policy(config), head='wave')


def _causal_case(network: Network, shape: Shape, rows: int) -> Case:
    """`rows` texts of a block. Each trunk call writes one token of every text."""
    return _text_case(network, 'standard', shape, rows, network.model.operations_per_token())


def _text_case(network: Network, method: Method, shape: Shape, rows: int, operations: float, **given: Any) -> Case:
    """The case of whole texts by `method`. operations: for each token."""
    device = network.model.lm_head.weight.device
    rule = DrawRule(base_vocabulary(network.model.config, device), TEMPERATURE)
    settings = GenerationSettings(method, rule, **given)
    written = rows * shape.block_size
    return Case(_sampling_run(network, settings, _masked(rows, shape, device)), written * operations, written,
                network.autocast or torch.float32)


def _sampling_run(network: Network, settings: GenerationSettings, tokens: Tensor) -> Callable[[int], object]:
    layout = Layout(tokens, torch.zeros_like(tokens, dtype=torch.bool))
    rows = torch.arange(len(tokens), device=tokens.device)
    return lambda number: generate(network, layout, settings, RowRandom(number, 0, rows))


def sampling_network(config: GPTConfig, device: torch.device, autocast: torch.dtype | None) -> Network:
    """An untrained model in a network that counts and times its calls, in precision `autocast` (None: float32)."""
    model = with_held_weights(GPT(config).to(device).eval().requires_grad_(False), autocast)
    return Network(model, TimingAccumulator(device), autocast)


def _masked(rows: int, shape: Shape, device: torch.device) -> Tensor:
    """int64 [rows, T], nothing but masks."""
    return torch.full((rows, shape.block_size), shape.base_size, device=device)


# Policies -----------------------------------------------------------------------------------------------------------

class PolicyRun(NamedTuple):
    """A policy at work on `POLICY_ROWS` rows of tokens int64 [rows, T], some or all of them masks."""

    policy: Policy
    tokens: Tensor
    use_sampler_head: bool
    use_critic: bool


def policy_runs(shape: Shape) -> dict[str, PolicyRun]:
    """Every policy without the sampler head, and those `WITH_HEAD` with it, for about `POLICY_CALLS` trunk calls.

    Some policies need more calls for more masks; their rows have fewer masks. An untrained model finds all tokens
    about equally probable, and the adaptive policies' bounds are set for that. The policy by threshold reveals half of
    the masked positions at each call, so it takes a few more calls.
    """
    T, calls = shape.block_size, POLICY_CALLS
    group = math.ceil(T / calls)  # positions a call
    options = {'iterations': calls, 'entropy_bound': (group - 0.5) * math.log(shape.base_size),
               'parallel_factor': group + 1.0, 'confidence_threshold': 1 / shape.base_size}
    masks = {'first_hitting': calls, 'dilated': 2 ** calls}
    found = {}
    for name, row in POLICIES.items():
        tokens = torch.zeros(POLICY_ROWS, T, dtype=torch.int64)
        tokens[:, :masks.get(name, T)] = shape.base_size
        found[name] = PolicyRun(make_policy(name, **options), tokens, False, row.needs_critic)
        if name in WITH_HEAD:
            found[f'{name} with sampler head'] = found[name]._replace(use_sampler_head=True)
    return found


# Operations ---------------------------------------------------------------------------------------------------------

def fill_operations(config: GPTConfig) -> int:
    """Operations that the sampler head and `lm_head` need per position drawn in a wavefront fill."""
    D, V, W = config.n_embd, config.vocab_size, config.sampler_n_embd or config.n_embd
    return 2 * (D * W + W * W + W * V + D * V)
