"""JSON files whose contents have types, which are checked when a file is read; some files have a checksum.

    class Entry(TypedDict):
        nats: Annotated[float, Range(0.0, 100.0)]
        texts: NotRequired[Annotated[list[str], Items(1)]]

    entry = checked(read_json(path), Entry)

The types are bool, int, float (whole numbers too), str, None, list[...], dict[str, ...], TypedDict, unions of these,
Literal, and `object` for any JSON value. Numbers are finite. Any fault raises `Unfit`.
"""

import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypeVar, Union

Value = TypeVar('Value')

LARGEST_FILE = 2 ** 28  # bytes; thousands of results have a few million
FARTHEST = 1e30  # largest number without a range of its own
LONGEST_TEXT = 1_000_000  # characters
MOST_ITEMS = 1_000_000
DEEPEST = 50  # levels of lists and objects
CHECKSUM = 'sha256'


class Unfit(ValueError):
    """The contents of a file are not what they should be; the message says what, without the file's name."""


class Range(NamedTuple):
    """The least and the greatest value of a number."""

    low: float = -FARTHEST
    high: float = FARTHEST


class Items(NamedTuple):
    """The fewest and the most items of a list or an object."""

    fewest: int = 0
    most: int = MOST_ITEMS


Share = Annotated[float, Range(-1e-9, 1 + 1e-9)]  # with room for rounding
Count = Annotated[int, Range(0, 2 ** 63)]
Seconds = Annotated[float, Range(0.0, 1e12)]
Interval = Annotated[list[float], Items(2, 2)]  # low and high end


def read_json(path: Path) -> object:
    """The JSON value in a file. Raises `Unfit` if the file is missing, too large, no JSON or nested too deeply."""
    try:
        if not path.is_file():
            raise Unfit('it is no regular file' if path.exists() else 'there is no such file')
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise Unfit(f'it has {size} bytes, more than the {LARGEST_FILE} that are read')
        return json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except OSError as error:
        raise Unfit(f'it cannot be read: {error.strerror or error}') from None
    except RecursionError:
        raise Unfit('it is nested too deeply') from None
    except Unfit:
        raise
    except ValueError as error:  # of JSON, of UTF-8, of numbers with thousands of digits
        raise Unfit(f'it is not JSON ({error})') from None


def _refuse_constant(name: str) -> None:
    raise Unfit(f'it holds {name}, which is no number')


# Checksums ----------------------------------------------------------------------------------------------------------

def with_checksum(content: Mapping[str, Any]) -> bytes:
    """`content`, of built-in types, as the text of a JSON file with the SHA-256 of its values."""
    plain = json.loads(json.dumps(content, allow_nan=False))
    return json.dumps({CHECKSUM: _checksum(plain), **plain}, indent=1, allow_nan=False).encode() + b'\n'


def verify_checksum(stored: object) -> None:
    """Raise `Unfit` unless `stored`, as `read_json` gives it, has the checksum of its values."""
    if not isinstance(stored, dict) or not isinstance(stored.get(CHECKSUM), str):
        raise Unfit('it has no checksum')
    if stored[CHECKSUM] != _checksum({key: value for key, value in stored.items() if key != CHECKSUM}):
        raise Unfit('its checksum is that of other values, so it was changed or damaged')


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(',', ':')).encode()).hexdigest()


# Types --------------------------------------------------------------------------------------------------------------

def checked(value: object, kind: type[Value], place: str = 'it') -> Value:
    """`value` itself, if it fits the type `kind`. Else raises `Unfit`, which names the first place that is wrong."""
    problem = _problem(value, kind, place, 0)
    if problem is not None:
        raise Unfit(problem)
    return typing.cast(Value, value)


def _problem(value: object, kind: Any, place: str, depth: int) -> str | None:
    """What is wrong with `value` as a `kind`: its own rule is checked first, then those of its parts."""
    if depth > DEEPEST:
        return f'{place} is nested too deeply'
    notes: list[object] = []
    while typing.get_origin(kind) in (Annotated, NotRequired):
        notes += getattr(kind, '__metadata__', ())
        kind = typing.get_args(kind)[0]
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        problems = [_problem(value, one, place, depth) for one in typing.get_args(kind)]
        return None if None in problems else max((one for one in problems if one), key=len)
    if origin is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in typing.get_args(kind))
        return None if fits else _wrong(value, place, f'be one of {", ".join(map(repr, typing.get_args(kind)))}')
    if kind is object:
        kind = {list: list[object], dict: dict[str, object], type(None): None}.get(type(value), type(value))
        origin = typing.get_origin(kind)
    if kind is None or kind is type(None):
        return None if value is None else _wrong(value, place, 'be null')
    if kind in (bool, str, int, float):
        return _plain_problem(value, kind, place, notes)
    return _parts_problem(value, kind, place, depth, notes)


def _plain_problem(value: object, kind: type, place: str, notes: list[object]) -> str | None:
    accepted, words = {bool: ((bool,), 'be true or false'), str: ((str,), 'be text'),
                       int: ((int,), 'be a whole number'),
                       float: ((int, float), 'be a number')}[kind]
    if type(value) not in accepted:
        return _wrong(value, place, words)
    if isinstance(value, str):
        fits = len(value) <= LONGEST_TEXT
        return None if fits else f'{place} has {len(value)} characters, but may have {LONGEST_TEXT}'
    low, high = next((note for note in notes if isinstance(note, Range)), Range())
    if isinstance(value, float) and not math.isfinite(value) or not low <= value <= high:
        return _wrong(value, place, f'lie in {low:g} .. {high:g}')
    return None


def _parts_problem(value: object, kind: Any, place: str, depth: int, notes: list[object]) -> str | None:
    is_list = typing.get_origin(kind) is list
    if not isinstance(value, list if is_list else dict):
        return _wrong(value, place, 'be a list' if is_list else 'be an object with named values')
    fewest, most = next((note for note in notes if isinstance(note, Items)), Items())
    if not fewest <= len(value) <= most:
        return f'{place} has {len(value)} items, but must have {fewest} .. {most}'
    if is_list:
        part, = typing.get_args(kind)
        parts = ((one, part, f'{place}[{number}]') for number, one in enumerate(value))
    elif typing.is_typeddict(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        strange = [key for key in value if key not in hints] + sorted(kind.__required_keys__ - set(value))
        if strange:
            return f'{place} {"holds" if strange[0] in value else "lacks"} {strange[0][:60]!r}'
        parts = ((one, hints[key], f'{place}.{key}') for key, one in value.items())
    else:
        part = typing.get_args(kind)[1]
        parts = ((one, part, f'{place}.{key[:60]}') for key, one in value.items())
    return next((problem for one, part, where in parts
                 if (problem := _problem(one, part, where, depth + 1)) is not None), None)


def _wrong(value: object, place: str, words: str) -> str:
    text = repr(value) if isinstance(value, (bool, int, float, str, type(None))) and len(str(value)[:61]) <= 60 \
        else f'a {type(value).__name__}'
    return f'{place} is {text}, but must {words}'
