"""What depends on the iteration number alone: the learning rate, the stage and the critic's weight."""

import math
from typing import NamedTuple

from model import GPTConfig


class Stage(NamedTuple):
    """Which parts of the loss are active. sampler: its head trains; critic: its head trains, with weight alpha."""

    sampler: bool
    critic: bool


def stage_at(config: GPTConfig, iteration: int) -> Stage:
    """Stage 1 trains the trunk, stage 2 from start_sampler_iteration on the sampler head too, stage 3 from
    start_critic_iteration on the critic too; a head that the model lacks never begins."""
    return Stage(config.add_sampler_head and iteration >= config.start_sampler_iteration,
                 config.add_critic_head and iteration >= config.start_critic_iteration)


def critic_alpha(config: GPTConfig, iteration: int) -> float:
    """Weight of the critic's loss: critic_alpha * min(1, (i - start + 1) / (end - start)) from start_critic_iteration
    on, 0 before; critic_alpha at once where end <= start."""
    start, end = config.start_critic_iteration, config.end_critic_iteration
    if iteration < start:
        return 0.0
    if end <= start:
        return config.critic_alpha
    return config.critic_alpha * min(1.0, (iteration - start + 1) / (end - start))


def all_heads_trained_from(config: GPTConfig) -> int:
    """The smallest number of steps done at which every configured head has had its schedule: the critic's weight its
    full size, the sampler head a first step. The best checkpoint is chosen from here on."""
    if config.add_critic_head:
        return max(config.start_critic_iteration + 1, config.end_critic_iteration)
    return config.start_sampler_iteration + 1 if config.add_sampler_head else 0


def learning_rate_at(iteration: int, *, learning_rate: float, min_lr: float, warmup_iters: int, lr_decay_iters: int,
                     decay_lr: bool) -> float:
    """Linear warm-up over warmup_iters, then a half cosine down to min_lr at lr_decay_iters, then min_lr."""
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / warmup_iters
    if not decay_lr:
        return learning_rate
    progress = min(1.0, (iteration - warmup_iters) / max(1, lr_decay_iters - warmup_iters))
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)
