"""Exported checkpoints: nothing is lost, nothing of the user's is replaced, and no damage goes unseen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.checkpoints import sharing
from core.checkpoints.__main__ import main
from core.checkpoints.checkpoint import export_checkpoint, load_checkpoint, save_checkpoint, verify_checkpoint
from core.checkpoints.weights import build_model
from core.common.errors import UserError
from helpers.checkpoints import SMALL, assert_same, checkpoint_of
from model import GPT

ROOT = Path(__file__).parent.parent.parent


def test_export_and_import(saved: Path, tmp_path: Path) -> None:
    checkpoint, folder = load_checkpoint(saved), export_checkpoint(saved, tmp_path / 'to share' / 'é')
    assert sorted(os.listdir(folder)) == ['config.json', 'model.safetensors']
    for source in (folder, folder / 'model.safetensors'):
        loaded = load_checkpoint(source)
        assert loaded.model.keys() == checkpoint.ema.keys()
        assert all(torch.equal(loaded.model[name], tensor) for name, tensor in checkpoint.ema.items())
        assert (loaded.ema, loaded.optimizers, loaded.scaler) == (None, [], None)
        for name in ('kind', 'model_config', 'config', 'vocabulary', 'vocabulary_hash', 'data_hash', 'data_sizes',
                     'iteration', 'best_value', 'extra'):
            assert getattr(loaded, name) == getattr(checkpoint, name)
        assert torch.equal(build_model(loaded).lm_head.weight, build_model(checkpoint).lm_head.weight)


def test_export_keeps_tied_weights_once(tmp_path: Path) -> None:
    model = GPT(SMALL)
    save_checkpoint(tmp_path / 'c.pt', checkpoint_of(model, ema=None).to_payload())
    folder = export_checkpoint(tmp_path / 'c.pt', tmp_path / 'shared')
    loaded = load_checkpoint(folder)
    assert loaded.model.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.model[name], tensor) for name, tensor in model.state_dict().items())
    assert (folder / 'model.safetensors').stat().st_size < 4 * model.parameter_count() + 3000


def test_damaged_export(saved: Path, tmp_path: Path) -> None:
    folder = export_checkpoint(saved, tmp_path / 'shared')
    weights, description = folder / 'model.safetensors', folder / 'config.json'
    data, text = bytearray(weights.read_bytes()), description.read_text()
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match='SHA-256 does not agree'):
        load_checkpoint(folder)
    for broken in ('', '[]', '{}', text[:-3], '{"tied": 3, "sha256": 4}', '[' * 100_000):
        description.write_text(broken)
        with pytest.raises(UserError):
            load_checkpoint(folder)
    description.unlink()
    with pytest.raises(UserError, match='cannot read .*config.json'):
        load_checkpoint(folder)


_short = st.text(max_size=4) | st.binary(max_size=4)
_plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _short,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        _short | st.just('$bytes') | st.just('$pairs'), inner, max_size=3), max_leaves=5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(_plain)
def test_json_form_is_reversible(value: object) -> None:
    text = json.dumps(sharing._to_json(value))
    assert_same(sharing._from_json(json.loads(text)), value)


def test_commands(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(['verify', str(saved)])
    assert 'is whole: unmasking, iteration 7' in capsys.readouterr().out
    main(['export', str(saved), str(tmp_path / 'shared')])
    assert load_checkpoint(tmp_path / 'shared').iteration == 7
    saved.write_bytes(saved.read_bytes()[:-1])
    done = subprocess.run([sys.executable, '-m', 'core.checkpoints', 'verify', str(saved)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('error: ') and 'Traceback' not in done.stderr


@pytest.mark.parametrize('name', ['', ' ', 'n' * 300, 'a/' + 'ü' * 200])
def test_arguments_that_are_no_paths_are_one_sentence(saved: Path, tmp_path: Path, name: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (['verify', name], ['export', name, 'shared'], ['export', str(saved), name]):
        with pytest.raises(UserError, match='^(checkpoint|folder) (is empty|has a name of [34]00 bytes)'):
            main(arguments)


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors', 'notes.md', 'ckpt.pt', '.git'])
def test_an_export_replaces_nothing_but_an_export(saved: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / name).write_text('{"out_dir": "out"}')
    with pytest.raises(UserError, match='holds files that no export wrote .*name a new or an empty folder'):
        export_checkpoint(saved, folder)
    assert os.listdir(folder) == [name] and (folder / name).read_text() == '{"out_dir": "out"}'
    (folder / name).unlink()
    for _ in range(2):  # an empty folder is fine, and so is an earlier export with a page of the user's
        export_checkpoint(saved, folder)
        (folder / 'README.md').write_text('mine')
    assert verify_checkpoint(folder).iteration == load_checkpoint(saved).iteration
    assert not verify_checkpoint(folder).resumable
    with pytest.raises(UserError, match='it is a file; name a folder'):
        export_checkpoint(saved, saved)
