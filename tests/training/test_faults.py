"""What strikes a whole run: signals, lost ranks, other data, awkward folders. docs/faults.md lists every fault."""

import dataclasses
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import core.trainer
from core.checkpoints.checkpoint import load_checkpoint
from core.checkpoints.run_folder import RunFolder
from core.common.errors import UserError, run_script
from core.common.runtime import Runtime, is_lost_rank
from core.data.learning import character_vocabulary
from core.data.writing import write_corpus
from core.logger import read_metrics
from helpers.runs import ROOT, SMALL, equal_runs, refused, run


DRAW_CURVE = core.trainer.Run.draw_curve


@pytest.fixture(autouse=True)
def quick_runs(monkeypatch):
    """Runs without their picture and without measuring the machine."""
    monkeypatch.setattr(core.trainer.Run, 'draw_curve', lambda self: None)
    monkeypatch.setattr(Runtime, 'matrix_rate', lambda self: (1.0, 'nothing'))


# ---------------------------------------------------------------- signals

def during_step(monkeypatch, iteration: int, *numbers: signal.Signals) -> list[int]:
    """The signals arrive one after another while the step of that iteration is going on; returns the list of saves."""
    step, save, saves = core.trainer.training_step, RunFolder.save, []

    def interrupted(state, number, learning_rate):
        losses = step(state, number, learning_rate)
        for one in numbers if number == iteration else ():
            signal.raise_signal(one)
        return losses

    def counted(folder, checkpoint, *further):
        saves.append(checkpoint.iteration)
        return save(folder, checkpoint, *further)

    monkeypatch.setattr(core.trainer, 'training_step', interrupted)
    monkeypatch.setattr(RunFolder, 'save', counted)
    return saves


@pytest.fixture
def heard():
    """No signal is ignored, whoever started the tests (nohup ignores the closed window)."""
    before = {one: signal.getsignal(one) for one in core.trainer.STOPPING}
    for one, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(one, signal.SIG_DFL)
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129),
                                          (signal.SIGUSR1, 128 + signal.SIGUSR1)])
def test_a_signal_finishes_the_step_saves_once_and_stops(small_corpus, monkeypatch, heard, number, code):
    handlers = [signal.getsignal(one) for one in core.trainer.STOPPING]
    saves = during_step(monkeypatch, 6, number)
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == code and saves == [4, 7] and load_checkpoint('out/ckpt.pt').iteration == 7
    assert handlers == [signal.getsignal(one) for one in core.trainer.STOPPING]


def test_a_closed_window_that_the_starter_wants_ignored_is_ignored(small_corpus, monkeypatch):
    """As nohup does."""
    during_step(monkeypatch, 6, signal.SIGHUP)
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert load_checkpoint('out/ckpt.pt').iteration == 12


class CompilerGone(RuntimeError):
    """As torch raises it where its compiler was stopped."""


CompilerGone.__module__ = 'torch._inductor.exc'


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize('iteration', [0, 6])
def test_a_signal_that_reaches_the_compiler_too_saves_and_stops(small_corpus, monkeypatch, number, code, iteration):
    run('--out_dir=whole')
    step = core.trainer.training_step

    def interrupted(state, at, learning_rate):
        if at == iteration:
            signal.raise_signal(number)
            raise CompilerGone('CppCompileError')
        return step(state, at, learning_rate)

    with monkeypatch.context() as patch:
        patch.setattr(core.trainer, 'training_step', interrupted)
        with pytest.raises(SystemExit) as stopped:
            run()
    assert stopped.value.code == code
    if iteration:
        assert load_checkpoint('out/ckpt.pt').iteration == iteration
        run('--init_from=resume')
        equal_runs(Path('whole'), Path('out'))


def test_a_compiler_that_fails_by_itself_is_an_error(small_corpus, monkeypatch):
    def fails(*given):
        raise CompilerGone('CppCompileError')

    monkeypatch.setattr(core.trainer, 'training_step', fails)
    with pytest.raises(CompilerGone):
        run()


def test_a_second_interrupt_stops_at_once(small_corpus, monkeypatch, capsys):
    run('--out_dir=whole')
    with monkeypatch.context() as patch:
        saves = during_step(patch, 6, signal.SIGINT, signal.SIGINT)
        with pytest.raises(SystemExit) as stopped:
            run_script(lambda arguments: run())
    assert stopped.value.code == 130 and saves == [4]
    assert 'interrupt again to stop at once' in capsys.readouterr().err
    with RunFolder('out') as folder:  # nothing holds it any more
        assert load_checkpoint(folder.latest(print)).iteration == 4
    run('--init_from=resume')
    equal_runs(Path('whole'), Path('out'))


# ---------------------------------------------------------------- data and folders

def other_corpus(keep_characters: bool) -> None:
    """Put another text in the place of the corpus 'tiny'."""
    text = 'to be or not, king\nMARY:\nqueen ' * 700 if keep_characters else 'abcdefghijklmnop, ' * 900
    shutil.rmtree('data/tiny')
    write_corpus(Path('data/tiny'), character_vocabulary(text), {'train': text[:-1000], 'val': text[-1000:]}, 'other')


def test_another_corpus_is_refused_unless_forced(small_corpus, capsys):
    run('--max_iters=4')
    other_corpus(keep_characters=True)
    assert small_corpus.vocabulary.base_size == len(set('to be or not, king\nMARY:\nqueen '))
    message = refused('--init_from=resume')
    assert message.startswith('cannot resume with another corpus: ') and '--force_resume=True' in message
    capsys.readouterr()
    run('--init_from=resume', '--force_resume=True')
    assert 'resuming with another corpus: ' in capsys.readouterr().out
    assert load_checkpoint('out/ckpt.pt').iteration == 12
    other_corpus(keep_characters=False)
    message = refused('--init_from=resume', '--force_resume=True')  # no weights fit such data
    assert 'corpus tiny was replaced since the run was saved (its vocabulary has 22 ids in place of 23)' in message
    assert 'force_resume' not in message and 'scratch' not in message and 'vocab_size' not in message
    shutil.copytree('data/tiny', 'data/other')
    assert 'dataset is other, but the run was trained on tiny' in refused('--init_from=resume', '--dataset=other')


def test_a_path_with_spaces_and_other_letters(small_corpus):
    folder = 'läufe und mehr/ö 1'
    run(f'--out_dir={folder}', '--max_iters=4')
    run(f'--out_dir={folder}', '--init_from=resume')
    assert load_checkpoint(Path(folder) / 'ckpt_best.pt').iteration == 12
    assert len(read_metrics(Path(folder) / 'metrics.jsonl')) == 12 + 4


def test_a_second_run_in_a_folder_is_refused(small_corpus):
    run('--max_iters=4')
    before = Path('out/ckpt.pt').read_bytes()
    with RunFolder('out'):
        for arguments in ((), ('--init_from=resume',)):
            assert 'in use by another run' in refused(*arguments)
    assert Path('out/ckpt.pt').read_bytes() == before and not list(Path('out').glob('earlier_run*'))


# ---------------------------------------------------------------- several ranks

TWO_RANKS = """
import dataclasses
import os
import torch._dynamo  # once for both
from core.common.errors import run_script
from helpers.runs import run
child = os.fork()
if child:
    print(child, flush=True)
else:
    os.dup2(os.open('second.txt', os.O_WRONLY | os.O_CREAT), 1)
rank = '0' if child else '1'
os.environ.update(RANK=rank, LOCAL_RANK=rank)
run_script(lambda arguments: run('--gradient_accumulation_steps=2', '--max_iters=100000', '--sample_length=0'))
"""


def test_when_a_rank_is_killed_the_others_say_so_and_stop(small_corpus):
    """Without torchrun, which would itself end the rank that is left. One rank writes; what it saved is whole."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    first = subprocess.Popen(
        [sys.executable, '-c', TWO_RANKS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}', 'WORLD_SIZE': '2',
             'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)})
    second = int(first.stdout.readline())
    for line in first.stdout:
        if line.startswith('iter 6:'):
            os.kill(second, signal.SIGKILL)
            break
    _, complaint = first.communicate(timeout=60)
    assert first.returncode == 1 and Path('second.txt').read_text() == ''
    assert complaint.strip().startswith('rank 0 stops, because another rank has ended')
    assert 'Traceback' not in complaint and '--init_from=resume' in complaint
    assert load_checkpoint('out/ckpt.pt').iteration >= 4


def test_what_a_lost_rank_looks_like():
    assert is_lost_rank(RuntimeError('[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234'))
    assert is_lost_rank(torch.distributed.DistBackendError('NCCL communicator was aborted'))
    assert not is_lost_rank(RuntimeError('mat1 and mat2 shapes cannot be multiplied'))


def test_the_first_rank_of_a_machine_speaks_for_all(monkeypatch, capsys):
    def main(arguments):
        raise UserError('one\ntwo')

    for rank, said in (('0', 'error: one\nerror: two\n'), ('1', '')):
        monkeypatch.setenv('LOCAL_RANK', rank)
        with pytest.raises(SystemExit) as stopped:
            run_script(main)
        assert stopped.value.code == 2 and capsys.readouterr().err == said


def test_a_reader_of_the_output_that_leaves_early_ends_the_script_quietly():
    script = ('from core.common.errors import run_script\n'
              "run_script(lambda arguments: print('line ' * 9 + '\\n' * 100000))")
    done = subprocess.run(['bash', '-c', f'{shlex.quote(sys.executable)} -c {shlex.quote(script)} | head -n 1; '
                           'echo ${PIPESTATUS[0]}'], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.splitlines()[-1] == '141' and done.stderr == ''


# ---------------------------------------------------------------- terminals and decoration

@pytest.mark.parametrize('streams', ['>&- 2>&- <&-', '>/dev/full 2>/dev/full', '| head -n 1; exit ${PIPESTATUS[0]}'])
def test_a_run_without_a_terminal_trains_saves_and_ends_well(small_corpus, streams):
    command = shlex.join([sys.executable, str(ROOT / 'train.py'), *SMALL, '--log_interval=1'])
    strange = {'MPLBACKEND': 'module://matplotlib_inline.backend_inline', 'COLUMNS': 'many', 'HOME': '/dev/null',
               'PYTHONIOENCODING': 'ascii'}
    done = subprocess.run(['bash', '-c', f'{command} {streams}'], env={**os.environ, **strange}, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
    assert load_checkpoint('out/ckpt.pt').iteration == 12 and Path('out/loss.png').stat().st_size > 1000
    assert len(read_metrics(Path('out/metrics.jsonl'))) == 12 + 4


def test_a_picture_that_cannot_be_written_changes_no_exit_code(small_corpus, tmp_path, monkeypatch, capsys,
                                                               failing_decoration):
    for folder in ('out', 'stopped'):
        run('--max_iters=2', '--eval_interval=2', f'--out_dir={folder}')
        Path(folder, 'loss.png').mkdir()
    monkeypatch.setattr(core.trainer.Run, 'draw_curve', DRAW_CURVE)
    run('--max_iters=4', '--init_from=resume')
    assert 'out/loss.png was not drawn: ' in capsys.readouterr().out
    during_step(monkeypatch, 2, signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        run('--out_dir=stopped', '--init_from=resume')
    assert stopped.value.code == 130 and load_checkpoint('stopped/ckpt.pt').iteration == 3


def test_compiling_is_said_before_each_stage_that_does(small_corpus, monkeypatch, capsys):
    said = []
    start, step = core.trainer.start_runtime, core.trainer.training_step

    def compiling(*given, **named):
        return dataclasses.replace(start(*given, **named), compile=True)

    def stepped(state, iteration, learning_rate):
        said.append((iteration, capsys.readouterr().out.count('compiling this stage, about')))
        return step(state, iteration, learning_rate)

    monkeypatch.setattr(core.trainer, 'start_runtime', compiling)
    monkeypatch.setattr(torch, 'compile', lambda function, **named: function)
    monkeypatch.setattr(core.trainer, 'training_step', stepped)
    run()
    assert [iteration for iteration, count in said if count == 1] == [0, 3, 6]  # where a head begins
