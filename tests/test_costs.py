"""The measurement of what dependability costs: it measures what it says and leaves nothing behind."""

import os

from core.bench import costs
from core.bench.measuring import Shape
from core.checkpoints.checkpoint import save_checkpoint
from core.common.randomness import RowRandom
from model import GPT
from test_checkpoint import SMALL, checkpoint_of


def test_costs_are_measured_and_nothing_is_left_behind(tmp_path, monkeypatch, capsys):
    path, draw = tmp_path / 'ckpt.pt', RowRandom.uniform
    save_checkpoint(path, checkpoint_of(GPT(SMALL)).to_payload())
    before = path.read_bytes()
    monkeypatch.setattr(costs, 'SHAPE', Shape(1, 2, 8, 8, 4))
    costs.main([str(path), '--rounds=3'])
    saving, drawing = capsys.readouterr().out.splitlines()
    assert 'times as long' in saving and 'rows of 8 tokens' in drawing
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['ckpt.pt'] and RowRandom.uniform is draw
