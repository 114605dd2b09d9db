"""A run's folder: one run at a time writes to it, and its newest usable checkpoint is always found.

ckpt.pt is the latest checkpoint, ckpt_previous.pt the one before, ckpt_best.pt the one with the lowest validation
value, ckpt_<label>_<iteration>.pt the last snapshots; environment.json and config.json say what made them.
"""

import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType

import torch

from core.checkpoints.checkpoint import HOW_TO_TRAIN, Checkpoint, CheckpointSummary, save_checkpoint, verify_checkpoint
from core.common.errors import UserError
from core.common.files import TEMPORARY_SUFFIX, unwritable, write_whole

LATEST, PREVIOUS, BEST = 'ckpt.pt', 'ckpt_previous.pt', 'ckpt_best.pt'
LOCK_FILE = 'run.lock'
EARLIER_RUN = 'earlier_run'  # where a run that is started anew puts the one it replaces
RECORDED_PACKAGES = ('torch', 'numpy', 'safetensors', 'tiktoken', 'wandb')


class RunFolder:
    """The folder at `path`, made if need be, and held by this process until `close` or its end, however it ends.

    UserError where another process holds it or it is not writable. Of several ranks only the writing one opens it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise unwritable(self.path, error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._lock, 32, 0).decode(errors='replace').strip() or 'unknown'
            os.close(self._lock)
            raise UserError(f'{self.path} is in use by another run (process {holder}); wait for it, or choose another '
                            f'folder with --out_dir=...') from error
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f'{os.getpid()}\n'.encode(), 0)
            for stale in self.path.glob(f'*{TEMPORARY_SUFFIX}'):
                stale.unlink()
        except OSError as error:
            self.close()
            raise unwritable(self.path, error) from error

    def close(self) -> None:
        """Let another run have the folder."""
        os.close(self._lock)

    def __enter__(self) -> 'RunFolder':
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def save_latest(self, checkpoint: Checkpoint) -> Path:
        """Save as ckpt.pt; the one that was there becomes ckpt_previous.pt, once the new one has verified."""
        path, arriving = self.path / LATEST, self.path / f'{LATEST}.new{TEMPORARY_SUFFIX}'
        save_checkpoint(arriving, checkpoint.to_payload())
        try:
            if path.exists():
                os.replace(path, self.path / PREVIOUS)
            os.replace(arriving, path)
        except OSError as error:
            raise unwritable(path, error) from error
        self._sync()
        return path

    def save_best(self, checkpoint: Checkpoint) -> Path:
        """Save as ckpt_best.pt in place of the one before."""
        path = self.path / BEST
        save_checkpoint(path, checkpoint.to_payload())
        return path

    def save_snapshot(self, checkpoint: Checkpoint, label: str, keep: int) -> Path:
        """Save as ckpt_<label>_<iteration>.pt, then remove all but the last `keep` (at least 1) of that label."""
        assert keep >= 1 and re.fullmatch(r'\w+', label)
        path = self.path / f'ckpt_{label}_{checkpoint.iteration}.pt'
        save_checkpoint(path, checkpoint.to_payload())
        older = [one for one in self.snapshots(label) if one != path]
        for one in older[:max(0, len(older) - (keep - 1))]:
            one.unlink(missing_ok=True)
        return path

    def snapshots(self, label: str) -> list[Path]:
        """The snapshots of `label`, by iteration."""
        numbered = [(int(match[1]), one) for one in self.path.iterdir()
                    if (match := re.fullmatch(rf'ckpt_{label}_(\d+)\.pt', one.name))]
        return [one for _, one in sorted(numbered)]

    def latest(self, say: Callable[[str], None]) -> Path:
        """As `latest_checkpoint`; a damaged file is renamed to <name>.damaged, so that no save keeps it."""
        summary, damaged = _newest(self.path, say)
        for path in damaged:
            os.replace(path, path.with_name(f'{path.name}.damaged'))
        return summary.path

    def set_aside_earlier_run(self, say: Callable[[str], None]) -> None:
        """Before a run from scratch: move an earlier run's files to earlier_run/ (in place of what is there).

        Without this a checkpoint of the earlier run could pass for the newest of the new one.
        """
        files = [one for one in self.path.iterdir() if one.is_file() and one.name != LOCK_FILE]
        if not any(re.fullmatch(r'ckpt.*\.pt', one.name) for one in files):
            return
        aside = self.path / EARLIER_RUN
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(exist_ok=True)
            for one in files:
                os.replace(one, aside / one.name)
        except OSError as error:
            raise unwritable(aside, error) from error
        say(f'{self.path} held an earlier run; its files are now in {aside}')

    def write_description(self, config: Mapping[str, object]) -> None:
        """Write config.json (`config`, the run's options) and environment.json (of `environment`)."""
        for name, values in (('config.json', config), ('environment.json', environment())):
            write_whole(self.path / name, json.dumps(values, indent=2, ensure_ascii=False) + '\n')

    def _sync(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def latest_checkpoint(folder: Path | str, say: Callable[[str], None]) -> Path:
    """The checkpoint to resume from: of ckpt.pt and ckpt_previous.pt the one that verifies and has gone furthest.

    Goes by the iteration inside the file, not by its date. `say` is told where a damaged file was passed over.
    UserError where neither can be used.
    """
    return _newest(Path(folder), say)[0].path


def _newest(folder: Path, say: Callable[[str], None]) -> tuple[CheckpointSummary, list[Path]]:
    """The summary of the newest usable checkpoint, and the damaged files beside it."""
    usable, damaged, problems = [], [], []
    for path in (folder / LATEST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            usable.append(verify_checkpoint(path))
        except UserError as error:
            damaged.append(path)
            problems.append(str(error))
    if not usable:
        raise UserError('\n'.join(problems) or f'there is no checkpoint in {folder} to resume from; make one with: '
                                               f'{HOW_TO_TRAIN}')
    newest = max(usable, key=lambda summary: summary.iteration)  # the first, ckpt.pt, among equals
    for problem in problems:
        say(f'{problem.splitlines()[0]}; going on from {newest.path} (iteration {newest.iteration})')
    return newest, damaged


def environment() -> dict[str, object]:
    """Where a run happens: versions, git revision, command line, machine. Built-in types only."""
    versions = {'python': platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {'versions': versions, 'git_revision': git_revision(), 'command_line': sys.argv,
            'platform': platform.platform(), 'processors': os.cpu_count(), 'threads': torch.get_num_threads(),
            'devices': [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]}


def git_revision() -> str | None:
    """The program's commit, with ' (changed)' where tracked files differ from it; None outside a repository."""
    command = ['git', '-C', str(Path(__file__).parent), 'describe', '--always', '--abbrev=40', '--exclude=*',
               '--dirty= (changed)']
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
