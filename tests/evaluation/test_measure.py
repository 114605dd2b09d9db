"""The result cache: what a result depends on, two processes in one folder, and damage of every kind."""

import json
import subprocess
import sys
from pathlib import Path
from typing import TypedDict

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from core.common import locks
from core.common.errors import UserError
from core.common.typed_json import with_checksum
from core.evaluation.measure import CACHE_FORMAT, Cell, ResultCache

ROOT = Path(__file__).resolve().parents[2]


class Numbers(TypedDict):
    nats: float


def cell(**settings):
    return Cell(settings, Numbers, dict)


def cache_at(path, said=None):
    return ResultCache(path, (said if said is not None else []).append)


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'evaluation.json'


RESULT = {'nats': 1.5, 'elapsed': 0.25}


def test_the_cache_tells_apart_whatever_a_result_depends_on(path):
    cache = cache_at(path)
    cache.store('a', 'nelbo', cell(windows=2, split='val'), RESULT)
    assert cache.find('a', 'nelbo', cell(split='val', windows=2)) == RESULT
    for other in (('b', 'nelbo', cell(windows=2, split='val')), ('a', 'x', cell(windows=2, split='val')),
                  ('a', 'nelbo', cell(windows=3, split='val')), ('a', 'nelbo', cell(windows=2))):
        assert cache.find(*other) is None
    cache_at(path).store('b', 'nelbo', cell(), {**RESULT, 'nats': 2.5})
    assert cache.find('b', 'nelbo', cell())['nats'] == 2.5
    assert cache.find('a', 'nelbo', cell(windows=2, split='val')) == RESULT


WRITER = """
import sys
from pathlib import Path
from core.evaluation.measure import Cell, ResultCache
name, path = sys.argv[1:]
cache = ResultCache(Path(path), print)
sys.stdin.readline()  # both begin together
for number in range(60):
    cache.store(name, 'nelbo', Cell({'number': number}, dict, dict), {'nats': 1.0, 'elapsed': 0.0})
"""


def test_two_processes_in_one_folder_lose_nothing(path):
    writers = [subprocess.Popen([sys.executable, '-c', WRITER, name, str(path)], cwd=ROOT, text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE) for name in 'ab']
    for one in writers:
        one.stdin.write('\n')
        one.stdin.flush()
    said = [one.communicate(timeout=120)[0] for one in writers]
    assert [one.returncode for one in writers] == [0, 0] and said == ['', '']
    cache = cache_at(path)
    assert all(cache.find(name, 'nelbo', cell(number=number)) for name in 'ab' for number in range(60))


@pytest.mark.parametrize('error', [OSError(95, 'Operation not supported'), NotImplementedError('no flock')])
def test_a_file_system_without_locks_is_said_once_and_the_work_goes_on(path, monkeypatch, error):
    def refuse(self, *given, **named):
        raise error

    monkeypatch.setattr(locks.filelock.FileLock, 'acquire', refuse)
    said = []
    cache = cache_at(path, said)
    for number in range(3):
        cache.store('a', 'nelbo', cell(number=number), RESULT)
    assert len(said) == 1 and 'without a lock' in said[0] and str(path) in said[0]
    assert all(cache_at(path).find('a', 'nelbo', cell(number=number)) == RESULT for number in range(3))


def test_a_lock_that_is_never_given_back_is_waited_for_and_then_passed(path, monkeypatch):
    monkeypatch.setattr(locks, 'PATIENCE', 0.1)
    said = []
    with locks.filelock.FileLock(f'{path}.lock'):
        cache_at(path, said).store('a', 'nelbo', cell(), RESULT)
    assert len(said) == 1 and cache_at(path).find('a', 'nelbo', cell()) == RESULT


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_is_noticed_or_changes_nothing(path, data):
    path.unlink(missing_ok=True)
    wanted = [cell(windows=2, split='val'), cell(windows=3, split='val')]
    for number, one in enumerate(wanted):
        cache_at(path).store('a', 'nelbo', one, {'nats': 1.25 + number, 'elapsed': 0.5})
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        found = [cache_at(path).find('a', 'nelbo', one) for one in wanted]
    except UserError as error:
        assert 'evaluation.json is damaged' in str(error) and 'move it away' in str(error) and '\n' not in str(error)
    else:
        assert found == [{'nats': 1.25, 'elapsed': 0.5}, {'nats': 2.25, 'elapsed': 0.5}]


def test_results_of_the_earlier_format_are_read_and_kept_with_a_checksum(path):
    cache_at(path).store('a', 'nelbo', cell(windows=2), RESULT)
    earlier = json.loads(path.read_text())
    del earlier['sha256']
    path.write_text(json.dumps({**earlier, 'format': 2}))
    cache = cache_at(path)
    assert cache.find('a', 'nelbo', cell(windows=2)) == RESULT
    cache.store('a', 'nelbo', cell(windows=3), RESULT)
    kept = json.loads(path.read_text())
    assert kept['format'] == CACHE_FORMAT and len(kept['sha256']) == 64 and len(kept['results']) == 2


ENTRY = {'checkpoint': 'a', 'measure': 'nelbo', 'settings': {}, 'result': {}}


@pytest.mark.parametrize('content, words', [
    (b'{"format": 1', 'not JSON'), (b'\xff', 'not JSON'), (b'[]', 'must be an object'), (b'[' * 100_000, 'nested'),
    (b'{"format": 3, "results": {}}', 'no checksum'), (b'{"format": 2, "results": {"a": {}}}', "lacks 'checkpoint'"),
    (b'{"format": 2, "results": {}, "sha256": "0"}', 'checksum is that of other values'),
    (with_checksum({'format': 1, 'results': {}}), 'format is 1'),
    (with_checksum({'format': True, 'results': {}}), 'format is True'),
    (with_checksum({'format': 3, 'results': [ENTRY]}), 'results is a list'),
    (with_checksum({'format': 3, 'results': {'a': {**ENTRY, 'result': 7}}}), 'result is 7'),
    (with_checksum({'format': 3, 'results': {'a': {**ENTRY, 'more': 7}}}), "holds 'more'"),
    (b'{"format": 3, "results": {"a": NaN}}', 'NaN'),
    (b'{"format": 3, "results": {"a": 1' + b'0' * 9000 + b'}}', 'JSON')])
def test_absurd_contents_are_one_sentence_before_any_work(path, content, words):
    path.write_bytes(content)
    with pytest.raises(UserError, match='evaluation.json is damaged.*move it away') as refused:
        cache_at(path)
    assert words in str(refused.value) and '\n' not in str(refused.value)


@pytest.mark.parametrize('result', [
    {}, {'nats': 1.5}, {'nats': '1.5', 'elapsed': 0.0}, {'nats': None, 'elapsed': 0.0}, {'nats': 1e40, 'elapsed': 0.0},
    {'nats': [1.5], 'elapsed': 0.0}, {'nats': 1.5, 'elapsed': -1.0}, {'nats': 1.5, 'bits': 2.0, 'elapsed': 0.0},
    {'nats': True, 'elapsed': 0.0}])
def test_a_result_that_is_none_of_its_cell_is_refused(path, result):
    cache = cache_at(path)
    cache.store('a', 'nelbo', cell(), result)
    with pytest.raises(UserError, match='evaluation.json is damaged.*(nats|elapsed|bits).*move it away'):
        cache.find('a', 'nelbo', cell())


def test_a_folder_in_place_of_the_file_is_said(path):
    path.mkdir()
    with pytest.raises(UserError, match='no regular file'):
        cache_at(path)
