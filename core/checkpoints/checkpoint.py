"""Saves and reads checkpoints. A failed save never loses the previous one, and a file can do no harm when it is read.

A checkpoint is one zip file as `torch.save` writes it. Every member carries a CRC-32. `torch.load` ignores it; this
module compares it before anything is unpickled. Unpickling admits tensors and built-in types only.
"""

import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from core.checkpoints.kinds import CheckpointKind
from core.checkpoints.sharing import WEIGHTS_FILE, read_folder, write_folder
from core.common.errors import UserError, raise_problems
from core.common.expressions import excerpt, shown, shown_name
from core.common.files import atomic_writer
from core.data.corpus import file_hash
from core.noise import SCHEDULES, NoiseSchedule

FORMAT_VERSION = 1
HOW_TO_TRAIN = CheckpointKind.UNMASKING.command


@dataclass
class Checkpoint:
    """Everything that a run needs to resume, or a sampler needs to start. All values are tensors or built-in types."""

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
        """What is written to the file: the fields in plain types, and the format version."""
        return {'format_version': FORMAT_VERSION, **{one.name: getattr(self, one.name) for one in fields(self)},
                'kind': str(self.kind), 'model': dict(self.model), 'ema': None if self.ema is None else dict(self.ema)}

    @property
    def resumable(self) -> bool:
        """Whether a run can resume from it. Otherwise it only holds weights to sample from."""
        return bool(self.optimizers) and self.extra.get('resumable', True) is True

    @classmethod
    def from_payload(cls, payload: object, source: Path) -> 'Checkpoint':
        """Read what `to_payload` made. source: the file, for a `UserError`. Weights get their plain names."""
        if not isinstance(payload, dict) or type(payload.get('format_version')) is not int:
            cure = f'try: python -m core.checkpoints convert {source} NEW_FILE' \
                if isinstance(payload, dict) and 'model_args' in payload else f'train again with: {HOW_TO_TRAIN}'
            raise UserError(f'{source} has no format version, so an older or another program wrote it; {cure}')
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
        """The averaged weights if there are any and `use_ema` is True, otherwise the last ones."""
        return self.ema if use_ema and self.ema is not None else self.model

    def noise_schedule(self) -> NoiseSchedule:
        """The schedule that the model was trained with; linear if the run had no such option. UserError if this program
        does not know it."""
        name = self.config.get('noise_schedule', 'linear')
        if not isinstance(name, str) or name not in SCHEDULES:
            raise UserError(f'the checkpoint was trained with noise_schedule={shown(name)}, but this program knows '
                            f'{", ".join(SCHEDULES)}; add its row first (docs/extending.md), or update this '
                            f'program')
        return SCHEDULES[name]


_FIELD_TYPES = {'kind': (str,), 'model_config': (dict,), 'config': (dict,), 'vocabulary': (dict,),
                'vocabulary_hash': (str,), 'data_hash': (str,), 'data_sizes': (dict,), 'model': (dict,),
                'iteration': (int,), 'ema': (dict, type(None)), 'optimizers': (list,), 'scaler': (dict, type(None)),
                'guard': (dict, type(None)), 'best_value': (float, type(None)), 'extra': (dict,)}


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
    """Passes bytes on and keeps the first failure. `torch.save` would replace it by an error about positions."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.failure: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except BaseException as failure:  # an interrupt would be lost too
            self.failure = self.failure or failure
            raise

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(path: Path | str, payload: Mapping[str, object]) -> None:
    """Write `Checkpoint.to_payload()` to `path`: temporary file, fsync, verification, rename, fsync of the folder.

    The payload must hold only tensors and built-in types, so that it can be loaded. The verification reads the file
    back and compares its checksums. UserError if the file cannot be written or does not verify. An earlier file of that
    name is then unharmed.
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
    """The first place in `value` that holds neither a tensor nor a built-in type; None if there is no such place."""
    if isinstance(value, Mapping):
        parts = [part for key, one in value.items() for part in ((f'{place}: a key', key), (f'{place}[{key!r}]', one))]
    elif type(value) in (list, tuple):
        parts = [(f'{place}[{index}]', one) for index, one in enumerate(value)]
    else:
        return None if type(value) in _PLAIN or isinstance(value, Tensor) else place
    return next((found for name, one in parts if (found := _stranger(one, name)) is not None), None)


def is_plain(value: object) -> bool:
    """Whether `value` may be part of a checkpoint: built-in types and tensors only."""
    return _stranger(value) is None


_PLAIN = (str, int, float, bool, bytes, type(None))


# ---------------------------------------------------------------- reading

def verify_checkpoint(path: Path | str) -> CheckpointSummary:
    """Read the whole file at `path`, compare every checksum and check its header. UserError if anything is wrong.

    Nothing is unpickled before the checksums agree, and the tensors are mapped, not copied.
    """
    path = Path(path)
    checkpoint = _load(path, mapped=True, device='cpu')
    storages = {tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in checkpoint.model.values()}
    return CheckpointSummary(path, checkpoint.kind, checkpoint.iteration, checkpoint.best_value,
                             sum(storages.values()), checkpoint.resumable)


def load_checkpoint(path: Path | str, device: torch.device | str = 'cpu') -> Checkpoint:
    """The checkpoint at `path`: a file of `save_checkpoint`, or a folder (or its weights file) of `export_checkpoint`.

    Tensors are loaded to `device`. UserError if the checkpoint is missing, damaged, of another format, or holds
    anything but tensors and built-in types.
    """
    return _load(Path(path), mapped=False, device=device)


def _load(path: Path, mapped: bool, device: torch.device | str) -> Checkpoint:
    if path.name == WEIGHTS_FILE:
        return Checkpoint.from_payload(read_folder(path.parent, device), path)
    if path.is_dir():
        weights = _exported_weights(path)
        return Checkpoint.from_payload(read_folder(path, device), weights)
    return _read(path, mapped, device)


def _exported_weights(folder: Path) -> Path:
    """The weights file of an exported folder. UserError for any other folder."""
    if not (folder / WEIGHTS_FILE).is_file():
        there = sorted(one.name for one in folder.glob('*.pt'))
        raise UserError(f'{folder} is a folder without {WEIGHTS_FILE}; '
                        + (f'name a file in it, such as {folder / there[0]}' if there else 'name a checkpoint'))
    return folder / WEIGHTS_FILE


def _read(path: Path, mapped: bool, device: torch.device | str) -> Checkpoint:
    return Checkpoint.from_payload(read_payload(path, mapped, device), path)


def read_payload(path: Path, mapped: bool = False, device: torch.device | str = 'cpu') -> object:
    """What a file of `torch.save` holds, whoever wrote it. Checksums are compared first; then only tensors and built-in
    types are read. UserError if it is missing, damaged, or holds anything else."""
    if not path.is_file():
        raise UserError(f'there is no checkpoint {path}; make one with: {HOW_TO_TRAIN}, or with the config '
                        f'that writes into {path.parent}')
    _compare_checksums(path)
    try:
        return torch.load(path, map_location=device, mmap=mapped, weights_only=True)
    except Exception as error:  # others may have written the file; all failures mean the same to the user
        raise UserError(f'{path} holds something other than tensors and plain values, or is no checkpoint '
                        f'({type(error).__name__}); it was not loaded; take another, or train with: '
                        f'{HOW_TO_TRAIN}') from error


def _compare_checksums(path: Path) -> None:
    """UserError unless `path` is a whole zip file of stored members whose CRC-32 all agree."""
    try:
        with open(path, 'rb') as file, zipfile.ZipFile(file) as archive:
            damaged = next((one.filename for one in archive.infolist()
                            if one.compress_type != zipfile.ZIP_STORED or _checksum(file, one) != one.CRC), None)
    except PermissionError as error:
        raise UserError(f'cannot read {path}: {error.strerror}; allow it or name another checkpoint') from error
    except Exception as error:  # zipfile raises a dozen kinds of errors on random bytes
        raise UserError(f'{path} ({path.stat().st_size} bytes) is damaged, cut off or no checkpoint '
                        f'({excerpt(str(error))}); {_IF_DAMAGED}') from error
    if damaged is not None:
        raise UserError(f'{path} is damaged: the checksum of {shown_name(damaged)} does not agree; {_IF_DAMAGED}')


def _checksum(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """CRC-32 of the bytes of a stored member. `zipfile` computes it too, but takes several times as long."""
    file.seek(member.header_offset)
    name_length, extra_length = struct.unpack('<26xHH', file.read(30))  # the member's own header, then its bytes
    file.seek(name_length + extra_length, os.SEEK_CUR)
    checksum, left = 0, member.file_size
    while left > 0 and (part := file.read(min(left, _PART))):
        checksum, left = zlib.crc32(part, checksum), left - len(part)
    return checksum


_PART = 2**20  # bytes read at a time
_IF_DAMAGED = f'take the previous one (ckpt_previous.pt in its folder), or train with: {HOW_TO_TRAIN}'


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

# ---------------------------------------------------------------- sharing


def export_checkpoint(path: Path | str, folder: Path | str) -> Path:
    """Write the checkpoint's weights (averaged if there are any) and its description into `folder`. Returns `folder`.

    One can sample, evaluate and initialise from the folder, but not resume. UserError if it holds files that no earlier
    export wrote.
    """
    return write_folder(Path(folder), load_checkpoint(path).to_payload())


def checkpoint_hash(path: Path) -> str:
    """SHA-256 (hex) of a checkpoint file, or of the weights of an exported folder; UserError for another folder."""
    return file_hash(_exported_weights(path) if path.is_dir() else path)
