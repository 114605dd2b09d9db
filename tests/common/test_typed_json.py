"""Types of JSON files: what fits, what does not and where, and values of any shape."""

import json
from typing import Annotated, Literal, NotRequired, TypedDict

import pytest
from hypothesis import given, settings, strategies as st

from core.common import typed_json
from core.common.typed_json import Items, Range, Unfit, checked, read_json, verify_checksum, with_checksum


class Entry(TypedDict):
    nats: Annotated[float, Range(0.0, 10.0)]
    kind: Literal['a', 'b']
    pair: NotRequired[Annotated[list[int], Items(2, 2)] | None]


class Book(TypedDict):
    entries: dict[str, Entry]
    rest: object


GOOD = {'entries': {'x': {'nats': 1, 'kind': 'a', 'pair': [1, 2]}, 'y': {'nats': 2.5, 'kind': 'b', 'pair': None},
                    'z': {'nats': 0.0, 'kind': 'b'}}, 'rest': [1, {'deep': [None, 'x', True]}]}


def test_what_fits_is_given_back_as_it_is():
    assert checked(GOOD, Book) is GOOD


@pytest.mark.parametrize('change, words', [
    ({'nats': '1'}, "it.entries.x.nats is '1', but must be a number"), ({'nats': True}, 'nats is True'),
    ({'nats': -0.5}, 'nats is -0.5, but must lie in 0 .. 10'), ({'nats': 1e308}, 'must lie in'),
    ({'nats': float('inf')}, 'must lie in'), ({'nats': float('nan')}, 'must lie in'), ({'nats': [1]}, 'nats is a list'),
    ({'kind': 'c'}, "kind is 'c', but must be one of 'a', 'b'"),
    ({'pair': [1]}, 'pair has 1 items, but must have 2 .. 2'),
    ({'pair': [1, 2.5]}, 'pair[1] is 2.5, but must be a whole number'), ({'more': 1}, "it.entries.x holds 'more'"),
    ({'kind': 'x' * 10_000}, 'kind is a str')])
def test_the_first_place_that_does_not_fit_is_named(change, words):
    with pytest.raises(Unfit) as refused:
        checked({**GOOD, 'entries': {'x': {**GOOD['entries']['x'], **change}}}, Book)
    assert words in str(refused.value) and len(str(refused.value)) < 300


def test_what_is_lacking_and_what_is_of_another_kind_is_named():
    for value, words in ((3, 'it is 3, but must be an object'), ({}, "it lacks 'entries'"),
                         ({'rest': 1}, "lacks 'entries'"),
                         ({**GOOD, 'entries': []}, 'entries is a list'),
                         ({**GOOD, 'rest': 'x' * 2_000_000}, 'characters')):
        with pytest.raises(Unfit) as refused:
            checked(value, Book)
        assert words in str(refused.value)
    deep = 1
    for _ in range(200):
        deep = [deep]
    with pytest.raises(Unfit, match='nested too deeply'):
        checked({**GOOD, 'rest': deep}, Book)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                    | st.text(max_size=5), lambda part: st.lists(part, max_size=4)
                    | st.dictionaries(st.sampled_from(['entries', 'rest', 'nats', 'kind', 'x']), part, max_size=4))


@settings(deadline=None)
@given(JSON)
def test_any_value_fits_or_is_unfit(value):
    for kind in (Book, Entry, dict[str, object], object):
        try:
            assert checked(value, kind) is value
        except Unfit as refused:
            assert '\n' not in str(refused)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=5).filter(lambda key: key != 'sha256'), JSON, max_size=4))
def test_a_checksum_is_of_the_values_and_not_of_their_order(content):
    stored = json.loads(with_checksum(content))
    verify_checksum(stored)
    verify_checksum(dict(reversed(stored.items())))
    with pytest.raises(Unfit, match='checksum'):
        verify_checksum({**stored, 'another': 1})
    assert {key: value for key, value in stored.items() if key != 'sha256'} == content


def test_files_that_cannot_be_read_are_said(tmp_path, monkeypatch):
    path = tmp_path / 'x.json'
    with pytest.raises(Unfit, match='there is no such file'):
        read_json(path)
    with pytest.raises(Unfit, match='no regular file'):
        read_json(tmp_path)
    path.write_text('[1, 2.5]')
    assert read_json(path) == [1, 2.5]
    monkeypatch.setattr(typed_json, 'LARGEST_FILE', 7)
    with pytest.raises(Unfit, match='8 bytes, more than the 7'):
        read_json(path)
