"""Converts checkpoints of the older format, which nanoGPT and the design documents use, to today's.

Such a file holds `model` (weights, perhaps under names that begin with `_orig_mod.`), `model_args` (the model's
options), `iter_num` and `config` (the run's options). It has no vocabulary; the meta.pkl of its corpus has it. Its
special ids may come in any order after the base vocabulary. Weights are moved, never changed. If the old network
computes something other than `GPT`, the file is refused.

Letters: V0 base vocabulary, V all ids of the old model, D = n_embd.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from core.checkpoints.checkpoint import Checkpoint, is_plain, normalise_names, read_payload, save_checkpoint
from core.checkpoints.kinds import CheckpointKind
from core.checkpoints.weights import load_weights, model_config_from_dict, model_config_to_dict
from core.common.errors import UserError, raise_problems
from core.common.expressions import excerpt, shown
from core.data.corpus import is_own_meta, read_meta
from core.data.folders import corpus_folder
from core.data.nanogpt import read_nanogpt_meta
from core.data.vocabulary import SPECIAL_NAMES, Vocabulary
from model import GPT, ModelMode

KEYS = {'model': dict, 'model_args': dict, 'iter_num': int, 'config': dict}
BY_TOKEN = ('transformer.wte.weight', 'lm_head.weight', 'sampler_head.output_head.weight')  # one row for each id


class Older(NamedTuple):
    """What an older file holds, under the plain names of its weights."""

    weights: dict[str, Tensor]
    model_args: Mapping[str, object]
    iteration: int
    config: Mapping[str, object]


def convert_checkpoint(path: Path, new: Path, meta: Path | None = None) -> Checkpoint:
    """Write the older checkpoint at `path` to the file `new` in today's format. Returns what was written.

    meta: the meta.pkl that the model was trained with. Default: nanoGPT's meta.pkl in the folder of the corpus that the
    checkpoint names. UserError with the reason if the file cannot be converted, and if `new` exists.
    """
    if new.exists():
        raise UserError(f'{new} exists, and nothing is replaced; name a new file')
    older = read_older(path)
    _require_same_network(older.weights, path)
    vocabulary = _vocabulary_of(older, path, meta)
    rows = _rows_of(older, vocabulary, path)
    values = {**_structure_of(older, path), 'vocab_size': vocabulary.size,
              **{f'{name}_token_id': vocabulary.base_size + place for place, name in enumerate(SPECIAL_NAMES)}}
    model = GPT(model_config_from_dict({**older.model_args, **values}, path))
    moved = {name: _moved(tensor, rows) if name in BY_TOKEN else tensor.float()
             for name, tensor in older.weights.items()}
    load_weights(model, moved, path)
    checkpoint = Checkpoint(
        kind=str(_kind_of(model.config.mode, model.config.attention_type, older.config)),
        model_config=model_config_to_dict(model.config),
        config={name: value for name, value in older.config.items() if is_plain(value)},
        vocabulary=vocabulary.to_meta(), vocabulary_hash=vocabulary.hash, data_hash='', data_sizes={},
        model=model.state_dict(), iteration=older.iteration, extra={'resumable': False})
    save_checkpoint(new, checkpoint.to_payload())
    return checkpoint


def read_older(path: Path) -> Older:
    """The older checkpoint at `path`. UserError if the file has another format, or holds anything but tensors and plain
    values."""
    with torch.serialization.safe_globals([ModelMode]):  # an enum of text, which `model_args` may hold
        payload = read_payload(path)
    if isinstance(payload, dict) and 'format_version' in payload:
        raise UserError(f"{path} is in today's format; there is nothing to convert")
    wrong = [name for name, kind in KEYS.items() if not isinstance(payload, dict) or type(payload.get(name)) is not kind]
    if wrong:
        raise UserError(f'{path} is not in the older format, which holds {", ".join(KEYS)}: it has no usable '
                        f'{", ".join(wrong)}; name another file')
    weights = normalise_names(payload['model'], path)
    if 'transformer.wte.weight' not in weights:
        raise UserError(f'{path} has no weights of a GPT (no transformer.wte.weight); name another file')
    size = tuple(weights['transformer.wte.weight'].shape)[:1] or (0,)
    raise_problems([f'{path} holds {name} of the shape {tuple(weights[name].shape)}, but the model has {size[0]} ids; '
                    f'name another file' for name in BY_TOKEN
                    if name in weights and (weights[name].dim() != 2 or weights[name].shape[:1] != size)])
    return Older(weights, payload['model_args'], payload['iter_num'], payload['config'])


def _require_same_network(weights: Mapping[str, Tensor], path: Path) -> None:
    """UserError if the weights show that the old network computes something other than `GPT`."""
    train = f'train again with: {CheckpointKind.UNMASKING.command}'
    if 'transformer.h.0.attn.query_norm.weight' not in weights:
        raise UserError(f"{path} cannot be converted: its network is built as GPT-2 is, without normalised queries and "
                        f"keys; this program's network normalises them, and has other norms and another MLP, which no "
                        f'change of weights can make up for; {train}')
    output = weights.get('lm_head.weight')
    if output is not None and not torch.equal(output, weights['transformer.wte.weight']):
        raise UserError(f'{path} cannot be converted: its output matrix lm_head is not its token embedding, and here '
                        f'they are one; {train}')


def _structure_of(older: Older, path: Path) -> dict[str, object]:
    """Fields of `GPTConfig` that the old options may lack, found from the weights. UserError if others are missing."""
    args, weights = older.model_args, older.weights
    needed = ['attention_type'] + (['sampler_residual'] if any(name.startswith('sampler_head.') for name in weights)
                                   else [])
    raise_problems([f'{path} cannot be converted: its model_args do not say {name}, which no weight shows; add it to '
                    f'model_args' for name in needed if name not in args])
    mode = args.get('mode', ModelMode.LANGUAGE_MODEL)
    return {'mode': mode.value if isinstance(mode, ModelMode) else mode,
            'position_encoding': 'absolute' if 'transformer.wpe.weight' in weights else 'rotary',
            'bias': 'transformer.h.0.attn.c_attn.bias' in weights}


def _vocabulary_of(older: Older, path: Path, meta: Path | None) -> Vocabulary:
    """The vocabulary that the model was trained with. A corpus of this program is used only if `meta` names it, since a
    corpus of the same name may have other characters."""
    dataset = older.config.get('dataset')
    if meta is None and type(dataset) is not str:
        raise UserError(f'{path} does not name its corpus; add --meta=... of the meta.pkl that it was trained with')
    source = meta if meta is not None else corpus_folder(dataset) / 'meta.pkl'
    if not source.is_file():
        raise UserError(f'the vocabulary of {path} is not there ({source} is no file); add --meta=... of the meta.pkl '
                        f'that it was trained with')
    if not is_own_meta(source):
        return read_nanogpt_meta(source)
    if meta is None:
        raise UserError(f'{source} was prepared by this program, perhaps from another text than {path} was trained on; '
                        f'add --meta={source} if it is the same, else --meta=... of the old one')
    try:
        return Vocabulary.from_meta(read_meta(source)['vocabulary'])
    except UserError as error:
        raise UserError(f'{source} cannot be used: {excerpt(str(error))}; name another with --meta=...') from error


def _rows_of(older: Older, vocabulary: Vocabulary, path: Path) -> list[int | None]:
    """The old id of each of today's ids; None if the old model lacks it. UserError unless the old ids are the base
    vocabulary and the special ids that the file names."""
    base, size = vocabulary.base_size, len(older.weights['transformer.wte.weight'])
    ids = [older.model_args.get(f'{name}_token_id') for name in SPECIAL_NAMES]
    if ids == [None] * len(ids) and size - base in (1, 2):  # mask, and wrong, follow the base vocabulary
        ids[:size - base] = range(base, size)
    named = [token for token in ids if token is not None]
    if any(type(token) is not int for token in named) or sorted(named) != list(range(base, size)):
        raise UserError(f'{path} cannot be converted: its model has {size} ids and names the special ones '
                        f'{shown(named)}, but after the {base} of the vocabulary these should be '
                        f'{shown(list(range(base, size)))}; add --meta=... of the meta.pkl that it was trained with')
    return [*range(base), *ids]


def _moved(tensor: Tensor, rows: list[int | None]) -> Tensor:
    """float32 [V0 + 4, D]: the rows of tensor [V, D] in the order of today's ids, with zeros for new ids."""
    index = torch.tensor([0 if row is None else row for row in rows])
    new = torch.tensor([row is None for row in rows])
    return tensor.float()[index].masked_fill(new[:, None], 0.0)


def _kind_of(mode: ModelMode, attention_type: str, config: Mapping[str, object]) -> CheckpointKind:
    """The kind of model, by its mode and the run's options."""
    if mode is not ModelMode.LANGUAGE_MODEL:
        return CheckpointKind.JUDGE if mode is ModelMode.SEQUENCE_SCORER else CheckpointKind.CLASSIFIER
    if attention_type != 'bidirectional':
        return CheckpointKind(attention_type)
    return CheckpointKind.REMASKING if config.get('training_type') == 'remasking' else CheckpointKind.UNMASKING
