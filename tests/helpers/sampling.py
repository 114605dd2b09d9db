"""A small checkpoint for sample.py, and a run of it without a process of its own."""

from pathlib import Path

import torch

from configurator import configure
from core.checkpoints.checkpoint import Checkpoint, save_checkpoint
from core.checkpoints.weights import model_config_to_dict
from core.data.vocabulary import Vocabulary
from core.sampling.options import SampleConfig
from core.sampling.result import SamplingResult
from core.sampling.run import run_sampling
from model import GPT, GPTConfig

VOCABULARY = Vocabulary(kind='characters', tokens=tuple('\n abcdefgh'))


def write_checkpoint(path: Path, iteration: int = 100, kind: str = 'unmasking', broken: str | None = None,
                     **changes: object) -> None:
    """An untrained model's; broken: a weight whose first number is not one."""
    config = GPTConfig(**{'block_size': 16, 'vocab_size': VOCABULARY.size, 'n_layer': 1, 'n_head': 2, 'n_embd': 16,
                          'mask_token_id': VOCABULARY.mask_token_id, **changes})
    weights = GPT(config).state_dict()
    if broken is not None:
        weights[broken].view(-1)[0] = torch.nan
    checkpoint = Checkpoint(kind=kind, model_config=model_config_to_dict(config), config={},
                            vocabulary=VOCABULARY.to_meta(), vocabulary_hash=VOCABULARY.hash, data_hash='',
                            data_sizes={}, model=weights, iteration=iteration)
    save_checkpoint(path, checkpoint.to_payload())


def sample(folder: Path, *arguments: str, say=None) -> tuple[SamplingResult, str]:
    """A run with options, and what it said."""
    configuration = configure(SampleConfig, [f'--out_dir={folder}', '--device=cpu', *arguments])
    lines: list[str] = []
    return run_sampling(configuration.config, configuration.explicit, say or lines.append), '\n'.join(lines)
