"""Choices of device, precision and compilation, each with its reason."""

import importlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import core.common.runtime as runtime
from core.batches import whole_batch
from core.bench.cases import Shape, base_vocabulary, model_config
from core.common.errors import UserError
from core.common.randomness import keyed
from core.objective import Objective
from core.stages import Stage
from model import GPT


def test_devices_that_are_not_there_are_refused():
    assert runtime.resolve_device('cpu') == 'cpu'
    assert runtime.resolve_device('auto') in ('cpu', 'cuda', 'mps')
    for name in ('tpu', 'cpu:1', 'cuda:x', 'cuda:999'):
        with pytest.raises(UserError):
            runtime.resolve_device(name)


def test_without_a_compiler_steps_run_uncompiled_and_one_line_says_so(monkeypatch):
    monkeypatch.setattr(runtime.shutil, 'which', lambda name: None)
    for asked in (None, True):
        chosen = runtime.start_runtime('cpu', 'auto', asked, width=64, iterations=10_000)
        assert chosen.compile is False
        assert len([line for line in chosen.reasons if 'no C++ compiler' in line]) == 1


def test_precision_follows_the_processor(monkeypatch):
    for fast, width, expected in ((True, 384, torch.bfloat16), (True, 128, torch.float32), (False, 384, torch.float32)):
        monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda fast=fast: fast)
        assert runtime.start_runtime('cpu', 'auto', False, width=width, iterations=1).dtype is expected
    assert runtime.start_runtime('cpu', 'bfloat16', False, width=8, iterations=1).dtype is torch.bfloat16
    with pytest.raises(UserError, match='float16'):
        runtime.start_runtime('cpu', 'float16', False, width=8, iterations=1)


@pytest.mark.parametrize('script', ['train', 'sample', 'evaluate', 'bench'])
def test_float16_on_a_cpu_is_refused_alike_by_every_script(script, data_here):
    with pytest.raises(UserError) as caught:
        importlib.import_module(script).main(['--dtype=float16', '--device=cpu'])
    assert str(caught.value) == ("dtype is 'float16', but only CUDA GPUs compute in it; take --dtype=float32 or "
                                 '--dtype=bfloat16')


@pytest.mark.parametrize('script', ['train', 'sample', 'evaluate'])
def test_every_script_lets_a_gpu_multiply_in_tf32(script, data_here, monkeypatch):
    """On a GPU by name alone; what comes after is missing, so that no kernel is started."""
    chosen = []
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', chosen.append)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(runtime, '_described', str)
    monkeypatch.setattr(runtime, 'has_fast_bfloat16', lambda device: False)
    nothing = '--dataset=nothing' if script == 'train' else '--out_dir=nothing'
    for device, expected in (('cpu', []), ('cuda', ['high'])):
        with pytest.raises(UserError, match='nothing'):
            importlib.import_module(script).main([f'--device={device}', '--dtype=float32', nothing])
        assert chosen == expected


def test_threads_change_no_number_on_a_cpu_while_a_run_lasts():
    chosen = runtime.start_runtime('cpu', 'float32', False, width=8, iterations=1)
    assert torch.are_deterministic_algorithms_enabled()
    runtime.stop_runtime(chosen)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.long
@pytest.mark.skipif(not runtime.has_compiler(), reason='no C++ compiler')
def test_compiled_gradients_are_the_same_each_time():
    shape = Shape(n_layer=1, n_head=2, n_embd=64, block_size=128, batch_size=64)
    config, threads = model_config(shape), torch.get_num_threads()
    tokens = torch.randint(0, shape.base_size, (shape.batch_size, shape.block_size),
                           generator=torch.Generator().manual_seed(1))
    count = tokens.numel()
    inputs = tokens.masked_fill(tokens % 2 == 0, config.mask_token_id)  # many threads add to the row of one id
    batch = whole_batch(keyed(1, 0, 0, shape.batch_size), inputs, tokens, torch.full((count,), 1 / count))
    runtime.start_runtime('cpu', 'float32', True, width=64, iterations=1)
    torch.set_num_threads(2)
    try:
        model = GPT(config)
        objective = Objective(model, base_vocabulary(config, torch.device('cpu')))
        objective.compile_parts()
        found = []
        for _ in range(6):
            model.zero_grad()
            objective(batch, Stage({}), None).total.backward()
            found.append([weight.grad.clone() for weight in model.parameters()])
        assert all(torch.equal(one, other) for later in found[1:] for one, other in zip(found[0], later))
    finally:
        torch.set_num_threads(threads)


def test_the_matrix_rate_is_plausible():
    rate = runtime.measure_matrix_rate(torch.device('cpu'), torch.float32, seconds=0.05)
    assert 1e8 < rate < 1e14


FAULTS = """
import resource, torch
from core.common.runtime import start_runtime
start_runtime('cpu', 'float32', False, width=8, iterations=1)
for number in range(31):
    torch.ones(64 * 2 ** 20 // 4)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    first = faults if number <= 20 else first  # until then blocks find their places
print(faults - first)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='another C library')
def test_freed_memory_serves_again_unless_the_environment_says_otherwise():
    """Ten times 64 MiB: 163,840 page faults of 4 KiB where it goes back to the system."""
    faults = []
    for wish in ({}, {'MALLOC_MMAP_THRESHOLD_': '131072'}):
        answer = subprocess.run([sys.executable, '-c', FAULTS], cwd=Path(__file__).parent.parent.parent,
                                capture_output=True,
                                text=True, check=True, env={**os.environ, **wish}).stdout
        faults.append(int(answer))
    assert faults[0] < 2_000 and faults[1] > 100_000, faults


BAD_COMPILER = """#!/bin/sh
case "$*" in *.cpp*) echo 'x.cpp:1:10: fatal error: Python.h: No such file or directory' >&2; exit 1;; esac
exec g++ "$@"
"""
CHOICE = """
import torch
from core.common.runtime import compile_problem, start_runtime
chosen = start_runtime('cpu', 'float32', None, width=64, iterations=10_000)
print(chosen.compile, *(line for line in chosen.reasons if line.startswith('compile')))
"""


@pytest.mark.long
@pytest.mark.skipif(not runtime.has_compiler(), reason='no C++ compiler')
def test_a_compiler_that_cannot_compile_is_found_by_a_tiny_kernel(tmp_path):
    bad = tmp_path / 'g++-without-headers'
    bad.write_text(BAD_COMPILER)
    bad.chmod(0o755)
    done = subprocess.run([sys.executable, '-c', CHOICE], cwd=Path(__file__).parent.parent.parent, capture_output=True,
                          text=True, env={**os.environ, 'CXX': str(bad)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('False compile False: torch.compile does not work here (')
    assert 'Python.h' in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_whatever_breaks_a_compiler_is_one_line(monkeypatch):
    def broken(*given, **named):
        raise RuntimeError('InductorError\n\n  x.cpp:2: fatal error: omp.h: No such file\nmuch\nmore')

    runtime._kernel_problem.cache_clear()
    monkeypatch.setattr(runtime, 'has_compiler', lambda: True)
    monkeypatch.setattr(torch, 'compile', broken)
    chosen = runtime.start_runtime('cpu', 'float32', None, width=64, iterations=10_000)
    runtime._kernel_problem.cache_clear()
    line = next(line for line in chosen.reasons if line.startswith('compile'))
    assert not chosen.compile and 'fatal error: omp.h: No such file' in line and 'much' not in line


def test_on_a_gpu_runs_repeat_exactly(monkeypatch):
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)
    monkeypatch.setattr(os, 'environ', {**os.environ})
    asked = []
    monkeypatch.setattr(torch, 'use_deterministic_algorithms', lambda *words, **more: asked.append((words, more)))
    runtime._repeat_exactly(torch.device('cuda'))
    assert asked == [((True,), {'warn_only': True})] and os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'
