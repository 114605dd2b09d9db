"""A run folder of the program before run folders had a marker: it is sampled and resumed to what that program made.

The recorded values are that program's own, on this very folder, on a CPU with one thread, in float32 and eager. Its
instruction sets (SSE, AVX2, AVX-512) moved the losses by 1e-7 and no token.
"""

import json
from pathlib import Path

import pytest
import torch

import sample
import train
from core.checkpoints.checkpoint import verify_checkpoint
from helpers.older_run import ITERATION, write_older_corpus, write_older_run

CLOSE = 1e-5  # of losses, relative
SAMPLED = {  # (policy, checkpoint): tokens of two texts, and the mean log-probability of each
    ('remask', 'ckpt_best.pt'): ([[3, 3, 7, 13, 10, 7, 6, 15, 2, 5, 15, 15, 15, 15, 4, 14],
                                  [7, 4, 8, 0, 15, 10, 4, 7, 17, 7, 7, 7, 13, 7, 15, 10]],
                                 [-2.7896498595582013, -2.601103962162683]),
    ('token_critic', 'ckpt.pt'): ([[3, 3, 7, 8, 3, 7, 6, 15, 4, 7, 7, 4, 15, 13, 4, 7],
                                   [15, 4, 7, 8, 13, 10, 13, 7, 6, 7, 7, 7, 13, 3, 4, 4]],
                                  [-2.5781602956032077, -2.560617802118224])}
AS_IT_WAS = {'remask': ['--guidance=critic', '--randomness_strength=0.4'], 'token_critic': []}  # that program's defaults
LOSSES = {  # iteration: of the trunk, the sampler head and the critic
    10: (3.0444588661193848, 3.27548885345459, 0.643819272518158),
    11: (2.956996440887451, 3.1117753982543945, 0.6379952430725098),
    12: (3.0278477668762207, 3.1990694999694824, 0.6729347705841064),
    13: (2.9852237701416016, 3.0459232330322266, 0.5800032615661621),
    14: (2.8726329803466797, 2.8942699432373047, 0.5965681672096252)}
BOUNDS = {10: 3.23267467367862, 15: 2.85524505981732}  # iteration: the validation's NELBO, nats per token
SQUARES = {'model': 212.259693, 'ema': 197.337956}  # sums over all weights after the last iteration


@pytest.fixture
def older_run(data_here) -> Path:
    write_older_corpus(data_here)
    folder = data_here.parent / 'out'
    write_older_run(folder)
    return folder


@pytest.mark.parametrize(('policy', 'name'), list(SAMPLED))
def test_it_is_sampled_to_the_same_tokens(older_run: Path, policy: str, name: str) -> None:
    written = older_run.parent / 'samples.json'
    sample.main([f'--out_dir={older_run}', f'--checkpoint_name={name}', f'--sampling_policy={policy}',
                 *AS_IT_WAS[policy], '--num_samples=2', '--iterations=4', '--device=cpu', f'--save_json={written}'])
    found = json.loads(written.read_text())
    tokens, confidence = SAMPLED[policy, name]
    assert found['tokens'] == tokens
    assert found['self_confidence'] == pytest.approx(confidence, rel=CLOSE)


def test_it_is_resumed_to_the_same_losses_and_weights(older_run: Path) -> None:
    earlier = (older_run / 'metrics.jsonl').read_text().splitlines()
    train.main([f'--out_dir={older_run}', '--init_from=resume'])  # its other options are those of config.json
    lines = (older_run / 'metrics.jsonl').read_text().splitlines()
    assert lines[:len(earlier) - 1] == earlier[:-1]  # the validation before iteration 10 comes again
    records = [json.loads(line) for line in lines[len(earlier) - 1:]]
    losses = {record['iteration']: [record[f'train/loss_{part}'] for part in ('main', 'sampler', 'critic')]
              for record in records if record['kind'] == 'iteration'}
    bounds = {record['iteration']: record['val/nelbo'] for record in records if record['kind'] == 'evaluation'}
    assert list(losses) == list(LOSSES) and bounds == pytest.approx(BOUNDS, rel=CLOSE)
    for iteration, values in losses.items():
        assert values == pytest.approx(LOSSES[iteration], rel=CLOSE), iteration
    saved = torch.load(older_run / 'ckpt.pt', weights_only=True)
    for part, recorded in SQUARES.items():
        assert sum(one.double().square().sum().item() for one in saved[part].values()) == \
            pytest.approx(recorded, rel=CLOSE), part
    assert saved['best_value'] == pytest.approx(BOUNDS[15], rel=CLOSE)  # the critic's weight has grown by now
    assert sorted(one.name for one in older_run.glob('*.pt')) == [
        'ckpt.pt', 'ckpt_best.pt', 'ckpt_previous.pt', 'ckpt_unmasking_10.pt', 'ckpt_unmasking_15.pt']


def test_its_checkpoints_verify(older_run: Path) -> None:
    found = verify_checkpoint(older_run / 'ckpt.pt')
    assert (found.kind, found.iteration, found.best_value, found.resumable) == ('unmasking', ITERATION, 2.75, True)
    assert not verify_checkpoint(older_run / 'ckpt_best.pt').resumable
