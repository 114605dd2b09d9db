"""A run's folder: one writer, rotation, and the newest checkpoint that verifies."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.checkpoints.checkpoint import Checkpoint, export_checkpoint, load_checkpoint, save_checkpoint
from core.checkpoints.environment import environment, git_revision
from core.checkpoints.run_folder import RunFolder, find_checkpoint, latest_checkpoint
from core.common.errors import UserError
from core.common.files import TEMPORARY_SUFFIX

ROOT = Path(__file__).parent.parent.parent
OPTIONS = {'out_dir': 'out', 'dataset': 'tiny', 'n_layer': 1}
DESCRIBED = ['config.json', 'environment.json', 'run.json', 'run.lock']


def checkpoint_at(iteration: int) -> Checkpoint:
    return Checkpoint(kind='unmasking', model_config={}, config={}, vocabulary={}, vocabulary_hash='v', data_hash='d',
                      data_sizes={}, model={'w': torch.full((50,), float(iteration))}, iteration=iteration,
                      optimizers=[{}], extra={'resumable': True})


def iteration_of(path: Path) -> int:
    return load_checkpoint(path).iteration


@pytest.fixture
def folder(tmp_path: Path):
    with RunFolder(tmp_path / 'läufe und mehr' / 'out') as opened:
        opened.begin(OPTIONS)
        yield opened


def test_rotation_keeps_the_last_two(folder: RunFolder) -> None:
    for iteration in (1, 2, 3):
        folder.save(checkpoint_at(iteration))
    assert iteration_of(folder.path / 'ckpt.pt') == 3 and iteration_of(folder.path / 'ckpt_previous.pt') == 2
    assert sorted(os.listdir(folder.path)) == ['ckpt.pt', 'ckpt_previous.pt', *DESCRIBED]
    said = []
    assert iteration_of(folder.latest(said.append)) == 3 and said == []


@pytest.mark.parametrize('kept', [0, 10, 0.5, -1])
def test_damaged_latest_falls_back_and_says_so(folder: RunFolder, kept: float) -> None:
    folder.save(checkpoint_at(1))
    folder.save(checkpoint_at(2))
    path = folder.path / 'ckpt.pt'
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * kept)] if kept == 0.5 else data[:int(kept)])
    said = []
    assert latest_checkpoint(folder.path, said.append) == folder.path / 'ckpt_previous.pt' and path.exists()
    assert folder.latest(said.append) == folder.path / 'ckpt_previous.pt'
    assert len(said) == 2 and 'ckpt.pt' in said[1] and 'going on from' in said[1] and '(iteration 1)' in said[1]
    assert not path.exists() and path.with_name('ckpt.pt.damaged').exists()
    folder.save(checkpoint_at(3))  # must not put the damaged file in place of the only good one
    assert iteration_of(folder.path / 'ckpt_previous.pt') == 1 and iteration_of(path) == 3


def test_newest_goes_by_iteration_not_by_date(folder: RunFolder) -> None:
    folder.save(checkpoint_at(4))
    folder.save(checkpoint_at(5))
    os.utime(folder.path / 'ckpt.pt', (0, 0))  # the clock was set back
    assert folder.latest(print).name == 'ckpt.pt'
    os.replace(folder.path / 'ckpt.pt', folder.path / 'x')
    os.replace(folder.path / 'ckpt_previous.pt', folder.path / 'ckpt.pt')
    os.replace(folder.path / 'x', folder.path / 'ckpt_previous.pt')
    assert folder.latest(print).name == 'ckpt_previous.pt'


def test_nothing_usable(folder: RunFolder) -> None:
    with pytest.raises(UserError, match='no checkpoint in .*out to resume from; make one with: python train.py'):
        folder.latest(print)
    folder.save(checkpoint_at(1))
    folder.save(checkpoint_at(2))
    for name in ('ckpt.pt', 'ckpt_previous.pt'):
        (folder.path / name).write_bytes(b'')
    with pytest.raises(UserError) as error:
        folder.latest(print)
    assert len(str(error.value).splitlines()) == 2
    assert (folder.path / 'ckpt.pt').exists()


def test_failed_save_leaves_both(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.save(checkpoint_at(1))
    folder.save(checkpoint_at(2))

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', full)
        for best in (None, checkpoint_at(3)):
            with pytest.raises(UserError, match='No space left'):
                folder.save(checkpoint_at(3), best)
    assert iteration_of(folder.path / 'ckpt.pt') == 2 and iteration_of(folder.path / 'ckpt_previous.pt') == 1
    assert sorted(os.listdir(folder.path)) == ['ckpt.pt', 'ckpt_previous.pt', *DESCRIBED]


@pytest.mark.parametrize('completed', [0, 1])
def test_stopped_between_the_renames(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, completed: int) -> None:
    """A save whose rotation stops after `completed` renames still leaves a checkpoint to go on from."""
    folder.save(checkpoint_at(1))
    folder.save(checkpoint_at(2))
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
            folder.save(checkpoint_at(3))
    folder.close()
    folder.__init__(folder.path, resume=True)  # the next start
    assert iteration_of(folder.latest(print)) == 2


def snapshot(folder: RunFolder, iteration: int, label: str, keep: int) -> None:
    folder.save(checkpoint_at(iteration), snapshot=checkpoint_at(iteration), label=label, keep=keep)


def test_snapshots_keep_the_last(folder: RunFolder) -> None:
    for iteration in (9, 10, 100):
        snapshot(folder, iteration, 'unmasking', 2)
    snapshot(folder, 5, 'remasking_balanced', 2)
    assert [path.name for path in folder.snapshots('unmasking')] == ['ckpt_unmasking_10.pt', 'ckpt_unmasking_100.pt']
    assert [path.name for path in folder.snapshots('remasking_balanced')] == ['ckpt_remasking_balanced_5.pt']
    snapshot(folder, 20, 'unmasking', 1)
    assert [iteration_of(path) for path in folder.snapshots('unmasking')] == [20]


def test_best_is_replaced(folder: RunFolder) -> None:
    assert not folder.has_best()
    folder.save(checkpoint_at(1), checkpoint_at(1))
    folder.save(checkpoint_at(2), checkpoint_at(2))
    folder.save(checkpoint_at(3))
    assert folder.has_best() and iteration_of(folder.path / 'ckpt_best.pt') == 2


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


def test_only_a_runs_own_temporary_files_are_removed(folder: RunFolder) -> None:
    """A token of letters and digits follows one of the run's own names; every other file is somebody's."""
    stale = ['ckpt.pt.77', 'ckpt_best.pt.0a1b', 'ckpt_unmasking_500.pt.c0ffee', 'metrics.jsonl.1', 'run.json.1']
    foreign = ['notes', 'my.ckpt.pt.77', 'ckpt_mine_500.pt.1', 'ckpt.pt.a b', 'evaluation.json.12', 'ckpt_merged.pt.12']
    folder.close()
    for name in (*stale, *foreign):
        (folder.path / f'{name}{TEMPORARY_SUFFIX}').write_bytes(b'mine')
    (folder.path / 'notes.tmp').write_bytes(b'mine')
    folder.__init__(folder.path)
    left = {one.name.removesuffix(TEMPORARY_SUFFIX) for one in folder.path.iterdir()}
    assert not left & set(stale) and left >= {*foreign, 'notes.tmp'}


@pytest.mark.parametrize('call', ['mkdir', 'open'])
def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refusing(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, 'Read-only file system')

    with monkeypatch.context() as patch:
        patch.setattr(Path if call == 'mkdir' else os, call, refusing)
        with pytest.raises(UserError, match='Read-only file system; choose a folder you may write to'):
            RunFolder(tmp_path / 'out')
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot write into .*file: it is a file'):
        RunFolder(tmp_path / 'file')


# ---------------------------------------------------------------- whose files they are

def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, but for the lock."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*')
            if path.is_file() and path.name != 'run.lock'}


FOREIGN = {'notes.md': 'mine', 'train.py': 'print()', 'ckpt_mine_7.pt': 'x', 'evaluation.json': '{}',
           'calibration.json': '{}', 'samples.txt': 'To be', 'earlier_run/ckpt.pt': 'of an older program',
           'ckpt_merged.pt': 'x', 'loss.png.tmp': 'x', 'model.safetensors': 'x', 'config.json.bak': 'x'}


def write_foreign(folder: Path) -> None:
    for name, text in FOREIGN.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)


def a_run(path: Path, iteration: int, **how: bool) -> None:
    """One run from scratch that saves everything once."""
    with RunFolder(path) as folder:
        folder.begin({**OPTIONS, 'run': iteration}, **how)
        with folder.place('metrics.jsonl').open('ab') as file:
            file.write(b'{"iteration": %d}\n' % iteration)
        folder.save(checkpoint_at(iteration), checkpoint_at(iteration), checkpoint_at(iteration), 'unmasking')
        folder.save(checkpoint_at(iteration + 1))


def test_foreign_files_stay_through_any_number_of_runs(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    a_run(out, 500)
    write_foreign(out)
    for number in range(3):
        a_run(out, number, overwrite=True)
    after = contents(out)
    assert {name: after[name] for name in FOREIGN} == {name: text.encode() for name, text in FOREIGN.items()}
    kept = sorted(one.name for one in out.iterdir()
                  if re.fullmatch(r'earlier_run_\d{4}-\d\d-\d\d_\d{6}(_\d)?', one.name))
    assert len(kept) == 3  # each run in a folder of its own, whole
    assert [iteration_of(out / one / 'ckpt.pt') for one in kept] == [501, 1, 2]
    for name, iteration in zip((*kept, '.'), (500, 0, 1, 2)):
        place = out / name
        assert iteration_of(place / 'ckpt_previous.pt') == iteration_of(place / 'ckpt_best.pt') == iteration
        assert iteration_of(place / f'ckpt_unmasking_{iteration}.pt') == iteration
        assert json.loads((place / 'config.json').read_text())['run'] == iteration
        assert (place / 'metrics.jsonl').read_text() == f'{{"iteration": {iteration}}}\n'
    assert not list(out.glob(f'*{TEMPORARY_SUFFIX}'))


def test_a_run_is_not_replaced_unasked(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    a_run(out, 7)
    before = contents(out)
    with pytest.raises(UserError, match='holds an earlier run .*--init_from=resume.*--out_dir=.*--overwrite=True'):
        a_run(out, 8)
    for name in ('ckpt.pt', 'ckpt_previous.pt', 'ckpt_unmasking_7.pt'):  # any one of them is reason enough
        (out / name).unlink()
        with pytest.raises(UserError, match='holds an earlier run'):
            a_run(out, 8)
    assert contents(out) == {name: data for name, data in before.items()
                             if name not in ('ckpt.pt', 'ckpt_previous.pt', 'ckpt_unmasking_7.pt')}


def test_nothing_moves_before_the_first_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / 'out'
    a_run(out, 7)
    before = contents(out)
    for ends in ('before', 'disk full'):
        with RunFolder(out) as folder:
            folder.begin({**OPTIONS, 'run': 8}, overwrite=True)
            folder.place('metrics.jsonl').write_text('{"iteration": 0}\n')
            assert folder.replaces and not folder.has_best()
            if ends == 'disk full':
                with monkeypatch.context() as patch:
                    patch.setattr(os, 'fsync', lambda number: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'No space')))
                    with pytest.raises(UserError, match='No space'):
                        folder.save(checkpoint_at(8), checkpoint_at(8))
            assert {name: data for name, data in contents(out).items() if not name.endswith(TEMPORARY_SUFFIX)} == before
        assert contents(out) == before


@pytest.mark.parametrize('target', ['store/big.pt', '../elsewhere/big.pt'])
def test_a_relative_link_leads_where_it_led_in_the_folder_that_it_is_moved_to(tmp_path: Path, target: str) -> None:
    out = tmp_path / 'out'
    a_run(out, 7)
    (out / target).parent.mkdir(exist_ok=True)
    os.replace(out / 'ckpt.pt', out / target)
    (out / 'ckpt.pt').symlink_to(target)
    (out / 'ckpt_best.pt').unlink()
    (out / 'ckpt_best.pt').symlink_to('nowhere')
    a_run(out, 8, overwrite=True)
    aside, = out.glob('earlier_run_*')
    assert iteration_of(out / 'ckpt.pt') == 9 and iteration_of(aside / 'ckpt.pt') == 8
    assert (aside / 'ckpt.pt').samefile(out / target) and os.readlink(aside / 'ckpt_best.pt') == '../nowhere'


@pytest.mark.parametrize('move', [['notes.md', 'ckpt.pt'], ['ckpt.pt', 'notes.md'], ['ckpt.pt', '../ckpt.pt'],
                                  ['ckpt.pt', 'notes/ckpt.pt'], ['ckpt.pt', 'earlier_run_x/loss.png'], ['ckpt.pt', 7],
                                  ['notes.md', 'earlier_run_x/notes.md'], ['ckpt_previous.pt', 'ckpt.pt'], ['ckpt.pt']])
def test_a_marker_moves_nothing_but_files_of_runs(tmp_path: Path, move: list[str]) -> None:
    out = tmp_path / 'out'
    a_run(out, 7)
    (out / 'notes.md').write_text('mine')
    marker = json.loads((out / 'run.json').read_text())
    (out / 'run.json').write_text(json.dumps({**marker, 'moves': [move]}))
    before = contents(out)
    for resume in (True, False):
        with pytest.raises(UserError, match='run.json is damaged or of another program'):
            RunFolder(out, resume)
    assert contents(out) == before


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_kill_at_any_moment_of_the_first_save_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop before the n-th call that changes the folder, for every n, and open it again: either run is whole."""
    changing, count = ('replace', 'unlink', 'mkdir', 'rename'), 0
    originals = {name: getattr(os, name) for name in changing}
    outcomes = set()
    for stop_at in range(1, 200):
        out = tmp_path / str(stop_at)
        a_run(out, 500)
        count = 0

        def counting(name: str, *given: object, **named: object) -> object:
            nonlocal count
            count += 1
            if count >= stop_at:
                raise Killed
            return originals[name](*given, **named)

        try:
            with monkeypatch.context() as patch:
                folder = RunFolder(out)
                folder.begin({**OPTIONS, 'run': 1}, overwrite=True)
                folder.place('metrics.jsonl').write_text('{"iteration": 1}\n')
                for name in changing:
                    patch.setattr(os, name, lambda *given, name=name, **named: counting(name, *given, **named))
                folder.save(checkpoint_at(1), checkpoint_at(1), checkpoint_at(1), 'unmasking')
                ended = True
        except Killed:
            ended = False
        os.close(folder._lock)
        with RunFolder(out, resume=True) as again:
            found = iteration_of(again.latest(lambda line: pytest.fail(line)))
        outcomes.add(found)
        kept = list(out.glob('earlier_run_*/ckpt.pt'))
        assert found == 501 and not kept or found == 1 and [iteration_of(one) for one in kept] == [501]
        for place, iteration in ((out, 500 if found == 501 else 1), *((one.parent, 500) for one in kept)):
            assert iteration_of(place / 'ckpt_best.pt') == iteration
            assert json.loads((place / 'config.json').read_text())['run'] == iteration
            assert (place / 'metrics.jsonl').read_text() == f'{{"iteration": {iteration}}}\n'
            assert {one.name for one in place.glob('ckpt_unmasking*')} == {f'ckpt_unmasking_{iteration}.pt'}
        assert not list(out.glob(f'*{TEMPORARY_SUFFIX}')) and 'moves' not in json.loads((out / 'run.json').read_text())
        if ended:
            break
    assert ended and outcomes == {501, 1} and stop_at > 15


def test_a_run_that_saved_nothing_is_no_obstacle_and_its_metrics_stay(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    with RunFolder(out) as folder:
        folder.begin(OPTIONS)
    a_run_after = contents(out)
    assert set(a_run_after) == {'config.json', 'environment.json', 'run.json'}
    (out / 'metrics.jsonl').write_text('{"iteration": 3}\n')
    a_run(out, 1)
    kept, = out.glob('earlier_run_*')
    assert (kept / 'metrics.jsonl').read_text() == '{"iteration": 3}\n' and iteration_of(out / 'ckpt.pt') == 2


@pytest.mark.parametrize('name', [*FOREIGN, '.bashrc', 'config.json', 'environment.json', 'metrics.jsonl', 'loss.png',
                                  'ckpt.pt', 'ckpt_best.pt', 'run.json', 'corpus.saving.tmp'])
@pytest.mark.parametrize('resume', [True, False])
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path, name: str, resume: bool) -> None:
    """Also where the file has a run's name and another program's contents."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"sha256": "of an exported model"}')
    before = contents(tmp_path)
    with pytest.raises(UserError) as refused:
        RunFolder(tmp_path, resume)
    words = 'there is no' if resume else 'is left alone'
    assert re.search(f'{words}|left alone|damaged|exported model, which', str(refused.value)), refused.value
    assert contents(tmp_path) == before and not (tmp_path / 'run.lock').exists()


def test_a_folder_of_the_program_before_markers_is_a_run(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    a_run(out, 500)
    (out / 'run.json').unlink()
    before = contents(out)
    with pytest.raises(UserError, match='holds an earlier run'):
        a_run(out, 1)
    assert contents(out) == before
    with RunFolder(out, resume=True) as folder:
        assert iteration_of(folder.latest(print)) == 501
        folder.write_description(OPTIONS)
    assert (out / 'run.json').exists()
    alone = tmp_path / 'alone'  # ckpt.pt on its own, moved to another computer
    alone.mkdir()
    (alone / 'ckpt.pt').write_bytes((out / 'ckpt.pt').read_bytes())
    with RunFolder(alone, resume=True) as folder:
        assert iteration_of(folder.latest(print)) == 501


def test_a_marker_of_a_newer_program_and_a_damaged_one(tmp_path: Path) -> None:
    for text, words in (('{"program": "masked-diffusion-gpt", "format": 2}', 'format 2.*update'), ('{"prog', 'damaged'),
                        ('{"program": "other", "format": 1}', 'another program'), ('[]', 'damaged'),
                        ('{"program": "masked-diffusion-gpt", "format": 1, "moves": [["/etc/passwd", "x"]]}',
                         'damaged'),
                        ('{"program": "masked-diffusion-gpt", "format": 1, "moves": [["a", "../b"]]}', 'damaged'),
                        ('{"program": "masked-diffusion-gpt", "format": 1, "moves": [["a", 3]]}', 'damaged')):
        (tmp_path / 'run.json').write_text(text)
        with pytest.raises(UserError, match=words):
            RunFolder(tmp_path)
        assert os.listdir(tmp_path) == ['run.json']


def test_resuming_a_folder_that_does_not_exist_makes_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='there is no run folder .*none to resume from'):
        RunFolder(tmp_path / 'none', resume=True)
    assert not (tmp_path / 'none').exists()


def test_its_own_log_in_a_new_folder_is_no_obstacle(tmp_path: Path) -> None:
    words = ('import sys; from core.checkpoints.run_folder import RunFolder\n'
             'RunFolder(sys.argv[1]).begin({}); print("begun")')
    with open(tmp_path / 'log.txt', 'wb') as log:
        subprocess.run([sys.executable, '-c', words, str(tmp_path)], cwd=ROOT, stdout=log, stderr=log, check=True)
    assert (tmp_path / 'log.txt').read_text() == 'begun\n' and (tmp_path / 'run.json').exists()


# ---------------------------------------------------------------- weights alone, locks, revisions

def test_weights_alone_are_not_resumed(folder: RunFolder) -> None:
    folder.save(checkpoint_at(1))
    folder.save(checkpoint_at(2))
    weights = checkpoint_at(9)
    weights.extra = {'resumable': False}
    save_checkpoint(folder.path / 'ckpt.pt', weights.to_payload())
    with pytest.raises(UserError, match='ckpt.pt holds weights to sample from.*--init_from_checkpoint=.*ckpt.pt.*'
                                        r'move it away to go on from .*ckpt_previous.pt \(iteration 1\)'):
        folder.latest(print)
    (folder.path / 'ckpt_previous.pt').unlink()
    with pytest.raises(UserError, match='holds weights to sample from'):
        folder.latest(print)


def test_damaged_files_never_replace_each_other(folder: RunFolder) -> None:
    for iteration in range(3):
        folder.save(checkpoint_at(iteration))
        folder.save(checkpoint_at(iteration))
        (folder.path / 'ckpt.pt').write_bytes(b'damaged %d' % iteration)
        folder.latest(lambda line: None)
    assert sorted((folder.path / name).read_bytes() for name in os.listdir(folder.path) if 'damaged' in name) == \
        [b'damaged 0', b'damaged 1', b'damaged 2']


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr('core.common.locks.filelock.lock_descriptor', lambda *given, **named: (_ for _ in ()).throw(OSError(number, 'no')))
    a_run(tmp_path / 'out', 1)
    assert iteration_of(tmp_path / 'out' / 'ckpt.pt') == 2 and 'has no locks' in capsys.readouterr().err
    monkeypatch.setattr('core.common.locks.filelock.lock_descriptor', lambda *given,
                        **named: (_ for _ in ()).throw(OSError(errno.EIO, 'I/O')))
    with pytest.raises(UserError, match='cannot write .*I/O'):
        RunFolder(tmp_path / 'other')


def git(folder: Path, *words: str) -> None:
    subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b', '-C', str(folder), *words], check=True,
                   capture_output=True)


def test_only_the_programs_own_revision_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outer, copy = tmp_path / 'outer', tmp_path / 'outer' / 'tools' / 'program'
    for top in (outer, copy):
        (top / 'core' / 'checkpoints').mkdir(parents=True)
        (top / 'core' / 'checkpoints' / 'environment.py').write_text('')
    git(outer, 'init', '-q')
    (outer / 'other.txt').write_text('')
    git(outer, 'add', 'other.txt')
    git(outer, 'commit', '-qm', 'of the other')
    assert git_revision(copy) is None  # below another repository
    assert git_revision(outer) is None  # at its top, untracked
    assert git_revision(tmp_path) is None  # in none
    git(copy, 'init', '-q')
    git(copy, 'add', '.')
    git(copy, 'commit', '-qm', 'its own')
    own = git_revision(copy)
    assert re.fullmatch('[0-9a-f]{40}', own)
    monkeypatch.setenv('GIT_DIR', str(outer / '.git'))  # as a hook of the other repository has it
    assert git_revision(copy) == own
    (copy / 'core' / 'checkpoints' / 'environment.py').write_text('changed')
    assert git_revision(copy) == f'{own} (changed)'


# ---------------------------------------------------------------- finding a checkpoint

def test_the_checkpoint_that_the_options_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path('out')
    with pytest.raises(UserError, match='no checkpoint out/ckpt_best.pt; name its folder.*or make one with'):
        find_checkpoint('out', 'ckpt_best.pt', False)
    a_run(out, 1)
    assert find_checkpoint('out', 'ckpt_best.pt', False) == (out / 'ckpt_best.pt', [])
    (out / 'ckpt_best.pt').unlink()
    path, said = find_checkpoint('out', 'ckpt_best.pt', False)
    assert path == out / 'ckpt.pt' and said == ['there is no out/ckpt_best.pt, so the latest checkpoint, out/ckpt.pt, '
                                                'is taken']
    with pytest.raises(UserError, match='no checkpoint out/ckpt_best.pt; out has ckpt.pt, .*--checkpoint_name=ckpt.pt'):
        find_checkpoint('out', 'ckpt_best.pt', True)
    with pytest.raises(UserError, match='a file; give its folder .*--out_dir=out --checkpoint_name=ckpt.pt'):
        find_checkpoint('out/ckpt.pt', 'ckpt_best.pt', False)
    export_checkpoint('out/ckpt.pt', 'shared')
    assert find_checkpoint('shared', 'ckpt_best.pt', False) == (Path('shared'), [])
    assert find_checkpoint('out', 'shared', True) == (Path('shared'), [])
    export_checkpoint('out/ckpt.pt', 'out/shared')
    assert find_checkpoint('out', 'shared', True) == (out / 'shared', [])
    with pytest.raises(UserError,
                       match='is an exported model, which has no state of a run.*--init_from_checkpoint=shared'):
        latest_checkpoint('shared', print)


def test_description(folder: RunFolder) -> None:
    folder.write_description({'seed': 1, 'start_text': 'é'})
    assert json.loads((folder.path / 'config.json').read_text()) == {'seed': 1, 'start_text': 'é'}
    recorded = json.loads((folder.path / 'environment.json').read_text())
    assert recorded['versions']['torch'] == torch.__version__.split('+')[0] or \
        recorded['versions']['torch'] == torch.__version__
    assert recorded['command_line'] == sys.argv
    assert set(environment()) == set(recorded)
