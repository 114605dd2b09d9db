"""Progress where there is no terminal."""

import pytest

from core.common import progress
from core.common.printing import counted
from core.common.progress import ProgressBar


@pytest.fixture
def clock(monkeypatch):
    """A list whose last number is the time."""
    times = [0.0]
    monkeypatch.setattr(progress.time, 'monotonic', lambda: times[-1])
    return times


def test_every_tenth_of_the_work_is_a_line(clock):
    said = []
    with ProgressBar(50, desc='work', tell=said.append) as bar:
        assert not bar.shown
        for done in range(1, 51):
            clock.append(10.0 * done)
            bar.move(1)
    assert said == [f'work: {10 * tenth}% done, about {left} left' for tenth, left in zip(range(1, 11), (
        '8 min', '7 min', '6 min', '5 min', '4 min', '3 min', '2 min', '2 min', '50 s', '0 s'))]


def test_short_work_says_nothing_and_a_resumed_one_counts_from_its_start(clock):
    said = []
    short = ProgressBar(10, desc='work', tell=said.append)
    for done in range(1, 11):
        clock.append(0.4 * done)
        short.move_to(done)
    assert not said
    resumed = ProgressBar(100, initial=50, desc='training', tell=said.append)
    clock.append(clock[-1] + 20)
    resumed.note('9 tokens/s')
    resumed.move_to(55)
    clock.append(clock[-1] + 20)
    resumed.move_to(60)
    resumed.move_to(58)
    assert said == ['training: 60% done, 9 tokens/s, about 3 min left']


def test_unwanted_progress_says_nothing(clock):
    said = []
    bar = ProgressBar(10, wanted=False, desc='work', tell=said.append)
    clock.append(1000.0)
    bar.move_to(10)
    ProgressBar(10).move_to(10)
    assert not said


def test_a_number_agrees_with_its_noun():
    assert [counted(number, 'sample') for number in (0, 1, 2)] == ['0 samples', '1 sample', '2 samples']
