"""Every output file that cannot be written is found before any work is done, and nothing that is there changes."""

import os

import pytest

from configurator import configure
from core.common import files
from core.common.errors import UserError
from core.sampling import outputs, run
from core.sampling.options import SampleConfig
from helpers.sampling import sample


def problems(*arguments):
    return outputs.output_problems(configure(SampleConfig, list(arguments)).config)


def test_the_check_comes_before_the_work(tmp_path, monkeypatch):
    def load(*_):
        raise AssertionError('the checkpoint was read')

    monkeypatch.setattr(run, 'load', load)
    with pytest.raises(UserError, match='output_file') as error:
        sample(tmp_path, '--output_file=', f'--save_json={tmp_path}', f'--save_html={tmp_path}/none/page.html')
    assert [line.split()[0] for line in str(error.value).split('\n')] == ['output_file', 'save_json', 'save_html']


@pytest.mark.parametrize('option', outputs.OUTPUTS)
@pytest.mark.parametrize('name, words', [
    ('', 'a file needs a name'), ('.', 'it is a folder'), ('folder', 'it is a folder'),
    ('none/file', 'the folder none does not exist'), ('file/below', 'what should be its folder is a file'),
    ('x' * 300, 'shorten the name'), ('circle', 'leads to itself')])
def test_paths_that_cannot_be_written(tmp_path, monkeypatch, option, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'circle').symlink_to('circle')
    found, = problems(f'--{option}={name}')
    assert found.startswith(f'{option} is {name!r}, but ') and words in found
    assert {path.name for path in tmp_path.iterdir()} == {'folder', 'file', 'circle'}
    assert (tmp_path / 'file').read_text() == 'mine'


def test_a_file_that_is_write_protected(tmp_path, monkeypatch):
    """Whoever runs this as root may write everything, so the system's answer is given here."""
    (tmp_path / 'file').write_text('mine')
    monkeypatch.setattr(files.os, 'access', lambda path, mode: False)
    assert 'write-protected' in problems(f'--output_file={tmp_path}/file')[0]


def test_a_folder_that_takes_no_file(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr('builtins.open', refuse)
    found, = problems(f'--save_json={tmp_path}/file')
    monkeypatch.undo()
    assert 'Permission denied; choose a folder you may write to' in found


def test_paths_that_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'link').symlink_to('file')
    os.mkfifo(tmp_path / 'pipe')
    for name in ('new', 'file', 'link', 'pipe', '/dev/null', '/dev/stdout'):
        assert problems(f'--output_file={name}') == [], name
    assert problems('--output_file=/dev/null', '--save_json=/dev/null') == []
    assert (tmp_path / 'file').read_text() == 'mine' and not (tmp_path / 'new').exists()


def test_one_file_for_two_outputs_or_for_the_checkpoint(tmp_path):
    (tmp_path / 'ckpt_best.pt').write_text('')
    (tmp_path / 'link').symlink_to('new')
    assert 'save_json names the same file' in problems(f'--save_json={tmp_path}/new', f'--save_html={tmp_path}/link')[0]
    assert 'that is a checkpoint' in problems(f'--out_dir={tmp_path}',
                                                             f'--output_file={tmp_path}/./ckpt_best.pt')[0]


def test_every_step_of_very_many_samples_is_refused(tmp_path):
    found, = problems(f'--save_json={tmp_path}/run', '--num_samples=10001')
    assert 'num_samples is 10001' in found and '10000' in found
    assert problems(f'--save_json={tmp_path}/run', '--num_samples=10000') == []
    assert problems(f'--output_file={tmp_path}/texts', '--num_samples=10001') == []
