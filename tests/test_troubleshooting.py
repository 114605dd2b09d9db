"""docs/troubleshooting.md: the program really says what the page quotes."""

import builtins
import importlib.util
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import core.trainer
import sample
import train
from core.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from core.checkpoints.run_folder import RunFolder
from core.common.errors import UserError, run_script
from core.common.runtime import Runtime
from core.data.learning import character_vocabulary
from core.data.text_figures import Spread, TextFigures
from core.data.writing import write_corpus
from helpers.runs import SMALL
from helpers.sampling import write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / 'docs' / 'troubleshooting.md').read_text(encoding='utf-8')
SYMPTOMS = [row.split(' | ')[0] for row in re.findall(r'^\| (?!you see|then)(.*)', PAGE.split('\n## The four')[0], re.M)]
MESSAGES = [span for symptom in SYMPTOMS for span in re.findall('`([^`]+)`', symptom) if len(span) > 20]
SHORT = ('--max_iters=5', '--eval_interval=2', '--sample_length=0')  # saved twice
PROVOKED: dict[str, Callable] = {}  # by how the message begins


def says(start):
    """The decorated function makes the program say the message that begins so; it returns what was printed."""
    def keep(function):
        PROVOKED[start] = function
        return function

    return keep


@pytest.fixture
def person(tmp_path, data_here, small_corpus, monkeypatch, capsys, failing_decoration):
    """Somebody at the command line, in a folder with the corpus 'tiny'. train, sample and run give what it printed."""
    monkeypatch.setattr(core.trainer.Run, 'draw_curve', lambda self: None)
    monkeypatch.setattr(Runtime, 'matrix_rate', lambda self: (1.0, 'nothing'))
    (tmp_path / 'config').symlink_to(ROOT / 'config')

    def run(main, *arguments):
        refused = ''
        try:
            main(list(arguments))
        except UserError as error:
            refused = str(error)
        heard = capsys.readouterr()
        return f'{heard.out}\n{heard.err}\n{refused}'

    def checkpoint(name='ckpt_best.pt', figures=None, **changes):
        (tmp_path / 'out').mkdir(exist_ok=True)
        write_checkpoint(tmp_path / 'out' / name, **changes)
        if figures is not None:
            held = load_checkpoint(tmp_path / 'out' / name)
            held.extra = {'text_figures': figures.to_builtins()}
            save_checkpoint(tmp_path / 'out' / name, held.to_payload())

    return SimpleNamespace(
        run=run, train=lambda *arguments: run(train.main, *SMALL, *arguments), checkpoint=checkpoint, out=Path('out'),
        sample=lambda *arguments: run(sample.main, '--device=cpu', '--iterations=2', *arguments), data=data_here,
        patch=monkeypatch, heard=capsys.readouterr)


# Before the first run -------------------------------------------------------------------------------------------------

@says('no such option')
def misspelt_option(person):
    return person.train('--max_iter=3')


@says('there is no such config file')
def misspelt_config(person):
    return person.train('config/train_char_difusion.py')


@says('noise_schedule is')
def misspelt_value(person):
    return person.train('--noise_schedule=cosinus')


@says('unknown dataset')
def misspelt_corpus(person):
    return person.train('--dataset=shakespeare_charr')


@says('pip could not fetch')
def no_index(person):
    def fails(command, **options):
        raise subprocess.CalledProcessError(1, command, stderr='no connection')

    person.patch.setattr(importlib.util, 'find_spec', lambda name: True)
    person.patch.setattr(subprocess, 'run', fails)
    return person.train('--dataset=shakespeare_char')


@says('the text of')
def short_text(person):
    Path('my.txt').write_text('a')
    return person.run(runpy.run_path(str(ROOT / 'data' / 'custom' / 'prepare.py'))['main'], 'my.txt')


@says('...train.bin has')
def long_context(person):
    return person.train('--block_size=100000')


@says('...meta.pkl cannot be used')
def damaged_corpus(person):
    path = person.data / 'tiny' / 'meta.pkl'
    path.write_bytes(path.read_bytes()[:-20])
    return person.train()


# The machine ----------------------------------------------------------------------------------------------------------

@says("device is 'cuda'")
def no_gpu(person):
    person.patch.setattr(torch.cuda, 'is_available', lambda: False)
    return person.train('--device=cuda')


@says("dtype is 'float16'")
def half_on_a_processor(person):
    return person.train('--dtype=float16')


@says('memory ran out')
def no_memory(person):
    """The allocator itself refuses."""
    person.checkpoint()
    person.patch.setattr('core.sampling.run.generate', lambda *given: torch.empty(2 ** 50))
    person.patch.setattr(sys, 'argv', ['sample.py', '--device=cpu'])
    with pytest.raises(SystemExit) as done:
        run_script(sample.main, lower=sample.MEMORY)
    assert done.value.code == 2
    return person.heard().err


@says('compiling this stage')
def compiling(person):
    person.patch.setattr('core.common.runtime.compile_problem', lambda device: None)
    person.patch.setattr(torch, 'compile', lambda function, **named: function)
    return person.train('--compile=True')


@says('compile False')
def no_compiler(person):
    person.patch.setattr('core.common.runtime.has_compiler', lambda: False)
    return person.train('--compile=True')


@says('W&B is not available')
def no_wandb(person):
    person.patch.setitem(sys.modules, 'wandb', None)
    return person.train('--wandb_log=True')


# Training -------------------------------------------------------------------------------------------------------------

@says('... holds an earlier run')
def earlier_run(person):
    person.train(*SHORT)
    return person.train()


@says('... is in use by another run')
def folder_in_use(person):
    with RunFolder('out'):
        return person.train()


@says('... holds files that no run')
def folder_of_others(person):
    person.out.mkdir()
    (person.out / 'thesis.txt').write_text('mine')
    return person.train()


def diverge(person, *arguments):
    person.patch.setattr(core.trainer, 'MOST_IN_A_ROW', 3)
    return person.train('--learning_rate=1e38', '--optimizer=adamw', '--warmup_iters=0', '--decay_lr=False', *arguments)


@says('iter ...: ... more skipped')
@says('the last ... steps until iteration')
def divergence(person):
    return diverge(person, '--eval_interval=100')


@says('validation at iteration')
def divergence_at_validation(person):
    return diverge(person, '--eval_interval=2', '--ema_decay=0')


@says('the critic head would begin')
def late_critic(person):
    return person.train('--max_iters=5')


# Going on with a run --------------------------------------------------------------------------------------------------

@says('there is no run folder')
def nothing_to_resume(person):
    return person.train('--init_from=resume')


@says('cannot resume with another model')
def other_model(person):
    person.train(*SHORT)
    return person.train('--init_from=resume', '--n_layer=2')


@says('cannot resume with another corpus')
def other_corpus(person):
    person.train(*SHORT)
    text = 'to be or not, to king\nMARY:\nqueen ' * 700
    old = Path('data/tiny/train.bin').stat().st_size
    write_corpus(person.data / 'tiny', character_vocabulary(text), {'train': text[:20000], 'val': text[20000:]}, 'other',
                 overwrite=True)
    assert Path('data/tiny/train.bin').stat().st_size != old
    return person.train('--init_from=resume', '--max_iters=9')


@says('... holds weights to sample from')
def weights_alone(person):
    person.train(*SHORT)
    (person.out / 'ckpt_best.pt').replace(person.out / 'ckpt.pt')
    return person.train('--init_from=resume')


@says('the run in ... is finished')
def finished(person):
    person.train(*SHORT)
    return person.train('--init_from=resume', *SHORT)


@says('...ckpt.pt (... bytes) is damaged')
def damaged_latest(person):
    person.train(*SHORT)
    path = person.out / 'ckpt.pt'
    path.write_bytes(path.read_bytes()[:-100])
    return person.train('--init_from=resume', *SHORT)


# Sampling -------------------------------------------------------------------------------------------------------------

@says('there is no checkpoint out/ckpt_best.pt')
def no_checkpoint(person):
    return person.sample()


@says('there is no checkpoint ...; out has')
def other_name(person):
    person.checkpoint('ckpt.pt')
    return person.sample('--checkpoint_name=big_boy2.pt')


@says('... has no format version')
def older_format(person):
    person.out.mkdir()
    torch.save({'model': {}, 'model_args': {}, 'iter_num': 1, 'config': {}}, person.out / 'ckpt_best.pt')
    return person.sample()


@says('top_p does not apply')
def unused_option(person):
    person.checkpoint()
    return person.sample('--sampling_method=multinomial', '--top_p=0.9')


@says('the sampler head is ignored')
def young_head(person):
    person.checkpoint(add_sampler_head=True, start_sampler_iteration=200)
    return person.sample()


@says('the text has 1 kind of character')
def unknown_letter(person):
    person.checkpoint()
    return person.sample('--start_text=aé')


@says('the texts repeat themselves')
def repeating(person):
    person.checkpoint(figures=TextFigures(16, Spread(2.0, 0.1), Spread(0.1, 0.1)))
    return person.sample('--temperature=0')


@says('the texts are wilder')
def wild(person):
    person.checkpoint(figures=TextFigures(16, Spread(0.5, 0.1), Spread(0.1, 0.5)))
    return person.sample()


@says('all ... samples are the same text')
def greedy(person):
    person.checkpoint()
    return person.sample('--temperature=0')


@says('model is given, but reading it needs')
def no_transformers(person):
    own_import = builtins.__import__

    def refuse(name, *rest):
        if name.split('.')[0] == 'transformers':
            raise ImportError('No module named transformers')
        return own_import(name, *rest)

    person.patch.setattr(builtins, '__import__', refuse)
    return person.sample('--model=folder')


# The page -------------------------------------------------------------------------------------------------------------

def quoted(message):
    """Matches what the program says where the page quotes it; ... stands for anything on the line."""
    return re.escape(message).replace(re.escape('...'), '.*')


def provoker_of(message):
    [found] = [function for start, function in PROVOKED.items() if message.startswith(start)]
    return found


@pytest.mark.filterwarnings('ignore::RuntimeWarning')
@pytest.mark.parametrize('message', MESSAGES, ids=[message[:40] for message in MESSAGES])
def test_the_program_says_what_the_page_quotes(message, person):
    said = provoker_of(message)(person)
    assert re.search(quoted(message), said), said


def test_every_provocation_is_of_a_message_of_the_page():
    assert [start for start in PROVOKED if sum(message.startswith(start) for message in MESSAGES) != 1] == []
    assert len(MESSAGES) == len(PROVOKED) > 35


def test_a_quotation_that_the_program_does_not_say_is_seen():
    assert re.search(quoted('out ... is (...)'), 'error: out of paper is (bad)')
    assert not re.search(quoted('the run in ... is finished'), 'the run in out is over')
    assert not re.search(quoted('a (b) c'), 'a b c')


def test_each_entry_of_the_design_documents_is_there():
    entries = [row.split(' | ')[0] for row in re.findall(r'^\| (?!then)(.*)', PAGE.split('\n## The four')[1], re.M)]
    assert [entry.strip('"') for entry in entries] == [
        'Checkpoint not found', 'Vocabulary file not found', 'Memory issues', 'Poor generation quality']
