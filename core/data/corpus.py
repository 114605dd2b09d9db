"""Corpora as the program reads them: meta, token files and windows. Preparing them is `core/data/prepare.py`.

A corpus is a folder with `train.bin`, `val.bin`, perhaps `ref.bin` (flat token ids) and `meta.pkl` (one plain dict of
built-in types). Files come from other people's machines, so `meta.pkl` is read by an unpickler that can build nothing
but built-in values, every field is checked, and the token files must have the recorded length, hash and range of ids.

Shapes: B windows.
"""

import hashlib
import pickle
import pickletools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from core.common.errors import UserError
from core.common.expressions import excerpt
from core.data.vocabulary import SPECIAL_NAMES, Vocabulary

META_FORMAT = 'masked-diffusion-corpus'
META_VERSION = 1
SPLITS = ('train', 'ref', 'val')
_LARGEST_META = 256 * 2**20  # bytes; GPT-2's vocabulary needs less than 1 MiB
_HASHED_AT_LOAD = 256 * 2**20  # bytes; longer files are checked by length and largest id only, which is much faster
_SCAN_CHUNK = 2**24  # tokens looked at together while a file is scanned


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus. `characters` and `utf8_bytes` are counts of the real text of each split."""

    name: str
    folder: Path
    vocabulary: Vocabulary
    sizes: Mapping[str, int]  # tokens per split
    characters: Mapping[str, int]
    utf8_bytes: Mapping[str, int]
    dtype: str  # 'uint16' or 'uint32', of the token files
    data_hash: str  # SHA-256 over the hashes of all token files
    source: str

    def tokens(self, split: str, at_least: int = 1) -> np.memmap:
        """The ids of a split, read-only, not yet in memory. UserError if it is missing or shorter than `at_least`."""
        if split not in self.sizes:
            raise UserError(f'corpus {self.name} has no {split}.bin, only {", ".join(self.sizes)}; '
                            f'choose one of these or a corpus that has it')
        if self.sizes[split] < at_least:
            raise UserError(f'{self.folder / split}.bin has {self.sizes[split]} tokens, but windows of {at_least} are '
                            f'asked for: use a smaller block_size or prepare a longer text')
        return np.memmap(self.folder / f'{split}.bin', dtype=self.dtype, mode='r')


def gather_windows(tokens: np.ndarray, starts: torch.Tensor | np.ndarray, length: int) -> torch.Tensor:
    """Windows `tokens[start : start + length]` for each of `starts` (int64 [B]) as int64 [B, length]."""
    starts = np.asarray(starts, dtype=np.int64)
    last = len(tokens) - length
    if last < 0:
        raise UserError(f'a split of {len(tokens)} tokens has no window of {length}: use a smaller block_size or '
                        f'prepare a longer text')
    assert starts.size == 0 or (starts.min() >= 0 and starts.max() <= last), 'a window leaves the split'
    return torch.from_numpy(tokens[starts[:, None] + np.arange(length)].astype(np.int64))  # [B, length]


def load_corpus(name: str, root: Path | str = 'data') -> Corpus:
    """Read and check a prepared corpus. UserError names the file, what is wrong and the command that cures it."""
    folder = Path(root) / name
    path = folder / 'meta.pkl'
    if not path.is_file():
        raise UserError(f'{path} does not exist: run {preparation_command(name)}')
    try:
        meta = _checked_meta(read_plain_pickle(path))
        vocabulary = Vocabulary.from_meta(meta['vocabulary'])
        recorded = (meta['vocabulary_hash'], meta['base_size'], meta['dtype'])
        if recorded != (vocabulary.hash, vocabulary.base_size, vocabulary.dtype):
            raise UserError('its vocabulary does not agree with the recorded hash, size or dtype')
        for split, size in meta['sizes'].items():
            _check_tokens(folder / f'{split}.bin', size, meta['dtype'], meta['file_hashes'][split], vocabulary)
    except UserError as error:
        raise UserError(f'{path} cannot be used: {excerpt(str(error))}; run {preparation_command(name)} again') from None
    return Corpus(name=name, folder=folder, vocabulary=vocabulary, dtype=meta['dtype'], source=meta['source'],
                  data_hash=hash_of_hashes(meta['file_hashes']),
                  **{key: dict(meta[key]) for key in ('sizes', 'characters', 'utf8_bytes')})


def hash_of_hashes(file_hashes: Mapping[str, str]) -> str:
    """One SHA-256 for a corpus: over its split names and the hashes of their files, in the order of the names."""
    listed = ''.join(f'{split} {file_hashes[split]}\n' for split in sorted(file_hashes))
    return hashlib.sha256(listed.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


# --- reading meta.pkl without trusting it ---------------------------------------------------------------------------

_PLAIN_OPCODES = frozenset((
    'PROTO FRAME STOP MARK MEMOIZE BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT '
    'SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE '
    'APPEND APPENDS SETITEM SETITEMS').split())


class _PlainUnpickler(pickle.Unpickler):
    """Builds built-in values only: whatever would import or call something is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f'it asks for {module}.{name}, and only plain values are allowed')


def read_plain_pickle(path: Path) -> object:
    """The built-in values pickled in `path`; UserError for anything else, before any of it is carried out."""
    if path.stat().st_size > _LARGEST_META:
        raise UserError(f'it is larger than {_LARGEST_META} bytes')
    try:
        with path.open('rb') as file:
            for opcode, _, _ in pickletools.genops(file):  # also keeps out opcodes that reserve memory at will
                if opcode.name not in _PLAIN_OPCODES:
                    raise pickle.UnpicklingError(f'the instruction {opcode.name} is not allowed in plain values')
            file.seek(0)
            return _PlainUnpickler(file).load()
    except OSError as error:
        raise UserError(f'it cannot be read ({error.strerror})') from None
    except Exception as error:  # a damaged pickle raises almost anything; none of it is our fault or our state
        raise UserError(f'it is damaged or not a plain dict ({error or type(error).__name__})') from None


_META_TYPES = {
    'format': str, 'version': int, 'source': str, 'vocabulary': dict, 'vocabulary_hash': str, 'base_size': int,
    'special_ids': dict, 'dtype': str, 'sizes': dict, 'characters': dict, 'utf8_bytes': dict, 'file_hashes': dict,
    'data_hash': str,
}


def _checked_meta(meta: object) -> dict:
    """`meta` with every key and type as `core/data/prepare.py` writes them, or a UserError."""
    if type(meta) is not dict or meta.get('format') != META_FORMAT:
        raise UserError('it was not written by this program')
    if meta.get('version') != META_VERSION:
        found = meta.get('version') if type(meta.get('version')) is int else 'none'
        raise UserError(f'it has format version {found}, and this program reads {META_VERSION}')
    if set(meta) != set(_META_TYPES):
        missing = ', '.join(sorted(set(_META_TYPES) - set(meta))) or 'none'
        raise UserError(f'its keys are not those of the format (missing: {missing})')
    for key, kind in _META_TYPES.items():
        if type(meta[key]) is not kind:
            raise UserError(f'{key} is of type {type(meta[key]).__name__}, not {kind.__name__}')
    splits = set(meta['sizes'])
    if not splits <= set(SPLITS) or 'train' not in splits or 'val' not in splits:
        raise UserError('sizes must name train and val, and beside them only ref')
    for key, kind in (('sizes', int), ('characters', int), ('utf8_bytes', int), ('file_hashes', str)):
        if set(meta[key]) != splits or any(type(value) is not kind for value in meta[key].values()):
            raise UserError(f'{key} must hold one {kind.__name__} for each of {", ".join(sorted(splits))}')
    if any(re.fullmatch('[0-9a-f]{64}', value) is None for value in meta['file_hashes'].values()):
        raise UserError('file_hashes must hold SHA-256 sums, 64 hexadecimal digits each')
    if any(value < 1 for key in ('sizes', 'characters', 'utf8_bytes') for value in meta[key].values()):
        raise UserError('a split without tokens is recorded')
    if meta['dtype'] not in ('uint16', 'uint32'):
        raise UserError(f"dtype is {meta['dtype']!r}, not 'uint16' or 'uint32'")
    if meta['special_ids'] != {special: meta['base_size'] + i for i, special in enumerate(SPECIAL_NAMES)}:
        raise UserError('the special ids do not follow the base vocabulary')
    if meta['data_hash'] != hash_of_hashes(meta['file_hashes']):
        raise UserError('data_hash does not agree with the hashes of the files')
    return meta


def _check_tokens(path: Path, size: int, dtype: str, recorded_hash: str, vocabulary: Vocabulary) -> None:
    """UserError unless `path` holds `size` ids of the base vocabulary and, if it is not huge, the recorded bytes."""
    if not path.is_file():
        raise UserError(f'{path.name} beside it does not exist')
    length, width = path.stat().st_size, np.dtype(dtype).itemsize
    if length != size * width:
        raise UserError(f'{path.name} beside it has {length} bytes, but {size} tokens of {dtype} need {size * width}')
    tokens = np.memmap(path, dtype=dtype, mode='r')
    largest = max(int(tokens[start:start + _SCAN_CHUNK].max()) for start in range(0, size, _SCAN_CHUNK))
    if largest >= vocabulary.base_size:
        raise UserError(f'{path.name} beside it holds token id {largest}, but text has only the ids 0 to '
                        f'{vocabulary.base_size - 1}')
    if length <= _HASHED_AT_LOAD and file_hash(path) != recorded_hash:
        raise UserError(f'{path.name} beside it is not the file that was prepared (its SHA-256 differs)')


NEEDED_ARGUMENTS = {'custom': ' my.txt', 'openwebtext': ' [--input FILE ...]'}  # where train.py does not prepare by itself


def preparation_command(name: str) -> str:
    """The command that prepares corpus `name`."""
    return f'python data/{name}/prepare.py' + NEEDED_ARGUMENTS.get(name, '')
