"""A run of sample.py: what was finished is kept, whatever fails, and no run holds more than it must."""

import json
import math

import pytest
import torch

from core.common.errors import UserError
from core.sampling import outputs, quality_metrics, run
from helpers.sampling import sample, write_checkpoint

FEW = ('--num_samples=5', '--batch_size=2', '--iterations=2')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    write_checkpoint(folder / 'ckpt_best.pt', add_critic_head=True)
    write_checkpoint(folder / 'judge.pt', kind='judge', mode='sequence_scorer', block_size=17, cls_token_id=12)
    return folder


NAMES = {**{option: option for option in outputs.OUTPUTS}, 'save_gif': 'save_gif.gif'}  # a picture's ending says which


def files(tmp_path):
    return [f'--{option}={tmp_path}/{name}' for option, name in NAMES.items()]


def stopping(monkeypatch, batches, error=KeyboardInterrupt):
    """`generate` raises after so many batches."""
    plain, done = run.generate, []

    def generate(*arguments):
        if len(done) == batches:
            raise error
        done.append(1)
        return plain(*arguments)

    monkeypatch.setattr(run, 'generate', generate)


@pytest.mark.parametrize('error',
                         [OSError('no space'), BrokenPipeError(), UnicodeEncodeError('ascii', 'x', 0, 1, 'no')])
def test_a_print_that_fails_loses_no_file(folder, tmp_path, error):
    whole, _ = sample(folder, *FEW)

    def say(line):
        raise error

    with pytest.raises(type(error)):
        sample(folder, *FEW, *files(tmp_path), '--use_verbose_logging=True', say=say)
    assert (tmp_path / 'output_file').read_text() == '\n\n'.join(whole.texts) + '\n'
    assert json.loads((tmp_path / 'save_json').read_text())['texts'] == whole.texts
    assert '<script>' in (tmp_path / 'save_html').read_text()


def test_files_are_saved_before_the_first_text_is_printed(folder, tmp_path):
    there = []
    sample(folder, *FEW, *files(tmp_path),
           say=lambda line: there.append({path.name for path in tmp_path.iterdir()}) if '--- sample' in line else None)
    assert there == [set(NAMES.values())] * 5


def test_a_print_that_fails_ends_a_run_that_writes_no_file(folder, monkeypatch):
    stopping(monkeypatch, 0, AssertionError)

    def say(line):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        sample(folder, *FEW, '--use_verbose_logging=True', say=say)


@pytest.mark.parametrize('error', [KeyboardInterrupt, UserError('broken'), MemoryError])
def test_what_was_finished_is_kept(folder, tmp_path, monkeypatch, error):
    whole, _ = sample(folder, *FEW)
    stopping(monkeypatch, 2, error)
    said = []
    with pytest.raises(error if isinstance(error, type) else type(error)):
        sample(folder, *FEW, *files(tmp_path), say=said.append)
    assert (tmp_path / 'output_file').read_text() == '\n\n'.join(whole.texts[:4]) + '\n'
    saved = json.loads((tmp_path / 'save_json').read_text())
    assert saved['texts'] == whole.texts[:4] and len(saved['protected']) == 4
    assert {one['sample'] for step in saved['steps'] for one in step['samples']} == {0, 1, 2, 3}
    assert said[-1] == '4 of 5 samples were finished' and whole.texts[3] in said and whole.texts[4] not in said
    assert {path.name for path in tmp_path.iterdir()} == set(NAMES.values())


def test_a_batch_that_was_begun_leaves_no_trace(folder, tmp_path, monkeypatch):
    """The interrupt comes in the middle of the third batch."""
    def stop(step):
        if step.event == 'remask' and int(step.rows[0]) == 4:
            raise KeyboardInterrupt

    plain = run.generate
    monkeypatch.setattr(run, 'generate', lambda *given: plain(*given[:-1], lambda step: (given[-1](step), stop(step))))
    with pytest.raises(KeyboardInterrupt):
        sample(folder, *FEW, *files(tmp_path))
    saved = json.loads((tmp_path / 'save_json').read_text())
    assert {one['sample'] for step in saved['steps'] for one in step['samples']} == {0, 1, 2, 3}


def test_nothing_finished_changes_no_file(folder, tmp_path, monkeypatch):
    stopping(monkeypatch, 0)
    (tmp_path / 'output_file').write_text('mine')
    with pytest.raises(KeyboardInterrupt):
        sample(folder, *FEW, *files(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ['output_file']
    assert (tmp_path / 'output_file').read_text() == 'mine'


def test_a_disk_that_is_full_at_the_first_batch_changes_no_file(folder, tmp_path, monkeypatch):
    class FullFile(outputs.NewFile):
        def __init__(self, path):
            super().__init__(path)
            self.file.close()
            self.file = open('/dev/full', 'wb', buffering=0)

    monkeypatch.setattr(outputs, 'NewFile', FullFile)
    (tmp_path / 'output_file').write_text('mine')
    with pytest.raises(UserError, match='free some space'):
        sample(folder, *FEW, f'--output_file={tmp_path}/output_file')
    assert [path.name for path in tmp_path.iterdir()] == ['output_file']
    assert (tmp_path / 'output_file').read_text() == 'mine'


def test_one_file_that_cannot_be_saved_keeps_no_other_from_it(folder, tmp_path, monkeypatch):
    def fail(*_):
        raise UserError('cannot write the run')

    monkeypatch.setattr(outputs, 'write_whole', fail)
    said = []
    with pytest.raises(UserError, match='cannot write the run'):
        sample(folder, *FEW, *files(tmp_path), say=said.append)
    assert {path.name for path in tmp_path.iterdir()} == {'output_file', 'save_html', 'save_gif.gif'}
    assert sum('--- sample' in line for line in said) == 5


def test_many_samples_go_out_as_they_are_finished(folder, tmp_path, monkeypatch):
    whole, said = sample(folder, *FEW)
    monkeypatch.setattr(outputs, 'KEPT', 4)
    seen = []

    def say(line):
        parts = list(tmp_path.glob('*.tmp'))
        seen.append((line, parts[0].read_text() if parts else None))

    made, _ = sample(folder, *FEW, f'--output_file={tmp_path}/texts', say=say)
    assert made.batches == [] and made.samples == 5 and made.waves == whole.waves
    assert (tmp_path / 'texts').read_text() == '\n\n'.join(whole.texts) + '\n'
    first = [line for line, _ in seen].index(whole.texts[0])
    assert seen[first][1] == '\n\n'.join(whole.texts[:2])  # two are written, and told before the third is made
    timeless = [line for line in said.split('\n') if 'tokens/s' not in line]
    told = [line for line, _ in seen if line in timeless or '\n' in line]
    assert '\n'.join(told).startswith(said[:said.index('\n---\n')])


def test_a_milliard_of_samples_needs_no_memory_before_it_begins(folder, tmp_path, monkeypatch):
    stopping(monkeypatch, 1)
    said = []
    with pytest.raises(KeyboardInterrupt):
        sample(folder, '--num_samples=1000000000', '--batch_size=3', '--iterations=2',
               f'--output_file={tmp_path}/texts',
               say=said.append)
    assert said[-1] == '3 of 1000000000 samples were finished'
    assert len((tmp_path / 'texts').read_text()) == 3 * 16 + 2 * 2 + 1


def test_scores_are_the_means_that_the_report_tells(folder, monkeypatch):
    monkeypatch.setattr(quality_metrics, 'judge_scores', lambda judge, tokens: tokens.double().mean(1) / 10)
    for metric in ('self', 'judge'):
        made, said = sample(folder, *FEW, f'--quality_metric={metric}',
                            *(['--judge_checkpoint_name=judge.pt'] if metric == 'judge' else []))
        scores = made.scores
        assert len(scores) == 5 and len(set(scores)) > 1
        assert f'{math.fsum(scores) / 5:.3f}' in said.split('\n---\n')[1]


def test_a_judge_without_numbers_is_refused(folder, monkeypatch):
    monkeypatch.setattr(quality_metrics, 'judge_scores', lambda judge, tokens: torch.full((len(tokens),), torch.nan))
    with pytest.raises(UserError, match="judge's scores are not numbers"):
        sample(folder, *FEW, '--quality_metric=judge', '--judge_checkpoint_name=judge.pt')
