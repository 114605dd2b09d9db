"""A run's folder: one writer, rotation, and the newest checkpoint that verifies."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.checkpoints.checkpoint import Checkpoint, load_checkpoint
from core.checkpoints.run_folder import RunFolder, environment, latest_checkpoint
from core.common.errors import UserError
from core.common.files import TEMPORARY_SUFFIX

ROOT = Path(__file__).parent.parent.parent


def checkpoint_at(iteration: int) -> Checkpoint:
    return Checkpoint(kind='unmasking', model_config={}, config={}, vocabulary={}, vocabulary_hash='v', data_hash='d',
                      data_sizes={}, model={'w': torch.full((50,), float(iteration))}, iteration=iteration)


def iteration_of(path: Path) -> int:
    return load_checkpoint(path).iteration


@pytest.fixture
def folder(tmp_path: Path):
    with RunFolder(tmp_path / 'läufe und mehr' / 'out') as opened:
        yield opened


def test_rotation_keeps_the_last_two(folder: RunFolder) -> None:
    for iteration in (1, 2, 3):
        folder.save_latest(checkpoint_at(iteration))
    assert iteration_of(folder.path / 'ckpt.pt') == 3 and iteration_of(folder.path / 'ckpt_previous.pt') == 2
    assert sorted(os.listdir(folder.path)) == ['ckpt.pt', 'ckpt_previous.pt', 'run.lock']
    said = []
    assert iteration_of(folder.latest(said.append)) == 3 and said == []


@pytest.mark.parametrize('kept', [0, 10, 0.5, -1])
def test_damaged_latest_falls_back_and_says_so(folder: RunFolder, kept: float) -> None:
    folder.save_latest(checkpoint_at(1))
    path = folder.save_latest(checkpoint_at(2))
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * kept)] if kept == 0.5 else data[:int(kept)])
    said = []
    assert latest_checkpoint(folder.path, said.append) == folder.path / 'ckpt_previous.pt' and path.exists()
    assert folder.latest(said.append) == folder.path / 'ckpt_previous.pt'
    assert len(said) == 2 and 'ckpt.pt' in said[1] and 'going on from' in said[1] and '(iteration 1)' in said[1]
    assert not path.exists() and path.with_name('ckpt.pt.damaged').exists()
    folder.save_latest(checkpoint_at(3))  # must not put the damaged file in place of the only good one
    assert iteration_of(folder.path / 'ckpt_previous.pt') == 1 and iteration_of(path) == 3


def test_newest_goes_by_iteration_not_by_date(folder: RunFolder) -> None:
    folder.save_latest(checkpoint_at(4))
    folder.save_latest(checkpoint_at(5))
    os.utime(folder.path / 'ckpt.pt', (0, 0))  # the clock was set back
    assert folder.latest(print).name == 'ckpt.pt'
    os.replace(folder.path / 'ckpt.pt', folder.path / 'x')
    os.replace(folder.path / 'ckpt_previous.pt', folder.path / 'ckpt.pt')
    os.replace(folder.path / 'x', folder.path / 'ckpt_previous.pt')
    assert folder.latest(print).name == 'ckpt_previous.pt'


def test_nothing_usable(folder: RunFolder) -> None:
    with pytest.raises(UserError, match='no checkpoint in .*out to resume from; make one with: python train.py'):
        folder.latest(print)
    folder.save_latest(checkpoint_at(1))
    folder.save_latest(checkpoint_at(2))
    for name in ('ckpt.pt', 'ckpt_previous.pt'):
        (folder.path / name).write_bytes(b'')
    with pytest.raises(UserError) as error:
        folder.latest(print)
    assert len(str(error.value).splitlines()) == 2
    assert (folder.path / 'ckpt.pt').exists()


def test_failed_save_leaves_both(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.save_latest(checkpoint_at(1))
    folder.save_latest(checkpoint_at(2))

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', full)
        for save in (folder.save_latest, folder.save_best):
            with pytest.raises(UserError, match='No space left'):
                save(checkpoint_at(3))
    assert iteration_of(folder.path / 'ckpt.pt') == 2 and iteration_of(folder.path / 'ckpt_previous.pt') == 1
    assert sorted(os.listdir(folder.path)) == ['ckpt.pt', 'ckpt_previous.pt', 'run.lock']


@pytest.mark.parametrize('completed', [0, 1])
def test_stopped_between_the_renames(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, completed: int) -> None:
    """A save whose rotation stops after `completed` renames still leaves a checkpoint to go on from."""
    folder.save_latest(checkpoint_at(1))
    folder.save_latest(checkpoint_at(2))
    replace, renames = os.replace, []

    def stopping(source: Path, target: Path) -> None:
        if target.name in ('ckpt.pt', 'ckpt_previous.pt'):
            renames.append(target.name)
            if len(renames) > completed:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', stopping)
        with pytest.raises(KeyboardInterrupt):
            folder.save_latest(checkpoint_at(3))
    folder.close()
    folder.__init__(folder.path)  # the next start
    assert iteration_of(folder.latest(print)) == 2


def test_snapshots_keep_the_last(folder: RunFolder) -> None:
    for iteration in (9, 10, 100):
        folder.save_snapshot(checkpoint_at(iteration), 'unmasking', keep=2)
    folder.save_snapshot(checkpoint_at(5), 'remasking_balanced', keep=2)
    assert [path.name for path in folder.snapshots('unmasking')] == ['ckpt_unmasking_10.pt', 'ckpt_unmasking_100.pt']
    assert [path.name for path in folder.snapshots('remasking_balanced')] == ['ckpt_remasking_balanced_5.pt']
    folder.save_snapshot(checkpoint_at(20), 'unmasking', keep=1)
    assert [iteration_of(path) for path in folder.snapshots('unmasking')] == [20]


def test_best_is_replaced(folder: RunFolder) -> None:
    folder.save_best(checkpoint_at(1))
    assert iteration_of(folder.save_best(checkpoint_at(2))) == 2
    assert (folder.path / 'ckpt_best.pt').is_file()


def test_second_run_is_refused(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, '-c', 'import sys, time; from core.checkpoints.run_folder import RunFolder\n'
         'folder = RunFolder(sys.argv[1]); print("held", flush=True); time.sleep(60)', str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    try:
        assert holder.stdout.readline() == 'held\n'
        with pytest.raises(UserError, match=rf'in use by another run \(process {holder.pid}\).*--out_dir'):
            RunFolder(tmp_path)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with RunFolder(tmp_path):  # a kill lets it go
        with pytest.raises(UserError, match=f'process {os.getpid()}'):
            RunFolder(tmp_path)
    RunFolder(tmp_path).close()


def test_stale_temporary_files_are_removed_at_the_start(tmp_path: Path) -> None:
    stale, foreign = tmp_path / f'ckpt.pt.77{TEMPORARY_SUFFIX}', tmp_path / 'notes.tmp'
    stale.write_bytes(b'half')
    foreign.write_bytes(b'mine')
    with RunFolder(tmp_path):
        assert not stale.exists() and foreign.exists()


@pytest.mark.parametrize('call', ['mkdir', 'open'])
def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refusing(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, 'Read-only file system')

    with monkeypatch.context() as patch:
        patch.setattr(Path if call == 'mkdir' else os, call, refusing)
        with pytest.raises(UserError, match='Read-only file system; choose a folder you may write to'):
            RunFolder(tmp_path / 'out')
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot write'):
        RunFolder(tmp_path / 'file')


def test_earlier_run_is_set_aside(folder: RunFolder) -> None:
    said = []
    folder.write_description({'seed': 1})
    folder.set_aside_earlier_run(said.append)
    assert said == [] and (folder.path / 'config.json').exists()  # there is no checkpoint to protect
    for iteration in (500, 1):  # the second run is younger and has gone less far
        if said or iteration == 1:
            folder.set_aside_earlier_run(said.append)
        folder.save_latest(checkpoint_at(iteration))
        folder.save_best(checkpoint_at(iteration))
    folder.save_latest(checkpoint_at(2))
    assert iteration_of(folder.latest(said.append)) == 2 and len(said) == 1
    aside = folder.path / 'earlier_run'
    assert sorted(os.listdir(aside)) == ['ckpt.pt', 'ckpt_best.pt', 'config.json', 'environment.json']
    folder.set_aside_earlier_run(said.append)
    assert iteration_of(aside / 'ckpt.pt') == 2 and os.listdir(folder.path).count('ckpt.pt') == 0
    with pytest.raises(UserError, match='in use'):
        RunFolder(folder.path)


def test_description(folder: RunFolder) -> None:
    folder.write_description({'seed': 1, 'start_text': 'é'})
    assert json.loads((folder.path / 'config.json').read_text()) == {'seed': 1, 'start_text': 'é'}
    recorded = json.loads((folder.path / 'environment.json').read_text())
    assert recorded['versions']['torch'] == torch.__version__.split('+')[0] or \
        recorded['versions']['torch'] == torch.__version__
    assert recorded['command_line'] == sys.argv
    assert set(environment()) == set(recorded)
