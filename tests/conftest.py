"""Small models and corpora that many tests share."""

import numpy as np
import pytest
import torch

from core.batches import BatchPlan
from core.corpora import character_vocabulary, write_corpus
from core.data import load_corpus
from core.runtime import Runtime
from core.training_step import TrainingState
from model import GPT, GPTConfig
from sample_utils import allowed_ids

V0 = 3  # base vocabulary of the toy
SPECIAL = {'mask_token_id': V0, 'wrong_token_id': V0 + 1, 'pad_token_id': V0 + 2, 'cls_token_id': V0 + 3}


def toy_config(**changes) -> GPTConfig:
    """A model over 3 tokens and sequences of 4; heads in stages at 2 and 4 where they are asked for."""
    values = {'block_size': 4, 'vocab_size': V0 + 4, 'n_layer': 1, 'n_head': 2, 'n_embd': 8, **SPECIAL, **changes}
    return GPTConfig(**values)


def awake(model: GPT, seed: int = 5) -> GPT:
    """`model` with every weight random, so that no branch is silent as it is at initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def toy_plan(**changes) -> BatchPlan:
    tokens = np.random.default_rng(0).integers(0, V0, 400).astype(np.uint16)
    values = {'tokens': tokens, 'seed': 1, 'block_size': 4, 'batch_size': 4, 'micro_steps': 1, 'rank': 0,
              'world_size': 1, 'mask_token_id': V0, 'loss_weighting': 'elbo', 'sampler_context': 0,
              'critic_row_stride': 1, 'critic_scope': 'masked_only', **changes}
    return BatchPlan(**values)


def toy_state(config: GPTConfig, plan: BatchPlan, **changes) -> TrainingState:
    values = {'optimizer': 'muon', 'learning_rate': 1e-2, 'weight_decay': 0.1, 'betas': (0.9, 0.99), 'grad_clip': 1.0,
              'ema_decay': 0.9, **changes}
    kind = 'causal' if config.attention_type == 'causal' else 'unmasking'
    return TrainingState(awake(GPT(config, seed=3)), allowed_ids(config.vocab_size, V0),
                         Runtime(torch.device('cpu'), torch.float32, False), plan, kind, **values)


@pytest.fixture(autouse=True)
def whole_floats():
    """A runtime on a CPU flushes denormal numbers for speed; the next test shall not inherit that."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def small_corpus(tmp_path, monkeypatch):
    """A corpus 'tiny' of made-up text under data/ of an empty working folder, loaded."""
    monkeypatch.chdir(tmp_path)
    words = np.random.default_rng(1).choice(['to ', 'be ', 'or ', 'not, ', 'king\n', 'MARY:\n', 'queen '], 4000)
    text = ''.join(words)
    cut = len(text) * 4 // 5
    write_corpus(tmp_path / 'data' / 'tiny', character_vocabulary(text), {'train': text[:cut], 'val': text[cut:]},
                 'made up')
    return load_corpus('tiny')
