"""The words of the code: docstrings, comments and messages of every module."""

import io
import tokenize
from pathlib import Path

import pytest

from helpers.plain_words import hard_words

ROOT = Path(__file__).parent.parent
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in [
    *ROOT.glob('*.py'), *(path for folder in ('core', 'config', 'data', 'tests') for path in (ROOT / folder).rglob('*.py'))])
OWN_EXAMPLES = 'tests/test_docs.py', 'tests/test_plain_words.py', 'tests/helpers/plain_words.py'


def prose(code: str) -> list[tuple[int, str]]:
    """(line, text) of each comment and each string of a module."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return [(token.start[0], token.string) for token in tokens
            if token.type == tokenize.COMMENT or tokenize.tok_name[token.type] in ('STRING', 'FSTRING_MIDDLE')]


@pytest.mark.parametrize('module', [name for name in MODULES if name not in OWN_EXAMPLES])
def test_docstrings_comments_and_messages_are_plain(module):
    found = prose((ROOT / module).read_text(encoding='utf-8'))
    assert not [f'{line}: {word}' for line, text in found for word in hard_words(text, in_code=True)]


def test_hard_words_of_code_are_found():
    code = 'x = 1  # beside it\ndef f():\n    """What lies behind them."""\n    raise ValueError(f"{x} is said anew")\n'
    assert [line for line, text in prose(code) if hard_words(text, in_code=True)] == [1, 3, 4]
    assert not hard_words('the ids after it', in_code=True) and not prose('beside = behind + anew\n')
