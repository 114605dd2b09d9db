"""Checkpoints under faults: whatever happens to a save or to a file, no state is lost and none is mistaken."""

import errno
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.checkpoints import checkpoint as room
from core.checkpoints.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from core.common.errors import UserError
from core.common.files import TEMPORARY_SUFFIX
from helpers.checkpoints import HEADS, SMALL, assert_same, checkpoint_of
from model import GPT

ROOT = Path(__file__).parent.parent.parent


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(GPT(HEADS))
    path = tmp_path / 'a folder with é' / 'ckpt ü.pt'
    path.parent.mkdir()
    save_checkpoint(path, checkpoint.to_payload())
    assert_same(load_checkpoint(path).to_payload(), checkpoint.to_payload())
    summary = verify_checkpoint(path)
    assert (summary.kind, summary.iteration, summary.best_value) == ('unmasking', 7, 2.5)
    assert summary.parameters == GPT(HEADS).parameter_count()
    assert os.listdir(path.parent) == [path.name]


def test_half_precision_and_shared_storage_survive(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(GPT(SMALL), ema={'a': torch.randn(3).bfloat16(), 'b': torch.tensor([1 << 40])})
    save_checkpoint(tmp_path / 'c.pt', checkpoint.to_payload())
    loaded = load_checkpoint(tmp_path / 'c.pt')
    assert_same(loaded.ema, checkpoint.ema)
    assert loaded.model['lm_head.weight'].data_ptr() == loaded.model['transformer.wte.weight'].data_ptr()


# ---------------------------------------------------------------- faults while saving

KILLED = '''
import sys, torch
from core.checkpoints import checkpoint
class Slow:
    """A disk so slow that the kill always lands inside the save."""
    def __init__(self, file): self.file, self.failure = file, None
    def write(self, data):
        import time
        written = self.file.write(data); self.file.flush()
        print('writing', flush=True); time.sleep(STEP)
        return written
    def flush(self): self.file.flush()
checkpoint._Sink = Slow
payload = checkpoint.load_checkpoint(sys.argv[1]).to_payload()
payload['iteration'] = 8
checkpoint.save_checkpoint(sys.argv[1], payload)
'''


def test_kill_while_saving_keeps_the_previous_file(saved: Path) -> None:
    before = saved.read_bytes()
    process = subprocess.Popen([sys.executable, '-c', KILLED.replace('STEP', '0.02'), str(saved)], cwd=ROOT,
                               stdout=subprocess.PIPE, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    for _ in range(9):  # of some hundred
        assert process.stdout.readline() == 'writing\n'
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert saved.read_bytes() == before
    assert load_checkpoint(saved).iteration == 7
    assert len(list(saved.parent.glob(f'*{TEMPORARY_SUFFIX}'))) == 1  # the run folder removes it at its start


@pytest.mark.parametrize('failing_write', [0, 1, 20, -1])
def test_full_disk_keeps_the_previous_file(saved: Path, monkeypatch: pytest.MonkeyPatch, failing_write: int) -> None:
    count, payload = 0, load_checkpoint(saved).to_payload()

    class Counting(room._Sink):
        def write(self, data: bytes) -> int:
            nonlocal count
            count += 1
            return super().write(data)

    monkeypatch.setattr(room, '_Sink', Counting)
    save_checkpoint(saved, payload)
    fails_at = failing_write % count

    class Full:
        def __init__(self, file) -> None:
            self.file, self.left = file, fails_at

        def write(self, data: bytes) -> int:
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, 'No space left on device')
            return self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

    class FullSink(room._Sink):
        def __init__(self, file) -> None:
            super().__init__(Full(file))

    before = saved.read_bytes()
    monkeypatch.setattr(room, '_Sink', FullSink)
    with pytest.raises(UserError, match='No space left on device; free some space'):
        save_checkpoint(saved, payload)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == ['ckpt.pt']


def test_file_size_limit_of_the_system(saved: Path) -> None:
    before, limits = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    payload = load_checkpoint(saved).to_payload()
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(UserError, match='File too large; free some space'):
            save_checkpoint(saved, payload)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == ['ckpt.pt']


@pytest.mark.parametrize('call', ['fsync', 'replace'])
def test_failing_system_calls_keep_the_previous_file(saved: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    before, payload = saved.read_bytes(), load_checkpoint(saved).to_payload()

    def failing(*arguments: object) -> None:
        raise OSError(errno.EIO, 'Input/output error')

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(UserError, match='Input/output error'):
        save_checkpoint(saved, payload)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == ['ckpt.pt']


def test_interrupt_while_saving_stays_an_interrupt(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def __init__(self, file) -> None:
            self.file, self.calls = file, 0

        def write(self, data: bytes) -> int:
            self.calls += 1
            if self.calls == 5:
                raise KeyboardInterrupt
            return self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

    sink = room._Sink
    payload = load_checkpoint(saved).to_payload()
    monkeypatch.setattr(room, '_Sink', lambda file: sink(Interrupted(file)))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, payload)
    assert os.listdir(saved.parent) == ['ckpt.pt']


def test_a_save_that_does_not_read_back_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, payload = saved.read_bytes(), load_checkpoint(saved).to_payload()

    class Corrupting(room._Sink):
        def write(self, data: bytes) -> int:
            data = bytes(data)
            return super().write(data if len(data) < 200 else data[:-1] + bytes([data[-1] ^ 1]))

    with pytest.raises(UserError, match='was not saved.*other than tensors'):
        save_checkpoint(saved, payload | {'extra': {'random': time.struct_time(range(9))}})
    monkeypatch.setattr(room, '_Sink', Corrupting)
    with pytest.raises(UserError, match='was not saved, because it did not read back'):
        save_checkpoint(saved, payload)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == ['ckpt.pt']


def test_order_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What safety rests on: the data is on the disk, then verified, then renamed, then the folder is synchronised."""
    calls = []
    for name in ('fsync', 'replace'):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, original=original: (calls.append(name),
                                                                                    original(*given))[1])
    verify = room._compare_checksums
    monkeypatch.setattr(room, '_compare_checksums', lambda path: (calls.append('verify'), verify(path))[1])
    save_checkpoint(tmp_path / 'c.pt', checkpoint_of(GPT(SMALL)).to_payload())
    assert calls == ['fsync', 'verify', 'replace', 'fsync']


# ---------------------------------------------------------------- damaged, foreign and hostile files

@pytest.mark.parametrize('kept', ['0', '10', 'half', 'n-1'])
def test_truncated(saved: Path, kept: str) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[:{'0': 0, '10': 10, 'half': len(data) // 2, 'n-1': len(data) - 1}[kept]])
    for read in (load_checkpoint, verify_checkpoint):
        with pytest.raises(UserError, match='damaged, cut off or no checkpoint.*train with'):
            read(saved)


def test_one_bit_flipped_in_any_tensor_is_detected(saved: Path) -> None:
    data = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        members = [one for one in archive.infolist() if '/data/' in one.filename and one.file_size]
    assert len(members) > 20
    for index, member in enumerate(members):
        name_length, extra_length = data[member.header_offset + 26], int.from_bytes(
            data[member.header_offset + 28:member.header_offset + 30], 'little')
        start = member.header_offset + 30 + name_length + extra_length
        damaged = bytearray(data)
        damaged[start + (index * 7) % member.file_size] ^= 1 << index % 8
        saved.write_bytes(damaged)
        with pytest.raises(UserError, match=f'checksum of {member.filename} does not agree'):
            load_checkpoint(saved)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, dict[str, object]]:
    """A checkpoint of one short tensor, for damage by the thousand."""
    path = tmp_path_factory.mktemp('tiny') / 'c.pt'
    values = dict(model={'w': torch.arange(4.0)}, ema=None, optimizers=[])
    payload = checkpoint_of(GPT(SMALL), **values).to_payload()
    save_checkpoint(path, payload)
    return path, path.read_bytes(), payload


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(place=st.integers(0, 10 ** 9), bit=st.integers(0, 7))
def test_any_flipped_bit_is_detected_or_harmless(tiny: tuple[Path, bytes, dict[str, object]], place: int,
                                                 bit: int) -> None:
    path, data, payload = tiny
    damaged = bytearray(data)
    damaged[place % len(data)] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        loaded = load_checkpoint(path)
    except UserError:
        return
    assert_same(loaded.to_payload(), payload)  # the bit lay in padding


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(start=st.integers(0, 10 ** 9), junk=st.binary(max_size=40), alone=st.booleans())
def test_random_bytes_never_raise_anything_else(tiny: tuple[Path, bytes, dict[str, object]], start: int, junk: bytes,
                                                alone: bool) -> None:
    path, data, payload = tiny
    start %= len(data)
    path.write_bytes(junk if alone else data[:start] + junk + data[start + len(junk):])
    try:
        loaded = load_checkpoint(path)
    except UserError:
        return
    assert_same(loaded.to_payload(), payload)  # the junk lay in padding, or is what stood there
    assert verify_checkpoint(path).iteration == payload['iteration']


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f'touch "{self.target}"',)


@pytest.mark.parametrize('form', ['zip', 'old', 'pickle'])
def test_malicious_pickle_is_refused_without_side_effect(saved: Path, tmp_path: Path, form: str) -> None:
    target = tmp_path / 'attacked'
    payload = load_checkpoint(saved).to_payload() | {'extra': {'a': Attack(target)}}
    if form == 'pickle':
        saved.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, saved, _use_new_zipfile_serialization=form == 'zip')
    for read in (load_checkpoint, verify_checkpoint):
        with pytest.raises(UserError):
            read(saved)
    assert not target.exists()
    if form == 'zip':
        torch.load(saved, weights_only=False)  # the file does attack whoever trusts it
        assert target.exists()


def test_missing_and_wrong_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'no checkpoint .*ckpt.pt; make one with: python train.py config/\w+.py'):
        load_checkpoint(tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='is a folder without model.safetensors; name a checkpoint'):
        load_checkpoint(tmp_path)


def test_packed_members_are_refused(saved: Path) -> None:
    """A small file could otherwise unfold to fill the memory."""
    with zipfile.ZipFile(saved) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(saved, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(UserError, match='damaged'):
        load_checkpoint(saved)


@pytest.mark.parametrize(('change', 'words'), [
    ({'format_version': 0}, 'has format 0, but this program reads format 1; train again with'),
    ({'format_version': 2}, 'has format 2, but this program reads format 1; update this program'),
    ({'format_version': '1'}, 'has no format version'),
    ({'kind': 'poem'}, "is of the kind 'poem', but this program knows unmasking, "),
    ({'iteration': '7'}, r'no usable iteration \(found str\)'),
    ({'iteration': True}, r'no usable iteration \(found bool\)'),
    ({'model': {'w': 1}}, "holds 'w' among its weights"),
    ({'model': {3: torch.ones(1)}}, 'holds 3 among its weights'),
])
def test_other_formats_say_what_to_do(saved: Path, change: dict[str, object], words: str) -> None:
    torch.save(load_checkpoint(saved).to_payload() | change, saved)
    with pytest.raises(UserError, match=words):
        load_checkpoint(saved)


def test_a_checkpoint_of_another_program(tmp_path: Path) -> None:
    torch.save({'model': {}, 'model_args': {}, 'iter_num': 3}, tmp_path / 'c.pt')
    with pytest.raises(UserError, match='no format version, so an older or another program wrote it; try: python'):
        load_checkpoint(tmp_path / 'c.pt')
    torch.save([1, 2], tmp_path / 'c.pt')
    with pytest.raises(UserError, match='no format version'):
        load_checkpoint(tmp_path / 'c.pt')


# ---------------------------------------------------------------- names

@pytest.mark.parametrize('prefix', ['_orig_mod.', 'module.', 'module._orig_mod.', '_orig_mod.module.'])
def test_prefixes_are_stripped(tmp_path: Path, prefix: str) -> None:
    model = GPT(HEADS)
    wrapped = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    save_checkpoint(tmp_path / 'c.pt', checkpoint_of(model, model=wrapped, ema=dict(wrapped)).to_payload())
    loaded = load_checkpoint(tmp_path / 'c.pt')
    assert_same(dict(loaded.model), dict(model.state_dict()))
    assert list(loaded.ema) == list(model.state_dict())


def test_prefixes_inside_names_and_doubles(tmp_path: Path) -> None:
    one, source = torch.ones(1), tmp_path
    assert list(room.normalise_names({'transformer.h.0._orig_mod.x': one}, source)) == ['transformer.h.0.x']
    with pytest.raises(UserError, match='holds the weight x twice'):
        room.normalise_names({'x': one, 'module.x': one}, source)
