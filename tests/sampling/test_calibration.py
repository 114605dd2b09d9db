"""Calibration: tables and maps against plain loops and known truths, its file, threshold mode."""

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from configurator import configure
from core.checkpoints.checkpoint import checkpoint_hash
from core.common.errors import UserError
from core.common.randomness import Purpose, keyed
from core.common.typed_json import with_checksum
from core.data.vocabulary import Vocabulary
from core.sampling.calibration import (CALIBRATION_NAME, Calibration, Reliability, calibration_error, find_calibration,
                                       fit_calibration, reliability, write_calibration)
from core.sampling.options import SampleConfig
from core.sampling.run import run_sampling
from helpers.toys import model_that_knows, save_model

VOCABULARY = Vocabulary(kind='characters', tokens=tuple('\n abcdefgh'))
WRONG = 'aceg'


def uniform(count, stream=0):
    return keyed(7, 0, 0, 1).uniform(Purpose.MASK, count, stream)[0]


def drawn(probability):
    """Whether each position is wrong, with its own probability."""
    return uniform(len(probability), stream=1) < probability


def column(values):
    return torch.tensor(values, dtype=torch.float64)


def as_table(observed, counts):
    return Reliability(torch.linspace(0.1, 0.9, len(counts), dtype=torch.float64), column(observed),
                       torch.tensor(counts))


# Tables -------------------------------------------------------------------------------------------------------------

def test_bins_hold_equal_counts_from_low_to_high_predictions():
    predicted = column([0.9, 0.1, 0.2, 0.8, 0.3, 0.7])
    wrong = torch.tensor([True, False, True, False, False, True])
    found = reliability(predicted, wrong, bins=3)
    assert found.predicted.tolist() == pytest.approx([0.15, 0.5, 0.85])
    assert found.observed.tolist() == [0.5, 0.5, 0.5] and found.count.tolist() == [2, 2, 2]
    assert calibration_error(found) == pytest.approx((0.35 + 0.0 + 0.35) / 3)


def test_equal_predictions_share_a_bin():
    found = reliability(column([0.25] * 7 + [0.5, 0.75]), torch.tensor([True] * 3 + [False] * 6), bins=4)
    assert found.predicted.tolist() == [0.25, 0.625] and found.count.tolist() == [7, 2]
    assert found.observed.tolist() == pytest.approx([3 / 7, 0.0])
    single = reliability(column([0.4]), torch.tensor([True]))
    assert single.predicted.tolist() == [0.4] and single.observed.tolist() == [1.0] and single.count.tolist() == [1]


def test_the_error_of_a_perfect_detector_is_what_chance_gives():
    rate, count, bins = 0.3, 20_000, 20
    wrong = drawn(torch.full((count,), rate, dtype=torch.float64))
    table = reliability(rate + 1e-9 * uniform(count), wrong, bins)
    assert table.count.tolist() == [count // bins] * bins
    chance = math.sqrt(2 * rate * (1 - rate) * bins / (math.pi * count))
    assert 0.5 * chance < calibration_error(table) < 1.6 * chance


# The map ------------------------------------------------------------------------------------------------------------

def pooled(observed, counts):
    """Pool adjacent violators, one bin at a time."""
    blocks = []
    for rate, count in zip(observed, counts):
        blocks.append([rate, count, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (first, n, size), (second, m, more) = blocks.pop(-2), blocks.pop()
            blocks.append([(first * n + second * m) / (n + m), n + m, size + more])
    return [rate for rate, _, size in blocks for _ in range(size)]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 50)), min_size=1, max_size=12))
def test_the_fit_is_that_of_pooling_adjacent_violators(bins):
    observed, counts = zip(*bins)
    found = fit_calibration(as_table(observed, counts)).observed
    assert found.tolist() == pytest.approx(pooled(observed, counts), abs=1e-12)


def test_the_map_is_linear_between_its_points_and_constant_beyond():
    curve = Calibration(column([0.2, 0.4, 0.8]), column([0.1, 0.5, 0.5]))
    given_, expected = [0.0, 0.2, 0.25, 0.4, 0.6, 0.8, 1.0], [0.1, 0.1, 0.2, 0.5, 0.5, 0.5, 0.5]
    assert curve.error_rate(column(given_)).tolist() == pytest.approx(expected)
    found = curve.error_rate(torch.tensor([[0.3, 0.9]], dtype=torch.float32))
    assert found.dtype == torch.float64 and found.shape == (1, 2)
    assert found[0].tolist() == pytest.approx([0.3, 0.5], abs=1e-6)
    assert Calibration(column([0.3]), column([0.7])).error_rate(column([0.0, 0.3, 1.0])).tolist() == [0.7] * 3


def test_a_calibrated_detector_keeps_its_scale():
    predicted = uniform(40_000)
    curve = fit_calibration(reliability(predicted, drawn(predicted)))
    inside = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    assert (curve.error_rate(inside) - inside).abs().max() < 3.5 * math.sqrt(0.25 / 2000)


def test_a_detector_that_doubles_its_logits_is_mapped_back():
    truth = 0.05 + 0.9 * uniform(40_000)
    wrong, said = drawn(truth), torch.sigmoid(2 * torch.logit(truth))
    even = torch.arange(len(truth)) % 2 == 0
    curve = fit_calibration(reliability(said[even], wrong[even]))
    before, after = (calibration_error(reliability(rate[~even], wrong[~even]))
                     for rate in (said, curve.error_rate(said)))
    assert before > 0.08 and after < 0.02
    assert (curve.error_rate(said) - truth).abs().mean() < 0.02


# The file -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def checkpoint(tmp_path):
    """A generator whose critic is sure of the letters in WRONG and of no others: 0.98 there, 0.27 elsewhere."""
    model = model_that_knows(VOCABULARY, WRONG, add_critic_head=True)
    with torch.no_grad():
        model.critic_head.weight.zero_()
        model.critic_head.bias.fill_(-1.0)
        model.critic_head.weight[0, VOCABULARY.encode(WRONG)] = 5.0 / math.sqrt(model.config.n_embd)
    save_model(tmp_path / 'run' / 'ckpt_best.pt', VOCABULARY, model)
    save_model(tmp_path / 'run' / 'ckpt.pt', VOCABULARY, model, iteration=101)
    save_model(tmp_path / 'run' / 'remasking.pt', VOCABULARY, model_that_knows(VOCABULARY, WRONG), 'remasking')
    return tmp_path / 'run' / 'ckpt_best.pt'


def keep(checkpoint, *observed):
    return write_calibration(checkpoint, checkpoint_hash(checkpoint),
                             {'map': {'predicted': [0.2, 0.9], 'observed': list(observed)}, 'windows': 16})


def test_a_calibration_is_found_beside_the_very_checkpoint_that_it_is_of(checkpoint):
    found, line = find_calibration(checkpoint)
    assert found is None and 'python evaluate.py --measure=errors' in line
    path = keep(checkpoint, 0.25, 0.75)
    assert path == checkpoint.parent / CALIBRATION_NAME and json.loads(path.read_text())['windows'] == 16
    found, line = find_calibration(checkpoint)
    assert found.observed.tolist() == [0.25, 0.75] and 'error rates' in line and str(path) in line
    found, line = find_calibration(checkpoint.with_name('ckpt.pt'))
    assert found is None and 'ignored' in line and 'another checkpoint than ckpt.pt' in line


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path, data):
    checkpoint = tmp_path / 'ckpt.pt'
    checkpoint.write_bytes(b'a checkpoint')
    path = keep(checkpoint, 0.25, 0.75)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        found, _ = find_calibration(checkpoint)
    except UserError as error:
        assert 'calibration.json is damaged' in str(error) and '\n' not in str(error)
    else:
        assert (found.predicted.tolist(), found.observed.tolist()) == ([0.2, 0.9], [0.25, 0.75])


def test_a_file_of_the_earlier_format_is_read_and_one_without_its_checksum_is_not(checkpoint):
    path = keep(checkpoint, 0.25, 0.75)
    stored = json.loads(path.read_text())
    del stored['sha256']
    path.write_text(json.dumps({**stored, 'format': 1}))
    assert find_calibration(checkpoint)[0].observed.tolist() == [0.25, 0.75]
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match='no checksum'):
        find_calibration(checkpoint)


@pytest.mark.parametrize('damage', [
    lambda stored: stored['map'].update(observed=[0.5, 0.2]), lambda stored: stored['map'].update(observed=[0.5]),
    lambda stored: stored['map'].update(observed=[0.5, 1.2]), lambda stored: stored['map'].update(predicted='x'),
    lambda stored: stored['map'].update(predicted=[], observed=[]), lambda stored: stored.update(format=9),
    lambda stored: stored.pop('map'), lambda stored: stored['map'].update(predicted=[0.2, math.nan])])
def test_a_damaged_file_is_named(checkpoint, damage):
    path = keep(checkpoint, 0.25, 0.75)
    stored = json.loads(path.read_text())
    del stored['sha256']
    damage(stored)
    path.write_bytes(with_checksum(stored) if 'nan' not in json.dumps(stored).lower() else json.dumps(stored).encode())
    with pytest.raises(UserError, match='calibration.json is damaged.*move it away'):
        find_calibration(checkpoint)
    path.write_bytes(b'\xff{')
    with pytest.raises(UserError, match='calibration.json is damaged'):
        find_calibration(checkpoint)


# Threshold mode -----------------------------------------------------------------------------------------------------

def sample(folder, *arguments):
    configuration = configure(SampleConfig, [f'--out_dir={folder}', '--device=cpu', '--num_samples=8', *arguments])
    lines = []
    return run_sampling(configuration.config, configuration.explicit, lines.append).texts, '\n'.join(lines)


def taken_back(folder, threshold, *arguments):
    """(letters taken back, letters kept) by the first remasking at a threshold, and what was printed."""
    path = folder / 'run.json'
    guide = () if any('remasking_checkpoint_name' in one for one in arguments) else ('--guidance=critic',)
    _, said = sample(folder, '--schedule_mode=threshold', f'--start_threshold={threshold}', *guide,
                     f'--end_threshold={threshold}', '--iterations=3', f'--save_json={path}', *arguments)
    steps = json.loads(path.read_text())['steps']
    before = next(step for step in steps if step['event'] == 'predict')['samples']
    after = next((step['samples'] for step in steps if step['event'] == 'remask'), before)
    found = set(), set()
    for first, second in zip(before, after):
        changed = second['changed'] if second is not first else []
        for place, letter in enumerate(first['text']):
            found[place not in changed].add(letter)
    return *found, said


def test_a_threshold_is_an_error_rate_where_the_critic_is_calibrated(checkpoint):
    folder, wrong, every = checkpoint.parent, set(WRONG), set(VOCABULARY.tokens)
    back, kept, said = taken_back(folder, 0.5)
    assert back == wrong and kept == every - wrong and 'calibrate it with' in said
    keep(checkpoint, 0.6, 0.8)  # those called wrong with 0.27 are wrong more often than not
    back, kept, said = taken_back(folder, 0.5)
    assert back == every and not kept and 'thresholds are error rates' in said
    back, kept, _ = taken_back(folder, 0.7)
    assert back == wrong and kept == every - wrong
    back, kept, _ = taken_back(folder, 0.85)
    assert not back and kept == every
    back, kept, said = taken_back(folder, 0.5, '--checkpoint_name=ckpt.pt')
    assert back == wrong and 'is ignored' in said


def test_an_external_model_is_not_put_through_the_map_and_ratios_know_nothing_of_it(checkpoint):
    folder = checkpoint.parent
    ratio, _ = sample(folder, '--iterations=4', '--guidance=critic')
    keep(checkpoint, 0.0, 0.0)  # would take nothing back
    back, _, said = taken_back(folder, 0.5, '--remasking_checkpoint_name=remasking.pt')
    assert back == set(WRONG) and 'calibrat' not in said
    again, said = sample(folder, '--iterations=4', '--guidance=critic')
    assert again == ratio and 'calibrat' not in said
    assert 'calibrat' not in sample(folder, '--sampling_policy=token_critic', '--iterations=3')[1]
