"""Checkpoints: saved so that no failure loses the previous one, and read so that no file can do harm.

A checkpoint is one zip file as `torch.save` writes it. Every member carries a CRC-32, which `torch.load` ignores and
which is compared here before anything is unpickled; unpickling admits tensors and built-in types only.
"""

import base64
import hashlib
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from core.checkpoints.kinds import CheckpointKind
from core.common.errors import UserError, raise_problems
from core.common.expressions import excerpt, shown, shown_name
from core.common.files import atomic_files, atomic_writer, unwritable
from core.data.corpus import file_hash
from core.noise import SCHEDULES, NoiseSchedule
from model import GPT, GPTConfig

FORMAT_VERSION = 1
WEIGHTS_FILE, CONFIG_FILE = 'model.safetensors', 'config.json'  # an exported folder
HOW_TO_TRAIN = CheckpointKind.UNMASKING.command
SHOWN_KEYS = 5  # of a long list of differing names

# Fields of GPTConfig that change how a model is trained, not what its weights mean: a resumed run may change them.
TRAINING_FIELDS = frozenset((
    'dropout', 'ignore_index', 'freeze_transformer', 'init_from_checkpoint', 'unfreeze_at_iteration',
    'unfreeze_lr_multiplier', 'critic_alpha', 'critic_target_scope', 'critic_gradient', 'critic_row_stride',
    'start_critic_iteration', 'end_critic_iteration', 'start_sampler_iteration', 'sampler_min_neighbors_ratio'))

# Fields of GPTConfig that the corpus decides.
VOCABULARY_FIELDS = frozenset(('vocab_size', 'mask_token_id', 'wrong_token_id', 'pad_token_id', 'cls_token_id'))


@dataclass
class Checkpoint:
    """Everything a run needs to go on, or a sampler to start. All values are tensors or built-in types."""

    kind: str                             # one of CheckpointKind
    model_config: dict[str, object]       # of `model_config_to_dict`
    config: dict[str, object]             # the run's options
    vocabulary: dict[str, object]         # of `Vocabulary.to_meta`
    vocabulary_hash: str
    data_hash: str
    data_sizes: dict[str, int]            # tokens per split
    model: dict[str, Tensor]              # state_dict
    iteration: int                        # steps done
    ema: dict[str, Tensor] | None = None  # averaged weights under the names of `model`
    optimizers: list[dict[str, object]] = field(default_factory=list)  # state_dicts
    scaler: dict[str, object] | None = None
    guard: dict[str, Tensor] | None = None  # of `StepGuard.state_dict`
    best_value: float | None = None       # lowest validation value so far
    extra: dict[str, object] = field(default_factory=dict)

    def to_payload(self) -> dict[str, object]:
        """What is written: the fields, plain, with the format version."""
        return {'format_version': FORMAT_VERSION, **{one.name: getattr(self, one.name) for one in fields(self)},
                'kind': str(self.kind), 'model': dict(self.model), 'ema': None if self.ema is None else dict(self.ema)}

    @property
    def resumable(self) -> bool:
        """Whether a run can go on from it; otherwise it holds weights to sample from."""
        return bool(self.optimizers) and self.extra.get('resumable', True) is True

    @classmethod
    def from_payload(cls, payload: object, source: Path) -> 'Checkpoint':
        """Read what `to_payload` made; `source` names the file in a `UserError`. Weights get their plain names."""
        if not isinstance(payload, dict) or type(payload.get('format_version')) is not int:
            raise UserError(f'{source} has no format version, so an older or another program wrote it; '
                            f'train again with: {HOW_TO_TRAIN}')
        version = payload['format_version']
        if version != FORMAT_VERSION:
            cure = 'update this program' if version > FORMAT_VERSION else f'train again with: {HOW_TO_TRAIN}'
            raise UserError(f'{source} has format {version}, but this program reads format {FORMAT_VERSION}; {cure}')
        values = {name: payload.get(name) for name in _FIELD_TYPES}
        raise_problems([f'{source} has no usable {name} (found {type(values[name]).__name__}); take another checkpoint'
                        for name, types in _FIELD_TYPES.items()
                        if type(values[name]) not in types])
        if values['kind'] not in tuple(CheckpointKind):
            raise UserError(f'{source} is of the kind {shown(values["kind"])}, but this program knows '
                            f'{", ".join(CheckpointKind)}; update this program')
        values['model'] = normalise_names(values['model'], source)
        values['ema'] = None if values['ema'] is None else normalise_names(values['ema'], source)
        return cls(**values)

    def weights(self, use_ema: bool = True) -> dict[str, Tensor]:
        """The averaged weights where there are any and they are wanted, else the last ones."""
        return self.ema if use_ema and self.ema is not None else self.model

    def noise_schedule(self) -> NoiseSchedule:
        """The one that the model was trained with; linear where the run had no such option. UserError for one that this
        program does not know."""
        name = self.config.get('noise_schedule', 'linear')
        if not isinstance(name, str) or name not in SCHEDULES:
            raise UserError(f'the checkpoint was trained with noise_schedule={shown(name)}, but this program knows '
                            f'{", ".join(SCHEDULES)}; update this program')
        return SCHEDULES[name]


_FIELD_TYPES = {'kind': (str,), 'model_config': (dict,), 'config': (dict,), 'vocabulary': (dict,),
                'vocabulary_hash': (str,), 'data_hash': (str,), 'data_sizes': (dict,), 'model': (dict,),
                'iteration': (int,), 'ema': (dict, type(None)), 'optimizers': (list,), 'scaler': (dict, type(None)),
                'guard': (dict, type(None)), 'best_value': (float, type(None)), 'extra': (dict,)}
_LEFT_OUT = ('model', 'ema', 'optimizers', 'scaler', 'guard')  # of an exported description


@dataclass(frozen=True)
class CheckpointSummary:
    """What a verified checkpoint holds, without its tensors."""

    path: Path
    kind: str
    iteration: int
    best_value: float | None
    parameters: int  # numbers in the weights; tied ones count once
    resumable: bool


# ---------------------------------------------------------------- saving

class _Sink:
    """Passes bytes on and keeps the first failure, which `torch.save` would cover with a complaint about positions."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.failure: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except BaseException as failure:  # an interrupt is lost in the same way
            self.failure = self.failure or failure
            raise

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(path: Path | str, payload: Mapping[str, object]) -> None:
    """Write `Checkpoint.to_payload()` to `path`: temporary file, fsync, verification, rename, fsync of the folder.

    What is written can be loaded, as it holds tensors and built-in types only; that the disk holds what was written is
    what the checksums say once they are read back. Raises UserError where it cannot be written or does not verify; an
    earlier file of that name is then unharmed.
    """
    stranger = _stranger(payload)
    if stranger is not None:
        raise UserError(f'{path} was not saved, because its {stranger} is something other than tensors and plain '
                        f'values; what was saved before is unchanged')
    Checkpoint.from_payload(payload, Path(path))

    def verify(temporary: Path) -> None:
        try:
            _compare_checksums(temporary)
        except UserError as error:
            raise UserError(f'{path} was not saved, because it did not read back as written: {error}') from error

    with atomic_writer(Path(path), verify) as file:
        sink = _Sink(file)
        try:
            torch.save(dict(payload), sink)
        except RuntimeError as error:
            raise (sink.failure or error) from None


def _stranger(value: object, place: str = 'payload') -> str | None:
    """The first place in `value` that holds neither a tensor nor a built-in type; None where all do."""
    if isinstance(value, Mapping):
        parts = [part for key, one in value.items() for part in ((f'{place}: a key', key), (f'{place}[{key!r}]', one))]
    elif type(value) in (list, tuple):
        parts = [(f'{place}[{index}]', one) for index, one in enumerate(value)]
    else:
        return None if type(value) in _PLAIN or isinstance(value, Tensor) else place
    return next((found for name, one in parts if (found := _stranger(one, name)) is not None), None)


_PLAIN = (str, int, float, bool, bytes, type(None))


# ---------------------------------------------------------------- reading

def verify_checkpoint(path: Path | str) -> CheckpointSummary:
    """Read all of the file at `path`, compare every checksum and check its header; UserError where anything is wrong.

    Nothing is unpickled before the checksums agree, and the tensors are mapped, not copied.
    """
    path = Path(path)
    checkpoint = _load(path, mapped=True, device='cpu')
    storages = {tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in checkpoint.model.values()}
    return CheckpointSummary(path, checkpoint.kind, checkpoint.iteration, checkpoint.best_value,
                             sum(storages.values()), checkpoint.resumable)


def load_checkpoint(path: Path | str, device: torch.device | str = 'cpu') -> Checkpoint:
    """The checkpoint at `path`: a file of `save_checkpoint`, or a folder (or its weights file) of `export_checkpoint`.

    Tensors come to `device`. UserError where it is missing, damaged, of another format, or holds anything but tensors
    and built-in types.
    """
    return _load(Path(path), mapped=False, device=device)


def _load(path: Path, mapped: bool, device: torch.device | str) -> Checkpoint:
    if path.name == WEIGHTS_FILE:
        return _import_folder(path.parent, device)
    if path.is_dir():
        if not (path / WEIGHTS_FILE).is_file():
            there = sorted(one.name for one in path.glob('*.pt'))
            raise UserError(f'{path} is a folder without {WEIGHTS_FILE}; '
                            + (f'name a file in it, such as {path / there[0]}' if there else 'name a checkpoint'))
        return _import_folder(path, device)
    return _read(path, mapped, device)


def _read(path: Path, mapped: bool, device: torch.device | str) -> Checkpoint:
    if not path.is_file():
        raise UserError(f'there is no checkpoint {path}; make one with: {HOW_TO_TRAIN}, or with the config '
                        f'that writes into {path.parent}')
    _compare_checksums(path)
    try:
        payload = torch.load(path, map_location=device, mmap=mapped, weights_only=True)
    except Exception as error:  # any failure on bytes that others may have written means the same to the user
        raise UserError(f'{path} holds something other than tensors and plain values, or is no checkpoint '
                        f'({type(error).__name__}); it was not loaded; take another, or train with: '
                        f'{HOW_TO_TRAIN}') from error
    return Checkpoint.from_payload(payload, path)


def _compare_checksums(path: Path) -> None:
    """UserError unless `path` is a whole zip file of stored members whose CRC-32 all agree."""
    try:
        with open(path, 'rb') as file, zipfile.ZipFile(file) as archive:
            damaged = next((one.filename for one in archive.infolist()
                            if one.compress_type != zipfile.ZIP_STORED or _checksum(file, one) != one.CRC), None)
    except PermissionError as error:
        raise UserError(f'cannot read {path}: {error.strerror}; allow it or name another checkpoint') from error
    except Exception as error:  # zipfile raises a dozen kinds on bytes at random
        raise UserError(f'{path} ({path.stat().st_size} bytes) is damaged, cut off or no checkpoint '
                        f'({excerpt(str(error))}); {_IF_DAMAGED}') from error
    if damaged is not None:
        raise UserError(f'{path} is damaged: the checksum of {shown_name(damaged)} does not agree; {_IF_DAMAGED}')


def _checksum(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """CRC-32 of the bytes of a stored member. `zipfile` computes it too, in several times the time."""
    file.seek(member.header_offset)
    name_length, extra_length = struct.unpack('<26xHH', file.read(30))  # the member's own header, then its bytes
    file.seek(name_length + extra_length, os.SEEK_CUR)
    checksum, left = 0, member.file_size
    while left > 0 and (part := file.read(min(left, _PART))):
        checksum, left = zlib.crc32(part, checksum), left - len(part)
    return checksum


_PART = 2**20  # bytes read at a time
_IF_DAMAGED = f'take the previous one (ckpt_previous.pt beside it), or train with: {HOW_TO_TRAIN}'


def normalise_names(state: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """`state` under the names of the plain model: without `_orig_mod.` (torch.compile) and leading `module.` (DDP)."""
    plain = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f'{source} holds {shown(name)} among its weights, which is no tensor; take another '
                            f'checkpoint')
        short = '.'.join(part for part in name.split('.') if part != '_orig_mod')
        while short.startswith('module.'):
            short = short.removeprefix('module.')
        if short in plain:
            raise UserError(f'{source} holds the weight {shown_name(short)} twice; take another checkpoint')
        plain[short] = tensor
    return plain


# ---------------------------------------------------------------- models from checkpoints

def model_config_to_dict(config: GPTConfig) -> dict[str, object]:
    """`config` in built-in types."""
    return {name: _plain(value) for name, value in asdict(config).items()}


def _plain(value: object) -> object:
    """A field's value as JSON has it too."""
    if isinstance(value, Enum):
        return value.value
    return list(value) if isinstance(value, tuple) else value


def model_config_from_dict(values: Mapping[str, object], source: Path | str) -> GPTConfig:
    """The reverse of `model_config_to_dict`; a field that is missing takes its default, an unknown one is an error."""
    unknown = [str(name) for name in values if name not in {one.name for one in fields(GPTConfig)}]
    if unknown:
        raise UserError(f'{source} describes its model with unknown options ({_shortened(unknown)}); '
                        f'update this program')
    try:
        return GPTConfig(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f'{source} describes a model that cannot be built: {excerpt(str(error))}; take another '
                        f'checkpoint') from error


def build_model(checkpoint: Checkpoint, device: torch.device | str = 'cpu', use_ema: bool = True) -> GPT:
    """The checkpoint's model on `device`, ready for evaluation, with averaged weights where there are any. UserError
    where they are not numbers."""
    model = GPT(model_config_from_dict(checkpoint.model_config, 'the checkpoint'))
    weights = checkpoint.weights(use_ema)
    load_weights(model, weights, 'the checkpoint')
    broken = [name for name, weight in weights.items() if weight.is_floating_point() and not weight.isfinite().all()]
    if broken:
        raise UserError(f'the checkpoint of kind {checkpoint.kind!r} has weights that are not numbers (NaN or infinite: '
                        f'{_shortened(broken)}); its training diverged: take an earlier checkpoint')
    return model.to(device).eval()


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: Path | str) -> None:
    """Copy `weights` into `model`; UserError that lists the names unless they are the model's, shapes included."""
    own = model.state_dict()
    missing = _missing(own, weights)
    superfluous = [name for name in weights if name not in own]
    shapes = _shape_differences(own, weights)
    raise_problems([f'{source} {words} ({_shortened(names)}); it belongs to another model' for names, words in
                    ((missing, 'lacks weights of this model'), (superfluous, 'has weights this model does not have'),
                     (shapes, 'has weights of other shapes')) if names])
    model.load_state_dict(weights, strict=False)  # names were compared above, where tied ones count as one


def initialise_from(model: nn.Module, path: Path | str, vocabulary_hash: str, say: Callable[[str], None]) -> None:
    """Start `model` from the weights (averaged where there are any) of the checkpoint at `path`.

    Heads, which are all weights outside `transformer`, may differ: those the checkpoint lacks stay fresh, those the
    model lacks are dropped, and `say` is told. Any other difference is a UserError, as is another vocabulary.
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
        raise UserError(f'{path} does not fit this model ({_shortened(differing)}); give the model the same shape, or '
                        f'initialise from another checkpoint')
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name in own}, strict=False)
    say(f'initialised from {path} (iteration {checkpoint.iteration})')
    for head in sorted(fresh):
        say(f'{head} is not in the checkpoint and starts fresh')
    for head in sorted(dropped):
        say(f'{head} of the checkpoint is not part of this model and was dropped')


def check_resume(saved: Checkpoint, model_config: Mapping[str, object], vocabulary_hash: str, data_hash: str,
                 force: bool = False, dataset: str | None = None) -> list[str]:
    """Lines to print about a run that goes on from `saved` with other options or (if forced) other data.

    UserError where the architecture or the heads differ, always; where corpus or vocabulary differ, unless `force` (which
    cannot help where the vocabularies have different sizes). `dataset` is the name of the corpus now.
    """
    other_vocabulary, before_name = saved.vocabulary_hash != vocabulary_hash, saved.config.get('dataset')
    before = {**{one.name: one.default for one in fields(GPTConfig)}, **saved.model_config}  # it may lack newer fields
    from_corpus = VOCABULARY_FIELDS if other_vocabulary else frozenset()  # these differ for that reason
    differences = {name: f'{shown_name(name)}: {shown(before.get(name))} in the checkpoint, '
                         f'{shown(model_config.get(name))} now'
                   for name in sorted({*saved.model_config, *model_config}, key=str)
                   if name not in from_corpus and _plain(before.get(name)) != model_config.get(name)}
    other_model = [words for name, words in differences.items() if name not in TRAINING_FIELDS]
    notes = [f'resuming with another {words}' for name, words in differences.items() if name in TRAINING_FIELDS]
    other_data = [f'another {name}: {old[:12]} in the checkpoint, {new[:12]} now' for name, old, new in (
        ('vocabulary', saved.vocabulary_hash, vocabulary_hash), ('corpus', saved.data_hash, data_hash)) if old != new]
    problems = [f'cannot resume with another model, {words}; use the old value, or start a new run with another --out_dir'
                for words in other_model]
    sizes = [before.get('vocab_size'), model_config.get('vocab_size')]
    too_different = other_vocabulary and sizes[0] != sizes[1]
    if other_data and (too_different or not force):
        renamed = dataset is not None and before_name is not None and dataset != before_name
        reason = f'dataset is {dataset}, but the run was trained on {before_name}' if renamed else \
            f'corpus {dataset or before_name} was replaced since the run was saved'
        cure = f'take --dataset={before_name}' if renamed else 'prepare the old text again'
        further = f' (its vocabulary has {sizes[1]} ids in place of {sizes[0]})' if too_different else ''
        other = ', or start a new run with another --out_dir' if too_different else ', or add --force_resume=True to go on ' \
            'with the new text'
        problems.append(f'cannot resume with {", ".join(other_data)}: {reason}{further}; {cure}{other}')
    raise_problems(problems)
    return notes + [f'resuming with {words}' for words in other_data]


def _missing(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """Names of `own` that `weights` gives neither under that name nor under that of a tied tensor."""
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


def _shortened(names: list[str]) -> str:
    more = len(names) - SHOWN_KEYS
    return ', '.join(map(shown_name, names[:SHOWN_KEYS])) + (f' and {more} more' if more > 0 else '')


# ---------------------------------------------------------------- sharing

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
        raise UserError(f'{folder} holds files that no export wrote ({_shortened(names)}); name a new or an empty folder')


def export_checkpoint(path: Path | str, folder: Path | str) -> Path:
    """Write the checkpoint's weights (averaged where there are any) and its description into `folder`; returns it.

    model.safetensors holds each tensor once; config.json the rest, the vocabulary and the weights' SHA-256 included,
    without optimizer state: one can sample, evaluate and initialise from the folder, but not resume. UserError where the
    folder holds other files than an earlier export's.
    """
    folder = Path(folder)
    _require_export_folder(folder)
    checkpoint = load_checkpoint(path)
    tensors, tied, first_names = {}, {}, {}
    for name, tensor in checkpoint.weights().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        if place in first_names:
            tied[name] = first_names[place]
        else:
            first_names[place] = name
            tensors[name] = tensor.contiguous().clone()  # views of one storage become tensors of their own
    data = safetensors.torch.save(tensors)
    payload = checkpoint.to_payload()
    description = {name: payload[name] for name in payload if name not in _LEFT_OUT}
    description |= {'tied': tied, 'averaged': checkpoint.ema is not None, 'sha256': hashlib.sha256(data).hexdigest()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    with atomic_files([folder / WEIGHTS_FILE, folder / CONFIG_FILE]) as (weights, described):
        weights.write(data)
        described.write(json.dumps(_to_json(description), indent=2, ensure_ascii=False).encode())
    return folder


def _import_folder(folder: Path, device: torch.device | str) -> Checkpoint:
    """Read what `export_checkpoint` wrote."""
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
    return Checkpoint.from_payload({**description, 'model': weights, 'ema': None, 'optimizers': [], 'scaler': None},
                                   source)


def checkpoint_hash(path: Path) -> str:
    """SHA-256 (hex) of a checkpoint file, or of the weights of an exported folder."""
    return file_hash(path / WEIGHTS_FILE if path.is_dir() else path)


def _to_json(value: object) -> object:
    """`value` in what JSON can say: bytes as base64, dicts with other keys than strings as pairs, tuples as lists."""
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
    """The reverse of `_to_json`, with lists for tuples."""
    if isinstance(value, list):
        return [_from_json(one) for one in value]
    if isinstance(value, dict):
        if set(value) == {'$bytes'}:
            return base64.b64decode(value['$bytes'])
        if set(value) == {'$pairs'}:
            return {_from_json(key): _from_json(one) for key, one in value['$pairs']}
        return {key: _from_json(one) for key, one in value.items()}
    return value
