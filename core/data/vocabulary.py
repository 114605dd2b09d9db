"""The vocabulary of a corpus: base tokens, the special ids after them, and the conversion of text to ids and back.

Shapes: V0 base vocabulary.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import numpy as np
import regex
import tiktoken

from core.common.errors import UserError
from core.common.expressions import excerpt
from core.common.printing import counted

SPECIAL_NAMES = ('mask', 'wrong', 'pad', 'cls')  # their ids follow the base vocabulary in this order
SPECIAL_SIGNS = ('_', '#', '~', '^')  # how `decode` shows them
LONGEST_PATTERN = 10_000  # characters
LONGEST_RUN = 2**16  # characters of white space in a row; a million overflow the stack of tiktoken's matcher
PIECES_SECONDS = 600  # most time for cutting a text with longer runs into pieces
DOCUMENT_END = '<|endoftext|>'  # the last base token of GPT-2's vocabulary
# A new vocabulary must encode and decode this text without loss: words, numbers, signs, white space of all kinds.
_TRIAL = "It's  12345 words,\n\n\tand \u00e9\u6f22\U0001f600\u0301 signs --\r\n\u3000\x00\x1c\x85 ?! \n"


@dataclass(frozen=True)
class Vocabulary:
    """The base tokens of a corpus and the special ids after them. Data, model, sampler and printer share this object.

    tokens: of kind 'characters' the characters; of kind 'bpe' the bytes of each byte-level BPE token, in the order of
    the merges. pattern: of a BPE, the regular expression that cuts text into pieces before merging. A BPE may end with
    the token DOCUMENT_END. Preparation puts it after documents; no text encodes to it.
    """

    kind: str
    tokens: tuple[str, ...] | tuple[bytes, ...]
    pattern: str = ''

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise UserError(f'the vocabulary is not usable: {problem}')

    def _problem(self) -> str:
        """What is wrong with the fields, or an empty string."""
        if self.kind not in ('characters', 'bpe'):
            return f"its kind is {self.kind!r}, not 'characters' or 'bpe'"
        element = str if self.kind == 'characters' else bytes
        if not self.tokens or any(type(token) is not element or not token for token in self.tokens):
            return f'its tokens must be non-empty {element.__name__} values'
        if len(set(self.tokens)) != len(self.tokens):
            return 'a token appears twice'
        if self.kind == 'characters':
            return 'a token has more than one character' if any(len(token) != 1 for token in self.tokens) else ''
        if not {bytes([value]) for value in range(256)}.issubset(self.tokens):
            return 'a byte-level BPE needs all 256 single bytes'
        if len(self.pattern) > LONGEST_PATTERN:
            return f'its pattern has {len(self.pattern)} characters, and at most {LONGEST_PATTERN} are taken'
        try:
            self._encoding
            lossless = self.decode(self.encode(_TRIAL)) == _TRIAL
        except UserError as error:
            return str(error)
        except BaseException as error:  # tiktoken raises its own exceptions for a pattern that does not compile
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            return f'tiktoken refuses it ({error})'
        return '' if lossless else 'its pattern leaves out parts of a text'

    @property
    def base_size(self) -> int:
        """V0, the number of tokens that text can consist of."""
        return len(self.tokens)

    @property
    def size(self) -> int:
        return self.base_size + len(SPECIAL_NAMES)

    @property
    def dtype(self) -> str:
        """The smallest type of the token files that holds every id, special ones included."""
        return 'uint16' if self.size <= 2**16 else 'uint32'

    @property
    def mask_token_id(self) -> int:
        return self.base_size

    @property
    def wrong_token_id(self) -> int:
        return self.base_size + 1

    @property
    def pad_token_id(self) -> int:
        return self.base_size + 2

    @property
    def cls_token_id(self) -> int:
        return self.base_size + 3

    @property
    def document_end_id(self) -> int | None:
        """The base token between documents; None if the vocabulary has none."""
        return self.base_size - 1 if self.tokens[-1] == DOCUMENT_END.encode() else None

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of everything that decides which id means what."""
        tokens = [token.encode('utf-8', 'surrogatepass').hex() if isinstance(token, str) else token.hex()
                  for token in self.tokens]
        return hashlib.sha256(json.dumps([self.kind, self.pattern, tokens, SPECIAL_NAMES]).encode()).hexdigest()

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        learnt = self.tokens[:self.document_end_id]
        return tiktoken.Encoding('corpus', pat_str=self.pattern, special_tokens={},
                                 mergeable_ranks={token: rank for rank, token in enumerate(learnt)})

    @cached_property
    def _sorted_characters(self) -> tuple[np.ndarray, np.ndarray]:
        codes = np.array([ord(character) for character in self.tokens], dtype=np.uint32)
        order = np.argsort(codes)
        return codes[order], order

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text` as int64 [tokens]. UserError if the vocabulary lacks a character."""
        if self.kind == 'bpe':
            return np.array(self._encode_bpe(text), dtype=np.int64)
        codes, order = self._sorted_characters
        wanted = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype=np.uint32)
        places = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
        if (codes[places] != wanted).any():
            strangers = sorted({chr(code) for code in wanted[codes[places] != wanted]})
            shown = ' '.join(map(repr, strangers[:10])) + (' ...' if len(strangers) > 10 else '')
            raise UserError(f'the text has {counted(len(strangers), "kind")} of character outside the corpus vocabulary of '
                            f'{self.base_size}: {shown}; leave them out or use a corpus that has them')
        return order[places].astype(np.int64)

    def _encode_bpe(self, text: str) -> list[int]:
        """The ids that tiktoken gives. If its matcher would overflow, this cuts the pieces and tiktoken merges them."""
        if len(text) <= LONGEST_RUN or re.search(rf'(?<!\s)\s{{{LONGEST_RUN}}}', text) is None:
            try:
                return self._encoding.encode_ordinary(text)
            except BaseException as error:
                if not is_panic(error):
                    raise
                self._refuse_text(text, error)
        pieces = regex.finditer(self.pattern, text, timeout=PIECES_SECONDS)
        try:
            return [token for piece in pieces for token in self._encoding._encode_single_piece(piece.group())]
        except TimeoutError as error:
            self._refuse_text(text, error)

    def _refuse_text(self, text: str, error: BaseException) -> NoReturn:
        raise UserError(f'a text of {len(text)} characters cannot be cut by the pattern of this vocabulary '
                        f'({excerpt(str(error)) or type(error).__name__}): take it in smaller parts, or use '
                        f'another vocabulary') from None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; UserError names the characters outside the vocabulary."""
        return self.encode_array(text).tolist()

    def decode(self, ids: Sequence[int], mask: str = SPECIAL_SIGNS[0]) -> str:
        """The text of `ids`. The mask token becomes `mask`, each other special id one sign.

        Bytes that are no complete UTF-8 character become U+FFFD. UserError for an id outside the vocabulary.
        """
        ids = [int(token) for token in ids]
        outside = [token for token in ids if not 0 <= token < self.size]
        if outside:
            raise UserError(f'token id {outside[0]} is outside the vocabulary of {self.size} tokens '
                            f'(0 to {self.size - 1}); check that text and model come from one corpus')
        signs = (mask, *SPECIAL_SIGNS[1:])
        if self.kind == 'characters':
            return ''.join(self.tokens[token] if token < self.base_size else signs[token - self.base_size]
                           for token in ids)
        return b''.join(self.tokens[token] if token < self.base_size else signs[token - self.base_size].encode()
                        for token in ids).decode('utf-8', 'replace')

    def to_meta(self) -> dict[str, object]:
        """Built-in types only; `from_meta` gives the same vocabulary back."""
        return {'kind': self.kind, 'tokens': list(self.tokens), 'pattern': self.pattern}

    @classmethod
    def from_meta(cls, meta: object) -> 'Vocabulary':
        """The vocabulary that `to_meta` described. UserError if `meta` does not have that form."""
        if not isinstance(meta, dict) or set(meta) != {'kind', 'tokens', 'pattern'}:
            raise UserError('the vocabulary is not usable: it needs exactly the keys kind, tokens and pattern')
        if type(meta['kind']) is not str or type(meta['tokens']) is not list or type(meta['pattern']) is not str:
            raise UserError('the vocabulary is not usable: kind and pattern must be text and tokens a list')
        return cls(kind=meta['kind'], tokens=tuple(meta['tokens']), pattern=meta['pattern'])


def is_panic(error: BaseException) -> bool:
    """Whether a Rust library panicked. Such an error is not an `Exception`, and its class cannot be imported."""
    return type(error).__name__ == 'PanicException'
