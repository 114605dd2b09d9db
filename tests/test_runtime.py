"""Choices of device, precision and compilation, each with its reason."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import core.runtime as runtime
from core.errors import UserError


def test_devices_that_are_not_there_are_refused():
    assert runtime.resolve_device('cpu') == 'cpu'
    assert runtime.resolve_device('auto') in ('cpu', 'cuda')
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


def test_the_matrix_rate_is_plausible():
    rate = runtime.measure_matrix_rate(torch.device('cpu'), torch.float32, seconds=0.05)
    assert 1e8 < rate < 1e14


FAULTS = """
import resource, torch
from core.runtime import start_runtime
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
        answer = subprocess.run([sys.executable, '-c', FAULTS], cwd=Path(__file__).parent.parent, capture_output=True,
                                text=True, check=True, env={**os.environ, **wish}).stdout
        faults.append(int(answer))
    assert faults[0] < 2_000 and faults[1] > 100_000, faults
