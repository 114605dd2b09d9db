"""How each kind of model is trained: one row a kind, and what follows from it for the options of train.py.

What a kind is stands in core/checkpoints/kinds.py. A new kind is a row there and a row of `TRAINING` here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from core.batches import Batch, BatchPlan, causal_batches, judge_batches, remasking_batches, unmasking_batches
from core.checkpoints.heads import HEADS
from core.checkpoints.helpers import load_generator, one_shot_fill, require_block
from core.checkpoints.kinds import CheckpointKind
from core.common.runtime import Runtime
from core.data.vocabulary import Vocabulary
from core.noise import SCHEDULES, BlockNoise, Corruption, Masking, seen_neighbours
from core.objective import WholeLoss, judge_loss, remasking_loss
from core.options import TrainConfig
from core.validation import HeldOut, Validation, validate_blocks, validate_generator, validate_judge, validate_remasking
from model import GPT

Noise = Masking | Corruption | None


@dataclass(frozen=True)
class TrainingKind:
    """asked_by: the options that ask for it; noise: what its text goes through, by the options; batches: the
    micro-steps of one iteration; whole_loss: its loss, None of a model that writes text (`Objective`); validate: on a
    held-out split; problems: with its options.

    value: the name of what validation measures ('val/<value>' in the log); unit: of the loss. names_loss_type: whether
    snapshots say how positions are weighted.
    """

    asked_by: Mapping[str, str]
    noise: Callable[[TrainConfig, Vocabulary, Runtime], Noise]
    batches: Callable[[BatchPlan, int, Callable[[int], int]], list[Batch]]
    whole_loss: WholeLoss | None
    validate: Callable[[GPT, HeldOut, Tensor, Noise], Validation]
    problems: Callable[[TrainConfig], list[str]]
    value: str = 'loss'
    unit: str = 'nats per token'
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
    wanted = config.corruption_checkpoint if config.remasking_corruption == 'model' else None
    return _corruption(config, wanted, config.block_size, vocabulary, runtime)


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


def _no_problems(config: TrainConfig) -> list[str]:
    return []


def _block_problems(config: TrainConfig) -> list[str]:
    """Options of block models that no type shows; what concerns the shape is in `GPTConfig`."""
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
    if config.add_critic_head:
        problems.append('add_critic_head is True, but the critic of a block model is not trained; leave it out')
    if config.noise_schedule != 'linear':
        problems.append(f'noise_schedule is {config.noise_schedule}, but each block of a block model is masked by '
                        f'block_mask_shares; leave it out')
    return problems


def _reader_problems(config: TrainConfig) -> list[str]:
    """Options that a model which writes no text has no use for."""
    what = f'training_type={config.training_type}'
    problems = [f'attention_type is causal, but {what} reads a text from both sides; leave it out'] \
        if config.attention_type == 'causal' else []
    return problems + [f'{head.added_by} is True, but {what} has no use for it; leave it out'
                       for head in HEADS if head.is_in(config)]


def _unnamed_generator(config: TrainConfig) -> list[str]:
    return ['remasking_corruption is model, but no model is named; add --corruption_checkpoint=... of a trained '
            'generator'] if config.remasking_corruption == 'model' and not config.corruption_checkpoint else []


def _remasking_problems(config: TrainConfig) -> list[str]:
    return _reader_problems(config) + _unnamed_generator(config)


def _classifier_problems(config: TrainConfig) -> list[str]:
    one_class = ['remasking_loss_type is corrupted_only, but then a binary remasking model would see one class alone; '
                 'take balanced or all_positions'] if config.remasking_loss_type == 'corrupted_only' else []
    return _reader_problems(config) + one_class + _unnamed_generator(config)


def _judge_problems(config: TrainConfig) -> list[str]:
    too_short = [f'block_size is {config.block_size}, but a judge reads CLS and at least one token'] \
        if config.block_size < 2 else []
    return _reader_problems(config) + too_short


TRAINING: dict[CheckpointKind, TrainingKind] = {
    CheckpointKind.UNMASKING: TrainingKind(
        {'training_type': 'unmasking', 'attention_type': 'bidirectional'}, _masking, unmasking_batches, None,
        validate_generator, _no_problems, value='nelbo'),
    CheckpointKind.BLOCK: TrainingKind(
        {'training_type': 'unmasking', 'attention_type': 'block'}, _masking_of_blocks, unmasking_batches, None,
        validate_blocks, _block_problems, value='nelbo'),
    CheckpointKind.CAUSAL: TrainingKind(
        {'training_type': 'unmasking', 'attention_type': 'causal'}, _no_noise, causal_batches, None,
        validate_generator, _no_problems),
    CheckpointKind.REMASKING: TrainingKind(
        {'training_type': 'remasking', 'remasking_kind': 'token'}, _wrong_tokens, remasking_batches, remasking_loss,
        validate_remasking, _remasking_problems, names_loss_type=True),
    CheckpointKind.CLASSIFIER: TrainingKind(
        {'training_type': 'remasking', 'remasking_kind': 'binary'}, _wrong_tokens, remasking_batches, remasking_loss,
        validate_remasking, _classifier_problems, names_loss_type=True),
    CheckpointKind.JUDGE: TrainingKind(
        {'training_type': 'judge'}, _texts_of_each_quality, judge_batches, judge_loss, validate_judge,
        _judge_problems, unit='squared error'),
}


def kind_of(config: TrainConfig) -> CheckpointKind:
    """The kind of model that the options describe."""
    asked = vars(config)
    return next(kind for kind, row in TRAINING.items()
                if all(asked[name] == value for name, value in row.asked_by.items()))


def run_label(config: TrainConfig) -> str:
    """The name of the run's snapshots, ckpt_<label>_<iteration>.pt; for a remasking model with its loss type."""
    kind = kind_of(config)
    return f'{kind}_{config.remasking_loss_type}' if TRAINING[kind].names_loss_type else str(kind)


def wandb_name(config: TrainConfig) -> str:
    """The name of the run at W&B: the option, followed by what is trained unless that is a generator."""
    return config.wandb_run_name + ('' if kind_of(config).writes_text else f'_{run_label(config)}')
