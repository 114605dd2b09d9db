"""The user's text files. This module finds them in folders, recognises their encoding and reads them in blocks."""

import codecs
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from core.common.errors import UserError, raise_problems
from core.common.expressions import excerpt, shown

READ = 2**17  # characters read at a time
MOST_FILES = 1_000_000
_LOOKED_AT = 2**16  # bytes from which an encoding is guessed
MOST_ACCENTS = 0.3  # largest share of bytes beyond ASCII in a text of a Western single-byte encoding
_CUT_OFF = ('unexpected end of data', 'truncated data')  # Python's reasons for an incomplete last character
_MARKS = ((codecs.BOM_UTF32_LE, 'utf-32'), (codecs.BOM_UTF32_BE, 'utf-32'),
          (codecs.BOM_UTF16_LE, 'utf-16'), (codecs.BOM_UTF16_BE, 'utf-16'))
_OTHER_KINDS = ((b'\x1f\x8b', 'compressed with gzip'), (b'PK\x03\x04', 'a zip archive (.docx and .epub are such)'),
                (b'%PDF', 'a PDF'), (b'BZh', 'compressed with bzip2'), (b'\xfd7zXZ', 'compressed with xz'),
                (b'\x28\xb5\x2f\xfd', 'compressed with zstd'), (b'PAR1', 'a Parquet table'),
                (b'\xd0\xcf\x11\xe0', 'an old Office document'), (b'{\\rtf', 'RTF, not plain text'))


def text_paths(names: Sequence[str]) -> list[Path]:
    """The files that `names` mean, in this order. A folder means all its files except hidden ones, sorted by path.

    UserError lists the names that are neither file nor folder, and folders without a file.
    """
    paths: list[Path] = []
    problems = []
    for name in names:
        path = Path(name)
        try:
            if path.is_dir():
                found = sorted(inner for inner in path.rglob('*') if inner.is_file()
                               and not any(part.startswith('.') for part in inner.relative_to(path).parts))
                paths += found
                if not found:
                    problems.append(f'{path} is a folder without files: give text files, or folders of them')
            elif path.is_file():
                paths.append(path)
            elif path.exists():
                problems.append(f'{path} is a pipe or a device: save the text in a file and give that')
            else:
                problems.append(f'{shown(name)} is not there, so it cannot be read: give the path of a text file')
        except (OSError, ValueError) as error:
            reason = getattr(error, 'strerror', None) or error
            problems.append(f'{excerpt(name)} cannot be read ({reason}): give the path of a text file')
    if len(paths) > MOST_FILES:
        problems.append(f'{len(paths)} files are given, and at most {MOST_FILES} are taken: join them to fewer')
    raise_problems(problems)
    return paths


def require_encoding(name: str) -> None:
    """UserError unless Python has a text encoding of that name."""
    try:
        codecs.lookup(name)
        io.TextIOWrapper(io.BytesIO(), encoding=name)
    except (LookupError, ValueError):
        raise UserError(f'--encoding={excerpt(name)} is unknown: take utf-8, utf-16, cp1252, latin-1 or another '
                        f'encoding of Python') from None


def text_blocks(path: Path, encoding: str | None = None) -> Iterator[str]:
    """The text of a file in blocks, with newlines for the line ends of every system.

    Without `encoding` the file is UTF-16 or UTF-32 if it begins with their byte order mark, otherwise UTF-8. The mark
    is not part of the text. If the file is no text in that encoding, a UserError tells what it seems to be.
    """
    try:
        used = encoding or _marked_encoding(path)
        with path.open(encoding=used) as file:
            first, beyond_ascii = True, False
            while block := file.read(READ):
                if first:
                    block, first = block.removeprefix('\ufeff'), False
                if '\0' in block:
                    raise UserError(f'{path} holds a zero byte, so it is no plain text{_what_it_is(path, encoding)}')
                beyond_ascii |= not block.isascii()
                yield block
    except UnicodeDecodeError as error:
        if error.reason in _CUT_OFF and (used != 'utf-8' or beyond_ascii or _has_letters_beyond_ascii(path)):
            raise UserError(f'{path} ends in the middle of a character, so it was cut off: fetch or copy it again, or '
                            f'leave out its last character') from None
        raise UserError(f'{path} is not {"UTF-8" if used == "utf-8" else used} (byte {error.object[error.start]} where '
                        f'none such can be){_what_it_is(path, encoding)}') from None
    except UnicodeError as error:
        raise UserError(f'{path} is not {used} ({error}){_what_it_is(path, encoding)}') from None
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}): give the path of a text file') from None


def _has_letters_beyond_ascii(path: Path) -> bool:
    """Whether the beginning of the file has some. Its last three bytes may be a cut character and do not count."""
    with path.open('rb') as file:
        return not file.read(_LOOKED_AT)[:-3].isascii()


def _marked_encoding(path: Path) -> str:
    with path.open('rb') as file:
        first = file.read(4)
    return next((name for mark, name in _MARKS if first.startswith(mark)), 'utf-8')


def _what_it_is(path: Path, encoding: str | None) -> str:
    """The end of a message about a refused file: what it seems to be, and the cure."""
    with path.open('rb') as file:
        data = file.read(_LOOKED_AT)
    for start, kind in _OTHER_KINDS:
        if data.startswith(start):
            return f'; it is {kind}: extract the text as UTF-8 first'
    if encoding:
        return ': give the encoding that it was saved in'
    zeros = [data[parity::2].count(0) for parity in (0, 1)]
    if 0 in data and max(zeros) > len(data) // 5 and min(zeros) < max(zeros) // 10:
        guess, words = ('utf-16-be', 'UTF-16') if zeros[0] > zeros[1] else ('utf-16-le', 'UTF-16')
    elif 0 in data:
        return ': give a UTF-8 text file'
    elif sum(byte >= 0x80 for byte in data) > len(data) * MOST_ACCENTS:
        return ': add --encoding=NAME of the encoding that it was saved in (such as cp1251, koi8-r, shift_jis, gbk), or ' \
            'save it as UTF-8'
    else:
        guess, words = _single_byte_guess(path)
    return f'; it seems to be {words}: add --encoding={guess}, or save it as UTF-8'


def _single_byte_guess(path: Path) -> tuple[str, str]:
    """Latin-1, or cp1252 if the file has bytes that are control characters in Latin-1 and signs in cp1252."""
    with path.open('rb') as file:
        while data := file.read(2**20):
            if any(byte in data for byte in range(0x80, 0xa0)):
                return 'cp1252', 'Windows-1252 (cp1252)'
    return 'latin-1', 'Latin-1 (ISO 8859-1)'
