"""What a run prints and records, after stops and with a W&B that fails in every way."""

import io
import json
import os
import re
import sys
import types

import pytest
import tqdm

from core.logger import WANDB_FAILURES_BORNE, IterationRecord, RunLogger, read_metrics, rewind_metrics


def logger(folder, **changes):
    settings = dict(wandb_log=False, project='p', run_name='r', config={}, start_iteration=0, total_iterations=10,
                    enabled=True)
    return RunLogger(folder, **(settings | changes))


def record(iteration=100, **changes):
    settings = dict(loss=4.5, parts={'main': 4.5}, learning_rate=1e-3, seconds=0.15, mfu=0.255)
    return IterationRecord(iteration, **(settings | changes))


def test_the_lines_are_those_of_the_specification(tmp_path, capsys):
    run = logger(tmp_path)
    run.iteration(record())
    run.iteration(record(1500, loss=9.2, parts={'main': 4.6, 'sampler': 4.6}, seconds=0.155, mfu=0.26))
    run.iteration(record(3500, loss=11.5, parts={'main': 4.6, 'sampler': 4.6, 'critic': 4.6}, seconds=0.16, mfu=0.265,
                         weights={'critic': 0.5}))
    run.iteration(record(3501, parts={'main': 4.5, 'critic': 0.0}, mfu=None))
    run.iteration(record(3502, tokens_per_second=12345.6))
    run.evaluation(3501, 'step 3501: val nelbo 2.0 nats/char', {'val/nelbo': 2.0})
    run.sample(3501, 'To be\nor not')
    run.close()
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        'iter 100: loss 4.5000 (main 4.5000), time 150.00ms, mfu 25.50%',
        'iter 1500: loss 9.2000 (main 4.6000, sampler 4.6000), time 155.00ms, mfu 26.00%',
        'iter 3500: loss 11.5000 (main 4.6000, sampler 4.6000, critic 0.5 x 4.6000), time 160.00ms, mfu 26.50%',
        'iter 3501: loss 4.5000 (main 4.5000, critic 0.0000), time 150.00ms',
        'iter 3502: loss 4.5000 (main 4.5000), time 150.00ms, mfu 25.50%, 12,346 tokens/s',
        'step 3501: val nelbo 2.0 nats/char', '  | To be', '  | or not']
    assert printed.err == ''  # no progress bar outside a terminal


def test_metrics_hold_every_number_and_no_inactive_part(tmp_path):
    run = logger(tmp_path / 'größe 1')
    run.iteration(record(7, extra={'train/grad_norm': 0.5}, weights={'critic': 0.25}, tokens_per_second=2.5))
    run.iteration(record(8, loss=float('nan'), parts={'main': float('inf'), 'sampler': 0.0}))
    run.evaluation(8, 'line', {'val/nelbo': 2.0})
    text = (tmp_path / 'größe 1' / 'metrics.jsonl').read_text()
    assert 'NaN' not in text and 'Infinity' not in text
    assert [json.loads(line) for line in text.splitlines()] == [
        {'kind': 'iteration', 'iteration': 7, 'train/loss': 4.5, 'train/loss_main': 4.5, 'lr': 1e-3, 'seconds': 0.15,
         'mfu': 0.255, 'train/tokens_per_second': 2.5, 'train/grad_norm': 0.5, 'train/critic_alpha': 0.25},
        {'kind': 'iteration', 'iteration': 8, 'train/loss': None, 'train/loss_main': None, 'train/loss_sampler': 0.0,
         'lr': 1e-3, 'seconds': 0.15, 'mfu': 0.255},
        {'kind': 'evaluation', 'iteration': 8, 'val/nelbo': 2.0}]


def test_a_resumed_run_reads_as_one(tmp_path):
    run = logger(tmp_path)
    for iteration in range(6):
        run.iteration(record(iteration, loss=float(iteration)))
    path = tmp_path / 'metrics.jsonl'
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "iteration", "iteration": 1, "tr')  # killed while writing
    assert len(read_metrics(path)) == 6
    run = logger(tmp_path, start_iteration=4)
    assert [line['iteration'] for line in read_metrics(path)] == [0, 1, 2, 3]
    for iteration in (4, 5):
        run.iteration(record(iteration, loss=float(iteration)))
    assert path.read_bytes() == whole
    logger(tmp_path)  # a fresh run in the same folder
    assert path.read_bytes() == b'' and {entry.name for entry in tmp_path.iterdir()} == {'metrics.jsonl'}


def test_rewinding_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(b'{"iteration": 1}\n{"iteration": 2}\n')
    rewind_metrics(tmp_path / 'none', 3)

    def killed(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, 'replace', killed)
    rewind_metrics(path, 3)  # nothing to drop: the file is not touched
    with pytest.raises(KeyboardInterrupt):
        rewind_metrics(path, 2)
    assert path.read_bytes() == b'{"iteration": 1}\n{"iteration": 2}\n'


def test_a_metrics_file_that_cannot_be_written_is_said_once(tmp_path, capsys):
    run = logger(tmp_path)
    (tmp_path / 'metrics.jsonl').mkdir()
    run.iteration(record(1))
    run.iteration(record(2))
    assert capsys.readouterr().out.count('cannot be written') == 1
    (tmp_path / 'metrics.jsonl').rmdir()
    run.iteration(record(3))
    assert [line['iteration'] for line in read_metrics(tmp_path / 'metrics.jsonl')] == [3]


def test_other_ranks_say_and_write_nothing(tmp_path, capsys):
    run = logger(tmp_path / 'out', enabled=False, wandb_log=True)
    run.iteration(record())
    run.evaluation(1, 'line', {})
    run.sample(1, 'text')
    run.advance(1)
    run.close()
    printed = capsys.readouterr()
    assert printed.out == printed.err == '' and not (tmp_path / 'out').exists()


def test_a_reader_that_has_gone_does_not_stop_the_run(tmp_path, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, 'stdout', Gone())
    run = logger(tmp_path)
    run.sample(1, 'plain')
    run.iteration(record(3))
    assert [one['iteration'] for one in read_metrics(tmp_path / 'metrics.jsonl')] == [3]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_progress_bar_is_on_terminals_only_and_lines_stay_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stderr', Terminal())
    run = logger(tmp_path, start_iteration=4, total_iterations=10)
    run.iteration(record(5, tokens_per_second=2048.0))
    run.advance(6)
    run.message('a line')
    run.advance(7)
    run.close()
    run.close()
    assert capsys.readouterr().out.splitlines() == [record(5, tokens_per_second=2048.0).line(), 'a line']
    shown = sys.stderr.getvalue().split('\r')[-1]
    assert '7/10' in shown and '2,048 tokens/s' in shown and re.search(r'<[\d:]+', shown)  # time left


@pytest.mark.parametrize('call', ['__init__', 'update', 'clear', 'close'])
def test_a_progress_bar_that_fails_is_one_line(tmp_path, monkeypatch, failing_decoration, call):
    def fails(*given, **named):
        raise ValueError('no columns')

    monkeypatch.setattr(sys, 'stderr', Terminal())
    monkeypatch.setattr(tqdm.tqdm, call, fails)
    run = logger(tmp_path, total_iterations=10)
    for iteration in range(3):
        run.iteration(record(iteration))
        run.advance(iteration + 1)
    run.close()
    assert len(read_metrics(tmp_path / 'metrics.jsonl')) == 3
    assert sys.stderr.getvalue().count('there is no progress bar: ValueError: no columns') == 1


class FakeWandb(types.ModuleType):
    """W&B as far as the logger uses it; the named call raises."""

    def __init__(self, fails='', error=RuntimeError):
        super().__init__('wandb')
        self.error = error
        self.fails, self.logged, self.finished, self.settings = fails, [], 0, types.SimpleNamespace(mode='offline')
        self.Settings = dict

    def Table(self, columns, data):
        self.step('Table')
        return [dict(zip(columns, row)) for row in data]

    def step(self, name):
        if self.fails == name:
            raise self.error(f'{name}\nbroke')

    def init(self, **given):
        self.given = given
        self.step('init')
        return self

    def log(self, numbers, step):
        self.step('log')
        self.logged.append((step, numbers))

    def finish(self):
        self.finished += 1
        self.step('finish')


def train_with(monkeypatch, folder, module, lines=8):
    monkeypatch.setitem(sys.modules, 'wandb', module)
    run = logger(folder, wandb_log=True, config={'n_layer': 6})
    for iteration in range(lines):
        run.iteration(record(iteration))
    run.close()
    assert len(read_metrics(folder / 'metrics.jsonl')) == lines


def test_wandb_takes_the_same_numbers(tmp_path, monkeypatch, capsys):
    module = FakeWandb()
    train_with(monkeypatch, tmp_path, module, 2)
    assert [step for step, _ in module.logged] == [0, 1] and module.logged[0][1]['train/loss_main'] == 4.5
    assert 'train/loss_critic' not in module.logged[0][1] and module.finished == 1
    assert module.given['config'] == {'n_layer': 6} and module.given['settings']['init_timeout'] > 0
    assert "W&B: run 'r' of project 'p', offline" in capsys.readouterr().out


def test_wandb_takes_the_samples(tmp_path, monkeypatch, capsys):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, 'wandb', module)
    run = logger(tmp_path, wandb_log=True)
    run.sample(4, 'To be\nor not')
    run.close()
    assert module.logged == [(4, {'sample': [{'iteration': 4, 'text': 'To be\nor not'}]})]
    assert '  | or not\n' in capsys.readouterr().out


@pytest.mark.parametrize('fails', ['Table', 'log'])
def test_wandb_that_takes_no_sample_is_one_line(tmp_path, monkeypatch, capsys, failing_decoration, fails):
    monkeypatch.setitem(sys.modules, 'wandb', FakeWandb(fails))
    run = logger(tmp_path, wandb_log=True)
    for iteration in range(3):
        run.sample(iteration, 'To be')
    run.close()
    said = capsys.readouterr().out
    assert said.count('W&B did not take a sample: ') == 1 and said.count('  | To be') == 3


def test_a_run_has_one_id_at_wandb_and_a_resumed_one_keeps_it(tmp_path, monkeypatch):
    modules, ids = [FakeWandb() for _ in range(3)], []
    for module, known in zip(modules, (None, None, 'the-first')):
        monkeypatch.setitem(sys.modules, 'wandb', module)
        run = logger(tmp_path, wandb_log=True, wandb_id=known)
        assert module.given['id'] == run.wandb_id and module.given['resume'] == 'allow'
        ids.append(run.wandb_id)
        run.close()
    assert ids[2] == 'the-first' and ids[0] != ids[1] and all(len(one) == 8 for one in ids[:2])
    assert logger(tmp_path).wandb_id is None  # without W&B


class Panic(BaseException):
    """What a library in Rust raises."""


@pytest.mark.parametrize('error', [RuntimeError, SystemExit, Panic])
@pytest.mark.parametrize('fails, said',
                         [('init', 'did not start'), ('log', 'did not take'), ('finish', 'did not finish')])
def test_wandb_that_fails_is_one_line(tmp_path, monkeypatch, capsys, failing_decoration, fails, said, error):
    train_with(monkeypatch, tmp_path, FakeWandb(fails, error))
    lines = [line for line in capsys.readouterr().out.splitlines() if said in line]
    assert len(lines) == 1 and f'{error.__name__}: {fails} broke' in lines[0]


def test_an_interrupt_within_wandb_is_an_interrupt(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        train_with(monkeypatch, tmp_path, FakeWandb('init', KeyboardInterrupt))


def test_what_wandb_says_cannot_move_the_cursor(tmp_path, monkeypatch, capsys, failing_decoration):
    module = FakeWandb('init')
    monkeypatch.setattr(module, 'step', lambda name: (_ for _ in ()).throw(ValueError('\x1b]0;title\x07\x9b2J')))
    train_with(monkeypatch, tmp_path, module)
    said = capsys.readouterr().out
    assert '\\x1b]0;title\\x07\\x9b2J' in said and not set('\x1b\x07\x9b') & set(said)


def test_wandb_that_keeps_failing_at_log_is_left(tmp_path, monkeypatch, capsys, failing_decoration):
    module = FakeWandb('log')
    calls = []
    monkeypatch.setattr(module, 'step', lambda name: (calls.append(name), FakeWandb.step(module, name)))
    train_with(monkeypatch, tmp_path, module, WANDB_FAILURES_BORNE + 3)
    assert calls.count('log') == WANDB_FAILURES_BORNE and module.finished == 1
    out = capsys.readouterr().out
    assert out.count('did not take a record') == 1 and out.count('is left') == 1


def test_wandb_that_fails_now_and_then_is_kept(tmp_path, monkeypatch, failing_decoration):
    module = FakeWandb()
    attempts = []

    def every_second(name):
        attempts.append(name)
        if name == 'log' and len(attempts) % 2:
            raise RuntimeError
    monkeypatch.setattr(module, 'step', every_second)
    train_with(monkeypatch, tmp_path, module, 4 * WANDB_FAILURES_BORNE)
    assert len(module.logged) == 2 * WANDB_FAILURES_BORNE


def test_wandb_that_is_missing_is_one_line(tmp_path, monkeypatch, capsys, failing_decoration):
    train_with(monkeypatch, tmp_path, None)  # None in sys.modules makes the import fail
    assert capsys.readouterr().out.count('W&B is not available') == 1


def test_wandb_is_not_imported_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    logger(tmp_path).close()


def test_the_real_wandb_offline(tmp_path, monkeypatch, capfd):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    run = logger(tmp_path, wandb_log=True)
    run.iteration(record(1))
    run.sample(1, 'To be')
    run.close()
    said = capfd.readouterr().out
    assert "W&B: run 'r' of project 'p', offline" in said and 'did not' not in said
    assert list(tmp_path.glob(f'wandb/offline-run-*-{run.wandb_id}'))
