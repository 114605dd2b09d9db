"""Words that make a sentence hard to read, and where they occur in a text."""

import re

STANDS = r'stands? (in|beside|there|between|below|above|before|behind|at|next)'
HARD_WORDS = re.compile(rf'\b(anew|beside|(is|are|was|were) said|{STANDS}|'
                        r'behind (the|each|every) (first|last|document|token|step|word))\b', re.IGNORECASE)
HARD_WORDS_OF_CODE = re.compile(rf'\b(anew|beside|(is|are|was|were) said|{STANDS}|behind)\b', re.IGNORECASE)


def hard_words(text: str, in_code: bool = False) -> list[str]:
    """'line: word' of every hard word in `text`. In code also `behind`, which a page may use for an idea."""
    words = HARD_WORDS_OF_CODE if in_code else HARD_WORDS
    return [f'{number}: {found[0]}' for number, line in enumerate(text.splitlines(), 1)
            for found in words.finditer(line)]
