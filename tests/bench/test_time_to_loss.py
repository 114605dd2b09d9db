"""Seconds until a loss: the crossing itself, the options, both sides on one corpus, and what the table compares."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import core.bench.time_to_loss as time_to_loss
from bench import main
from core.bench.time_to_loss import YARDSTICK, Point, seconds_until, table
from core.bench.yardstick import Baseline, BaselineTraining
from core.common.errors import UserError
from core.optimizer import learning_rate_at


def test_the_crossing_lies_on_the_line_between_two_validations():
    points = [Point(0.0, 4.0), Point(10.0, 2.0), Point(20.0, 2.5), Point(30.0, 1.5)]
    assert seconds_until(points, 3.0) == 5.0
    assert seconds_until(points, 2.0) == 10.0
    assert seconds_until(points, 1.75) == 27.5
    assert seconds_until(points, 5.0) == 0.0
    assert seconds_until(points, 1.4) is None


def test_ratios_are_taken_seed_by_seed_and_a_seed_that_never_gets_there_is_a_dash():
    def run(seconds):
        return [Point(0.0, 4.0), Point(seconds, 2.0)]

    runs = {YARDSTICK: [run(20.0), run(90.0)], 'causal': [run(10.0), run(30.0)],
            'diffusion': [run(40.0), [Point(0.0, 4.0), Point(50.0, 3.5)]]}
    first, last = table(runs, [3.0])[2:]
    cells = [cell.strip() for cell in first.strip('|').split('|')]
    assert cells == ['3', '28 (10 to 45)', '10 (5 to 15)', '-', '2.50 (2.00 to 3.00)']
    assert '2.750 (2.000 to 3.500)' in last


@pytest.mark.parametrize('arguments, words', [
    (['--time_to_nelbo=2,fast'], ["'fast'", 'nats per token']),
    (['--time_to_nelbo=0'], ['0', 'above 0']),
    (['--time_to_nelbo', '--groups=training', '--repetitions=4'], ['groups does not apply', '3 seeds']),
    (['--dataset=other'], ['dataset is of --time_to_nelbo']),
    (['--iterations=7'], ['iterations is of --time_to_nelbo']),
])
def test_wrong_options_are_one_message(arguments, words):
    with pytest.raises(UserError) as error:
        main([*arguments, '--device=cpu'])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_yardstick_is_validated_on_every_window_alike():
    model, tokens = Baseline(6, 11, 2, 2, 8), np.arange(40, dtype=np.uint16) % 11
    windows = torch.randint(11, (6, 7), generator=torch.Generator().manual_seed(2))
    found = BaselineTraining(model, tokens, 3, 6).validate(windows)
    logits = model.double()(windows[:, :-1], windows[:, 1:])[0]
    assert found == pytest.approx(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item(), rel=1e-5)


def test_all_sides_train_on_one_corpus_and_their_validations_are_kept(small_corpus, tmp_path, monkeypatch, capsys):
    base = ''.join(f'{line}\n' for line in ('n_layer = 1', 'n_head = 2', 'n_embd = 16', 'block_size = 8',
                                            'batch_size = 4', 'warmup_iters = 2', 'learning_rate = 1e-2'))
    for name, kind in (('causal', 'causal'), ('diffusion', 'bidirectional')):
        (tmp_path / f'{name}.py').write_text(f"{base}attention_type = '{kind}'\n")
    monkeypatch.setattr(time_to_loss, 'RECIPES', {name: f'{name}.py' for name in ('causal', 'diffusion')})
    monkeypatch.setattr(time_to_loss, 'VALIDATIONS', 4)
    rates, step = [], BaselineTraining.step
    monkeypatch.setattr(BaselineTraining, 'step',
                        lambda self, *rate: (rates.extend(rate), step(self, *rate))[1])
    main(['--time_to_nelbo=3,2', '--dataset=tiny', '--iterations=40', '--repetitions=2', '--device=cpu',
          '--compile=False', '--json=found.json'])
    record = json.loads((tmp_path / 'found.json').read_text())
    assert list(record['runs']) == [YARDSTICK, 'causal', 'diffusion'] and record['iterations'] == 40
    vocabulary = small_corpus.vocabulary
    for name, seeds in record['runs'].items():
        assert len(seeds) == 2 and seeds[0] != seeds[1]
        for points in seeds:
            seconds, losses = zip(*points)
            assert len(points) == 5 and seconds[0] == 0 and list(seconds) == sorted(seconds)
            assert losses[0] == pytest.approx(np.log(vocabulary.size if name == YARDSTICK else vocabulary.base_size),
                                              abs=0.15)
            assert losses[-1] < losses[0]
    expected = [learning_rate_at(number, learning_rate=1e-3, min_lr=1e-4, warmup_iters=20, lr_decay_iters=40,
                                 decay_lr=True) for number in range(40)]
    assert rates == 2 * expected
    said = capsys.readouterr().out
    assert 'plain GPT / causal' in said and 'diffusion, seed 1338' in said
    assert {path.name for path in tmp_path.iterdir()} == {'data', 'causal.py', 'diffusion.py', 'found.json'}
