"""What a start of train.py does with the folder it is given: earlier runs, moved checkpoints, other people's files."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

import train as script
from core.checkpoints import run_folder
from core.checkpoints.checkpoint import export_checkpoint, load_checkpoint, save_checkpoint
from core.checkpoints.run_folder import RunFolder
from core.common.errors import UserError
from core.common.runtime import Runtime
from core.interpolation import merge_checkpoints
from core.logger import read_metrics
from core.trainer import Run
from helpers.runs import SMALL, equal_runs, refused, run


@pytest.fixture(autouse=True)
def quick_runs(monkeypatch):
    """Runs without their picture and without measuring the machine."""
    monkeypatch.setattr(Run, 'draw_curve', lambda self: None)
    monkeypatch.setattr(Runtime, 'matrix_rate', lambda self: (1.0, 'nothing'))


def contents(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob('*')
            if path.is_file() and path.name != 'run.lock'}


def stopping_at(monkeypatch, iteration: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    step = Run.step

    def stopping(self):
        if self.iteration == iteration:
            raise error
        step(self)
    monkeypatch.setattr(Run, 'step', stopping)


@pytest.mark.parametrize('arguments', [(), ('--seed=7',), ('--attention_type=causal', '--add_sampler_head=False',
                                                           '--add_critic_head=False')])
def test_mistaken_starts_over_a_finished_run_change_nothing(small_corpus, monkeypatch, arguments):
    run('--max_iters=4')
    Path('out/notes.md').write_text('mine')
    before = contents('out')
    assert '--overwrite=True' in refused(*arguments)
    for at in (0, 2):  # stopped at once, before anything was saved, though overwriting was asked for
        with monkeypatch.context() as patch:
            stopping_at(patch, at)
            with pytest.raises(KeyboardInterrupt):
                run('--overwrite=True', *arguments)
        assert contents('out') == before


def test_a_start_that_fails_changes_nothing(small_corpus, monkeypatch):
    run('--max_iters=4')
    before = contents('out')
    monkeypatch.setattr(Run, 'validate', lambda self: (_ for _ in ()).throw(UserError('too short')))
    assert refused('--overwrite=True') == 'too short'
    assert contents('out') == before


def test_overwriting_keeps_the_earlier_run_whole(small_corpus, capsys):
    run('--max_iters=8', '--out_dir=whole')
    run('--max_iters=8', '--seed=7', '--out_dir=out')
    earlier = contents('out')
    assert 'earlier run' not in capsys.readouterr().out
    run('--max_iters=8', '--overwrite=True')
    kept, = Path('out').glob('earlier_run_*')
    assert capsys.readouterr().out.count(f'the earlier run of out is now in {kept}\n') == 1  # saved twice, moved once
    assert {name: data for name, data in earlier.items() if name != 'run.json'} == contents(str(kept))
    equal_runs(Path('whole'), Path('out'))
    assert len(read_metrics(Path('out/metrics.jsonl'))) == 8 + 3  # from its very beginning
    run('--max_iters=12', '--init_from=resume', f'--out_dir={kept}', '--seed=7')  # and it can be gone on with
    assert load_checkpoint(kept / 'ckpt.pt').iteration == 12


def test_a_moved_checkpoint_gets_a_best_one_again(small_corpus):
    """ckpt.pt knows a value that its new folder has no checkpoint of."""
    run('--max_iters=4')
    Path('moved').mkdir()
    saved = load_checkpoint('out/ckpt.pt')
    saved.best_value = 0.0  # no later value is lower
    save_checkpoint('moved/ckpt.pt', saved.to_payload())
    run('--max_iters=8', '--out_dir=moved', '--init_from=resume')
    best = load_checkpoint('moved/ckpt_best.pt')
    assert best.iteration == 8 and best.best_value == load_checkpoint('moved/ckpt.pt').best_value > 0
    assert len(read_metrics(Path('moved/metrics.jsonl'))) == 4 + 1 + 1  # of steps 4 to 7, and at 4 and 8


@pytest.mark.parametrize('name', ['ckpt_best.pt', 'ckpt_unmasking_4.pt', 'merged'])
def test_weights_alone_are_not_resumed(small_corpus, name):
    run('--max_iters=4')
    if name == 'merged':
        merge_checkpoints(Path('out/ckpt.pt'), Path('out/ckpt_best.pt'), 0.5, Path('merged.pt'), print)
        name = '../merged.pt'
    shutil.copy(Path('out') / name, 'out/ckpt.pt')
    before = contents('out')
    assert re.search('out/ckpt.pt holds weights to sample from.*--init_from_checkpoint=out/ckpt.pt',
                     refused('--init_from=resume'))
    assert contents('out') == before
    run('--out_dir=new', '--init_from_checkpoint=out/ckpt.pt', '--max_iters=1')  # what the message proposes


def test_an_exported_folder_is_started_from_and_never_trained_into(small_corpus):
    run('--max_iters=4')
    export_checkpoint('out/ckpt_best.pt', 'shared')
    before = contents('shared')
    assert 'is an exported model' in refused('--init_from=resume', '--out_dir=shared')
    assert 'no run of this program wrote' in refused('--out_dir=shared')
    run('--out_dir=new', '--init_from_checkpoint=shared', '--max_iters=1')
    assert contents('shared') == before


def test_a_finished_run_says_so_and_is_left_alone(small_corpus, capsys):
    run('--max_iters=8')
    before = contents('out')
    for options in ((), ('--max_iters=4',)):
        capsys.readouterr()
        run('--max_iters=8', '--init_from=resume', *options)
        assert re.search(r'the run in out is finished: it has done 8 iterations and max_iters is \d; raise it to go on '
                         r'\(--max_iters=16\)', capsys.readouterr().out)
    assert contents('out') == before


def test_a_run_stopped_after_its_last_step_is_not_finished(small_corpus, monkeypatch):
    run('--max_iters=8', '--out_dir=whole')
    with monkeypatch.context() as patch:
        patch.setattr(Run, 'stop_wanted', lambda self: self.iteration == 8)
        with pytest.raises(SystemExit):
            run('--max_iters=8')
    run('--max_iters=8', '--init_from=resume')
    equal_runs(Path('whole'), Path('out'))


def main(*arguments: str) -> None:
    script.main(list(arguments))


def test_a_run_goes_on_with_its_own_options(small_corpus, capsys):
    """Started with many options and resumed with none; those that are given win."""
    run('--out_dir=whole')
    main(*SMALL, '--max_iters=4', '--out_dir=parts')
    capsys.readouterr()
    main('--init_from=resume', '--out_dir=parts', '--max_iters=12')
    out = capsys.readouterr().out
    assert out.count('options that are not given are those of parts/config.json\n') == 1
    equal_runs(Path('whole'), Path('parts'))
    config = json.loads(Path('parts/config.json').read_text())
    assert config['dropout'] == 0.1 and config['init_from'] == 'resume' and config['max_iters'] == 12
    main('--init_from=resume', '--out_dir=parts')
    assert 'the run in parts is finished' in capsys.readouterr().out


@pytest.mark.parametrize('made', [0, 3, 99])
def test_a_run_killed_between_the_renames_of_its_first_save_goes_on_with_its_own_options(small_corpus, monkeypatch, made):
    """Not with those of the run that it replaces, whose config.json still has its name."""
    run('--out_dir=whole', '--seed=7', '--weight_decay=0.2')
    run('--max_iters=4')
    renamed = 0

    def moving(source, target):
        nonlocal renamed
        if renamed == made:
            raise KeyboardInterrupt
        renamed += 1
        os.replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder, '_move', moving)
        patch.setattr(RunFolder, 'close', lambda self: os.close(self._lock))  # a kill cleans nothing up
        stopping_at(patch, 5)
        run('--seed=7', '--weight_decay=0.2', '--overwrite=True')
    main('--init_from=resume')
    equal_runs(Path('whole'), Path('out'))


def test_without_config_json_the_checkpoint_has_the_options(small_corpus, capsys):
    run('--max_iters=4')
    Path('moved').mkdir()
    shutil.copy('out/ckpt.pt', 'moved')
    main('--init_from=resume', '--out_dir=moved', '--max_iters=8')
    assert load_checkpoint('moved/ckpt.pt').iteration == 8
    assert 'those of moved/ckpt.pt' in capsys.readouterr().out


def test_options_that_nobody_could_have_given_are_refused(small_corpus):
    run('--max_iters=4')
    config = json.loads(Path('out/config.json').read_text())
    Path('out/config.json').write_text(json.dumps({**config, 'n_layer': 'two', 'attention_type': 'sideways',
                                                   'an_option_that_went': 3}))
    with pytest.raises(UserError) as refusal:
        main('--init_from=resume')
    assert sorted(line.split(':')[0] for line in str(refusal.value).splitlines()) == [
        "attention_type='sideways' in out/config.json", "n_layer='two' in out/config.json"]


def test_a_device_that_went_is_no_obstacle(small_corpus, monkeypatch):
    run('--max_iters=4')
    config = json.loads(Path('out/config.json').read_text())
    Path('out/config.json').write_text(json.dumps({**config, 'device': 'cuda:7', 'max_iters': 8}))
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    main('--init_from=resume')
    assert load_checkpoint('out/ckpt.pt').iteration == 8


@pytest.mark.parametrize('arguments', [['--init_from=resume', '--out_dir=none'], ['--init_from=resume', '--out_dir=']])
def test_nothing_to_resume(small_corpus, arguments):
    before = sorted(os.listdir())
    with pytest.raises(UserError, match='no run folder none|out_dir is empty'):
        main(*arguments)
    assert sorted(os.listdir()) == before
