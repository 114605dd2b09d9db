"""Writes a corpus folder as a stream. At every instant it holds either the earlier corpus or the complete new one.

The token files are written under temporary names. Then they get names that hold their SHA-256
(`train-<16 digits>.bin`). meta.pkl holds the hashes. Its rename replaces the earlier corpus by the new one. After that
the token files get their usual names, one by one. Until then readers find them by their hash.
"""

import hashlib
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import Timeout

from core.common.errors import UserError
from core.common.expressions import excerpt
from core.common.files import NewFile, write_whole
from core.common.locks import PATIENCE, held
from core.data.corpus import META_FORMAT, META_VERSION, SPLITS, content_name, hash_of_hashes, is_own_meta, read_meta
from core.data.folders import script_of
from core.data.vocabulary import SPECIAL_NAMES, Vocabulary

LOCK_NAME = 'prepare.lock'


@dataclass
class Part:
    """One split while it grows."""

    written: NewFile
    sha256: Any = field(default_factory=hashlib.sha256)
    tokens: int = 0
    characters: int = 0
    utf8_bytes: int = 0

    def add(self, ids: np.ndarray, text: str) -> None:
        """Append `ids` (int [tokens], already of the file's dtype), which encode `text`."""
        self.add_counted(ids, len(text), len(text.encode('utf-8')))

    def add_counted(self, ids: np.ndarray, characters: int, utf8_bytes: int) -> None:
        """Append `ids` (int [tokens], already of the file's dtype), whose text has that many characters and bytes."""
        data = ids.tobytes()
        self.written.file.write(data)
        self.sha256.update(data)
        self.tokens += len(ids)
        self.characters += characters
        self.utf8_bytes += utf8_bytes


def write_corpus(folder: Path, vocabulary: Vocabulary, splits: Mapping[str, str], source: str,
                 overwrite: bool = False) -> None:
    """Encode the texts of `splits` and write the corpus folder as `new_corpus` does."""
    with new_corpus(folder, vocabulary, list(splits), source, overwrite) as parts:
        for split, text in splits.items():
            parts[split].add(vocabulary.encode_array(text).astype(vocabulary.dtype), text)


@contextmanager
def new_corpus(folder: Path, vocabulary: Vocabulary, splits: Sequence[str], source: str,
               overwrite: bool = False) -> Iterator[dict[str, Part]]:
    """Parts to fill inside the `with` block. Its end makes them the corpus in `folder`, whole or not at all.

    If anything fails, an earlier corpus stays and no temporary file is left. UserError if a split stays empty or the
    folder cannot be written. Without `overwrite` also if the folder holds another corpus or files of others.
    """
    require_replaceable(folder, overwrite)
    made = not folder.exists()
    parts: dict[str, Part] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split in splits:
            parts[split] = Part(NewFile(folder / f'{split}-new.bin'))
        yield parts
        for part in parts.values():
            part.written.finish(None)
        empty = [split for split, part in parts.items() if not part.tokens]
        if empty:
            raise UserError(f'the text of {source} is too short: nothing is left for {", ".join(empty)}; '
                            f'give at least a few thousand characters')
        with held(folder / LOCK_NAME, _busy(folder)):
            _replace(folder, vocabulary, parts, source, overwrite)
    except OSError as error:
        raise UserError(f'{folder} cannot be written ({error.strerror or error}): free some space, or choose a folder '
                        f'that can be written with --data_dir=...; an earlier corpus there is unchanged') from None
    finally:
        for part in parts.values():
            part.written.discard()
        if made:
            with suppress(OSError):
                folder.rmdir()  # works only if the folder is still empty


def require_replaceable(folder: Path, overwrite: bool, hashes: tuple[str, str] | None = None) -> None:
    """UserError if `folder` holds something that only `overwrite` may replace: files of others, or another corpus.

    hashes: of the new corpus's vocabulary and data. While they are unknown (None), only files of others count.
    """
    if overwrite:
        return
    way = 'add --overwrite' if folder.name != 'custom' and script_of(folder.name).is_file() else \
        'give the new one a name of its own with --name=..., or add --overwrite'
    if not is_own_meta(folder / 'meta.pkl'):
        strangers = [name for name in (*(f'{split}.bin' for split in SPLITS), 'meta.pkl') if (folder / name).exists()]
        if strangers:
            raise UserError(f'{folder} holds {", ".join(strangers)} without a meta.pkl of this program: nothing is '
                            f'replaced; {way}')
    elif hashes is not None:
        try:
            earlier = read_meta(folder / 'meta.pkl')
        except UserError:
            raise UserError(f'{folder} holds a corpus whose meta.pkl is damaged: nothing is replaced; {way}') from None
        if (earlier['vocabulary_hash'], earlier['data_hash']) != hashes:
            raise UserError(f'{folder} holds another corpus (of {excerpt(earlier["source"])}, '
                            f'{earlier["sizes"]["train"]:,} tokens to train on): nothing is replaced; {way}')


def _replace(folder: Path, vocabulary: Vocabulary, parts: Mapping[str, Part], source: str, overwrite: bool) -> None:
    """Make the written `parts` the corpus of `folder`. The decisive step is the rename of meta.pkl."""
    hashes = {split: part.sha256.hexdigest() for split, part in parts.items()}
    require_replaceable(folder, overwrite, (vocabulary.hash, hash_of_hashes(hashes)))
    earlier, meta = _earlier_hashes(folder), make_meta(vocabulary, source, parts)
    named = {split: folder / content_name(split, digest) for split, digest in hashes.items()}
    try:
        for split, part in parts.items():
            part.written.target = named[split]
            part.written.settle()
        write_whole(folder / 'meta.pkl', meta)
    except BaseException:
        replaced = (folder / 'meta.pkl').is_file() and (folder / 'meta.pkl').read_bytes() == meta
        for split, path in named.items():
            if not replaced and earlier.get(split) != hashes[split]:  # the earlier corpus may use such a name
                with suppress(OSError):
                    path.unlink(missing_ok=True)
        raise
    for split, path in named.items():
        usual = folder / f'{split}.bin'
        if not usual.is_symlink() and (usual.is_file() or not usual.exists()):
            with suppress(OSError):  # the corpus is complete under the other name
                os.replace(path, usual)
    for split, digest in earlier.items():
        if hashes.get(split) != digest:
            with suppress(OSError):
                (folder / content_name(split, digest)).unlink(missing_ok=True)


def _earlier_hashes(folder: Path) -> dict[str, str]:
    """The hashes of the corpus in `folder`; empty if there is none or its meta.pkl is unreadable."""
    try:
        return read_meta(folder / 'meta.pkl')['file_hashes']
    except UserError:
        return {}


def _busy(folder: Path) -> Callable[[Exception], None]:
    """What to do if the lock of a preparation cannot be taken. If another process holds it, refuse. If the file system
    has no locks, go on: two preparations would have to replace the corpus in the same moment to disturb each other."""
    def refuse(error: Exception) -> None:
        if isinstance(error, Timeout):
            raise UserError(f'{folder} is being prepared by another process for {PATIENCE:.0f} seconds: wait until it '
                            f'has ended, then try again') from None
    return refuse


def make_meta(vocabulary: Vocabulary, source: str, parts: Mapping[str, Part]) -> bytes:
    """The bytes of `meta.pkl`."""
    hashes = {split: part.sha256.hexdigest() for split, part in parts.items()}
    return pickle.dumps({
        'format': META_FORMAT, 'version': META_VERSION, 'source': source,
        'vocabulary': vocabulary.to_meta(), 'vocabulary_hash': vocabulary.hash, 'base_size': vocabulary.base_size,
        'special_ids': {name: vocabulary.base_size + i for i, name in enumerate(SPECIAL_NAMES)},
        'dtype': vocabulary.dtype,
        'sizes': {split: part.tokens for split, part in parts.items()},
        'characters': {split: part.characters for split, part in parts.items()},
        'utf8_bytes': {split: part.utf8_bytes for split, part in parts.items()},
        'file_hashes': hashes, 'data_hash': hash_of_hashes(hashes),
    }, protocol=4)
