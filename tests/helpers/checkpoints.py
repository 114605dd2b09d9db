"""A checkpoint of a small model."""

from dataclasses import replace

import torch

from core.checkpoints.checkpoint import Checkpoint
from core.checkpoints.kinds import CheckpointKind
from core.checkpoints.weights import model_config_to_dict
from model import GPT, GPTConfig

SMALL = GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=8, mask_token_id=5)
HEADS = replace(SMALL, add_sampler_head=True, add_critic_head=True)


def checkpoint_of(model: GPT, /, **changes: object) -> Checkpoint:
    """A checkpoint as a training run makes it, optimizer state and averaged weights included."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum().backward()
    optimizer.step()
    ema = {name: parameter.detach() + 1 for name, parameter in model.named_parameters()}  # tied lm_head not listed
    values = dict(kind=CheckpointKind.UNMASKING, model_config=model_config_to_dict(model.config),
                  config={'learning_rate': 1e-3, 'dataset': 'two words', 'ratios': [0.5, None]},
                  vocabulary={'kind': 'bpe', 'ranks': {b'\xff\x00': 0, b'ab': 1}, 'characters': 'aé"'},
                  vocabulary_hash='v' * 64, data_hash='d' * 64, data_sizes={'train': 70, 'val': 10},
                  model=model.state_dict(), ema=ema, optimizers=[optimizer.state_dict()], scaler=None, iteration=7,
                  best_value=2.5, extra={'losses': [1.5, 2.5]})
    return Checkpoint(**(values | changes))


def assert_same(first: object, second: object) -> None:
    """Equal down to the bits and the types."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second):
            assert_same(one, other)
    else:
        assert first == second
