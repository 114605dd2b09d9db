"""How a script ends: its exit code and its words, whatever struck."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from core.common.errors import UserError, is_out_of_memory, out_of_memory, run_script

ROOT = Path(__file__).parent.parent.parent


def ended(main, capsys, **keywords):
    """(exit code, standard error) of a script with this `main`."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stopped:
            run_script(main, **keywords)
    finally:
        signal.signal(signal.SIGINT, handler)
    return stopped.value.code, capsys.readouterr().err


def raising(error):
    def main(arguments):
        raise error
    return main


# ---------------------------------------------------------------- memory

HUGE = 2 ** 50


@pytest.mark.parametrize('ask', [
    lambda: torch.zeros(HUGE), lambda: torch.empty(2 ** 62, 8), lambda: np.zeros(HUGE), lambda: [0] * HUGE,
    lambda: bytearray(HUGE), lambda: np.zeros(2 ** 62, dtype=np.int64), lambda: torch.arange(HUGE),
    lambda: torch.zeros(2 ** 20).expand(2 ** 30, -1).clone()],
    ids=['torch', 'torch beyond 64 bits', 'numpy', 'list', 'bytes', 'numpy beyond 64 bits', 'arange', 'clone'])
def test_memory_that_is_not_there_is_one_sentence_with_a_cure(capsys, ask):
    code, said = ended(lambda arguments: ask(), capsys, lower=('batch_size', 'block_size', 'n_layer'))
    assert code == 2 and said.startswith('error: memory ran out') and said.count('\n') == 1
    assert said.endswith('; lower batch_size, block_size or n_layer\n')


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 8 GiB'),
    RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'),
    RuntimeError('std::bad_alloc'), OSError(12, 'Cannot allocate memory'),
    RuntimeError('MPS backend out of memory (MPS allocated: 1 GB)')])
def test_every_allocator_is_understood(error):
    assert is_out_of_memory(error)
    assert out_of_memory(error, ['batch_size']).startswith('memory ran out') and 'lower batch_size' in out_of_memory(
        error, ['batch_size'])


def test_other_errors_are_not_taken_for_memory(capsys):
    for error in (RuntimeError('mat1 and mat2 shapes cannot be multiplied'), UserError('out of memory'), KeyError('x')):
        assert not is_out_of_memory(error)
    with pytest.raises(ZeroDivisionError):
        run_script(raising(ZeroDivisionError()))


def test_the_amount_is_named():
    said = out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 800 bytes."),
                         ())
    assert said == 'memory ran out, as 800 bytes were asked for at once; lower the amount of data'


# ---------------------------------------------------------------- words and codes

def test_what_a_message_quotes_cannot_move_the_cursor(capsys):
    code, said = ended(raising(UserError('there is no \x1b[2J\r\u202e.pt\nand\u2028more')), capsys)
    assert code == 2 and said == 'error: there is no \\x1b[2J\\x0d\\u202e.pt\nerror: and\\u2028more\n'


def test_an_error_that_an_interrupt_has_caused_is_an_interrupt(capsys):
    """Importing, for one, may answer Ctrl-C with an ImportError."""
    def main(arguments):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError('half imported') from None

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert ended(main, capsys) == (130, 'stopped\n')
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'evaluate.py', 'bench.py'])
def test_a_typo_and_an_interrupt_while_importing_are_answered_without_torch(script):
    code = (f'import sys, runpy; sys.argv = ["{script}", "--batch_sise=1"]; sys.modules["torch"] = None\n'
            f'runpy.run_path("{script}", run_name="__main__")')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('error: --batch_sise'), done.stderr


def test_an_interrupt_while_importing_ends_quietly():
    started = subprocess.Popen([sys.executable, '-X', 'importtime', 'sample.py'], cwd=ROOT, stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    for line in started.stderr:
        if ' torch.' in line:  # one of many hundred modules has been imported
            started.send_signal(signal.SIGINT)
            break
    left = [line for line in started.communicate(timeout=60)[1].splitlines() if not line.startswith('import time:')]
    assert started.returncode == 130 and left == ['stopped']


STRUCK = '''
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with it ignored
class Strike:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy" or name == "torch":
            {}
sys.meta_path.insert(0, Strike())
command, *sys.argv = sys.argv[1:]
if command.endswith(".py"):
    runpy.run_path(command, run_name="__main__")
else:
    runpy.run_module(command, run_name="__main__", alter_sys=True)
'''
COMMANDS = [*((script, script) for script in ('train.py', 'sample.py', 'evaluate.py', 'bench.py')),
            *((str(one.relative_to(ROOT)), 'prepare.py', 'no such text') for one in ROOT.glob('data/*/prepare.py')),
            ('core.merging', 'merging', 'one.pt', 'other.pt'), ('core.checkpoints', 'checkpoints', 'verify', 'one.pt')]


@pytest.mark.parametrize('command', COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize('strike, code, words', [
    ('signal.raise_signal(signal.SIGINT)', 130, 'stopped'), ('raise MemoryError', 2, 'error: memory ran out; lower ')])
def test_what_strikes_while_any_command_imports_is_one_line(command, strike, code, words):
    done = subprocess.run([sys.executable, '-c', STRUCK.format(strike), *command], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == code and done.stderr.startswith(words) and done.stderr.count('\n') == 1, done.stderr
