"""Problems that the user can cure, and how a script reports them. Standard library only; any module may import it."""

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from core.common.printing import OutputLost, attach_streams, complain, flush_output, silence


class UserError(ValueError):
    """A problem the user can cure. The message is one clear sentence with the value, the limit and the cure."""


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one `UserError` that lists all `problems`, one per line. Without problems do nothing."""
    if problems:
        raise UserError('\n'.join(problems))


# Messages of allocators without an error class: torch's on CPU and GPU, cuBLAS's and C++'s; and of sizes over 64 bits.
_NO_MEMORY = ("can't allocate memory", 'not enough memory', 'out of memory', 'std::bad_alloc', 'ALLOC_FAILED',
              'Storage size calculation overflowed', 'integer multiplication overflow', 'Cannot allocate memory',
              'array is too big', 'Maximum allowed dimension exceeded', 'nvalid buffer size')


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, from any library, says that there is not enough memory."""
    said = isinstance(error, (RuntimeError, OSError, ValueError)) and not isinstance(error, UserError)
    return isinstance(error, MemoryError) or said and any(words in str(error) for words in _NO_MEMORY)


def out_of_memory(error: BaseException, lower: Sequence[str]) -> str:
    """The message when memory ran out. `lower` names options; lower values of them need less memory."""
    asked = re.search(r'allocate ([\d.]+ ?[kKMGTPE]?i?[Bb]\w*)', str(error))
    amount = f', as {asked[1]} were asked for at once' if asked else ''
    *others, last = lower or ('the amount of data',)
    return f'memory ran out{amount}; lower {", ".join(others)}{" or " if others else ""}{last}'


def run_script(main: Callable[[list[str]], None], lower: Sequence[str] = ()) -> NoReturn:
    """Call `main` with the command line and end the process.

    A `UserError` becomes plain words and exit code 2. So does memory that ran out: `lower` names options, and lower
    values of them need less memory. The exit code is 130 for an interrupt, and 141 if the reader of the output has gone
    (`| head`).

    Slow imports belong inside `main`, so that an interrupt during them ends quietly too. All ranks that torchrun starts
    meet the same problem, and the first of each machine reports it.
    """
    attach_streams()
    interrupted = _note_interrupts()
    try:
        main(sys.argv[1:])
        flush_output()
    except KeyboardInterrupt:
        _stop()
    except UserError as error:
        _refuse(str(error).split('\n'))
    except BrokenPipeError:
        silence(sys.stdout)  # what is left in the buffer has no reader either
        sys.exit(141)
    except OutputLost as error:
        silence(sys.stdout)
        _refuse([str(error)])
    except Exception as error:
        if interrupted:  # what was interrupted, such as an import, may fail in its own way
            _stop()
        if not is_out_of_memory(error):
            raise
        _refuse([out_of_memory(error, lower)])
    sys.exit(0)


def _note_interrupts() -> list[int]:
    """A list that is empty until Ctrl-C. Ctrl-C still raises KeyboardInterrupt."""
    noted: list[int] = []

    def handler(number: int, frame: object) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, handler)
    return noted


def _stop() -> NoReturn:
    complain('stopped')
    sys.exit(130)


def _refuse(problems: Sequence[str]) -> NoReturn:
    if os.environ.get('LOCAL_RANK', '0') == '0':
        for problem in problems:
            complain(f'error: {problem}')
    sys.exit(2)
