"""Converts a folder of nanoGPT (train.bin and val.bin of uint16, perhaps meta.pkl) to a corpus of this program."""

from pathlib import Path

import numpy as np

from core.common.errors import UserError
from core.common.expressions import excerpt
from core.data.corpus import is_own_meta, read_plain_pickle
from core.data.folders import Say
from core.data.gpt2_bpe import gpt2_vocabulary
from core.data.vocabulary import Vocabulary
from core.data.writing import new_corpus

_CHUNK = 2**22  # tokens converted at a time
_SPLITS = ('train', 'val')


def convert_nanogpt(source: Path, folder: Path, root: Path, overwrite: bool, say: Say) -> None:
    """Write `folder` with the token files of `source` and their vocabulary: meta.pkl's characters, else GPT-2's BPE.

    The unpickler of meta.pkl builds only plain values. UserError if `source` is not such a folder, and for ids outside
    the vocabulary.
    """
    files = {split: source / f'{split}.bin' for split in _SPLITS}
    try:
        missing = [path.name for path in files.values() if not path.is_file()]
        if missing:
            raise UserError(f'{source} has no {" and no ".join(missing)}: give the folder that a prepare.py of nanoGPT '
                            f'has filled')
        if source.resolve() == folder.resolve():
            raise UserError(f'{source} would be replaced by what is made from it: choose another --name=...')
        odd = [path.name for path in files.values() if path.stat().st_size % 2 or not path.stat().st_size]
    except OSError as error:
        raise UserError(f'{excerpt(str(source))} cannot be read ({error.strerror}): give a folder of nanoGPT') from None
    if odd:
        raise UserError(f'{source / odd[0]} is no file of 16-bit tokens (an odd number of bytes, or none): prepare it '
                        f'again with nanoGPT')
    vocabulary = _vocabulary(source / 'meta.pkl', root, say)
    bytes_of, characters_of = _lengths(vocabulary)
    with new_corpus(folder, vocabulary, _SPLITS, f'{source.name} of nanoGPT', overwrite) as parts:
        for split, path in files.items():
            with path.open('rb') as file:
                while data := file.read(2 * _CHUNK):
                    ids = np.frombuffer(data, dtype='<u2')
                    if ids.max() >= vocabulary.base_size:
                        raise UserError(f'{path} holds token id {ids.max()}, but its vocabulary has only 0 to '
                                        f'{vocabulary.base_size - 1}: is it of another corpus?')
                    parts[split].add_counted(ids.astype(vocabulary.dtype), int(characters_of[ids].sum()),
                                             int(bytes_of[ids].sum()))


def _vocabulary(path: Path, root: Path, say: Say) -> Vocabulary:
    if not path.exists():
        say(f"there is no {path}, so the tokens are taken for GPT-2's")
        return gpt2_vocabulary(root / 'openwebtext', say)
    if is_own_meta(path):
        raise UserError(f'{path.parent} is a corpus of this program already: use it with --dataset={path.parent.name}')
    return read_nanogpt_meta(path)


def read_nanogpt_meta(path: Path) -> Vocabulary:
    """The characters of nanoGPT's meta.pkl, in the order of their ids. UserError for any other file."""
    try:
        meta = read_plain_pickle(path)
        itos = meta.get('itos') if type(meta) is dict else None
        if type(itos) is not dict or set(itos) != set(range(len(itos))):
            raise UserError('it needs a dict itos with a character for each id from 0 on')
        return Vocabulary('characters', tuple(itos[number] for number in range(len(itos))))
    except (UserError, RecursionError, TypeError) as error:
        raise UserError(f"{path} is no meta.pkl of nanoGPT's character corpora: {excerpt(str(error))}") from None


def _lengths(vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of UTF-8 bytes and of characters of each base token, int64 [V0] each; 0 for a document's end.

    A character that several tokens share counts for the token that has its first byte.
    """
    texts = [token if isinstance(token, bytes) else token.encode('utf-8', 'surrogatepass')
             for token in vocabulary.tokens]
    if vocabulary.document_end_id is not None:
        texts[vocabulary.document_end_id] = b''
    return (np.array([len(text) for text in texts], dtype=np.int64),
            np.array([sum(byte & 0xc0 != 0x80 for byte in text) for text in texts], dtype=np.int64))
