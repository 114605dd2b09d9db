"""Reads corpora: meta, token files and windows. `core/data/prepare.py` prepares them.

A corpus is a folder with `train.bin`, `val.bin`, perhaps `ref.bin` (flat token ids) and `meta.pkl` (one plain dict of
built-in types). Files may come from other people's machines. So the unpickler of `meta.pkl` builds only built-in
values, and every field is checked. The token files must have the recorded length, hash and range of ids.

Shapes: B windows.
"""

import hashlib
import io
import os
import pickle
import pickletools
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from core.common.errors import UserError
from core.common.expressions import excerpt, shown
from core.data.folders import corpus_folder, preparation_command
from core.data.vocabulary import SPECIAL_NAMES, Vocabulary

META_FORMAT = 'masked-diffusion-corpus'
META_VERSION = 1
SPLITS = ('train', 'ref', 'val')
LARGEST_META = 32 * 2**20  # bytes; GPT-2's vocabulary needs less than 1 MiB, all characters of Unicode 10 MiB
_MOST_INSTRUCTIONS = 5_000_000  # of the pickle in meta.pkl; all characters of Unicode need half of them
_IN_MEMORY = 256 * 2**20  # bytes; longer token files stay on the disk, and are checked by length and largest id only
_SCAN_CHUNK = 2**24  # tokens that are scanned together
_ATTEMPTS = 5  # to read a corpus that is being replaced


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, opened once. Later changes in its folder do not change what `tokens` returns.

    `characters` and `utf8_bytes` are counts of the real text of each split.
    """

    name: str
    folder: Path
    vocabulary: Vocabulary
    sizes: Mapping[str, int]  # tokens per split
    characters: Mapping[str, int]
    utf8_bytes: Mapping[str, int]
    dtype: str  # 'uint16' or 'uint32', of the token files
    data_hash: str  # SHA-256 over the hashes of all token files
    source: str
    opened: Mapping[str, np.ndarray] = field(repr=False, compare=False)  # read-only ids of each split

    def tokens(self, split: str, at_least: int = 1) -> np.ndarray:
        """The ids of a split, read-only [tokens]. UserError if it is missing or shorter than `at_least`."""
        if split not in self.sizes:
            raise UserError(f'corpus {self.name} has no {split}.bin, only {", ".join(self.sizes)}; '
                            f'choose one of these or a corpus that has it')
        if self.sizes[split] < at_least:
            raise UserError(f'{self.folder / split}.bin has {self.sizes[split]} tokens, but windows of {at_least} are '
                            f'asked for: use a smaller block_size or prepare a longer text')
        return self.opened[split]


def gather_windows(tokens: np.ndarray, starts: torch.Tensor | np.ndarray, length: int) -> torch.Tensor:
    """Windows `tokens[start : start + length]` for each of `starts` (int64 [B]) as int64 [B, length]."""
    starts = np.asarray(starts, dtype=np.int64)
    last = len(tokens) - length
    if last < 0:
        raise UserError(f'a split of {len(tokens)} tokens has no window of {length}: use a smaller block_size or '
                        f'prepare a longer text')
    assert starts.size == 0 or (starts.min() >= 0 and starts.max() <= last), 'a window leaves the split'
    return torch.from_numpy(tokens[starts[:, None] + np.arange(length)].astype(np.int64))  # [B, length]


def load_corpus(name: str, root: Path | None = None) -> Corpus:
    """Read, check and open a prepared corpus of the folder `root` (default: `data_folder()`).

    UserError names the file, what is wrong and the command that cures it.
    """
    folder = corpus_folder(name, root)
    path = folder / 'meta.pkl'
    if not path.is_file():
        raise UserError(f'{path} does not exist: run {preparation_command(name, root)}')
    for attempt in range(_ATTEMPTS):
        stamp = _stamp(path)
        try:
            return _load(name, folder)
        except UserError as error:
            if attempt < _ATTEMPTS - 1 and _stamp(path) != stamp:
                continue  # it was replaced after meta.pkl was read and before the token files were
            raise UserError(f'{path} cannot be used: {excerpt(str(error))}; run '
                            f'{preparation_command(name, root, again=True)}') from None
    raise AssertionError('the last attempt returns or raises')


def _load(name: str, folder: Path) -> Corpus:
    meta = read_meta(folder / 'meta.pkl')
    vocabulary = Vocabulary.from_meta(meta['vocabulary'])
    recorded = (meta['vocabulary_hash'], meta['base_size'], meta['dtype'])
    if recorded != (vocabulary.hash, vocabulary.base_size, vocabulary.dtype):
        raise UserError('its vocabulary does not agree with the recorded hash, size or dtype')
    _check_counts(meta, vocabulary)
    opened = {split: _open_tokens(folder, split, meta, vocabulary.base_size) for split in meta['sizes']}
    return Corpus(name=name, folder=folder, vocabulary=vocabulary, dtype=meta['dtype'], source=meta['source'],
                  data_hash=meta['data_hash'], opened=opened,
                  **{key: dict(meta[key]) for key in ('sizes', 'characters', 'utf8_bytes')})


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What tells one version of a file from the next; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def content_name(split: str, digest: str) -> str:
    """The name of a token file before it gets its usual one (`core/data/writing.py`). digest: its SHA-256 (hex)."""
    return f'{split}-{digest[:16]}.bin'


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
    'APPEND APPENDS SETITEM SETITEMS BINPUT LONG_BINPUT').split())


class _PlainUnpickler(pickle.Unpickler):
    """Builds built-in values only. It refuses to import or call anything."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f'it asks for {module}.{name}, and only plain values are allowed')


def read_plain_pickle(path: Path) -> object:
    """The built-in values pickled in `path`. UserError for anything else, before any of it is executed."""
    try:
        with path.open('rb') as file:
            data = file.read(LARGEST_META + 1)
    except IsADirectoryError:
        raise UserError('it is a folder, and a file is meant') from None
    except OSError as error:
        raise UserError(f'it cannot be read ({error.strerror})') from None
    if len(data) > LARGEST_META:
        raise UserError(f'it is larger than {LARGEST_META} bytes')
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name not in _PLAIN_OPCODES:
                raise pickle.UnpicklingError(f'the instruction {opcode.name} is not allowed in plain values')
            if number >= _MOST_INSTRUCTIONS:
                raise pickle.UnpicklingError(f'it has more than {_MOST_INSTRUCTIONS} instructions')
            if opcode.name == 'LONG_BINPUT' and argument > number:  # this reserves memory for as many values
                raise pickle.UnpicklingError('it keeps a value at a place that no value needs')
        return _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle raises almost anything; it is no fault of this program
        raise UserError(f'it is damaged or not a plain dict ({error or type(error).__name__})') from None


def is_own_meta(path: Path) -> bool:
    """Whether `path` is a meta.pkl that this program wrote, damaged or not."""
    try:
        with path.open('rb') as file:
            return META_FORMAT.encode() in file.read(256)
    except OSError:
        return False


def read_meta(path: Path) -> dict:
    """The checked content of a meta.pkl. UserError for any other file."""
    meta = read_plain_pickle(path)
    if type(meta) is dict and 'stoi' in meta and 'itos' in meta:
        raise UserError(f"it is nanoGPT's; convert its folder {path.parent} with the command below, --nanogpt "
                        f'FOLDER in place of the text and a --name=... that is free')
    try:
        return _checked_meta(meta)
    except (RecursionError, ValueError) as error:  # values that contain themselves, numbers too long to print
        raise error if isinstance(error, UserError) else UserError('its values are absurdly large or nested') from None


_META_TYPES = {
    'format': str, 'version': int, 'source': str, 'vocabulary': dict, 'vocabulary_hash': str, 'base_size': int,
    'special_ids': dict, 'dtype': str, 'sizes': dict, 'characters': dict, 'utf8_bytes': dict, 'file_hashes': dict,
    'data_hash': str,
}


def _checked_meta(meta: object) -> dict:
    """`meta` if its keys and types are those that this program writes; otherwise UserError."""
    if type(meta) is not dict or meta.get('format') != META_FORMAT:
        raise UserError('it was not written by this program')
    if meta.get('version') != META_VERSION:
        found = shown(meta.get('version')) if type(meta.get('version')) is int else 'none'
        raise UserError(f'it has format version {found}, and this program reads {META_VERSION}')
    if set(meta) != set(_META_TYPES):
        missing = ', '.join(sorted(set(_META_TYPES) - set(meta))) or 'none'
        raise UserError(f'its keys are not those of the format (missing: {missing})')
    for key, kind in _META_TYPES.items():
        if type(meta[key]) is not kind:
            raise UserError(f'{key} is of type {type(meta[key]).__name__}, not {kind.__name__}')
    splits = set(meta['sizes'])
    if not splits <= set(SPLITS) or 'train' not in splits or 'val' not in splits:
        raise UserError('sizes must name train and val, and besides only ref')
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


def _check_counts(meta: dict, vocabulary: Vocabulary) -> None:
    """UserError if the recorded counts of tokens, characters and bytes cannot belong to one text."""
    longest = max(map(len, vocabulary.tokens))
    for split, size in meta['sizes'].items():
        characters, utf8_bytes = meta['characters'][split], meta['utf8_bytes'][split]
        most = size if vocabulary.kind == 'characters' else size * longest
        if not characters <= utf8_bytes <= 4 * characters + 3 or characters > most or \
                vocabulary.kind == 'characters' and characters != size:
            raise UserError(f'{shown(size)} tokens, {shown(characters)} characters and {shown(utf8_bytes)} bytes of '
                            f'{split} do not fit together')


def _open_tokens(folder: Path, split: str, meta: dict, base_size: int) -> np.ndarray:
    """The checked ids of a split, read-only [tokens], from the file with the recorded hash.

    That file has its usual name. If a preparation was interrupted, its name holds the hash (core/data/writing.py).
    """
    digest = meta['file_hashes'][split]
    by_hash = folder / content_name(split, digest)
    if by_hash.is_file():
        with suppress(UserError):  # a bad file of this name does no harm if the usual one is sound
            return _read_tokens(by_hash, meta['sizes'][split], meta['dtype'], digest, base_size)
    return _read_tokens(folder / f'{split}.bin', meta['sizes'][split], meta['dtype'], digest, base_size)


def _read_tokens(path: Path, size: int, dtype: str, digest: str, base_size: int) -> np.ndarray:
    """The ids in `path`. UserError unless it holds `size` ids of the base vocabulary.

    The file is opened once, for the check and for use. A file of up to 256 MiB must also have the SHA-256 `digest`. It
    is kept in memory, so that later changes of the file have no effect. A longer file is mapped; it keeps its content
    if another file takes its name.
    """
    width = np.dtype(dtype).itemsize
    try:
        if path.is_dir():
            raise UserError(f'{path.name} in its folder is a folder, and a file is meant')
        if not path.is_file():
            raise UserError(f'{path.name} in its folder does not exist')
        with path.open('rb') as file:
            length = os.fstat(file.fileno()).st_size
            if length != size * width:
                raise UserError(f'{path.name} in its folder has {length} bytes, but {shown(size)} tokens of {dtype} '
                                f'need {shown(size * width)}')
            if length <= _IN_MEMORY:
                data = file.read(length)
                sound, tokens = hashlib.sha256(data).hexdigest() == digest, np.frombuffer(data, dtype=dtype)
            else:
                sound, tokens = True, np.memmap(file, dtype=dtype, mode='r')
    except OSError as error:
        raise UserError(f'{path.name} in its folder cannot be read ({error.strerror or error})') from None
    largest = max(int(tokens[start:start + _SCAN_CHUNK].max()) for start in range(0, size, _SCAN_CHUNK))
    if largest >= base_size:
        raise UserError(f'{path.name} in its folder holds token id {largest}, but text has only the ids 0 to '
                        f'{base_size - 1}')
    if not sound:
        raise UserError(f'{path.name} in its folder is not the file that was prepared (its SHA-256 differs)')
    return tokens
