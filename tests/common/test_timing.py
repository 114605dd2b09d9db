"""The timer adds up, counts, nests and survives exceptions."""

import time

import pytest
import torch

from core.common.timing import TimingAccumulator, get_global_timer


def test_totals_counts_and_shares():
    timer = TimingAccumulator(torch.device('cpu'))
    for _ in range(3):
        with timer.measure('outer'):
            with timer.measure('inner'):
                time.sleep(0.01)
            time.sleep(0.005)
    with timer.measure('other'):
        time.sleep(0.02)
    assert timer.counts == {'outer': 3, 'inner': 3, 'other': 1}
    assert 0.03 <= timer.totals['inner'] < 0.1 and 0.015 <= timer.totals['outer'] < timer.totals['inner']
    assert timer.totals['other'] >= 0.02 and timer.measured == pytest.approx(sum(timer.totals.values()))
    header, *rows = timer.summary().splitlines()
    assert header.split() == ['stage', 'seconds', 'share', 'calls', 'ms/call']
    assert [row.split()[0] for row in rows] == ['inner', 'other', 'outer'] and rows[0].split()[3] == '3'
    assert sum(float(row.split()[2].rstrip('%')) for row in rows) == pytest.approx(100, abs=0.2)


def test_a_stage_that_raises_is_counted_and_closed():
    timer = TimingAccumulator()
    with pytest.raises(KeyError):
        with timer.measure('broken'):
            raise KeyError
    with timer.measure('next'):
        pass
    assert timer.counts == {'broken': 1, 'next': 1}
    assert timer.measured == pytest.approx(sum(timer.totals.values()))
    timer.reset()
    assert timer.summary() == 'no times were measured' and timer.measured == 0


def test_the_device_is_synchronised_at_both_ends(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: calls.append('synchronize'))
    with TimingAccumulator(torch.device('cuda')).measure('stage'):
        calls.append('work')
    assert calls == ['synchronize', 'work', 'synchronize']
    with TimingAccumulator(torch.device('cpu')).measure('stage'):
        pass
    assert len(calls) == 3


def test_the_global_timer_is_one():
    assert get_global_timer() is get_global_timer()
