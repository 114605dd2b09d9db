"""Checkpoints for sharing: a folder of safetensors and JSON, readable without unpickling and without this program.

model.safetensors holds each tensor once. config.json holds the rest, such as the vocabulary and the SHA-256 of the
weights. The optimizer state is left out.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from core.common.errors import UserError
from core.common.expressions import excerpt, shown_names
from core.common.files import atomic_files, unwritable

WEIGHTS_FILE, CONFIG_FILE = 'model.safetensors', 'config.json'  # an exported folder
_LEFT_OUT = ('model', 'ema', 'optimizers', 'scaler', 'guard')  # fields that an exported description does not hold


def _require_export_folder(folder: Path) -> None:
    """UserError unless `folder` is new, empty, or holds what an earlier export wrote."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f'cannot export to {folder}: it is a file; name a folder')
    names = sorted(one.name for one in folder.iterdir())
    try:
        earlier = {'tied', 'sha256', 'format_version'} <= set(json.loads((folder / CONFIG_FILE).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        earlier = False
    if names and not earlier:
        raise UserError(f'{folder} holds files that no export wrote ({shown_names(names)}); name a new or an empty '
                        f'folder')


def write_folder(folder: Path, payload: Mapping[str, object]) -> Path:
    """Write what `Checkpoint.to_payload` made into `folder`, with averaged weights if there are any. Returns `folder`.
    UserError if the folder holds files that no earlier export wrote."""
    _require_export_folder(folder)
    weights = payload['model'] if payload['ema'] is None else payload['ema']
    tensors, tied, first_names = {}, {}, {}
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        if place in first_names:
            tied[name] = first_names[place]
        else:
            first_names[place] = name
            tensors[name] = tensor.contiguous().clone()  # views of one storage become separate tensors
    data = safetensors.torch.save(tensors)
    description = {name: payload[name] for name in payload if name not in _LEFT_OUT}
    description |= {'tied': tied, 'averaged': payload['ema'] is not None, 'sha256': hashlib.sha256(data).hexdigest()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    with atomic_files([folder / WEIGHTS_FILE, folder / CONFIG_FILE]) as (file, described):
        file.write(data)
        described.write(json.dumps(_to_json(description), indent=2, ensure_ascii=False).encode())
    return folder


def read_folder(folder: Path, device: torch.device | str) -> dict[str, object]:
    """The payload of a checkpoint that `write_folder` wrote. UserError if the folder is damaged or no export."""
    source = folder / WEIGHTS_FILE
    try:
        data = source.read_bytes()
        description = _from_json(json.loads((folder / CONFIG_FILE).read_bytes()))
        tied = description.pop('tied')
        if description.pop('sha256') != hashlib.sha256(data).hexdigest():
            raise UserError(f'{source} is damaged or belongs to another {CONFIG_FILE}: its SHA-256 does not agree; '
                            f'export it again')
        weights = {name: tensor.to(device) for name, tensor in safetensors.torch.load(data).items()}
        weights |= {name: weights[first] for name, first in tied.items()}
    except OSError as error:
        raise UserError(f'cannot read {error.filename}: {error.strerror}; an exported folder holds {WEIGHTS_FILE} '
                        f'and {CONFIG_FILE}') from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError,
            safetensors.SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f'{folder} is damaged or was not exported by this program ({type(error).__name__}: '
                        f'{excerpt(str(error))}); export it again') from error
    return {**description, 'model': weights, 'ema': None, 'optimizers': [], 'scaler': None}


def _to_json(value: object) -> object:
    """`value` in types that JSON has. Bytes become base64. Tuples become lists. Dicts become lists of pairs if some key
    is not a string."""
    if isinstance(value, bytes):
        return {'$bytes': base64.b64encode(value).decode()}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith('$') for key in value):
            return {key: _to_json(one) for key, one in value.items()}
        return {'$pairs': [[_to_json(key), _to_json(one)] for key, one in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_to_json(one) for one in value]
    return value


def _from_json(value: object) -> object:
    """The reverse of `_to_json`, except that tuples stay lists."""
    if isinstance(value, list):
        return [_from_json(one) for one in value]
    if isinstance(value, dict):
        if set(value) == {'$bytes'}:
            return base64.b64decode(value['$bytes'])
        if set(value) == {'$pairs'}:
            return {_from_json(key): _from_json(one) for key, one in value['$pairs']}
        return {key: _from_json(one) for key, one in value.items()}
    return value
