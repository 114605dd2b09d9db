"""A training run that is killed again and again at random moments ends in the state of one that never was.

    pytest tests/training/test_soak.py                  five kills
    pytest -m long -s tests/training/test_soak.py       two hundred, with what was found
"""

import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# 12 steps through all three stages
ACCUMULATED = ('--batch_size=2', '--gradient_accumulation_steps=2', '--eval_interval=2', '--sample_length=4')
PHASES = ('starting', 'stepping', 'validating', 'saving', 'between')


class Board:
    """What a run's process last said, in memory that outlives it: the phase it is in and the last iteration saved."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 16)

    def write(self, phase: str, saved: int) -> None:
        self.memory[:] = struct.pack('qq', PHASES.index(phase), saved)

    def read(self) -> tuple[str, int]:
        phase, saved = struct.unpack('qq', self.memory[:])
        return PHASES[phase], saved

    def follow(self, room: type, name: str, phase: str, saves: bool = False) -> None:
        """Let `room.name` say when it begins and ends, and which iteration it has saved."""
        original = getattr(room, name)

        def followed(this, *given):
            before = self.read()[1]
            self.write(phase, before)
            result = original(this, *given)
            self.write('between', given[0].iteration if saves else before)
            return result

        setattr(room, name, followed)


def start(arguments: tuple[str, ...], board: Board) -> int:
    """The id of a new process that trains; its words are appended to log.txt."""
    board.write('starting', 0)
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open('log.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from helpers.runs import run
        run(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(child: int, seconds: float, board: Board | None = None, within: float = 0.0) -> bool:
    """Whether `child` has ended, as it must, with success, before `seconds` are over; it is killed otherwise.

    With a board it is killed `within` seconds after it next begins to save.
    """
    until, waiting = time.monotonic() + seconds, board is not None
    while time.monotonic() < until or waiting:
        if waiting and time.monotonic() >= until and board.read()[0] == 'saving':
            until, waiting = time.monotonic() + within, False
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, Path('log.txt').read_text()[-3000:]
            return True
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


def newest(folder: Path) -> int:
    """The iteration that a run in `folder` would go on from, 0 where it would start from scratch. Every file must
    verify."""
    from core.checkpoints.checkpoint import load_checkpoint, verify_checkpoint
    from core.checkpoints.run_folder import RunFolder, latest_checkpoint

    if folder.exists():
        RunFolder(folder).close()  # makes the renames of a first save that a kill left out, as the next start would
    paths = [path for path in folder.glob('ckpt*.pt') if verify_checkpoint(path)] if folder.exists() else []
    if not {'ckpt.pt', 'ckpt_previous.pt'} & {path.name for path in paths}:
        return 0
    said: list[str] = []
    found = load_checkpoint(latest_checkpoint(folder, said.append)).iteration
    assert not said
    return found


def soak(kills: int, seed: int = 0) -> None:
    """Kill runs in the working folder `kills` times in all, each time at a random moment, every second time of a save,
    and compare every run that ends with one that was left alone. Prints what it found."""

    from core.checkpoints.run_folder import RunFolder
    from core.common.runtime import Runtime
    from core.trainer import Run
    from helpers.runs import equal_runs

    Runtime.matrix_rate = lambda self: (1.0, 'nothing')
    Run.draw_curve = lambda self: None
    board, chance = Board(), random.Random(seed)
    board.follow(RunFolder, 'save', 'saving', saves=True)
    board.follow(Run, 'step', 'stepping')
    board.follow(Run, 'validate', 'validating')

    begin = time.monotonic()
    assert ended(start((*ACCUMULATED, '--out_dir=whole'), board), 600)
    reach = time.monotonic() - begin
    phases, runs, killed, lost, resumes, saved, unfinished = Counter(), 0, 0, 0, 0, 0, False
    while killed < kills or unfinished:
        folder = Path(f'run {runs}')
        arguments = (*ACCUMULATED, f'--out_dir={folder}', f'--init_from={"resume" if saved else "scratch"}')
        resumes += saved > 0
        delay = chance.uniform(0, reach) if killed < kills else 600
        aim = (board, chance.uniform(0, 0.02)) if killed % 2 and killed < kills else ()  # every second one at a save
        begin = time.monotonic()
        if ended(start(arguments, board), delay, *aim):
            reach = (reach + time.monotonic() - begin) / 2  # the first one may have met a busy machine
            equal_runs(Path('whole'), folder)
            runs, saved, unfinished = runs + 1, 0, False
            continue
        killed, unfinished = killed + 1, True
        phase, said = board.read()
        phases[phase] += 1
        found = newest(folder)
        lost += found < max(said, saved)
        saved = found
    assert not lost
    print(f'{killed} kills over {runs} runs of 12 iterations, {resumes} resumes; killed while '
          + ', '.join(f'{phase} {phases[phase]}' for phase in PHASES))
    print(f'checkpoints lost: {lost}; runs that ended in the state of the uninterrupted one, bit for bit: {runs}')


def soaked(kills: int) -> str:
    """The output of `soak` in a process of its own, which has nothing running that a fork would lose."""
    result = subprocess.run([sys.executable, __file__, str(kills)], capture_output=True, text=True, timeout=7200,
                            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'})
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_a_few_kills_lose_nothing(small_corpus):
    assert '5 kills over ' in soaked(5)


@pytest.mark.long
def test_two_hundred_kills_lose_nothing(small_corpus, capsys):
    output = soaked(200)
    with capsys.disabled():
        print('\n' + output)
    assert '200 kills over ' in output and 'checkpoints lost: 0' in output


if __name__ == '__main__':
    soak(int(sys.argv[1]))
