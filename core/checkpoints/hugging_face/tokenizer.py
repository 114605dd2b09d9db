"""Describes a corpus's vocabulary as tokenizer.json, the file of the tokenizers library, without that library."""

from core.data.vocabulary import SPECIAL_NAMES, Vocabulary

NAMES = tuple(f'[{name.upper()}]' for name in SPECIAL_NAMES)  # [MASK], [WRONG], [PAD], [CLS]
_EVERY_CHARACTER = {'type': 'Split', 'pattern': {'Regex': r'[\s\S]'}, 'behavior': 'Isolated', 'invert': False}


def tokenizer_description(vocabulary: Vocabulary) -> dict[str, object]:
    """The content of tokenizer.json: the same ids for the same text. A character that a vocabulary of characters lacks
    becomes [WRONG]."""
    added = [{'id': vocabulary.base_size + number, 'content': name, 'special': True}
             for number, name in enumerate(NAMES)]
    if vocabulary.kind == 'characters':
        ids = {token: number for number, token in enumerate(vocabulary.tokens)}
        model = {'type': 'WordLevel', 'vocab': ids | {one['content']: one['id'] for one in added},
                 'unk_token': NAMES[1]}
        before, after = _EVERY_CHARACTER, {'type': 'Fuse'}
    else:
        if vocabulary.document_end_id is not None:
            added.insert(0, {'id': vocabulary.document_end_id, 'special': False,
                             'content': vocabulary.tokens[-1].decode()})
        learnt = vocabulary.tokens[:vocabulary.document_end_id]
        letters = byte_letters()
        ids = {''.join(letters[byte] for byte in token): number for number, token in enumerate(learnt)}
        model = {'type': 'BPE', 'vocab': ids, 'ignore_merges': True,
                 'merges': [[''.join(letters[byte] for byte in part) for part in pair] for pair in merges_of(learnt)]}
        byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': False}
        cut = {'type': 'Split', 'pattern': {'Regex': vocabulary.pattern}, 'behavior': 'Isolated', 'invert': False}
        before, after = {'type': 'Sequence', 'pretokenizers': [cut, byte_level]}, byte_level
    usual = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
    return {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [one | usual for one in added],
            'normalizer': None, 'pre_tokenizer': before, 'post_processor': None, 'decoder': after, 'model': model}


def tokenizer_config(block_size: int) -> dict[str, object]:
    """The content of tokenizer_config.json."""
    mask, wrong, pad, cls = NAMES
    return {'tokenizer_class': 'PreTrainedTokenizerFast', 'mask_token': mask, 'unk_token': wrong, 'pad_token': pad,
            'cls_token': cls, 'model_max_length': block_size, 'clean_up_tokenization_spaces': False}


def byte_letters() -> list[str]:
    """The letter that byte-level BPE files (Radford et al. 2019) write for each byte: the byte's own letter if it is
    visible, otherwise one from U+0100 on."""
    seen = {*range(ord('!'), ord('~') + 1), *range(0xa1, 0xac + 1), *range(0xae, 0xff + 1)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(byte) if byte in seen else chr(256 + hidden.index(byte)) for byte in range(256)]


def merges_of(tokens: tuple[bytes, ...]) -> list[tuple[bytes, bytes]]:
    """The two parts that each token of several bytes was merged from: what is left after all earlier merges."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    found = []
    for rank, token in enumerate(tokens):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            first = min(range(len(parts) - 1), key=lambda place: ranks.get(parts[place] + parts[place + 1], rank))
            parts[first:first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
    return found
