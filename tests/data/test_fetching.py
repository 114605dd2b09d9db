"""Fetching a wheel where there is no pip: from the index that is configured, of both kinds of page, checked."""

import hashlib
import json
import os
import threading
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from core.common.errors import UserError
from core.data import fetching
from core.data.fetching import INDEX_VARIABLES, index_address, wheel_from_index

WHEEL = b'the bytes of a wheel'
NAME = 'some_thing-1.0-py3-none-any.whl'
SHA256 = hashlib.sha256(WHEEL).hexdigest()
HTML = ('<!DOCTYPE html><a href="../../files/other-1.0.whl">x</a>'
        f'<a\n class=a href="../../files/{NAME}#sha256=ab">{NAME}</a>')
JSON = json.dumps({'meta': {'api-version': '1.0'},
                   'files': [{'filename': NAME, 'url': f'/files/{NAME}', 'hashes': {}}]})


@pytest.fixture
def index(monkeypatch):
    """A package index on this machine; `pages` is what it delivers, `asked` what it was asked for."""
    class Handler(BaseHTTPRequestHandler):
        pages: dict[str, bytes] = {}
        asked: list[tuple[str, str | None]] = []

        def do_GET(self) -> None:
            Handler.asked.append((self.path, self.headers['Authorization']))
            data = Handler.pages.get(self.path)
            self.send_response(404 if data is None else 200)
            self.end_headers()
            self.wfile.write(data or b'')

        def log_message(self, *_: object) -> None:
            pass

    Handler.pages = {'/simple/some-thing/': HTML.encode(), f'/files/{NAME}': WHEEL}
    Handler.asked = []
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in INDEX_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetching.importlib.util, 'find_spec', lambda name: None)
    monkeypatch.setenv('UV_INDEX_URL', f'http://127.0.0.1:{server.server_port}/simple')
    yield Handler
    server.shutdown()
    server.server_close()


def fetch() -> bytes:
    return wheel_from_index('some_thing==1.0', NAME, SHA256, 'bring it by hand')


@pytest.mark.parametrize('page', [HTML, JSON])
def test_without_pip_the_wheel_comes_from_the_configured_index(index, page: str) -> None:
    index.pages['/simple/some-thing/'] = page.encode()
    assert fetch() == WHEEL
    assert [path for path, _ in index.asked] == ['/simple/some-thing/', f'/files/{NAME}']


def test_a_login_is_sent_to_the_index_and_never_shown(index, monkeypatch) -> None:
    monkeypatch.setenv('PIP_INDEX_URL', fetching.os.environ['UV_INDEX_URL'].replace('//', '//me:p%40ss@'))
    assert fetch() == WHEEL
    assert {login for _, login in index.asked} == {'Basic ' + b64encode(b'me:p@ss').decode()}
    index.pages.clear()
    with pytest.raises(UserError, match='404') as refused:
        fetch()
    assert 'p%40ss' not in str(refused.value) and 'me:' not in str(refused.value)


@pytest.mark.parametrize(('pages', 'words'), [
    ({}, r'simple/some-thing/ .HTTP Error 404.*has no pip .python -m ensurepip, or uv pip.*bring it by hand'),
    ({'/simple/some-thing/': b'<a href="/files/other.whl">'}, 'does not list some_thing'),
    ({'/simple/some-thing/': b'\xff'}, 'cannot be fetched'), ({'/simple/some-thing/': b'{'}, 'cannot be fetched'),
    ({'/simple/some-thing/': b'{"files": 3}'}, 'cannot be fetched'),
    ({'/simple/some-thing/': b'{"files": [3, {"filename": []}]}'}, 'cannot be fetched'),
    ({'/simple/some-thing/': b'<a href="file:///etc/passwd/' + NAME.encode() + b'">'}, "scheme is 'file'"),
    ({'/simple/some-thing/': HTML.encode(), f'/files/{NAME}': b'another'}, 'delivered another file than expected'),
])
def test_an_index_that_does_not_help_is_one_sentence(index, pages: dict[str, bytes], words: str) -> None:
    index.pages.clear()
    index.pages.update(pages)
    with pytest.raises(UserError, match=words) as refused:
        fetch()
    assert '\n' not in str(refused.value)


def test_more_than_a_wheel_can_have_is_not_read(index, monkeypatch) -> None:
    monkeypatch.setattr(fetching, 'LARGEST_DOWNLOAD', 10)
    with pytest.raises(UserError, match='more than 10 bytes'):
        fetch()


def test_the_index_is_that_of_pip_or_uv(tmp_path, monkeypatch) -> None:
    for name in INDEX_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setattr(fetching.sys, 'prefix', str(tmp_path / 'none'))
    settings = tmp_path / 'pip.conf'
    monkeypatch.setenv('PIP_CONFIG_FILE', str(settings))
    settings.write_text('no sections')
    other = tmp_path / '.config' / 'pip' / 'pip.conf'
    other.parent.mkdir(parents=True)
    other.write_text('[global]\nindex-url = https://second.example/simple\n')
    assert index_address() == 'https://second.example/simple'
    settings.write_text('[global]\nindex-url = https://user:100%@first.example/simple\n')
    assert index_address() == 'https://user:100%@first.example/simple'
    monkeypatch.setenv('UV_INDEX_URL', 'https://uv.example')
    assert index_address() == 'https://uv.example'
    monkeypatch.setenv('PIP_INDEX_URL', 'https://pip.example')
    assert index_address() == 'https://pip.example'


def test_downloads_are_checked(index) -> None:
    index.pages = {'/file': b'content'}
    address = os.environ['UV_INDEX_URL'].replace('/simple', '/file')
    digest = hashlib.sha256(b'content').hexdigest()
    assert fetching.download(address, digest, 'cure') == b'content'
    with pytest.raises(UserError, match=r'delivered another file than expected .*; the cure$'):
        fetching.download(address, hashlib.sha256(b'other').hexdigest(), 'the cure')
    for out_of_reach in (f'{address}/absent', Path(__file__).resolve().as_uri()):
        with pytest.raises(UserError, match=r'cannot be reached .*; the cure$'):
            fetching.download(out_of_reach, digest, 'the cure')
