"""The one way to the terminal: lines that no text, encoding or lost reader can break. Standard library only.

Files keep a text unchanged. On the terminal its control characters are escaped, because they could move the cursor,
change the title or hide what follows.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

Answer = TypeVar('Answer')

# Control characters except tab and newline, lone surrogates, and format characters that reorder, hide or break a line.
_UNSAFE = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff'
                     '\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]')
_said: set[str] = set()  # by `complain_once`
LONGEST_REASON = 200  # characters of an error in one line


def escaped(text: str, sign: str | None = None) -> str:
    r"""`text`, with each character that a terminal would obey written as '\x1b', '\u202e' and so on, or as `sign`.

    Newlines and tabs stay.
    """
    return _UNSAFE.sub(lambda found: _escape(found[0]) if sign is None else sign, text)


def _escape(character: str) -> str:
    code = ord(character)
    return f'\\x{code:02x}' if code < 256 else f'\\u{code:04x}' if code < 65536 else f'\\U{code:08x}'


def encodable(text: str, encoding: str | None) -> str:
    """`text`, with the characters escaped that `encoding` lacks. None: the stream can write every character."""
    return text if encoding is None else text.encode(encoding, 'backslashreplace').decode(encoding)


class OutputLost(OSError):
    """Standard output cannot be written, as on a full disk; the message is a sentence."""


def say(text: str = '') -> None:
    """Print a line, or several, to standard output, at once.

    Raises BrokenPipeError if its reader has gone, OutputLost if it cannot be written for another reason.
    """
    with _losing_output():
        _write(sys.stdout, text)


def flush_output() -> None:
    """Write what other code has printed. Raises as `say` does."""
    with _losing_output():
        sys.stdout.flush()


@contextmanager
def _losing_output() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputLost(f'standard output cannot be written ({error.strerror or error}); give it another '
                         f'place') from None


def say_if_heard(text: str = '') -> None:
    """`say` for work that goes on without a reader. If a line cannot be written, it and all later ones are dropped.
    """
    _write_or_drop(sys.stdout, text)


def complain(text: str) -> None:
    """Print a line to standard error; never raises."""
    _write_or_drop(sys.stderr, text)


def complain_once(text: str) -> None:
    """`complain`, unless this process has already printed this line."""
    if text not in _said:
        _said.add(text)
        complain(text)


def counted(number: int, noun: str) -> str:
    """'1 sample', '2 samples': a number with its noun, whose plural ends in s."""
    return f'{number} {noun}' + ('' if number == 1 else 's')


def _write(stream: TextIO, text: str) -> None:
    stream.write(encodable(escaped(text), getattr(stream, 'encoding', None)) + '\n')
    stream.flush()


def _write_or_drop(stream: TextIO, text: str) -> None:
    try:
        _write(stream, text)
    except (OSError, ValueError):  # ValueError: closed by someone
        silence(stream)


def silence(stream: TextIO) -> None:
    """Discard what `stream` still holds, and everything that is written to it later."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        pass  # it has no descriptor


def attach_streams() -> None:
    """If the process was started without standard streams (`>&-`, a service), give it streams that lead nowhere.

    Otherwise the next file that is opened would take the descriptor, and printed lines would go into it.
    """
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w' if number else 'r', encoding='utf-8'))


# Decoration -------------------------------------------------------------------------------------------------------

failed_decorations: dict[str, BaseException] = {}  # errors that `optional` has caught and told, by what failed


def optional(what: str, call: Callable[[], Answer], tell: Callable[[str], None] = complain) -> Answer | None:
    """The answer of `call`, or None if it fails: for pictures, progress bars and other services that no run needs.

    `what` says what is missing. The first failure tells it in one line, with the error. SystemExit is caught too,
    because libraries raise it; an interrupt is not.
    """
    try:
        return call()
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        if what not in failed_decorations:
            failed_decorations[what] = error
            tell(f'{what}: {reason(error)}; all else goes on')
        return None


def reason(error: BaseException) -> str:
    """An error in one short line."""
    text = ' '.join(f'{type(error).__name__}: {error}'.split())
    return text if len(text) <= LONGEST_REASON else f'{text[:LONGEST_REASON]}...'
