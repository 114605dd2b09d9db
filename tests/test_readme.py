"""The README's commands, run with small settings, and its links."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
COMMANDS = [line for block in re.findall(r'```sh\n(.*?)```', README, re.S) for line in block.strip().splitlines()]
SMALL = {
    'train.py': ('--n_layer=1 --n_head=2 --n_embd=16 --block_size=64 --batch_size=4 --max_iters=6 --warmup_iters=1 '
                 '--start_sampler_iteration=1 --start_critic_iteration=2 --end_critic_iteration=4 --eval_interval=3 '
                 '--eval_iters=1 --sample_length=16 --compile=False --device=cpu').split(),
    'sample.py': ['--num_samples=1', '--device=cpu'],
    'evaluate.py': ['--windows=4', '--device=cpu'],
}


def test_the_readme_names_the_main_commands():
    main = ['pip install -r requirements.txt', 'python train.py config/train_char_diffusion_sampler.py',
            'python sample.py --sampling_method=diffusion']
    assert COMMANDS[:3] == main and 'pip install -r requirements.txt && pytest' in COMMANDS


def run_here(words, monkeypatch):
    """The exit status of `python words ...` in this process, which has torch already."""
    monkeypatch.setattr(sys, 'argv', words)
    with pytest.raises(SystemExit) as done:
        runpy.run_path(words[0], run_name='__main__')
    return done.value.code


def test_every_command_runs_with_small_settings(tmp_path, small_corpus, monkeypatch):
    """In the README's order, in one folder, on a made-up corpus in place of the plays."""
    text = small_corpus.vocabulary.decode(small_corpus.tokens('train')[:4000].tolist())
    (tmp_path / 'my.txt').write_text(text + '\nTo be, or not to be ' + 'Once upon a time ' * 30)
    for name in ('config', 'core', 'model.py', 'sample_utils.py', 'configurator.py', 'train.py', 'sample.py',
                 'evaluate.py'):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / 'data' / 'custom').mkdir(parents=True)
    prepare = (ROOT / 'data' / 'custom' / 'prepare.py').read_text()
    (tmp_path / 'data' / 'custom' / 'prepare.py').write_text(prepare)
    assert run_here(['data/custom/prepare.py', 'my.txt'], monkeypatch) == 0
    for command in COMMANDS:
        if command.startswith('pip'):
            continue
        words = shlex.split(command)
        script = next(word for word in words if word.endswith('.py') and '/' not in word or 'prepare.py' in word)
        extra = SMALL.get(script, [])
        if script == 'train.py' and '--dataset=custom' not in words:
            extra = [*extra, '--dataset=custom']
        if '--iterations' not in command and script == 'sample.py':
            extra = [*extra, '--iterations=4']
        if words[0] == 'python':
            assert run_here([*words[1:], *extra], monkeypatch) == 0, command
            continue
        assert words[0] == 'torchrun', command
        result = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', *words[1:], *extra],
                                env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, f'{command}\n{result.stdout[-1500:]}\n{result.stderr[-1500:]}'


@pytest.mark.parametrize('page', sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / 'README.md',
                                                                                     *(ROOT / 'docs').rglob('*.md')]))
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)#]+)\)', (ROOT / page).read_text()):
        if '://' not in target:
            assert ((ROOT / page).parent / target).exists(), f'{page} links to {target}'


def section(title):
    """The text of a section of the README."""
    return README.split(f'\n## {title}\n')[1].split('\n## ')[0]


def test_the_tree_lists_every_folder_and_top_file():
    listed = [line.split()[0] for line in section('Files').split('```')[1].strip().splitlines()]
    known = subprocess.run(['git', 'ls-files', '--cached', '--others', '--exclude-standard'], cwd=ROOT,
                           capture_output=True, text=True).stdout.split()
    if not known:
        pytest.skip('git does not know this folder')
    folders = {f'{parent}/' for path in known for parent in Path(path).parents if str(parent) != '.'}
    top = {path for path in known if '/' not in path and not path.startswith('.')}
    assert sorted(listed) == sorted(folders | top)


def test_what_is_touched_for_a_change_exists():
    rows = [line.strip('| ').split(' | ') for line in section('Where to change what').splitlines() if '.py' in line]
    assert [row[0] for row in rows] == ['a noise schedule', 'a guide of remasking', 'a policy', 'a head',
                                        'a kind of sampler head', 'a training kind', 'a quality metric',
                                        'a number in the training log', 'a measure', 'a corpus']
    for _, touched, test in rows:
        paths = re.findall(r'`([\w/]+\.py)`', touched)
        assert 1 <= len(paths) <= 3 and all((ROOT / path).is_file() for path in (*paths, test.strip('`'))), touched


def test_the_fault_matrix_names_tests_that_exist():
    """Each row of docs/faults.md names files of tests, and parts of the names of tests in them."""
    tests = {path.stem: re.findall(r'def (test_\w+)', path.read_text()) for path in ROOT.glob('tests/**/test_*.py')}
    rows = [line for line in (ROOT / 'docs/faults.md').read_text().splitlines() if line.startswith('|') and '`test_' in line]
    assert len(rows) > 50
    for row in rows:
        for named in row.rstrip(' |').rpartition('|')[2].split(';'):
            file, _, parts = named.strip().partition(':')
            for part in (part.strip().split(' (')[0] for part in parts.split(',') if part.strip()):
                assert any(part in name for name in tests[file.strip('`')]), named
            assert tests[file.strip('`')], named
