"""What environment.json records of a run: versions, the program's revision, the command line, the machine."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]  # of the program
RECORDED_PACKAGES = ('torch', 'numpy', 'safetensors', 'tiktoken', 'wandb')


def environment() -> dict[str, object]:
    """The environment of a run: versions, git revision, command line, machine. Built-in types only."""
    versions = {'python': platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {'versions': versions, 'git_revision': git_revision(), 'command_line': sys.argv,
            'platform': platform.platform(), 'processors': os.cpu_count(), 'threads': torch.get_num_threads(),
            'devices': [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]}


def git_revision(root: Path = ROOT) -> str | None:
    """The commit of the program in `root`, with ' (changed)' if tracked files differ from it.

    None unless `root` is the top of a repository that tracks the program: a copy inside another repository has no
    revision.
    """
    top = _git(root, 'rev-parse', '--show-toplevel')
    try:
        if not top or not os.path.samefile(top, root):
            return None
    except OSError:
        return None
    if _git(root, 'ls-files', '--error-unmatch', 'core/checkpoints/environment.py') is None:
        return None
    return _git(root, 'describe', '--always', '--abbrev=40', '--exclude=*', '--dirty= (changed)')


def _git(root: Path, *words: str) -> str | None:
    """The output of git in `root`, without the environment's GIT_ variables; None if it fails or is not installed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith('GIT_')}
    try:
        return subprocess.run(['git', '-C', str(root), *words], capture_output=True, encoding='utf-8', timeout=10,
                              check=True, env=environment).stdout.strip()
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
