"""The tokenizer of a pretrained model as a vocabulary: text to ids and back, and which ids a text may consist of.

Unlike in a corpus's `Vocabulary`, special ids can be anywhere among the others.

Letters: V vocabulary of the model.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from core.common.errors import UserError
from core.common.expressions import excerpt
from core.common.printing import counted
from core.data.vocabulary import SPECIAL_SIGNS, Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKUP = re.compile(r'<.+>|\[.+\]', re.DOTALL)  # tokens that are no text in a vocabulary of single characters


@dataclass(frozen=True)
class TokenizerVocabulary:
    """What sampling and evaluation need of a vocabulary.

    tokenizer: of the library. size: V, the model's. special_ids: never part of a text and never drawn. mask_token_id:
    one of them. characters: the id of each character, if every token is a character; otherwise None, and the tokenizer
    encodes text.
    """

    tokenizer: 'PreTrainedTokenizerBase'
    size: int
    special_ids: frozenset[int]
    mask_token_id: int
    characters: dict[str, int] | None

    @classmethod
    def of(cls, tokenizer: 'PreTrainedTokenizerBase', size: int, mask_token_id: int) -> 'TokenizerVocabulary':
        """The vocabulary of a tokenizer for a model of `size` ids."""
        names = {token: name for name, token in tokenizer.get_vocab().items() if token < size}
        special = {*tokenizer.all_special_ids, mask_token_id, *(set(range(size)) - set(names))}
        special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        text = {token: name for token, name in names.items() if token not in special}
        if text and all(len(name) == 1 or _MARKUP.fullmatch(name) for name in text.values()):
            special |= {token for token, name in text.items() if len(name) > 1}
            characters = {name: token for token, name in text.items() if len(name) == 1}
        else:
            characters = None
        if len(special) >= size:
            raise UserError(f'the tokenizer has no token that a text could consist of among the {size} ids of the '
                            f'model; is it of another model?')
        return cls(tokenizer, size, frozenset(token for token in special if token < size), mask_token_id, characters)

    @property
    def kind(self) -> str:
        """'characters' if every token is a character, otherwise 'tokens'."""
        return 'characters' if self.characters is not None else 'tokens'

    @property
    def base_size(self) -> int:
        """How many ids a text may consist of."""
        return self.size - len(self.special_ids)

    @cached_property
    def allowed(self) -> Tensor:
        """bool [V]: the ids that a text may consist of."""
        allowed = torch.ones(self.size, dtype=torch.bool)
        allowed[sorted(self.special_ids)] = False
        return allowed

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of everything that decides which id means what."""
        named = sorted(self.tokenizer.get_vocab().items(), key=lambda pair: pair[::-1])
        return hashlib.sha256(json.dumps([self.size, sorted(self.special_ids), self.mask_token_id, named]).encode()
                              ).hexdigest()

    @property
    def has_line_breaks(self) -> bool:
        """Whether a text may have several lines."""
        return self.characters is None or '\n' in self.characters

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text` as int64 [tokens]. UserError as for `encode`."""
        return np.array(self.encode(text), dtype=np.int64)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. UserError names parts that the vocabulary lacks, or a special token in the text."""
        found = next((name for name in self._special_names if name in text), None)
        if found is not None:
            raise UserError(f'the text holds {found!r}, a special token of the model, which no text may hold; leave it '
                            f'out, and mark positions to fill with infill_char in infill_text')
        if self.characters is not None:
            strangers = sorted(set(text) - set(self.characters))
            if strangers:
                raise UserError(f'the text has {counted(len(strangers), "kind")} of character that the model does not know: '
                                f'{" ".join(map(repr, strangers[:10]))}{" ..." if len(strangers) > 10 else ""}; it '
                                f'knows {excerpt("".join(self.characters))}')
            return [self.characters[character] for character in text]
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)['input_ids']
        unknown = [place for place, token in enumerate(ids) if token in self.special_ids or token >= self.size]
        if unknown:
            raise UserError(f'the tokenizer has no tokens for {self._words(text, unknown)}; write them in another way '
                            f'or leave them out')
        return ids

    @cached_property
    def _special_names(self) -> list[str]:
        names = {added.content for token, added in self.tokenizer.added_tokens_decoder.items()
                 if token in self.special_ids}
        return sorted(name for name in names | set(self.tokenizer.all_special_tokens) if len(name) > 1)

    def _words(self, text: str, places: Sequence[int]) -> str:
        """The parts of the text at these places of its tokens; their number if the tokenizer does not tell them."""
        if not self.tokenizer.is_fast:
            return f'{len(places)} parts of the text'
        spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        words = list(dict.fromkeys(text[slice(*spans['offset_mapping'][place])] for place in places))
        return ', '.join(excerpt(repr(word)) for word in words[:5]) + (' ...' if len(words) > 5 else '')

    def decode(self, ids: Sequence[int], mask: str = SPECIAL_SIGNS[0]) -> str:
        """The text of `ids`. The mask token becomes `mask`; other special tokens keep their names."""
        if self.characters is not None:
            return ''.join(mask if token == self.mask_token_id else self._names[token] for token in map(int, ids))
        text = self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text.replace(self.tokenizer.convert_ids_to_tokens(self.mask_token_id), mask)

    @cached_property
    def _names(self) -> dict[int, str]:
        return {token: name for name, token in self.tokenizer.get_vocab().items()}


AnyVocabulary = Vocabulary | TokenizerVocabulary
