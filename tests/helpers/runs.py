"""Training runs in this process, and what makes two of them equal."""

from pathlib import Path

import pytest
import torch

import train as script
from configurator import configure
from core.checkpoints.checkpoint import load_checkpoint
from core.common.errors import UserError
from core.logger import read_metrics
from core.trainer import train

ROOT = Path(__file__).parent.parent.parent
SMALL = ('--dataset=tiny --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --max_iters=12 '
         '--lr_decay_iters=12 --warmup_iters=2 --eval_interval=4 --eval_iters=2 --log_interval=1 --device=cpu '
         '--compile=False --sample_length=12 --dropout=0.1 --add_sampler_head=True --start_sampler_iteration=3 '
         '--add_critic_head=True --start_critic_iteration=6 --end_critic_iteration=9').split()


def run(*arguments: str):
    """train.py's main in this process."""
    config = configure(script.TrainConfig, [*SMALL, *arguments]).config
    train(config, [])
    return config


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        run(*arguments)
    return str(caught.value)


def equal_runs(one: Path, other: Path) -> None:
    first, second = load_checkpoint(one / 'ckpt.pt'), load_checkpoint(other / 'ckpt.pt')
    assert first.iteration == second.iteration and first.best_value == second.best_value
    for left, right in ((first.model, second.model), (first.ema, second.ema)):
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    for left, right in zip(first.optimizers, second.optimizers):
        for key, state in left['state'].items():
            assert all(torch.equal(torch.as_tensor(state[name]), torch.as_tensor(right['state'][key][name]))
                       for name in state)
    kept = ('train/loss', 'train/loss_main', 'train/loss_sampler', 'train/loss_critic', 'val/nelbo', 'iteration', 'lr')
    assert [{k: r[k] for k in kept if k in r} for r in read_metrics(one / 'metrics.jsonl')] == \
        [{k: r[k] for k in kept if k in r} for r in read_metrics(other / 'metrics.jsonl')]
