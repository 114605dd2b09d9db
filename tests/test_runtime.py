"""Choices of device, precision and compilation, each with its reason."""

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
