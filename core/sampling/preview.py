"""A short sample printed while a model trains."""

import torch

from core.common.drawing import DrawRule
from core.common.randomness import keyed
from core.common.timing import TimingAccumulator
from core.data.vocabulary import Vocabulary
from core.sampling.generation import GenerationSettings, generate
from core.sampling.network import Network
from core.sampling.options import SampleConfig
from core.sampling.policy_options import block_defaults, build_policy
from core.sampling.prompt import Layout, start_token
from model import GPT

PREDICTIONS = 16


def preview(model: GPT, vocabulary: Vocabulary, allowed: torch.Tensor, with_sampler_head: bool, length: int,
            seed: int) -> str:
    """`length` tokens of text written from nothing by the averaged model: the same noise at every validation."""
    device = allowed.device
    tokens = torch.full((1, length), vocabulary.mask_token_id, device=device)
    causal, head = model.config.attention_type == 'causal', model.config.sampler_order if with_sampler_head else 'none'
    config, _ = block_defaults(SampleConfig(iterations=PREDICTIONS), {}, model.config, head == 'left_to_right')
    settings = GenerationSettings(
        'standard' if causal else 'diffusion', DrawRule(allowed, config.temperature), policy=build_policy(config),
        head=head, start_token=start_token(vocabulary), block_length=config.block_length)
    with torch.no_grad():
        written = generate(Network(model, TimingAccumulator(device)), Layout(tokens, torch.zeros_like(tokens).bool()),
                           settings, keyed(seed, 0, 0, 1, device))
    return vocabulary.decode(written.tokens[0].tolist())
