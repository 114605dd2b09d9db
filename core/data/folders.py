"""Folders and names of corpora, and the commands that prepare them. All scripts follow one rule.

Corpora lie in the folder that --data_dir names. Without this option it is the folder that the environment variable
MASKED_DIFFUSION_DATA_DIR names, or `data/` of the program itself. The working directory does not matter.
"""

import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from core.common.errors import UserError
from core.common.expressions import excerpt

PROGRAM = Path(__file__).resolve().parents[2]
DATA_VARIABLE = 'MASKED_DIFFUSION_DATA_DIR'
LONGEST_NAME = 100  # characters; file systems allow 255 bytes, and endings are added to the name
_LONGEST_PATH = 4096  # bytes
_OWN_FOLDERS = ('config', 'core', 'data', 'docs', 'tests')
_NEEDED_ARGUMENTS = {'custom': ['my.txt'], 'openwebtext': []}  # train.py does not prepare them

Say = Callable[[str], None]


def data_folder(given: str | None = None) -> Path:
    """The absolute folder of the corpora: `given` (--data_dir), else the environment's, else the program's own.

    UserError if it is an empty name, an impossible name, or a file.
    """
    if given is not None and not given.strip():
        raise UserError('--data_dir is empty: name the folder of the corpora, or leave the option out')
    chosen, origin = (given, '--data_dir') if given is not None else (os.environ.get(DATA_VARIABLE), DATA_VARIABLE)
    if not chosen:
        return PROGRAM / 'data'
    if '\0' in chosen or len(os.fsencode(chosen)) > _LONGEST_PATH:
        raise UserError(f'{origin}={excerpt(chosen)!r} is no possible folder (at most {_LONGEST_PATH} bytes, no zero '
                        f'byte): name the folder of the corpora')
    folder = Path(os.path.abspath(os.path.expanduser(chosen)))
    try:
        is_other = folder.exists() and not folder.is_dir()
    except OSError as error:
        raise UserError(f'{origin}={excerpt(chosen)} cannot be used ({error.strerror}): name another folder') from None
    if is_other:
        raise UserError(f'{origin}={folder} is a file: name the folder of the corpora')
    return folder


def recorded_data_folder(given: str | None, recorded: Mapping[str, object]) -> Path:
    """`data_folder` for a checkpoint. Without `given`, the folder in its `recorded` options is used if it exists."""
    there = recorded.get('data_dir')
    if given is None and type(there) is str and os.path.isdir(os.path.expanduser(there)):
        return data_folder(there)
    return data_folder(given)


def corpus_folder(name: str, root: Path | None = None) -> Path:
    """The folder of corpus `name`. UserError unless `name` is the name of one folder, without a path."""
    if not name or name in ('.', '..') or re.search(r'[/\\\0]', name) or len(os.fsencode(name)) > 255:
        raise UserError(f'dataset {excerpt(name)!r} is not the name of one folder (1 to 255 bytes, no / or \\): give '
                        f'the name alone, and the folder that it lies in with --data_dir=...')
    return (data_folder() if root is None else root) / name


def require_new_name(name: str, root: Path) -> None:
    """UserError unless a user may call a corpus `name`."""
    if re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9_.-]*', name) is None or len(name) > LONGEST_NAME:
        raise UserError(f'--name={excerpt(name)} is no name for a corpus: take 1 to {LONGEST_NAME} letters, digits, '
                        f'_ - and ., no path')
    if name.casefold() != 'custom' and script_of(name.casefold()).is_file():
        raise UserError(f'--name={name} is a corpus that the program itself prepares: choose another name')
    if (root / name).resolve() in [PROGRAM / own for own in _OWN_FOLDERS]:
        raise UserError(f'--name={name} in {root} is a folder of the program: choose another name')


def script_of(name: str) -> Path:
    """The path of a corpus's prepare.py, which exists if the program knows the corpus."""
    return PROGRAM / 'data' / name / 'prepare.py'


def can_be_given(name: str) -> bool:
    """Whether the program knows corpus `name`, but needs the user's text or consent to prepare it."""
    return name in _NEEDED_ARGUMENTS


def preparation_command(name: str, root: Path | None = None, again: bool = False) -> str:
    """The command that prepares corpus `name` in `root`, for the current folder. again: it replaces a corpus there."""
    own = (data_folder() if root is None else root) / name / 'prepare.py'
    script = next((path for path in (script_of(name), own) if path.is_file()), script_of('custom'))
    is_custom = script == script_of('custom')
    here = Path.cwd()
    words = ['python', shlex.quote(str(script.relative_to(here) if script.is_relative_to(here) else script)),
             *_NEEDED_ARGUMENTS.get('custom' if is_custom else name, [])]
    if is_custom and name != 'custom':
        words.append(f'--name={shlex.quote(name)}')
    if root is not None and root != data_folder():
        words.append(f'--data_dir={shlex.quote(str(root))}')
    return ' '.join(words + ['--overwrite'] * again)
