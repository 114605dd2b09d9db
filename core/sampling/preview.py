"""A short sample printed while a model trains."""

import torch

from core.common.drawing import DrawRule
from core.common.randomness import keyed
from core.common.timing import TimingAccumulator
from core.data.vocabulary import Vocabulary
from core.sampling.generation import GenerationSettings, generate
from core.sampling.network import Network
from core.sampling.policies import remask_policy
from core.sampling.prompt import Layout
from model import GPT
from sample_utils import linear_remasking_schedule

PREDICTIONS = 16
TEMPERATURE = 0.8


def preview(model: GPT, vocabulary: Vocabulary, allowed: torch.Tensor, with_sampler_head: bool, length: int,
            seed: int) -> str:
    """`length` tokens of text written from nothing by the averaged model: the same noise at every validation."""
    device = allowed.device
    tokens = torch.full((1, length), vocabulary.mask_token_id, device=device)
    causal = model.config.attention_type == 'causal'
    newline = vocabulary.encode('\n')[0] if vocabulary.kind == 'bpe' or '\n' in vocabulary.tokens else 0
    settings = GenerationSettings(
        'standard' if causal else 'diffusion', DrawRule(allowed, TEMPERATURE),
        policy=remask_policy(linear_remasking_schedule(PREDICTIONS - 1, 0.95, 0.05), 'ratio', 0.4, True),
        head='wave' if with_sampler_head else 'none', start_token=newline)
    with torch.no_grad():
        written = generate(Network(model, TimingAccumulator(device)), Layout(tokens, torch.zeros_like(tokens).bool()),
                           settings, keyed(seed, 0, 0, 1, device))
    return vocabulary.decode(written.tokens[0].tolist())
