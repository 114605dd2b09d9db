"""How each kind of model is trained: one row for each kind, and what it asks of the options of train.py.

core/checkpoints/kinds.py says what a kind is. A new kind needs a row there and a row of `TRAINING` here. A training
that continues from a model of an existing kind, such as a policy gradient, needs only a row of `TRAINING`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from core.batches import Batch, BatchPlan, causal_batches, judge_batches, remasking_batches, unmasking_batches
from core.checkpoints.heads import HEADS
from core.checkpoints.helpers import load_generator, one_shot_fill, require_block
from core.checkpoints.kinds import CheckpointKind
from core.common.runtime import Runtime
from core.data.vocabulary import Vocabulary
from core.noise import SCHEDULES, SOURCES, BlockNoise, Corruption, Masking, seen_neighbours
from core.objective import Objective, WholeLoss, judge_loss, position_metrics, remasking_loss
from core.options import TrainConfig
from core.reinforcement import GroupObjective, Reinforcement, prompt_batches, reinforcement_metrics, validate_rewards
from core.rewards import REWARDS, make_reward
from core.sampling.policies import POLICIES
from core.validation import HeldOut, Validation, validate_blocks, validate_generator, validate_judge, validate_remasking
from model import GPT

Noise = Masking | Corruption | Reinforcement | None
GRPO = 'grpo'  # the row of policy gradients, which continue from a trained generator


@dataclass(frozen=True)
class TrainingKind:
    """asked_by: the options that choose this kind. noise: what happens to its text, from the options. batches: the
    micro-steps of one iteration. objective: the module that computes its losses, from the model, the allowed ids and
    the noise. validate: its validation on a held-out split. problems: what is wrong with its options.

    value: the name of what validation measures ('val/<value>' in the log). unit: of the loss. metrics: further numbers
    for the log, from `Losses.sums`. passes: trunk calls that a step costs; a backward pass counts as two.
    names_loss_type: whether the names of snapshots contain the loss type. reads: options that name checkpoints. A run
    reads these at every start, so they must be the same when it is resumed.
    """

    asked_by: Mapping[str, str]
    noise: Callable[[TrainConfig, Vocabulary, Runtime], Noise]
    batches: Callable[[BatchPlan, int, Callable[[int], int]], list[Batch]]
    objective: Callable[[GPT, Tensor, Noise], nn.Module]
    validate: Callable[[GPT, HeldOut, Tensor, Noise], Validation]
    problems: Callable[[TrainConfig], list[str]]
    value: str = 'loss'
    unit: str = 'nats per token'
    metrics: Callable[[Tensor], dict[str, float]] = position_metrics
    passes: Callable[[TrainConfig], int] = lambda config: 3
    reads: Callable[[TrainConfig], list[str]] = lambda config: []
    names_loss_type: bool = False


def _masking(config: TrainConfig, vocabulary: Vocabulary, runtime: Runtime) -> Masking:
    return Masking(vocabulary.mask_token_id, config.loss_weighting, seen_neighbours(config), config.critic_row_stride,
                   config.critic_target_scope, schedule=SCHEDULES[config.noise_schedule])


def _masking_of_blocks(config: TrainConfig, vocabulary: Vocabulary, runtime: Runtime) -> Masking:
    low, high = config.block_mask_shares
    return _masking(config, vocabulary, runtime)._replace(blocks=BlockNoise(
        tuple(config.block_length), tuple(config.block_length_from), config.whole_block_share, (low, high)))


def _no_noise(config: TrainConfig, vocabulary: Vocabulary, runtime: Runtime) -> None:
    return None


def _wrong_tokens(config: TrainConfig, vocabulary: Vocabulary, runtime: Runtime) -> Corruption:
    sources = _sources(config)
    wanted = config.corruption_checkpoint if 'model' in sources else None
    return _corruption(config, wanted, config.block_size, vocabulary, runtime)._replace(sources=sources)


def _sources(config: TrainConfig) -> tuple[str, ...]:
    """What writes the wrong tokens that a remasking model reads."""
    return tuple(SOURCES) if config.remasking_corruption == 'mixed' else (config.remasking_corruption,)


def _texts_of_each_quality(config: TrainConfig, vocabulary: Vocabulary, runtime: Runtime) -> Corruption:
    return _corruption(config, config.corruption_checkpoint, config.block_size - 1, vocabulary, runtime)


def _corruption(config: TrainConfig, checkpoint: str | None, length: int, vocabulary: Vocabulary,
                runtime: Runtime) -> Corruption:
    """Tokens replaced at random, or filled by the generator of `checkpoint`, which reads `length` tokens at once."""
    fill = None
    if checkpoint:
        model, use_sampler_head = load_generator(checkpoint, vocabulary, runtime.device)
        require_block(model, f'corruption_checkpoint={checkpoint}', length, 'the text of one row')
        fill = one_shot_fill(model, use_sampler_head, vocabulary.base_size, runtime.autocast)
    return Corruption(vocabulary.base_size, vocabulary.cls_token_id, config.remasking_loss_type, fill)


def _with_heads(model: GPT, allowed: Tensor, noise: Noise) -> Objective:
    return Objective(model, allowed)


def _whole(loss: WholeLoss) -> Callable[[GPT, Tensor, Noise], Objective]:
    return lambda model, allowed, noise: Objective(model, allowed, loss)


def _drawn_groups(config: TrainConfig, vocabulary: Vocabulary, runtime: Runtime) -> Reinforcement:
    start, use_sampler_head = load_generator(config.init_from_checkpoint, vocabulary, runtime.device,
                                             'init_from_checkpoint')
    head = start.config.sampler_order if use_sampler_head and config.add_sampler_head else 'none'
    return Reinforcement(vocabulary.mask_token_id, config.group_size, config.prompt_length,
                         POLICIES[config.draw_policy].make(iterations=config.draw_calls), head, config.kl_weight, start,
                         make_reward(config, vocabulary, runtime.device),
                         None if runtime.dtype is torch.float32 else runtime.dtype)


def _no_problems(config: TrainConfig) -> list[str]:
    return []


def _block_problems(config: TrainConfig) -> list[str]:
    """Problems of a block model's options that types do not show; `GPTConfig` checks its shape."""
    problems, shares = [], config.block_mask_shares
    if config.block_length_from and len(config.block_length_from) != len(config.block_length):
        problems.append(f'block_length_from is {config.block_length_from}, but block_length is {config.block_length}; '
                        f'give one iteration for each length, or leave it out')
    if not 0 <= config.whole_block_share <= 1:
        problems.append(f'whole_block_share is {config.whole_block_share}, but must lie in [0, 1]')
    if len(shares) != 2 or not 0 <= shares[0] < shares[1] <= 1:
        problems.append(f'block_mask_shares is {shares}, but must be two rising numbers in [0, 1]')
    elif shares != [0.0, 1.0] and config.loss_weighting == 'elbo':
        problems.append(f'block_mask_shares is {shares}, but loss_weighting=elbo is a bound over [0, 1] alone; take '
                        f'loss_weighting=masked_mean or leave block_mask_shares out')
    if config.add_critic_head and config.critic_fill == 'revised':
        problems.append('critic_fill is revised, but the critic of a block model learns from text filled once; '
                        'leave it out')
    if config.noise_schedule != 'linear':
        problems.append(f'noise_schedule is {config.noise_schedule}, but each block of a block model is masked by '
                        f'block_mask_shares; leave it out')
    return problems


def _reader_problems(config: TrainConfig) -> list[str]:
    """Options that are of no use for a model that writes no text."""
    what = f'training_type={config.training_type}'
    problems = [f'attention_type is causal, but {what} reads a text from both sides; leave it out'] \
        if config.attention_type == 'causal' else []
    return problems + [f'{head.added_by} is True, but {what} has no use for it; leave it out'
                       for head in HEADS if head.is_in(config)]


def _unnamed_generator(config: TrainConfig) -> list[str]:
    return [f'remasking_corruption is {config.remasking_corruption}, but no model is named; add '
            f'--corruption_checkpoint=... of a trained generator'] \
        if 'model' in _sources(config) and not config.corruption_checkpoint else []


def _remasking_problems(config: TrainConfig) -> list[str]:
    return _reader_problems(config) + _unnamed_generator(config)


def _classifier_problems(config: TrainConfig) -> list[str]:
    never_right = [f'remasking_loss_type is corrupted_only, but then a {config.remasking_kind} remasking model would '
                   f'never see a right token; take balanced or all_positions'] \
        if config.remasking_loss_type == 'corrupted_only' else []
    return _reader_problems(config) + never_right + _unnamed_generator(config)


def _multiclass_problems(config: TrainConfig) -> list[str]:
    one_source = [f'remasking_kind is multiclass, but with remasking_corruption={config.remasking_corruption} all wrong '
                  f'tokens have one source; take --remasking_corruption=mixed'] if len(_sources(config)) == 1 else []
    return one_source + _classifier_problems(config)


def _judge_problems(config: TrainConfig) -> list[str]:
    too_short = [f'block_size is {config.block_size}, but a judge reads CLS and at least one token'] \
        if config.block_size < 2 else []
    start = config.init_from_checkpoint
    no_start = [f'init_from_checkpoint is {start}, but there is no such file; a judge starts from a remasking model, '
                f'trained with: {CheckpointKind.REMASKING.command} (or give --init_from_checkpoint=None to start from '
                f'random weights)'] if start and config.init_from == 'scratch' and not Path(start).exists() else []
    return _reader_problems(config) + too_short + no_start


def _reads_generator(config: TrainConfig) -> list[str]:
    wanted = config.training_type == 'judge' or 'model' in _sources(config)
    return ['corruption_checkpoint'] if wanted and config.corruption_checkpoint else []


def _grpo_problems(config: TrainConfig) -> list[str]:
    """Problems of a policy gradient's options that types do not show."""
    problems = [] if config.init_from_checkpoint else [
        f'training_type is grpo, which goes on with a trained generator, but none is named; add '
        f'--init_from_checkpoint=out/ckpt_best.pt (trained with: {CheckpointKind.UNMASKING.command})']
    if config.attention_type != 'bidirectional':
        problems.append(f'attention_type is {config.attention_type}, but training_type=grpo draws by the policies of '
                        f'bidirectional models; leave it out')
    if config.group_size < 2:
        problems.append(f'group_size is {config.group_size}, but an advantage compares at least two texts; give 2 or '
                        f'more')
    elif config.batch_size % config.group_size:
        problems.append(f'batch_size is {config.batch_size}, but must be a multiple of group_size '
                        f'({config.group_size}), so that a micro-step holds whole groups')
    free = config.block_size - config.prompt_length
    if free < 1:
        problems.append(f'prompt_length is {config.prompt_length}, but must be below block_size ({config.block_size}), '
                        f'so that there is text to write')
    elif config.draw_calls > free:
        problems.append(f'draw_calls is {config.draw_calls}, but each call reveals at least one of the {free} tokens '
                        f'after the prompt; give at most {free}')
    if config.dropout > 0:
        problems.append(f'dropout is {config.dropout}, but the log-probabilities of drawn texts are exact without it '
                        f'alone; leave it out')
    problems += [f'{name} is {value}, but training_type=grpo {why}; leave it out' for name, value, why in (
        ('add_critic_head', config.add_critic_head, 'does not train the critic'),
        ('compile', config.compile, 'draws in steps of changing shapes'),
        ('sharding', config.sharding if config.sharding == 'full' else None, 'reads whole weights')) if value]
    return problems + REWARDS[config.reward].problems(config)


TRAINING: dict[str, TrainingKind] = {
    CheckpointKind.UNMASKING: TrainingKind(
        {'training_type': 'unmasking', 'attention_type': 'bidirectional'}, _masking, unmasking_batches,
        _with_heads, validate_generator, _no_problems, value='nelbo'),
    CheckpointKind.BLOCK: TrainingKind(
        {'training_type': 'unmasking', 'attention_type': 'block'}, _masking_of_blocks, unmasking_batches,
        _with_heads, validate_blocks, _block_problems, value='nelbo'),
    CheckpointKind.CAUSAL: TrainingKind(
        {'training_type': 'unmasking', 'attention_type': 'causal'}, _no_noise, causal_batches, _with_heads,
        validate_generator, _no_problems),
    CheckpointKind.REMASKING: TrainingKind(
        {'training_type': 'remasking', 'remasking_kind': 'token'}, _wrong_tokens, remasking_batches,
        _whole(remasking_loss), validate_remasking, _remasking_problems, names_loss_type=True,
        reads=_reads_generator),
    CheckpointKind.CLASSIFIER: TrainingKind(
        {'training_type': 'remasking', 'remasking_kind': 'binary'}, _wrong_tokens, remasking_batches,
        _whole(remasking_loss), validate_remasking, _classifier_problems, metrics=partial(position_metrics, named=None),
        names_loss_type=True, reads=_reads_generator),
    CheckpointKind.MULTICLASS: TrainingKind(
        {'training_type': 'remasking', 'remasking_kind': 'multiclass'}, _wrong_tokens, remasking_batches,
        _whole(remasking_loss), validate_remasking, _multiclass_problems,
        metrics=partial(position_metrics, named='source'), names_loss_type=True, reads=_reads_generator),
    CheckpointKind.JUDGE: TrainingKind(
        {'training_type': 'judge'}, _texts_of_each_quality, judge_batches, _whole(judge_loss),
        validate_judge, _judge_problems, unit='squared error', reads=_reads_generator),
    GRPO: TrainingKind(
        {'training_type': 'grpo'}, _drawn_groups, prompt_batches, GroupObjective, validate_rewards, _grpo_problems,
        unit='minus reward', metrics=reinforcement_metrics, passes=lambda config: 5 * config.draw_calls,
        reads=lambda config: ['init_from_checkpoint', *REWARDS[config.reward].reads]),
}


def training_of(config: TrainConfig) -> str:
    """The row of `TRAINING` that the options describe."""
    asked = vars(config)
    return next(name for name, row in TRAINING.items()
                if all(asked[option] == value for option, value in row.asked_by.items()))


def kind_of(config: TrainConfig) -> CheckpointKind:
    """The kind of model that the options make."""
    name = training_of(config)
    return CheckpointKind.UNMASKING if name == GRPO else CheckpointKind(name)


def run_label(config: TrainConfig) -> str:
    """The label in the names of snapshots, ckpt_<label>_<iteration>.pt. A remasking model's contains its loss type."""
    kind = kind_of(config)
    return f'{kind}_{config.remasking_loss_type}' if TRAINING[training_of(config)].names_loss_type else str(kind)


def wandb_name(config: TrainConfig) -> str:
    """The name of the run at W&B: the option, and what is trained if that is not a generator."""
    return config.wandb_run_name + ('' if kind_of(config).writes_text else f'_{run_label(config)}')
