"""A file to read, damage and share."""

from pathlib import Path

import pytest

from core.checkpoints.checkpoint import save_checkpoint
from helpers.checkpoints import HEADS, checkpoint_of
from model import GPT


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / 'ckpt.pt'
    save_checkpoint(path, checkpoint_of(GPT(HEADS)).to_payload())
    return path
