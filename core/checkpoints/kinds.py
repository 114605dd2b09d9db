"""What a run trains, by its options: the kind of model, its mode, and the name of its snapshots.

`config` is train.py's flat dataclass of options everywhere here.
"""

from enum import StrEnum
from typing import Any

from model import ModelMode

class CheckpointKind(StrEnum):
    """What the model was trained for; a sampler takes a generator, not a judge."""

    UNMASKING = 'unmasking'    # a diffusion model that reveals masked tokens
    REMASKING = 'remasking'    # logits over base vocabulary and the wrong id
    CLASSIFIER = 'classifier'  # the binary remasking model
    JUDGE = 'judge'            # one number per sequence
    CAUSAL = 'causal'          # left to right


MODES = {CheckpointKind.CLASSIFIER: ModelMode.TOKEN_CLASSIFIER, CheckpointKind.JUDGE: ModelMode.SEQUENCE_SCORER}
GENERATORS = (CheckpointKind.UNMASKING, CheckpointKind.CAUSAL)  # kinds that write text
OWN_OUTPUT = tuple(MODES)  # kinds with an output layer apart from the embedding, which trains on a frozen trunk


def kind_of(config: Any) -> CheckpointKind:
    """The kind of model that the options describe."""
    if config.training_type == 'judge':
        return CheckpointKind.JUDGE
    if config.training_type == 'remasking':
        return CheckpointKind.CLASSIFIER if config.remasking_kind == 'binary' else CheckpointKind.REMASKING
    return CheckpointKind.CAUSAL if config.attention_type == 'causal' else CheckpointKind.UNMASKING


def mode_of(kind: CheckpointKind) -> ModelMode:
    """What a model of `kind` predicts."""
    return MODES.get(kind, ModelMode.LANGUAGE_MODEL)


def run_label(config: Any) -> str:
    """The name of the run's snapshots, ckpt_<label>_<iteration>.pt; for a remasking model with its loss type."""
    kind = kind_of(config)
    remasks = kind in (CheckpointKind.REMASKING, CheckpointKind.CLASSIFIER)
    return f'{kind}_{config.remasking_loss_type}' if remasks else str(kind)


def wandb_name(config: Any) -> str:
    """The name of the run at W&B: the option, followed by what is trained unless that is a generator."""
    return config.wandb_run_name + ('' if kind_of(config) in GENERATORS else f'_{run_label(config)}')


def kind_problems(config: Any) -> list[str]:
    """Options that do not suit what is trained."""
    kind, problems = kind_of(config), []
    if kind in GENERATORS:
        return problems
    what = f'training_type={config.training_type}'
    if config.attention_type == 'causal':
        problems.append(f'attention_type is causal, but {what} reads a text from both sides; leave it out')
    problems += [f'{name} is True, but {what} has no use for it; leave it out'
                 for name in ('add_sampler_head', 'add_critic_head') if getattr(config, name)]
    if kind is CheckpointKind.CLASSIFIER and config.remasking_loss_type == 'corrupted_only':
        problems.append('remasking_loss_type is corrupted_only, but then a binary remasking model would see one class '
                        'alone; take balanced or all_positions')
    if kind is not CheckpointKind.JUDGE and config.remasking_corruption == 'model' and not config.corruption_checkpoint:
        problems.append('remasking_corruption is model, but no model is named; add --corruption_checkpoint=... of a '
                        'trained generator')
    if kind is CheckpointKind.JUDGE and config.block_size < 2:
        problems.append(f'block_size is {config.block_size}, but a judge reads CLS and at least one token')
    return problems
