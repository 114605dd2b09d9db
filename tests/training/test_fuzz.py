"""Whatever bytes come as a config, a corpus description or a checkpoint: they are read or refused in plain words.

    pytest tests/training/test_fuzz.py                  some hundred inputs for each reader
    pytest -m long -s tests/training/test_fuzz.py       40,000 for each, and what became of them

An audit hook of the interpreter watches every reading: none may start a process, open a file for writing, remove or
rename one, or open a connection.
"""

import pickle
import random
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import train as script
from configurator import configure
from core.checkpoints.checkpoint import save_checkpoint, verify_checkpoint
from core.common.errors import UserError
from core.data.corpus import load_corpus
from core.data.learning import train_bpe
from core.data.splitting import split_text
from core.data.writing import write_corpus
from helpers.checkpoints import checkpoint_of
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent.parent
FORBIDDEN = ('os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'os.remove', 'os.rename', 'os.mkdir', 'os.rmdir',
             'os.link', 'os.symlink', 'os.chmod', 'os.truncate', 'subprocess.Popen', 'socket.connect', 'ctypes.dlopen',
             'shutil.rmtree', 'webbrowser.open')
pytestmark = pytest.mark.filterwarnings('ignore')  # of pickletools and torch, about what they are given
_watched: list[list[str]] = []  # the side effects of the reading that is going on


def _hook(event: str, given: tuple) -> None:
    if not _watched:
        return
    writes = event == 'open' and isinstance(given[1], str) and any(letter in given[1] for letter in 'wax+')
    if writes or event in FORBIDDEN:
        _watched[-1].append(f'{event}{given}')


@contextmanager
def no_side_effects() -> Iterator[None]:
    """Fails where what runs inside did anything that FORBIDDEN names or opened a file for writing."""
    _watched.append([])
    try:
        yield
    finally:
        seen = _watched.pop()
    assert not seen, seen


@pytest.fixture(scope='module', autouse=True)
def audit() -> None:
    """The hook; the interpreter keeps it to its end."""
    sys.addaudithook(_hook)


# ---------------------------------------------------------------- making inputs

NUMBERS = (0, 1, -1, 2**31, 2**63, 2**64 + 1, 1e308, float('nan'), float('-inf'))
VALUES = (*NUMBERS, None, True, '', 'x', 'ü\ud800', b'', b'\xff', [], {}, (), [[]], {'a': {}}, {1: 2}, ['a', 1])


def mutated(chance: random.Random, data: bytes, pieces: tuple[bytes, ...]) -> bytes:
    """`data` after one, two or five changes: a bit flipped, a stretch lost, repeated or moved, or a piece put in."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        place, length = chance.randrange(len(changed) + 1), chance.choice((1, 2, 5, 40))
        stretch = changed[place:place + length]
        kind = chance.randrange(5)
        if kind == 0 and stretch:
            changed[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del changed[place:place + length]
        elif kind == 2:
            changed[place:place] = stretch
        elif kind == 3:
            other = chance.randrange(len(changed) + 1)
            changed[other:other + length] = stretch
        else:
            changed[place:place + chance.choice((0, length))] = chance.choice(pieces)
    return bytes(changed)


def other_value(chance: random.Random, value: object, depth: int = 0) -> object:
    """A copy of `value` with one part of it, however deep, replaced, removed or added."""
    if isinstance(value, dict) and value and chance.random() < 0.9 - 0.2 * depth:
        key, changed = chance.choice(list(value)), dict(value)
        if chance.random() < 0.1:
            del changed[key]
        elif chance.random() < 0.1:
            changed[chance.choice(('x', 1, b'y', None))] = chance.choice(VALUES)
        else:
            changed[key] = other_value(chance, value[key], depth + 1)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.5:
        place = chance.randrange(len(value))
        return [*value[:place], other_value(chance, value[place], depth + 1), *value[place + 1:]]
    if isinstance(value, int) and chance.random() < 0.3:
        return value + chance.choice((-1, 1, 2**16))
    return chance.choice(VALUES)


# ---------------------------------------------------------------- the readers

CONFIG_PIECES = tuple(piece.encode('utf-8', 'surrogatepass') for piece in (
    'n_layer', 'device', '=', ' == ', '+', '-', '**', '//', '%', '(', ')', '[', ']', ',', ':', '\n', '\n    ', 'if ',
    'else:', 'elif ', ' and ', ' in ', '"a"', "'", '9', '1e308', 'None', 'True', '.', ':=', 'import os\n', '\\', '\0',
    '__import__("os").system("touch x")', 'open("x", "w")', 'lambda: ', 'f"{', '}', '\ud800', '9**9**9', 'for x in ',
    'exec("1")', '"a" * 10**9', '#', '((((((((((((((((((((', '"""', '\r', '\x0c', 'n_layer = 3\n', 'yield ', '*', ';'))


def config_reader(folder: Path) -> Callable[[random.Random], None]:
    """Config files and command lines."""
    texts = [path.read_bytes() for path in sorted((ROOT / 'config').glob('*.py'))] + [b'n_layer = 2\n']
    words = [b'--n_layer=3', b'--learning_rate=1e-3', b'--compile=None', b'--out_dir=a=b', b'--device=cpu', b'x.py']
    path = folder / 'x.py'

    def read(chance: random.Random) -> None:
        text = chance.choice(texts)
        lines = text.splitlines(keepends=True)
        first = chance.choice((0, chance.randrange(len(lines))))
        path.write_bytes(mutated(chance, b''.join(lines[first:first + chance.choice((1, 3, 40))]), CONFIG_PIECES))
        arguments = [mutated(chance, chance.choice(words), CONFIG_PIECES).decode('utf-8', 'surrogateescape')
                     for _ in range(chance.randrange(3))]
        with no_side_effects():
            configure(script.TrainConfig, [str(path), *(one for one in arguments if one not in ('-h', '--help'))],
                      resolve_device=lambda asked: 'cpu')

    return read


PICKLE_PIECES = (
    b'cos\nsystem\n', b'\x8c\x02os\x8c\x06system\x93', b'R', b'tR', b'i__main__\nX\n', b'(S"touch x"\ntR.', b'o',
    b'\x81', b'b', b'\x82\x01', b'P1\n', b'Q', b'.', b'0', b'2', b'}', b']', b')', b'\x88', b'N', b'J\xff\xff\xff\x7f',
    b'K\xff', b'B\xff\xff\xff\x7f', b'\x8e' + b'\xff' * 7 + b'\x7f', b'\x8d' + b'\xff' * 8, b'\x8b\xff\xff\xff\x7f',
    b'h\x00', b'j\xff\xff\xff\xff', b'r\xff\xff\xff\x7f', b'\x94', b'e', b'u', b's', b'(', b't', b'\x85',
    b'\x95' + b'\xff' * 8, b'\x97', b'\x96' + b'\xff' * 8, b'ctorch._utils\n_rebuild_tensor_v2\n',
    b'ctorch\nFloatStorage\n', b'\x80\x02', b'cbuiltins\neval\n', b'ccollections\nOrderedDict\n',
    b'cbuiltins\nbytearray\n')


def meta_reader(folder: Path) -> Callable[[random.Random], None]:
    """`meta.pkl` of a corpus whose token files are sound."""
    text = 'MARY:\nA speech of a few words.\n\n' * 60
    write_corpus(folder / 'small', train_bpe(text, 260), split_text(text), 'made up')
    path = folder / 'small' / 'meta.pkl'
    sound = path.read_bytes()
    meta = pickle.loads(sound)

    def read(chance: random.Random) -> None:
        if chance.random() < 0.1:  # sound values in another order and form
            values = {**dict(chance.sample(list(meta.items()), len(meta))), 'source': chance.choice(('', 'ü', 'x' * 99))}
            content = pickle.dumps(values, protocol=chance.choice((2, 4, 5)))
        elif chance.random() < 0.5:
            content = mutated(chance, sound, PICKLE_PIECES)
        else:
            content = pickle.dumps(other_value(chance, meta), protocol=chance.choice((2, 4, 4, 5)))
        path.write_bytes(content)
        with no_side_effects():
            load_corpus('small', folder)

    return read


def checkpoint_reader(folder: Path) -> Callable[[random.Random], None]:
    """A checkpoint: damaged bytes; a damaged header under sound checksums; sound headers with other values."""
    path = folder / 'ckpt.pt'
    payload = checkpoint_of(GPT(GPTConfig(block_size=4, vocab_size=7, n_layer=1, n_head=1, n_embd=2, mask_token_id=3)),
                            ema=None, optimizers=[]).to_payload()
    payload['model'] = {'w': torch.arange(4.0), 'tied': torch.arange(4.0)}
    save_checkpoint(path, payload)
    sound = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    header = next(name for name in members if name.endswith('data.pkl'))

    def read(chance: random.Random) -> None:
        kind = chance.randrange(3)
        if kind == 0:
            path.write_bytes(mutated(chance, sound, PICKLE_PIECES))
        elif kind == 1:
            with zipfile.ZipFile(path, 'w') as archive:
                for name, data in members.items():
                    archive.writestr(name, mutated(chance, data, PICKLE_PIECES) if name == header else data)
        else:
            torch.save(other_value(chance, payload), path)
        with no_side_effects():
            verify_checkpoint(path)

    return read


READERS = {'config files and command lines': config_reader, 'corpus descriptions': meta_reader,
           'checkpoint headers': checkpoint_reader}


def fuzz(name: str, count: int, folder: Path, seed: int = 0) -> Counter:
    """How many of `count` generated inputs the reader took and refused; any other end is a failure."""
    read, found = READERS[name](folder), Counter()
    for number in range(count):
        try:
            read(random.Random(seed * 10**9 + number))
            found['taken'] += 1
        except UserError as error:
            found['refused'] += 1
            assert all(0 < len(line) < 2000 for line in str(error).split('\n'))
        except Exception as error:
            raise AssertionError(f'input {number} for {name} raised {type(error).__name__}') from error
    return found


@pytest.mark.parametrize('name', READERS)
def test_some_inputs_are_read_or_refused(tmp_path, name):
    found = fuzz(name, 300, tmp_path)
    assert found.total() == 300 and found['refused'] > 100 and found['taken'] > 3


def test_the_watch_sees_side_effects(tmp_path):
    for harm in (lambda: (tmp_path / 'x').write_text(''), lambda: (tmp_path / 'y').mkdir(),
                 lambda: pickle.loads(b'cos\nsystem\n(S"true"\ntR.')):
        with pytest.raises(AssertionError), no_side_effects():
            harm()
    with no_side_effects():
        (tmp_path / 'x').read_text()


@pytest.mark.long
@pytest.mark.parametrize('name', READERS)
def test_many_inputs_are_read_or_refused(tmp_path, capsys, name):
    found = fuzz(name, 40_000, tmp_path, seed=1)
    with capsys.disabled():
        print(f'\n{name}: {found.total():,} inputs, {found["taken"]:,} read, {found["refused"]:,} refused, '
              f'no other end, no side effect')
