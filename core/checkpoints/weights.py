"""Models and weights from checkpoints: build, load, initialise, and check that a run can resume."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor, nn

from core.checkpoints.checkpoint import Checkpoint, load_checkpoint
from core.checkpoints.heads import HEADS
from core.checkpoints.kinds import CheckpointKind
from core.common.errors import UserError, raise_problems
from core.common.expressions import excerpt, shown, shown_name, shown_names
from model import GPT, GPTConfig

# Fields of GPTConfig that change how a model is trained, not what its weights mean: a resumed run may change them.
TRAINING_FIELDS = frozenset((
    'dropout', 'ignore_index', 'freeze_transformer', 'init_from_checkpoint', 'unfreeze_at_iteration',
    'unfreeze_lr_multiplier', 'critic_target_scope', 'critic_gradient', 'critic_row_stride',
    'critic_fill', 'sampler_min_neighbors_ratio', *(name for head in HEADS for name in head.when_it_trains)))

# Fields of GPTConfig that the corpus decides.
VOCABULARY_FIELDS = frozenset(('vocab_size', 'mask_token_id', 'wrong_token_id', 'pad_token_id', 'cls_token_id'))


def model_config_to_dict(config: GPTConfig) -> dict[str, object]:
    """`config` in built-in types."""
    return {name: _plain(value) for name, value in asdict(config).items()}


def _plain(value: object) -> object:
    """A field's value in types that JSON has."""
    if isinstance(value, Enum):
        return value.value
    return list(value) if isinstance(value, tuple) else value


def model_config_from_dict(values: Mapping[str, object], source: Path | str) -> GPTConfig:
    """The reverse of `model_config_to_dict`. A missing field takes its default; an unknown field is a UserError."""
    unknown = [str(name) for name in values if name not in {one.name for one in fields(GPTConfig)}]
    if unknown:
        raise UserError(f'{source} describes its model with unknown options ({shown_names(unknown)}); '
                        f'update this program')
    try:
        return GPTConfig(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f'{source} describes a model that cannot be built: {excerpt(str(error))}; take another '
                        f'checkpoint') from error


def build_model(checkpoint: Checkpoint, device: torch.device | str = 'cpu', use_ema: bool = True) -> GPT:
    """The checkpoint's model on `device`, ready for evaluation, with averaged weights if there are any. UserError if
    weights are not finite."""
    model = GPT(model_config_from_dict(checkpoint.model_config, 'the checkpoint'))
    weights = checkpoint.weights(use_ema)
    load_weights(model, weights, 'the checkpoint')
    broken = [name for name, weight in weights.items() if weight.is_floating_point() and not weight.isfinite().all()]
    if broken:
        raise UserError(f'the checkpoint of kind {checkpoint.kind!r} has weights that are not numbers (NaN or '
                        f'infinite: {shown_names(broken)}); its training diverged: take an earlier checkpoint')
    return model.to(device).eval()


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: Path | str) -> None:
    """Copy `weights` into `model`. UserError that lists the weights whose names or shapes differ from the model's."""
    own = model.state_dict()
    missing = _missing(own, weights)
    superfluous = [name for name in weights if name not in own]
    shapes = _shape_differences(own, weights)
    raise_problems([f'{source} {words} ({shown_names(names)}); it belongs to another model' for names, words in
                    ((missing, 'lacks weights of this model'), (superfluous, 'has weights this model does not have'),
                     (shapes, 'has weights of other shapes')) if names])
    model.load_state_dict(weights, strict=False)  # names were compared above, where tied ones count as one


def initialise_from(model: GPT, path: Path | str, vocabulary_hash: str, say: Callable[[str], None]) -> None:
    """Start `model` from the weights (averaged if there are any) of the checkpoint at `path`.

    Heads may differ; they are all weights outside `transformer`. A head that the checkpoint lacks keeps its fresh
    weights. A head that the model lacks is dropped. `say` prints a line about each. Any other difference is a
    UserError, and so is another vocabulary.
    """
    checkpoint = load_checkpoint(path)
    weights, own = checkpoint.weights(), model.state_dict()
    if checkpoint.vocabulary_hash != vocabulary_hash:
        raise UserError(f'{path} has another vocabulary ({checkpoint.model_config.get("vocab_size")} ids, this model '
                        f'{own["transformer.wte.weight"].size(0)}); initialise from a checkpoint of the same corpus')
    missing, superfluous = _missing(own, weights), [name for name in weights if name not in own]
    fresh = _heads(missing) - _heads(weights)
    dropped = _heads(superfluous) - _heads(own)
    differing = [name for name in missing if _head(name) not in fresh]
    differing += [name for name in superfluous if _head(name) not in dropped]
    differing += _shape_differences(own, weights)
    if differing:
        raise UserError(f'{path} does not fit this model ({shown_names(differing)}); give the model the same shape, or '
                        f'initialise from another checkpoint')
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name in own}, strict=False)
    say(f'initialised from {path} (iteration {checkpoint.iteration})')
    if checkpoint.kind == CheckpointKind.CAUSAL and model.config.attention_type == 'block' \
            and model.config.predicts == 'own':
        say(f'{path} predicts the next token, but this model its own position; --predicts=next keeps what it knows')
    for head in sorted(fresh):
        say(f'{head} is not in the checkpoint and starts fresh')
    for head in sorted(dropped):
        say(f'{head} of the checkpoint is not part of this model and was dropped')


def check_resume(saved: Checkpoint, model_config: Mapping[str, object], vocabulary_hash: str, data_hash: str,
                 force: bool = False, dataset: str | None = None) -> list[str]:
    """Lines to print about a run that resumes from `saved` with other options or (with `force`) other data.

    UserError if the architecture or the heads differ, or if the vocabularies differ in size. Without `force` also if
    corpus or vocabulary differ. dataset: the name of the corpus now.
    """
    other_vocabulary, before_name = saved.vocabulary_hash != vocabulary_hash, saved.config.get('dataset')
    before = {**{one.name: one.default for one in fields(GPTConfig)}, **saved.model_config}  # it may lack newer fields
    from_corpus = VOCABULARY_FIELDS if other_vocabulary else frozenset()  # these differ because the vocabulary does
    differences = {name: f'{shown_name(name)}: {shown(before.get(name))} in the checkpoint, '
                         f'{shown(model_config.get(name))} now'
                   for name in sorted({*saved.model_config, *model_config}, key=str)
                   if name not in from_corpus and _plain(before.get(name)) != model_config.get(name)}
    other_model = [words for name, words in differences.items() if name not in TRAINING_FIELDS]
    notes = [f'resuming with another {words}' for name, words in differences.items() if name in TRAINING_FIELDS]
    other_data = [f'another {name}: {old[:12]} in the checkpoint, {new[:12]} now' for name, old, new in (
        ('vocabulary', saved.vocabulary_hash, vocabulary_hash), ('corpus', saved.data_hash, data_hash)) if old != new]
    problems = [f'cannot resume with another model, {words}; use the old value, or start a new run with another '
                f'--out_dir' for words in other_model]
    sizes = [before.get('vocab_size'), model_config.get('vocab_size')]
    too_different = other_vocabulary and sizes[0] != sizes[1]
    if other_data and (too_different or not force):
        renamed = dataset is not None and before_name is not None and dataset != before_name
        reason = f'dataset is {dataset}, but the run was trained on {before_name}' if renamed else \
            f'corpus {dataset or before_name} was replaced since the run was saved'
        cure = f'take --dataset={before_name}' if renamed else 'prepare the old text again'
        further = f' (its vocabulary has {sizes[1]} ids in place of {sizes[0]})' if too_different else ''
        other = 'start a new run with another --out_dir' if too_different else \
            'add --force_resume=True to go on with the new text'
        problems.append(f'cannot resume with {", ".join(other_data)}: {reason}{further}; {cure}, or {other}')
    raise_problems(problems)
    return notes + [f'resuming with {words}' for words in other_data]


def _missing(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """Names of `own` whose tensor `weights` lacks, both under this name and under the name of a tied tensor."""
    given = {tensor.data_ptr() for name, tensor in own.items() if name in weights}
    return [name for name, tensor in own.items() if name not in weights and tensor.data_ptr() not in given]


def _shape_differences(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    return [f'{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}' for name, tensor in own.items()
            if name in weights and weights[name].shape != tensor.shape]


def _head(name: str) -> str | None:
    """The head a weight belongs to; None for the trunk."""
    first = name.split('.')[0]
    return None if first == 'transformer' else first


def _heads(names: Mapping[str, Tensor] | list[str]) -> set[str]:
    return {head for head in map(_head, names) if head is not None}
