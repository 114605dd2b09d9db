"""A model whose weights lie on the line between those of two models of one architecture (core/merging.py)."""

import os
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

from core.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from core.checkpoints.heads import HEADS, Head
from core.checkpoints.kinds import CheckpointKind
from core.checkpoints.weights import TRAINING_FIELDS, build_model, model_config_from_dict, model_config_to_dict
from core.common.drawing import allowed_ids
from core.common.errors import UserError
from core.common.files import why_unwritable
from core.common.runtime import Runtime, resolve_device
from core.data.folders import recorded_data_folder
from core.data.prepare import ensure_corpus
from core.data.vocabulary import Vocabulary
from core.options import TrainConfig
from core.training_kinds import TRAINING
from core.validation import HeldOut
from model import GPTConfig


def merge_checkpoints(first: Path, second: Path, weight: float, output: Path, say: Callable[[str], None],
                      data_dir: str | None = None) -> Checkpoint:
    """Write (1 - weight) * first + weight * second to `output`, a checkpoint of the first one's kind; returns it.

    Averaged weights are used if there are any. A head that one of the two lacks, or has in another shape, is dropped,
    with a line to `say`. `say` also gets the validation losses of both and of the result, one for each kind of the two,
    on the corpora in `data_dir`. UserError if trunk or vocabulary differ.
    """
    if not 0 <= weight <= 1:
        raise UserError(f'weight is {weight}, but must lie in [0, 1]: it is the share of {second}')
    if os.path.lexists(output):
        raise UserError(f'{output} is there already and is not replaced; choose another name with --output=..., or '
                        f'move it away')
    reason = why_unwritable(str(output))
    if reason is not None:
        raise UserError(f'output is {output}, but {reason}')
    one, other = load_checkpoint(first), load_checkpoint(second)
    _require_equal_shape(one, other, first, second)
    dropped = _unlike_heads(one, other)
    for head in dropped:
        say(f'the {head.name} head is not the same in {first} and {second}, and is dropped')
    merged = _between(_without(one, dropped), _without(other, dropped), weight)
    device = torch.device(resolve_device('auto'))
    found = []
    for source in (one, other) if other.kind != one.kind else (one,):
        for name, checkpoint in ((f'merged {weight:g}', merged), (str(first), one), (str(second), other)):
            value, line = _validate_as(source, checkpoint, name, device, data_dir, say)
            found.append(value)
            say(line)
    merged.best_value = found[0]
    save_checkpoint(output, merged.to_payload())
    say(f'{output}: {1 - weight:g} of {first} and {weight:g} of {second}')
    return merged


def _require_equal_shape(one: Checkpoint, other: Checkpoint, first: Path, second: Path) -> None:
    if one.vocabulary_hash != other.vocabulary_hash:
        sizes = [Vocabulary.from_meta(checkpoint.vocabulary).base_size for checkpoint in (one, other)]
        raise UserError(f'{first} and {second} have different vocabularies (of {sizes[0]} and {sizes[1]} tokens); '
                        f'merge models of one corpus')
    shapes = [model_config_to_dict(model_config_from_dict(checkpoint.model_config, path))
              for checkpoint, path in ((one, first), (other, second))]
    of_heads = {name for head in HEADS for name in _fields_of(head)}
    differing = [f'{name} {shapes[0][name]} and {shapes[1][name]}' for name in shapes[0]
                 if name not in TRAINING_FIELDS | of_heads and shapes[0][name] != shapes[1][name]]
    trunks = [_without(checkpoint, HEADS).weights().keys() for checkpoint in (one, other)]
    if differing or trunks[0] != trunks[1]:
        raise UserError(f'{first} and {second} are of different architectures ({", ".join(differing) or "weights"}); '
                        f'merge models of one')


def _fields_of(head: Head) -> list[str]:
    """The fields of `GPTConfig` that describe the shape of a head, without those that say when it trains."""
    return [head.added_by, *(one.name for one in fields(GPTConfig)
                             if one.name.startswith(f'{head.name}_') and one.name not in TRAINING_FIELDS)]


def _unlike_heads(one: Checkpoint, other: Checkpoint) -> list[Head]:
    """The heads that one of the two lacks, or has in another shape."""
    configs = [model_config_from_dict(checkpoint.model_config, 'the checkpoint') for checkpoint in (one, other)]
    return [head for head in HEADS if any(head.is_in(config) for config in configs)
            and len({tuple(vars(config)[name] for name in _fields_of(head)) for config in configs}) > 1]


def _without(checkpoint: Checkpoint, heads: Sequence[Head]) -> Checkpoint:
    """The same model without some heads; only its averaged weights, if there are any."""
    usual = {one.name: one.default for one in fields(GPTConfig)}
    described = {name: usual[name] for head in heads for name in _fields_of(head)}
    return replace(checkpoint, ema=None, model_config={**checkpoint.model_config, **described},
                   config={**checkpoint.config, **{head.added_by: False for head in heads}},
                   model={name: tensor for name, tensor in checkpoint.weights().items()
                          if name.split('.')[0] not in {head.module for head in heads}})


def _between(one: Checkpoint, other: Checkpoint, weight: float) -> Checkpoint:
    """The interpolated model as a checkpoint to sample or to start from; it cannot be resumed."""
    others, model, made = other.weights(), {}, {}
    for name, tensor in one.weights().items():
        if tensor.data_ptr() not in made:  # tied weights stay one tensor
            made[tensor.data_ptr()] = torch.lerp(tensor.float(), others[name].float(), weight).to(tensor.dtype)
        model[name] = made[tensor.data_ptr()]
    return Checkpoint(one.kind, one.model_config, one.config, one.vocabulary, one.vocabulary_hash, one.data_hash,
                      one.data_sizes, model, min(one.iteration, other.iteration),
                      extra={'merged_with': other.kind, 'weight': weight, 'resumable': False,
                             'text_figures': one.extra.get('text_figures')})


def _validate_as(source: Checkpoint, checkpoint: Checkpoint, name: str, device: torch.device,
                 data_dir: str | None, say: Callable[[str], None]) -> tuple[float, str]:
    """The validation loss of a checkpoint's weights, by the kind and options of `source`, and a line about it."""
    shape = model_config_from_dict(checkpoint.model_config, name)
    own = {field: vars(shape)[field] for head in HEADS if source.config.get(head.added_by) for field in _fields_of(head)}
    config, runtime = TrainConfig.of_checkpoint({**source.config, **own}), Runtime(device, torch.float32, False)
    corpus = ensure_corpus(config.dataset, say, recorded_data_folder(data_dir, source.config))
    vocabulary = Vocabulary.from_meta(source.vocabulary)
    if corpus.vocabulary.hash != vocabulary.hash:
        raise UserError(f'corpus {config.dataset} has another vocabulary ({corpus.vocabulary.base_size} tokens) than '
                        f'the models ({vocabulary.base_size}); restore the corpus that they were trained on')
    training = TRAINING[CheckpointKind(source.kind)]
    model = build_model(checkpoint, device).requires_grad_(False)
    allowed = allowed_ids(vocabulary.size, vocabulary.base_size, device)
    held_out = HeldOut(corpus, runtime, config.eval_iters * config.batch_size, config.batch_size)
    found = training.validate(model, held_out, allowed, training.noise(config, vocabulary, runtime))
    return found.value, found.line(f'{name}, as {source.kind}: val')
