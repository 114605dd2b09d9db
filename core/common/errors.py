"""Problems that the user can cure, and how a script reports them. Standard library only; every room may import this."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class UserError(ValueError):
    """A problem the user can cure. The message is one clear sentence with the value, the limit and the cure."""


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one `UserError` that lists all `problems`, one per line; do nothing where there are none."""
    if problems:
        raise UserError('\n'.join(problems))


def run_script(main: Callable[[list[str]], None]) -> NoReturn:
    """Call `main` with the command line; a `UserError` becomes plain words and exit code 2, an interrupt code 130, and
    a reader of the output that has gone (`| head`) code 141.

    Of the ranks that torchrun starts, which meet the same problem, the first of each machine says it.
    """
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        if os.environ.get('LOCAL_RANK', '0') == '0':
            for problem in str(error).splitlines():
                print(f'error: {problem}', file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer has no reader either
        sys.exit(141)
    except KeyboardInterrupt:
        print('stopped', file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
