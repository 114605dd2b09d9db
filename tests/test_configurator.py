"""Config files and command lines: what is accepted, what every refusal says, and that nothing is ever executed."""

import importlib
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Literal, Optional

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from configurator import bound_problems, configure, help_text, option
from core.common.errors import UserError, raise_problems


class Size(StrEnum):
    SMALL, LARGE = 'small', 'large'


@dataclass(frozen=True)
class Options:
    out_dir: str = option('out', 'folder of the run')
    device: str = option('auto', 'auto, cpu or cuda')
    n_layer: int = option(6, 'layers')
    n_embd: int = option(384, 'channels')
    max_iters: int = option(5000, 'iterations')
    lr_decay_iters: int = option(5000, 'iterations')
    learning_rate: float = option(1e-3, 'per step')
    compile: bool = option(True, 'torch.compile')
    iterations: int = option(50, 'predictions', alias='diffusion_iterations')
    top_k: Optional[int] = option(None, 'tokens')
    masking_ratios: list[float] | None = option(None, 'shares')
    betas: list[float] = option([0.9, 0.95], 'two numbers')
    schedule: Literal['linear', 'cosine'] = option('linear', 'form')
    size: Size = option(Size.SMALL, 'of the work')
    report: str | None = option(None, 'page', bare='docs/results.md')
    baseline: bool = option(False, 'the yardstick too', bare='True')


def on(device):
    return lambda asked: device if asked == 'auto' else asked


def written(tmp_path, text, name='x.py'):
    path = tmp_path / name
    path.write_text(text, encoding='utf-8')
    return str(path)


def from_file(tmp_path, text, *arguments, **keywords):
    return configure(Options, [written(tmp_path, text), *arguments], **keywords)


def refusals(arguments, **keywords):
    with pytest.raises(UserError) as caught:
        configure(Options, arguments, **keywords)
    return str(caught.value).split('\n')


def test_defaults_and_fresh_lists():
    first, second = configure(Options, []), configure(Options, [])
    assert first.config == Options() and first.explicit == {} and first.notes == []
    assert first.config.betas is not second.config.betas


def test_a_choice_may_be_an_enum(tmp_path):
    """The members' values are what a person writes; the option is the member."""
    for found in (configure(Options, ['--size=large']), from_file(tmp_path, "size = 'large'"),
                  configure(Options, [], defaults={'size': 'large'}, source='config.json'),
                  configure(Options, [], defaults={'size': Size.LARGE}, source='config.json')):
        assert found.config.size is Size.LARGE
    assert "it must be one of 'small', 'large'; did you mean 'large'?" in refusals(['--size=larg'])[0]
    assert '--size=small' in help_text(Options) and 'small|large' in help_text(Options)


def test_an_option_may_be_given_bare():
    found = configure(Options, ['--report', '--n_layer=2', '--baseline'])
    assert found.config == Options(report='docs/results.md', n_layer=2, baseline=True)
    assert found.explicit == dict.fromkeys(('report', 'n_layer', 'baseline'), 'command line')
    assert configure(Options, ['--report=x.md', '--baseline=False']).config == Options(report='x.md')
    assert configure(Options, ['--report', '--report=x.md']).config.report == 'x.md'  # the later one wins
    assert 'here --report=x.md' in refusals(['--report', 'x.md'])[0]
    assert 'here --compile=VALUE' in refusals(['--compile'])[0] and '--n_layer=2' in refusals(['--n_layer', '2'])[0]
    assert '--report=VALUE' in refusals(['-report'])[0]
    assert '--report=None' in help_text(Options) and '(--report alone: docs/results.md)' in help_text(Options)


def test_the_command_line_reads_each_type():
    config = configure(Options, ['--out_dir=a=b c', '--n_layer=1_2', '--learning_rate=3', '--compile=false',
                                 '--top_k=7',
                                 '--masking_ratios=[.5, 1/4, -0]', '--schedule=cosine', '--device=']).config
    assert config == Options(out_dir='a=b c', n_layer=12, learning_rate=3.0, compile=False, top_k=7, device='',
                             masking_ratios=[0.5, 0.25, 0.0], schedule='cosine')
    assert isinstance(config.learning_rate, float)
    assert configure(Options, ['--top_k=3', '--top_k=None']).config.top_k is None


@pytest.mark.parametrize('argument, said', [
    ('--n_layer=1.0', 'whole number'), ('--n_layer=True', 'whole number'), ('--n_layer=', 'whole number'),
    ('--n_layer=1__2', 'whole number'), ('--n_layer=99999999999999999999999', '2**64'), ('--n_layer=None',
    'whole number'),
    ('--learning_rate=nan', 'finite'), ('--learning_rate=1e999', 'finite'), ('--learning_rate=fast', 'finite'),
    ('--compile=1', 'True or False'), ('--compile=yes', 'True or False'), ('--masking_ratios=[1, x]', 'list of finite'),
    ('--masking_ratios=0.5', 'list of finite'), ('--masking_ratios=[9**9**9]', 'list of finite'),
    ('--masking_ratios=[1e999]', 'list of finite'), ('--masking_ratios=' + '[' * 5000, 'list of finite'),
    ('--masking_ratios=[__import__("os")]', 'list of finite'), ('--schedule=cosin', "did you mean 'cosine'"),
    ('--out_dir=\udce9', 'broken UTF-8'), ('--out_dir=a\0b', 'null'),
    ('--lerning_rate=1', "did you mean 'learning_rate'"), ('--batch-sise=1', 'no such option'),
    ('--n-layer=1', "did you mean 'n_layer'"), ('--N_LAYER=1', "did you mean 'n_layer'"),
    ('--diffusion_iteration=3', "did you mean 'diffusion_iterations'"),
    ('--compile', '--compile=VALUE'), ('-n_layer=3', '--n_layer=3'), ('n_layer=3', '--n_layer=3'), ('-k',
    '--key=value'),
    ('--', '--key=value'), ('--=3', '--key=value'), ('nothing.py', 'no such config file'), ('n_layer',
    'no such config file'),
    ('', 'no such config file'), ('a\0b.py', 'no such config file'),
])
def test_a_wrong_argument_is_one_clear_line(argument, said):
    lines = refusals([argument])
    assert len(lines) == 1 and said in lines[0], lines


def test_a_value_after_a_space_is_one_mistake():
    assert refusals(['--n_layer', '3', '--top_k=5']) == [
        '--n_layer on the command line: options are written --key=value, here --n_layer=3']


def test_every_problem_is_listed_with_its_place(tmp_path):
    path = written(tmp_path, '"""About."""\nimport os\nn_layr = 4\n\nn_layer = 6 / 2\nlearning_rate = "x"\n')
    lines = refusals(['--top_k=a', path, '--compile=2'])
    assert [line.split(': ')[0] for line in lines] == [
        "--top_k='a' on the command line", "--compile='2' on the command line", f'{path}:2', f'{path}:3', f'{path}:5',
        f'{path}:6']
    assert 'an import' in lines[2] and "did you mean 'n_layer'" in lines[3] and 'use // to divide' in lines[4]
    assert "learning_rate = 'x'" in lines[5]


def test_precedence_and_where_each_value_came_from(tmp_path):
    first = written(tmp_path, 'n_layer = 1\nn_embd = 64 * n_layer\nschedule = "cosine"', 'first.py')
    second = written(tmp_path, '# differences\nn_layer = n_layer + 1\nmax_iters = 7\nlr_decay_iters = max_iters',
                     'second.py')
    result = configure(Options, ['--max_iters=100', first, '--max_iters=200', second])
    config = result.config
    assert (config.n_layer, config.n_embd, config.max_iters, config.lr_decay_iters) == (2, 64, 200, 200)
    assert result.explicit == {'max_iters': 'command line', 'n_layer': f'{second}:2', 'n_embd': f'{first}:2',
                               'schedule': f'{first}:3', 'lr_decay_iters': f'{second}:4'}
    assert configure(Options, [second, first]).config.n_layer == 1


def test_aliases_are_the_same_key_everywhere(tmp_path):
    result = from_file(tmp_path, 'diffusion_iterations = 20\nn_layer = diffusion_iterations + iterations')
    assert (result.config.iterations, result.config.n_layer) == (20, 40) and 'iterations' in result.explicit
    assert configure(Options, ['--iterations=3', '--diffusion_iterations=4']).config.iterations == 4


@pytest.mark.parametrize('expression, value', [
    ('2 ** 10 - 24 // 5 % 3', 1023), ('-(3)', -3), ('+3 if not True else 4', 4), ('8 if "c" in device else 1', 8),
    ('1 if 1 < 2 <= 2 != 3 else 0', 1), ('1 if top_k is None and n_layer else 0', 1), ('0 or 5', 5),
    ('3 if device in ["cpu", "mps"] else 2', 3), ('6 if heads == 4 else 0', 6),
])
def test_expressions_have_pythons_values(tmp_path, expression, value):
    assert from_file(tmp_path, f'n_embd = {expression}', offered={'heads': 4},
                     resolve_device=on('cpu')).config.n_embd == value


@pytest.mark.parametrize('text', [
    'n_layer = __import__("os").system("touch {canary}")', '__import__("os").system("touch {canary}")',
    'import os', 'from os import path', 'n_layer = open("{canary}", "w")', 'n_layer = (1).real', 'n_layer = [1, 2][0]',
    'out_dir = f"{canary}"', 'masking_ratios = [x for x in [1]]', 'n_layer = (lambda: 3)()', 'n_layer += 1',
    'n_layer: int = 3',
    'for n_layer in [1]: pass', 'def n_layer(): pass', 'class n_layer: pass', 'del n_layer',
    'assert open("{canary}", "w")',
    'n_layer, n_embd = 1, 2', 'n_layer = (n_embd := 3)', 'n_layer = unknown', 'unknown = 1', 'n_layer = 1 +',
    'n_layer = 9**9**9', 'n_layer = 10**19 * 10**19', 'n_layer = 1 // 0', 'learning_rate = 10.0 ** 999',
    'learning_rate = (-2) ** 0.5', 'n_layer = "a" * 3', 'out_dir = "a" * 10**9', 'out_dir = "%999999999d" % 1',
    'n_layer = True + 1', 'n_layer = 3 < "a"', 'n_layer = ...', 'out_dir = b"a"', 'n_layer = 1j', 'n_layer = -"a"',
    'n_layer = ' + '(' * 3000, 'n_layer = ' + '-' * 50000 + '1', 'n_layer = ' + '1+' * 30000 + '1',
    'n_layer = ' + '9' * 9000,
    'n_layer = ' + 'not ' * 5000 + '1', 'out_dir = "a"\n' + 'out_dir = out_dir + out_dir\n' * 40,
    'n_layer = 1\0', 'out_dir = "\\ud800"', 'out_dir = "\\0"', 'if True:\n' + ' n_layer = "x"', 'learning_rate = 1e999',
    'if ' + ' 1\nelif '.join(['1:\n n_layer = "a"\n'] * 3), 'x' * 200_000, 'if unknown: n_layer = 1',
])
def test_what_is_no_assignment_is_refused_with_its_file_and_never_run(tmp_path, text):
    canary = tmp_path / 'canary'
    path = written(tmp_path, text.replace('{canary}', str(canary)))
    for line in refusals([path]):
        assert line.startswith(path) and len(line) < len(path) + 300
    assert not canary.exists()


def test_branches_by_device_say_what_they_changed(tmp_path):
    text = ('n_layer = 6\nn_embd = 384\nif device == "cpu":\n    n_layer = 4\n    n_embd = 128\n    compile = False\n'
            'elif device == "cuda":\n    n_layer = 12\nelse:\n    n_layer = 1\n')
    on_cpu = from_file(tmp_path, text, resolve_device=on('cpu'))
    assert (on_cpu.config.n_layer, on_cpu.config.n_embd, on_cpu.config.device) == (4, 128, 'auto')
    assert on_cpu.notes == [f"{tmp_path / 'x.py'}: device is 'cpu', so n_layer 6 -> 4, n_embd 384 -> 128"]
    on_cuda = from_file(tmp_path, text, '--n_embd=8', '--device=cuda', resolve_device=on('cpu'))
    assert (on_cuda.config.n_layer, on_cuda.config.n_embd, on_cuda.config.compile) == (12, 8, True)
    assert from_file(tmp_path, text, resolve_device=on('mps')).config.n_layer == 1
    pinned = from_file(tmp_path, text, '--n_layer=5', resolve_device=on('cpu'))
    assert pinned.config.n_layer == 5 and pinned.notes[0].endswith('so n_embd 384 -> 128')


def test_a_file_may_choose_the_device_itself(tmp_path):
    text = 'device = "cuda"\nif device == "cuda": n_layer = 9'
    assert from_file(tmp_path, text, resolve_device=on('cpu')).config.n_layer == 9
    assert from_file(tmp_path, text, '--device=cpu', resolve_device=on('cpu')).config.n_layer == 6


def test_branches_not_taken_are_checked_and_change_nothing(tmp_path):
    path = written(tmp_path,
        'if False:\n    import os\n    n_layr = 1\n    n_layer = "six"\n    n_embd = 1 / n_layer\n')
    assert [line.split(': ')[0] for line in refusals([path])] == [f'{path}:{line}' for line in (2, 3, 4)]
    assert from_file(tmp_path, 'if n_layer > 100:\n    n_layer = 1\n').config.n_layer == 6


def test_a_device_that_does_not_exist_is_listed_with_the_rest():
    def no_gpu(asked):
        raise UserError(f'device {asked!r} is not on this machine; use --device=cpu')
    assert len(refusals(['--device=cuda', '--n_layer=x'], resolve_device=no_gpu)) == 2


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / 'latin.py').write_bytes(b'# one\nout_dir = "\xe9"')
    assert 'line 2: the file is not UTF-8' in refusals([str(tmp_path / 'latin.py')])[0]
    assert 'no such config file' in refusals([str(tmp_path)])[0]
    assert 'did you mean' in refusals([str(tmp_path / 'lattin.py')])[0]
    (tmp_path / 'größe 1.py').write_bytes(b'\xef\xbb\xbfn_layer = 3\r\n')
    assert configure(Options, [str(tmp_path / 'größe 1.py')]).config.n_layer == 3
    assert from_file(tmp_path, '').config == Options()


def test_help_names_every_option_and_stops(capsys):
    with pytest.raises(SystemExit) as stopped:
        configure(Options, ['--n_layer=x', '--help'], usage='python train.py')
    lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0 and lines[0] == 'python train.py'
    assert '\n'.join(lines) == help_text(Options, 'python train.py')
    assert len([line for line in lines if line.startswith('  --')]) == len(fields(Options))
    assert any('--iterations=50' in line and 'also --diffusion_iterations' in line for line in lines)


PIECES = st.sampled_from([
    'n_layer', 'device', 'out_dir', 'masking_ratios', 'unknown', '=', '==', '+', '-', '*', '**', '//', '%', '/', '(',
    ')', '[',
    ']', ',', ':', '\n', '\n    ', 'if ', 'else', 'elif ', 'not ', ' and ', ' or ', ' in ', ' is ', '"a"', "'", '9',
    '1e308',
    'None', 'True', '.', '@', ':=', 'import os', '__import__("os").system("touch {}")', 'open("{}", "w")', 'lambda: ',
    'f"{', '}',
    '\\', '\0', '\ud800', '999999999', 'for x in ', 'yield ', '*', ';', '#', ' '])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=200), st.lists(PIECES, max_size=25).map(
    lambda pieces: ''.join(pieces).encode('utf-8', 'surrogatepass'))),
    arguments=st.lists(st.one_of(st.text(max_size=20), st.lists(PIECES, max_size=8).map(lambda p: '--' + ''.join(p))),
                             max_size=3))
def test_whatever_comes_is_read_or_refused_without_effect(tmp_path, content, arguments):
    canary = tmp_path / 'canary'
    path = tmp_path / 'x.py'
    path.write_bytes(content.replace(b'{}', str(canary).encode()))
    arguments = [argument for argument in arguments if argument not in ('-h', '--help')]
    try:
        result = configure(Options, [str(path), *arguments], resolve_device=on('cpu'))
        assert type(result.config.n_layer) is int and type(result.config.out_dir) is str
    except UserError as error:
        assert all(len(line) < 1000 and line.isprintable() for line in str(error).split('\n'))
    assert not canary.exists() and {entry.name for entry in tmp_path.iterdir()} == {'x.py'}


# ---------------------------------------------------------------- bounds, and where people stumble

@dataclass(frozen=True)
class Bounded:
    out_dir: str = option('out', 'folder', path=True)
    start_text: str = option('', 'prompt', alias='seed_text')
    batch_size: int = option(64, 'rows', minimum=1, maximum=10**6)
    seed: int = option(1, 'any', minimum=-2**63, maximum=2**63 - 1)
    warmup: int = option(0, 'iterations', minimum=0)
    top: int | None = option(None, 'tokens', minimum=1)


def bounded_refusal(*arguments):
    with pytest.raises(UserError) as caught:
        raise_problems(bound_problems(configure(Bounded, arguments).config))
    return str(caught.value)


@pytest.mark.parametrize('argument, said', [
    ('--batch_size=0', 'batch_size is 0, but must be at least 1'),
    ('--warmup=-1', 'warmup is -1, but must not be negative'),
    ('--batch_size=1000001', 'batch_size is 1000001, but must be at most 1,000,000'),
    ('--seed=9223372036854775808', 'must be at most 9,223,372,036,854,775,807'), ('--top=0', 'must be at least 1'),
    ('--out_dir=' + 'é' * 128, 'a name of 256 bytes'), ('--out_dir=a/' + 'b' * 256 + '/c', 'at most 255; shorten it'),
    ('--out_dir=runs\\a', 'folders are parted by / on this system: runs/a')])
def test_bounds_are_stated_with_the_option_and_checked_for_all(argument, said):
    assert said in bounded_refusal(argument) and '\n' not in bounded_refusal(argument)


def test_every_bound_is_reported_and_its_ends_are_taken(tmp_path):
    assert bounded_refusal('--batch_size=0', '--warmup=-1').count('\n') == 1
    assert 'batch_size is 0' in bounded_refusal(written(tmp_path, 'batch_size = 0'))
    taken = configure(Bounded, ['--batch_size=1000000', f'--seed={-2**63}', '--top=None',
                                '--out_dir=' + 'b' * 255]).config
    assert bound_problems(taken) == []
    assert (taken.batch_size, taken.seed, taken.top) == (10**6, -2**63, None)


def test_home_is_meant_by_its_sign_in_paths_alone(monkeypatch):
    monkeypatch.setenv('HOME', '/home/someone')
    config = configure(Bounded, ['--out_dir=~/runs/a', '--start_text=~/x']).config
    assert (config.out_dir, config.start_text) == ('/home/someone/runs/a', '~/x')


@pytest.mark.parametrize('name', ['--start_text', '--seed_text'])
def test_an_unquoted_prompt_is_one_hint(name):
    assert bounded_refusal(f'{name}=To', 'be', 'or', 'not', '--batch_size=3').endswith(
        f'a text of several words is put in quotes: {name}="To be or not"')


def test_config_files_are_found_however_they_are_named(tmp_path, monkeypatch):
    (tmp_path / 'sub').mkdir()
    path = written(tmp_path / 'sub', 'batch_size = 3')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setattr('configurator.CONFIGS', tmp_path / 'sub')
    for arguments in ([path], [f'--config={path}'], ['--config', path], [f'config={path}'], ['x.py'], ['x'],
                      ['~/sub/x.py'],
                      ['sub\\x.py'], ['--start_text=a', 'x']):
        assert configure(Bounded, arguments).config.batch_size == 3, arguments
    assert 'no such config file' in bounded_refusal('--config=none.py')


@pytest.mark.parametrize('options', ['core.options.TrainConfig', 'core.sampling.options.SampleConfig',
                                     'core.evaluation.options.EvaluateConfig', 'core.bench.options.BenchConfig'])
def test_every_option_keeps_its_default_and_counts_have_bounds(options):
    room, _, name = options.rpartition('.')
    described = getattr(importlib.import_module(room), name)
    assert configure(described, []).config == described() and bound_problems(described()) == []
    for entry in fields(described):
        if entry.name in ('batch_size', 'num_samples', 'seed', 'max_iters', 'eval_iters', 'iterations', 'repetitions'):
            config = configure(described, [f'--{entry.name}=18446744073709551615']).config
            assert [f'{entry.name} is 18446744073709551615, but must be at most' in one
                    for one in bound_problems(config)] == [True]


# ---- a base

def test_a_base_is_read_first(tmp_path):
    base = written(tmp_path, "'''Base.'''\nn_layer = 8\nn_embd = 16\nif device == 'cpu':\n    n_layer = 2\n", 'base.py')
    found = from_file(tmp_path, f'"""Doc."""\nbase_config = {base!r}\nn_embd = 3 * n_embd\ntop_k = n_layer\n',
                      '--max_iters=7', resolve_device=on('cpu'))
    assert (found.config.n_layer, found.config.n_embd, found.config.top_k) == (2, 48, 2)
    assert found.explicit['n_layer'] == f'{base}:5' and found.explicit['n_embd'].endswith('x.py:3')
    assert found.notes == [f"{base}: device is 'cpu', so n_layer 8 -> 2"]


def test_the_command_line_beats_the_base(tmp_path):
    base = written(tmp_path, 'n_layer = 8\n', 'base.py')
    assert from_file(tmp_path, f'base_config = {base!r}\ntop_k = n_layer\n', '--n_layer=3').config.top_k == 3


def test_a_base_by_its_name_in_the_config_folder(tmp_path, monkeypatch):
    written(tmp_path, 'n_layer = 8\n', 'base.py')
    monkeypatch.setattr('configurator.CONFIGS', tmp_path)
    assert from_file(tmp_path, "base_config = 'base'\n").config.n_layer == 8


@pytest.mark.parametrize('text, words', [
    ("base_config = 'nowhere.py'\n", 'nowhere.py: there is no such config file'),
    ("n_layer = 2\nbase_config = 'base.py'\n", 'x.py:2: base_config is the first line of a config file'),
    ('base_config = 3\n', 'x.py:1: base_config is the first line of a config file'),
    ("base_config = 'HERE/x.py'\n", 'no config file is its own base; name another'),
    ("base_config = 'HERE/y.py'\n", 'y.py: base_config =')])
def test_a_base_that_cannot_be_read(tmp_path, text, words):
    written(tmp_path, f"base_config = '{tmp_path}/x.py'\n", 'y.py')
    problems = refusals([written(tmp_path, text.replace('HERE', str(tmp_path)))])
    assert len(problems) == 1 and words in problems[0]
