"""The program runs where a system lacks what only POSIX has, as Windows does."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Runs in a process of its own. What packages of others need is imported first: they have their own ways on Windows.
WITHOUT_POSIX = '''
import os, pkgutil, signal, sys, warnings
from importlib import import_module
from pathlib import Path
import filelock, matplotlib.pyplot, numpy, regex, rustbpe, safetensors.torch, tiktoken, torch, torch.distributed, tqdm

for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios', 'tty', 'pty', 'syslog', 'readline', 'curses'):
    sys.modules[name] = None
for name in ('fchmod fchown chown lchown getuid geteuid getgid getloadavg sysconf uname fork statvfs killpg getpgid '
             'setsid mkfifo openpty sched_getaffinity nice wait4 sync posix_fallocate posix_fadvise sendfile '
             'pread pwrite O_DIRECTORY O_SYNC').split():
    delattr(os, name)
for name in ('SIGHUP SIGUSR1 SIGUSR2 SIGALRM SIGCHLD SIGPIPE SIGQUIT SIGTSTP SIGWINCH setitimer alarm pause '
             'pthread_sigmask sigwait').split():
    delattr(signal, name)

def is_open(path):
    """Whether this process has the file open or mapped, so that Windows neither renames, replaces nor removes it."""
    path = os.path.realpath(path)
    if not os.path.isfile(path):
        return False
    opened = [os.path.join('/proc/self/fd', number) for number in os.listdir('/proc/self/fd')]
    with open('/proc/self/maps', 'rb') as maps:
        mapped = any(line.rstrip().endswith(b' ' + os.fsencode(path)) for line in maps)
    return mapped or any(os.path.realpath(one) == path for one in opened)

def as_on_windows(real):
    def call(*paths, **named):
        for path in paths:
            if is_open(path):
                raise PermissionError(13, 'The process cannot access the file because it is being used', str(path))
        return real(*paths, **named)
    return call

for name in ('replace', 'rename', 'unlink', 'remove'):
    setattr(os, name, as_on_windows(getattr(os, name)))
with open('taken', 'w', encoding='utf-8'):
    try:
        Path('taken').rename('moved')
        raise AssertionError('a file that is open was renamed')
    except PermissionError:
        pass

def opening(path, flags, *further, real=os.open, **named):
    if os.path.isdir(path):
        raise PermissionError(13, 'Permission denied', str(path))  # Windows opens no folder
    return real(path, flags, *further, **named)
os.open = opening

# A text file without an encoding is one of cp1252 there.
warnings.filterwarnings('error', category=EncodingWarning, module=r'core\\.|configurator|__main__')
root = Path(sys.argv[1])
sys.path.insert(0, str(root))
'''
MODULES = '''
names = ['model', 'sample_utils', 'configurator', 'train', 'sample', 'evaluate', 'bench']
import core
names += [one.name for one in pkgutil.walk_packages(core.__path__, 'core.')
          if not one.name.endswith(('__main__', 'modeling_masked_diffusion', 'harness.language_model'))]
# The last two need transformers and lm_eval.
names += ['core.checkpoints.__main__']
for name in names:
    import_module(name)
print(len(names), 'modules')
'''
WORK = '''
import runpy
from core.data.corpus import load_corpus
SMALL = ('--dataset=custom --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --eval_interval=4 '
         '--eval_iters=1 --warmup_iters=1 --log_interval=1 --device=cpu --compile=False --sample_length=12 '
         '--add_sampler_head=True --start_sampler_iteration=2 --add_critic_head=True --start_critic_iteration=3 '
         '--end_critic_iteration=5').split()

def run(script, *words):
    sys.argv = [script, *words]
    try:
        runpy.run_path(str(root / script), run_name='__main__')
    except SystemExit as done:
        assert done.code in (0, None), (script, words, done.code)

Path('text.txt').write_text('to be or not to be\\n' * 400, encoding='utf-8')
run('data/custom/prepare.py', 'text.txt', '--data_dir=data')
run('data/custom/prepare.py', 'text.txt', '--data_dir=data', '--name=other')
train = ['--data_dir=data', *SMALL]
run('train.py', *train, '--max_iters=8', '--lr_decay_iters=8')
run('train.py', '--init_from=resume', '--max_iters=12')
run('train.py', *train, '--max_iters=8', '--overwrite=True')
run('sample.py', '--num_samples=2', '--iterations=3', '--output_file=texts.txt', '--save_json=run.json',
    '--save_html=run.html')
run('evaluate.py', '--measure=likelihood', '--windows=4', '--trunk_calls=[2]', '--data_dir=data')
run('evaluate.py', '--measure=nelbo', '--windows=4', '--data_dir=data')
run('bench.py', '--help')
held = load_corpus('custom', Path('data'))
before = held.tokens('train').copy()
Path('text.txt').write_text('not to be or to be\\n' * 400, encoding='utf-8')
run('data/custom/prepare.py', 'text.txt', '--data_dir=data', '--overwrite')
assert (held.tokens('train') == before).all()
assert load_corpus('custom', Path('data')).data_hash != held.data_hash
run('train.py', *train, '--max_iters=4', '--out_dir=out-block', '--attention_type=block', '--block_length=4',
    '--add_sampler_head=False', '--add_critic_head=False')
'''


def test_all_modules_are_imported_and_a_model_is_trained_and_sampled_without_posix(tmp_path):
    command = [sys.executable, '-X', 'warn_default_encoding', '-c', WITHOUT_POSIX + MODULES + WORK, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding='utf-8', timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert int(re.search(r'^(\d+) modules$', done.stdout, re.M)[1]) > 100
    assert 'going on from out' in done.stdout and 'picture written' in done.stdout
    assert (tmp_path / 'texts.txt').read_text(encoding='utf-8').strip()
