"""What generation starts from: the tokens, and the protected positions of the prompt.

Letters: B rows (samples), L sequence length.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from core.common.errors import UserError
from core.common.randomness import Purpose, RowRandom
from core.data.vocabulary import Vocabulary
from core.pretrained.vocabulary import AnyVocabulary


class Layout(NamedTuple):
    """tokens int64 [B, L], the mask token where text is to be written; protected bool [B, L], never changed."""

    tokens: Tensor
    protected: Tensor


def lay_out_prompt(prompt: Sequence[int], length: int, mask_token_id: int, generator: RowRandom,
                   placement: Literal['prefix', 'random'] = 'prefix') -> Layout:
    """`prompt` at the start of each row of `length` tokens, or at an offset that each row draws for itself."""
    if len(prompt) > length:
        raise UserError(f'start_text has {len(prompt)} tokens, but the sequence holds {length}; shorten it or raise '
                        f'sequence_length')
    rows, device = len(generator.rows), generator.rows.device
    offset = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    if placement == 'random':
        offset = (generator.uniform(Purpose.PLACEMENT, 1) * (length - len(prompt) + 1)).long()  # [B, 1]
    tokens = torch.full((rows, length), mask_token_id, dtype=torch.int64, device=device)
    columns = offset + torch.arange(len(prompt), device=device)  # [B, prompt]
    tokens = tokens.scatter(1, columns, torch.tensor(list(prompt), dtype=torch.int64, device=device).expand(rows, -1))
    return Layout(tokens, tokens != mask_token_id)


def lay_out_infill(pieces: Sequence[Sequence[int] | int], length: int, mask_token_id: int,
                   generator: RowRandom) -> Layout:
    """Rows that hold `pieces` in order: a list of tokens is protected, a number is that many masked positions.

    What `length` has beyond the pieces is masked too.
    """
    row: list[int] = []
    for piece in pieces:
        row.extend([mask_token_id] * piece if isinstance(piece, int) else piece)
    if len(row) > length:
        raise UserError(f'infill_text has {len(row)} tokens, but the sequence holds {length}; shorten it or raise '
                        f'sequence_length')
    row.extend([mask_token_id] * (length - len(row)))
    tokens = torch.tensor(row, dtype=torch.int64, device=generator.rows.device).expand(len(generator.rows), -1).clone()
    return Layout(tokens, tokens != mask_token_id)


def start_token(vocabulary: AnyVocabulary) -> int:
    """What a causal model reads before an empty prompt: a line break, or the first token if the vocabulary has none.
    Vocabularies of pretrained models, which no causal model here uses, give their first token."""
    if not isinstance(vocabulary, Vocabulary):
        return 0
    return vocabulary.encode('\n')[0] if vocabulary.kind == 'bpe' or '\n' in vocabulary.tokens else 0


def split_infill(text: str, infill_char: str) -> list[str | int]:
    """The text's known parts, and the number of infill characters between them: 'a__b' gives ['a', 2, 'b']."""
    pieces: list[str | int] = []
    for index, part in enumerate(text.split(infill_char)):
        if index:
            pieces = [*pieces[:-1], pieces[-1] + 1] if pieces and isinstance(pieces[-1], int) else [*pieces, 1]
        if part:
            pieces.append(part)
    return pieces
