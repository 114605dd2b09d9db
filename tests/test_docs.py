"""The pages in docs/: their length, their words, and every command in them."""

import argparse
import re
import runpy
import shlex
from pathlib import Path

import pytest

import core.bench.report
import core.bench.scaling_run
import core.data.openwebtext
import core.data.own_text
import core.data.prepare
import core.evaluation.run
from configurator import configure
from core.bench.options import BenchConfig
from core.checkpoints.__main__ import main as checkpoints
from core.common.errors import UserError
from core.data.command_line import read_arguments
from core.evaluation.harness.options import HarnessConfig
from core.evaluation.options import EvaluateConfig
from core.merging import main as merging
from core.options import TrainConfig
from core.sampling.options import SampleConfig
from helpers.plain_words import hard_words
from helpers.tour import commands_of_tour

ROOT = Path(__file__).resolve().parent.parent
MOST_LINES = 150
PAGES = sorted(path for path in (ROOT / 'docs').glob('*.md') if path.name != 'LOG.md')  # the log grows; tables: docs/results/
SCRIPTS = {'train.py': TrainConfig, 'sample.py': SampleConfig, 'evaluate.py': EvaluateConfig, 'bench.py': BenchConfig}


class Parsed(Exception):
    """Raised in place of the work, once the arguments of a command are read."""


def without_code(text: str) -> str:
    """The page with its blocks of code empty, line for line."""
    return re.sub(r'^```.*?^```', lambda block: '\n' * block[0].count('\n'), text, flags=re.S | re.M)


def commands_of(text: str) -> list[str]:
    """The lines of all `sh` blocks, without remarks; a line that ends with a backslash goes on in the next one."""
    lines = [line for block in re.findall(r'^```sh\n(.*?)^```', text, re.S | re.M)
             for line in block.replace('\\\n', ' ').splitlines()]
    return [line for line in lines if line.strip() and not line.startswith('#')]


COMMANDS = [(path.name, command) for path in PAGES for command in commands_of(path.read_text(encoding='utf-8'))]
COMMANDS += [('tour.ipynb', f'python {command}') for command in commands_of_tour()]


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.name)
def test_a_page_is_short_and_plain(path):
    text = path.read_text(encoding='utf-8')
    lines = text.splitlines()
    assert len(lines) <= MOST_LINES, f'{len(lines)} lines; a page answers one question, and tables live in docs/results/'
    assert lines[0].startswith('# ') and not lines[1] and lines[2], 'a title, then a line that says what the page answers'
    assert not hard_words(without_code(text))
    assert not [line for line in without_code(text).splitlines() if re.match(r' {4}(python|torchrun|pytest|pip) ', line)], \
        'commands belong in sh blocks, where they are checked'


def test_hard_words_are_found_and_plain_ones_are_not():
    for hard in ('It is written anew.', 'Beside it:', 'what is said', 'the step behind the first', 'It stands in results'):
        assert hard_words(hard)
    for plain in ('It stands for a step.', 'stand-alone', 'the idea behind it', 'besides', '```\nbeside\n```', 'As we said.'):
        assert not hard_words(without_code(plain))


def prepare_arguments(arguments, *rest, **named):
    read_arguments(arguments, *rest, **named)
    raise Parsed


def parse_arguments(parser, arguments):
    parser.parse_known_args(arguments)  # exits where one is missing
    if parser.parse_known_args(arguments)[1]:
        parser.error('unknown')
    raise Parsed


def read_options(script: str, words: list[str]) -> None:
    """Options, config files and what excludes each other, as the scripts read them."""
    if words[:1] == ['--compare']:
        assert script == 'bench.py' and len(words) == 3
        return
    if '--help' in words:
        return
    found = configure(SCRIPTS[script], words, resolve_device=lambda asked: 'cpu')
    problems = []
    if script == 'evaluate.py':
        problems = core.evaluation.run.option_problems(found.config, found.explicit)
    elif script == 'bench.py' and not found.config.gpu_checks:
        module = core.bench.scaling_run if found.config.scaling else core.bench.report
        problems = module.option_problems(found.config, found.explicit)
    if problems:
        raise UserError('; '.join(problems))


def read_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise what the command's own reading of its arguments raises."""
    while re.match(r'[A-Z_]+=', words[0]):  # the environment of a command
        words = words[1:]
    program, *words = words
    if program == 'torchrun':
        place = next(place for place, word in enumerate(words) if word.endswith('.py'))
        return read_options(words[place], words[place + 1:])
    if program == 'pytest':
        paths = [word.partition('::')[0] for word in words if word.startswith('tests')]
        return paths and [next(ROOT.glob(path)) for path in paths]
    if program in ('pip', 'git', 'cd'):
        return None
    assert program == 'python', program
    with pytest.raises(Parsed):
        if words[0].endswith('prepare.py'):
            for module in (core.data.own_text, core.data.openwebtext, core.data.prepare):
                monkeypatch.setattr(module, 'read_arguments', prepare_arguments)
            runpy.run_path(str(ROOT / words[0]))['main'](words[1:])
        elif words[0] == '-m' and words[1] in ('core.checkpoints', 'core.merging'):
            monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_arguments)
            {'core.checkpoints': checkpoints, 'core.merging': merging}[words[1]](words[2:])
        elif words[:2] == ['-m', 'core.evaluation.harness']:
            options = dict(zip(words[3::2], words[4::2]))
            assert words[2] == 'run' and options['--model'] == 'masked_diffusion' and '--tasks' in options
            configure(HarnessConfig, [f'--{pair}' for pair in options['--model_args'].split(',')])
            raise Parsed
        elif words[:2] == ['-m', 'core.study.blocks']:
            assert (ROOT / words[2]).exists() and len(words) == 3
            raise Parsed
        else:
            read_options(words[0], words[1:])
            raise Parsed


@pytest.mark.parametrize('page, command', COMMANDS, ids=[f'{page}-{number}' for number, (page, _) in enumerate(COMMANDS)])
def test_every_command_is_understood(page, command, monkeypatch):
    """Scripts, options, values and config files exist. That they work is for the scripts' own tests to show."""
    monkeypatch.chdir(ROOT)
    read_command(shlex.split(command, comments=True), monkeypatch)


@pytest.mark.parametrize('command', [
    'python train.py config/absent.py', 'python train.py --max_iter=3', 'python sample.py --iterations=many',
    'python evaluate.py --measure=nell', 'python bench.py --scaling --groups=training', 'python data/custom/prepare.py --nam=x',
    'python -m core.checkpoints look out/ckpt.pt',
    'python -m core.evaluation.harness run --model masked_diffusion --model_args out_dri=out --tasks x', 'python -m core.merging one.pt', 'pytest tests/test_absent.py',
    'torchrun --nproc_per_node=2 train.py --ranks=2', 'ruby train.py'])
def test_a_wrong_command_is_noticed(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((UserError, SystemExit, StopIteration, AssertionError)):
        read_command(shlex.split(command), monkeypatch)
