"""What a run trains, by the options of train.py: its kind, the names that follow from it, how its text is corrupted."""

from core.checkpoints.helpers import load_generator, one_shot_fill, require_block
from core.checkpoints.kinds import GENERATORS, CheckpointKind
from core.common.runtime import Runtime
from core.data.vocabulary import Vocabulary
from core.noise import Corruption
from core.options import TrainConfig


def kind_of(config: TrainConfig) -> CheckpointKind:
    """The kind of model that the options describe."""
    if config.training_type == 'judge':
        return CheckpointKind.JUDGE
    if config.training_type == 'remasking':
        return CheckpointKind.CLASSIFIER if config.remasking_kind == 'binary' else CheckpointKind.REMASKING
    return CheckpointKind.CAUSAL if config.attention_type == 'causal' else CheckpointKind.UNMASKING


def run_label(config: TrainConfig) -> str:
    """The name of the run's snapshots, ckpt_<label>_<iteration>.pt; for a remasking model with its loss type."""
    kind = kind_of(config)
    remasks = kind in (CheckpointKind.REMASKING, CheckpointKind.CLASSIFIER)
    return f'{kind}_{config.remasking_loss_type}' if remasks else str(kind)


def wandb_name(config: TrainConfig) -> str:
    """The name of the run at W&B: the option, followed by what is trained unless that is a generator."""
    return config.wandb_run_name + ('' if kind_of(config) in GENERATORS else f'_{run_label(config)}')


def load_corruption(config: TrainConfig, kind: CheckpointKind, vocabulary: Vocabulary, runtime: Runtime) -> Corruption | None:
    """How the options of train.py make text wrong; None for models that write text."""
    if kind in GENERATORS:
        return None
    judge, fill = kind is CheckpointKind.JUDGE, None
    if config.corruption_checkpoint and (judge or config.remasking_corruption == 'model'):
        model, use_sampler_head = load_generator(config.corruption_checkpoint, vocabulary, runtime.device)
        require_block(model, f'corruption_checkpoint={config.corruption_checkpoint}', config.block_size - judge,
                      'the text of one row')
        fill = one_shot_fill(model, use_sampler_head, vocabulary.base_size, runtime.autocast)
    return Corruption(vocabulary.base_size, vocabulary.cls_token_id, config.remasking_loss_type, fill)
