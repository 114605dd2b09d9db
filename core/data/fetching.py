"""Files from the network: a download from an address, or a wheel from the package index. Both are checked by SHA-256.

pip fetches a wheel. In an environment without pip (uv makes such), Python fetches it from the index that pip or uv is
set up to use: PEP 503's page of links or PEP 691's JSON.
"""

import base64
import configparser
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path

from core.common.errors import UserError
from core.common.expressions import excerpt
from core.common.files import write_whole

DOWNLOAD_SECONDS = 120
LARGEST_DOWNLOAD = 64 * 2**20  # bytes; the files that are fetched have at most 10 MB
DEFAULT_INDEX = 'https://pypi.org/simple'
INDEX_VARIABLES = ('PIP_INDEX_URL', 'UV_DEFAULT_INDEX', 'UV_INDEX_URL')
_PAGE_KINDS = 'application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.5, text/html;q=0.2'


def download(address: str, sha256: str, cure: str) -> bytes:
    """The bytes at `address`. UserError, ending in `cure`, if it cannot be reached or delivers another file."""
    try:
        data = _read(address)
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(f'{_shown(address)} cannot be reached ({excerpt(str(error))}); {cure}') from None
    return _checked(data, sha256, _shown(address), cure)


def wheel_from_index(requirement: str, wheel: str, sha256: str, cure: str) -> bytes:
    """The file `wheel` of `requirement` ('name==version'), neither installed nor run.

    UserError, ending in `cure`, if the index cannot be reached or delivers another file.
    """
    if importlib.util.find_spec('pip') is None:
        data = _wheel_without_pip(requirement, wheel, cure)
    else:
        data = _wheel_through_pip(requirement, wheel, cure)
    return _checked(data, sha256, f'the package index, for {requirement},', cure)


def _wheel_through_pip(requirement: str, wheel: str, cure: str) -> bytes:
    command = [sys.executable, '-m', *pip_command(requirement)]
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, encoding='utf-8',
                           errors='replace', timeout=DOWNLOAD_SECONDS)
            return (Path(folder) / wheel).read_bytes()
        except subprocess.TimeoutExpired:
            raise UserError(f'the package index did not deliver {requirement} in {DOWNLOAD_SECONDS} seconds; '
                            f'{cure}') from None
        except (OSError, subprocess.CalledProcessError) as error:
            lines = (getattr(error, 'stderr', None) or str(error)).strip().splitlines()
            reason = excerpt(lines[-1]) if lines else 'no reason given'
            raise UserError(f'pip could not fetch {requirement} ({reason}); {cure}') from None


def _wheel_without_pip(requirement: str, wheel: str, cure: str) -> bytes:
    """The wheel by Python's own download."""
    index = index_address()
    page = f'{index.rstrip("/")}/{requirement.partition("==")[0].lower().replace("_", "-")}/'
    try:
        address = dict(_links(_read(page, _PAGE_KINDS), page)).get(wheel)
        if address is None:
            raise ValueError(f'it does not list {wheel}')
        return _read(_with_login_of(index, address))
    except (OSError, ValueError, TypeError, AttributeError, HTTPException) as error:  # the page may hold anything
        raise UserError(f'{wheel} cannot be fetched from {_shown(page)} ({excerpt(str(error))}), and this environment '
                        f'has no pip (python -m ensurepip, or uv pip install pip, adds it); {cure}') from None


def index_address() -> str:
    """The package index that the environment or pip's files set for pip or uv; PyPI if none is set."""
    for name in INDEX_VARIABLES:
        if os.environ.get(name, '').strip():
            return os.environ[name].strip()
    home = Path(os.path.expanduser('~'))
    places = [os.environ.get('PIP_CONFIG_FILE'), Path(sys.prefix) / 'pip.conf', home / '.config' / 'pip' / 'pip.conf',
              home / '.pip' / 'pip.conf', home / 'pip' / 'pip.ini', '/etc/pip.conf']
    for place in filter(None, places):
        settings = configparser.ConfigParser(interpolation=None)
        try:
            settings.read(place)
        except (configparser.Error, UnicodeDecodeError, OSError):
            continue
        for section in ('download', 'install', 'global'):
            if settings.get(section, 'index-url', fallback='').strip():
                return settings.get(section, 'index-url').strip()
    return DEFAULT_INDEX


def _links(page: bytes, address: str) -> Iterator[tuple[str, str]]:
    """(file name, address) of every file on an index page, JSON (PEP 691) or HTML (PEP 503)."""
    text = page.decode('utf-8')
    if text.lstrip().startswith('{'):
        files = json.loads(text).get('files', [])
        found = [(one['filename'], one['url']) for one in files if {'filename', 'url'} <= set(one)]
    else:
        reader = _LinkReader()
        reader.feed(text)
        found = [(urllib.parse.unquote(link.partition('#')[0].rpartition('/')[2]), link) for link in reader.links]
    for name, link in found:
        yield name, urllib.parse.urljoin(address, link).partition('#')[0]


class _LinkReader(HTMLParser):
    """Collects the targets of all links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for key, value in attrs if tag == 'a' and key == 'href' and value]


def _read(address: str, kinds: str = '*/*') -> bytes:
    """The bytes at an http or https address, at most LARGEST_DOWNLOAD. Raises OSError or ValueError."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ('http', 'https'):
        raise ValueError(f'its scheme is {parts.scheme!r}, not http or https')
    request = urllib.request.Request(_without_login(address), headers={'Accept': kinds})
    if parts.username:
        login = f'{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or "")}'
        request.add_unredirected_header('Authorization', 'Basic ' + base64.b64encode(login.encode()).decode())
    with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as answer:
        data = answer.read(LARGEST_DOWNLOAD + 1)
    if len(data) > LARGEST_DOWNLOAD:
        raise ValueError(f'it delivers more than {LARGEST_DOWNLOAD} bytes')
    return data


def _without_login(address: str) -> str:
    parts = urllib.parse.urlsplit(address)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition('@')[2]))


def _with_login_of(index: str, address: str) -> str:
    """`address`, with the login of `index` if both have the same host."""
    own, other = urllib.parse.urlsplit(index), urllib.parse.urlsplit(address)
    same = own.netloc.rpartition('@')[2] == other.netloc and own.scheme == other.scheme
    return urllib.parse.urlunsplit(other._replace(netloc=own.netloc)) if same else address


def _shown(address: str) -> str:
    """An address for a message, without the login in it."""
    return excerpt(_without_login(address))


def pip_command(requirement: str) -> list[str]:
    """The command, after `python -m`, that downloads the file of `requirement` to the working folder."""
    return ['pip', 'download', '--no-deps', '--dest', '.', requirement]


def keep(path: Path, data: bytes) -> None:
    """Write fetched `data` to `path`, whole or not at all. UserError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{path.parent} cannot be made ({error.strerror}): choose another folder with '
                        f'--data_dir=...') from None
    write_whole(path, data)


def _checked(data: bytes, sha256: str, where: str, cure: str) -> bytes:
    """`data` if it has this SHA-256; otherwise UserError, ending in `cure`."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise UserError(f'{where} delivered another file than expected (its SHA-256 is {found}, not {sha256}); {cure}')
    return data
