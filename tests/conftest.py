"""Small models and corpora that many tests share.

pytest runs the files side by side, one worker per core, so each worker and what it starts computes with one thread.
"""

import os

import numpy as np
import pytest
import torch

from core.common.printing import failed_decorations
from core.data.corpus import load_corpus
from core.data.folders import DATA_VARIABLE
from core.data.learning import character_vocabulary
from core.data.writing import write_corpus

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ['OMP_NUM_THREADS'] = '1'
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def whole_floats():
    """A runtime on a CPU flushes denormal numbers and is deterministic; the next test shall not inherit that."""
    yield
    torch.set_flush_denormal(False)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def no_failed_decoration():
    """No picture, progress bar or service may fail in a test that does not ask for it (and clears the record then)."""
    failed_decorations.clear()
    yield
    failed, errors = list(failed_decorations), list(failed_decorations.values())
    failed_decorations.clear()
    if failed:
        raise AssertionError(f'a boundary caught a failure that no test asked for: {failed}') from errors[0]


@pytest.fixture
def failing_decoration():
    """For a test in which something fails that no work needs: the record of what was caught, by what it said."""
    yield failed_decorations
    failed_decorations.clear()


@pytest.fixture
def data_here(tmp_path, monkeypatch):
    """An empty working folder, in whose folder data/ this test's corpora are; returns that folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / 'data'))
    (tmp_path / 'data').mkdir()
    return tmp_path / 'data'


@pytest.fixture
def small_corpus(data_here):
    """A corpus 'tiny' of made-up text in `data_here`, loaded."""
    words = np.random.default_rng(1).choice(['to ', 'be ', 'or ', 'not, ', 'king\n', 'MARY:\n', 'queen '], 4000)
    text = ''.join(words)
    cut = len(text) * 4 // 5
    write_corpus(data_here / 'tiny', character_vocabulary(text), {'train': text[:cut], 'val': text[cut:]},
                 'made up')
    return load_corpus('tiny')
