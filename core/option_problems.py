"""What is wrong with the options of train.py, each problem a sentence with value, limit and cure."""

import torch

from configurator import bound_problems
from core.checkpoints.heads import HEADS
from core.common.expressions import unknown_choice
from core.common.runtime import Runtime
from core.noise import SCHEDULES
from core.options import TrainConfig
from core.rewards import REWARDS
from core.sampler_head import SAMPLER_KINDS
from core.training_kinds import GRPO, TRAINING, kind_of, training_of


def option_problems(config: TrainConfig) -> list[str]:
    """What is wrong with the numbers that no type shows."""
    problems = bound_problems(config)
    if not config.out_dir.strip():
        problems.append('out_dir is empty; name a folder with --out_dir=..., or leave it out for the usual one')
    problems += [f'{name} is {getattr(config, name)}, but must not be negative'
                 for name in ('learning_rate', 'min_lr', 'weight_decay', 'grad_clip', 'unfreeze_lr_multiplier',
                              'skip_spikes') if getattr(config, name) < 0]
    problems += [f'{name} is {getattr(config, name)}, but must lie in [0, 1)'
                 for name in ('beta1', 'beta2', 'ema_decay') if not 0 <= getattr(config, name) < 1]
    if config.min_lr > config.learning_rate:
        problems.append(f'min_lr is {config.min_lr}, but must not exceed learning_rate ({config.learning_rate})')
    if config.eval_only and config.init_from == 'scratch' and not config.init_from_checkpoint:
        problems.append('eval_only validates trained weights; add --init_from=resume or --init_from_checkpoint=...')
    if config.sharding == 'full' and config.optimizer == 'muon':
        problems.append('sharding is full, but optimizer=muon needs whole matrices and a rank holds a part of each; '
                        'take --optimizer=adamw')
    if config.sharding == 'full' and config.compile:
        problems.append('sharding is full, but compile is True, and layers that are gathered one by one are not '
                        'compiled; leave compile out')
    unknown = table_problems(config)
    return [*problems, *unknown, *head_problems(config), *([] if unknown else TRAINING[training_of(config)].problems(config))]


def table_problems(config: TrainConfig) -> list[str]:
    """Options that are to name a row of a table, and do not."""
    tables = {'noise_schedule': SCHEDULES, 'reward': REWARDS, 'sampler_kind': SAMPLER_KINDS}
    return [problem for name, table in tables.items() for problem in unknown_choice(name, getattr(config, name), table)]


def head_problems(config: TrainConfig) -> list[str]:
    """What is wrong with the schedule of the heads and of a frozen trunk."""
    problems = []
    if config.add_critic_head and config.add_sampler_head and \
            config.start_critic_iteration < config.start_sampler_iteration:
        problems.append(f'start_critic_iteration is {config.start_critic_iteration}, but the critic judges what the '
                        f'sampler head draws, so it must not start before start_sampler_iteration '
                        f'({config.start_sampler_iteration})')
    if config.add_critic_head and config.critic_row_stride > 0 and config.batch_size % config.critic_row_stride:
        problems.append(f'batch_size is {config.batch_size}, but must be a multiple of critic_row_stride '
                        f'({config.critic_row_stride}), so that micro-steps and ranks judge the same rows')
    begins = [head.start(config) for head in HEADS if head.is_in(config)]
    if config.freeze_transformer and 0 not in begins and not kind_of(config).own_output:
        problems.append('freeze_transformer leaves nothing to train at iteration 0; add a head that starts there '
                        '(start_sampler_iteration=0), train a model with an output layer of its own '
                        '(remasking_kind=binary or multiclass, or a judge), or leave freeze_transformer out')
    if config.freeze_transformer and config.init_from == 'scratch' and not config.init_from_checkpoint:
        problems.append('freeze_transformer would keep random weights; name the trained ones with '
                        '--init_from_checkpoint=...')
    if config.unfreeze_at_iteration is not None and not config.freeze_transformer:
        problems.append(f'unfreeze_at_iteration is {config.unfreeze_at_iteration}, but nothing is frozen; add '
                        f'freeze_transformer=True or leave it out')
    return problems


def world_problems(config: TrainConfig, runtime: Runtime) -> list[str]:
    """What is wrong with sharing the work among the ranks."""
    problems = []
    if config.sharding == 'full' and runtime.world_size == 1:
        problems.append('sharding is full, but one process has nobody to share with; start several with '
                        'torchrun --nproc_per_node=2 train.py ..., or leave sharding out')
    if config.gradient_accumulation_steps % runtime.world_size:
        problems.append(f'gradient_accumulation_steps is {config.gradient_accumulation_steps}, but must be a '
                        f'multiple of the {runtime.world_size} ranks, which share them')
    return problems + (recording_problems(config, runtime) if config.cuda_graphs else [])


def recording_problems(config: TrainConfig, runtime: Runtime) -> list[str]:
    """What keeps steps from being recorded as CUDA graphs."""
    against = [(f'the device is {runtime.device}', runtime.device.type != 'cuda'),
               (f'there are {runtime.world_size} ranks', runtime.world_size > 1),
               (f'gradient_accumulation_steps is {config.gradient_accumulation_steps}',
                config.gradient_accumulation_steps > 1),
               (f'skip_spikes is {config.skip_spikes}', config.skip_spikes > 0),
               ('dtype is float16', runtime.dtype is torch.float16),
               ('training_type is grpo', training_of(config) == GRPO)]
    return [f'cuda_graphs is True, but {why}; leave one of them out' for why, holds in against if holds]
