"""docs/extending.md: each of its scripts runs as it is printed, and does what nothing but its entry can do."""

import dataclasses
import importlib
import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from core.batches import unmasking_batches
from core.checkpoints.checkpoint import load_checkpoint
from core.checkpoints.weights import build_model
from core.common.errors import UserError
from core.gauges import GAUGES
from core.logger import read_metrics
from core.noise import SCHEDULES
from core.options import TrainConfig
from core.rewards import REWARDS
from core.sampler_head import SAMPLER_KINDS
from core.sampling.options import SampleConfig
from core.sampling.policies import GUIDES, POLICIES
from core.sampling.policy_options import remasking_levels
from core.sampling.presets import PRESETS
from core.sampling.quality_metrics import QUALITY_METRICS
from helpers.runs import SMALL, refused
from helpers.sampling import sample, write_checkpoint
from sample_utils import REMASKING_SCHEDULES

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / 'docs' / 'extending.md').read_text(encoding='utf-8')
SCRIPTS = {name: (command.split(), code) for code in re.findall(r'^```python\n(.*?)^```', PAGE, re.S | re.M)
           for name, command in re.findall(r'\A# (\w+\.py): python \w+\.py ?(.*)\n', code)}
TABLES = (GUIDES, POLICIES, REMASKING_SCHEDULES, SCHEDULES, QUALITY_METRICS, GAUGES, REWARDS, PRESETS)
T = 16  # tokens of a text


@pytest.fixture(autouse=True)
def tables_as_they_were():
    """An entry of a test is gone after it."""
    before = [dict(table) for table in TABLES]
    yield
    for table, rows in zip(TABLES, before):
        table.clear()
        table.update(rows)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a script of the page in a folder with a checkpoint: with its own arguments and more, or with others in place
    of them. Gives the script's names."""
    (tmp_path / 'out').mkdir()
    write_checkpoint(tmp_path / 'out' / 'ckpt_best.pt')
    (tmp_path / 'config').symlink_to(ROOT / 'config')
    monkeypatch.chdir(tmp_path)

    def run(name, *more, arguments=None):
        own, code = SCRIPTS[name]
        (tmp_path / name).write_text(code)
        monkeypatch.setattr(sys, 'argv', [name, *(own if arguments is None else arguments), *more])
        try:
            return runpy.run_path(name, run_name='__main__')
        except SystemExit as done:
            assert done.code == 0, name
            return {}

    return run


def steps_of(path):
    """(event, tokens, changed positions) of every step and text of a run that --save_json kept."""
    found = []
    for step in json.loads(path.read_text())['steps']:
        found += [(one['sample'], step['event'], one['tokens'], set(one['changed'])) for one in step['samples']]
    return [found_of for number in {one[0] for one in found}
            for found_of in [(event, tokens, changed) for sample, event, tokens, changed in found if sample == number]]


def remaskings(path):
    """(the tokens before, the positions taken back) of every remasking."""
    steps = steps_of(path)
    return [(before[1], now[2]) for before, now in zip(steps, steps[1:]) if now[0] == 'remask']


def doubles(tokens):
    return {place for place in range(1, T) if tokens[place] == tokens[place - 1]}


def test_a_guide_has_its_tokens_taken_back_first(run, tmp_path, capsys):
    """Of eight tokens six go by the guide; so all doubles go, where there are no more of them, and no others before."""
    run('doubles.py', '--start_ratio=0.5', '--end_ratio=0.5', '--iterations=8', '--save_json=run.json')
    found = remaskings(tmp_path / 'run.json')
    assert 'guidance doubles: as asked for' in capsys.readouterr().out and len(found) == 4 * 7
    assert all(len(taken) == 8 and (doubles(tokens) <= taken or len(doubles(tokens)) > 6) for tokens, taken in found)
    assert sum(len(doubles(tokens)) for tokens, _ in found) > 28


def test_a_guide_serves_thresholds_with_those_of_its_row(run, tmp_path):
    """Above one half are the doubles and nothing else; a text without any is finished."""
    run('doubles.py', arguments=['--guidance=doubles', '--schedule_mode=threshold', '--iterations=40',
                                 '--num_samples=32', '--save_json=run.json'])
    found = remaskings(tmp_path / 'run.json')
    assert sum(bool(taken) for _, taken in found) > 20 and all(taken == doubles(tokens) for tokens, taken in found)
    assert not any(doubles(tokens) for tokens in json.loads((tmp_path / 'run.json').read_text())['tokens'])
    assert remasking_levels(SampleConfig(guidance='doubles', schedule_mode='threshold', iterations=4)) == [0.5] * 3


def test_a_policy_reveals_in_its_order(run, tmp_path):
    run('right_to_left.py', '--save_json=run.json')
    revealed = [changed for event, _, changed in steps_of(tmp_path / 'run.json') if event == 'predict']
    assert revealed == [{place} for place in reversed(range(T))] * 4


def test_a_remasking_schedule_says_how_many_are_taken_back(run, tmp_path):
    run('steep.py', '--save_json=run.json')
    counts = [len(taken) for _, taken in remaskings(tmp_path / 'run.json')]
    levels = [0.05 + 0.9 * (1 - index / 18) ** 2 for index in range(19)]
    assert counts == [math.floor(T * level + 0.5) for level in levels] * 4


def masked_share(moment):
    """Of the batch that the step was made on."""
    [batch] = unmasking_batches(moment.state.plan, moment.iteration, lambda count: count)
    return {'masked': (batch.inputs == moment.state.plan.noise.mask_token_id).double().mean().item()}


def test_a_noise_schedule_trains_and_is_known_to_the_checkpoint(run, small_corpus, tmp_path):
    """The mean of t^2 over all times is a third; that of the linear schedule is a half."""
    GAUGES['masked'] = masked_share
    run('late.py', *SMALL, '--batch_size=256', '--max_iters=2')
    shares = [record['train/masked'] for record in read_metrics(tmp_path / 'out-late' / 'metrics.jsonl')
              if record['kind'] == 'iteration']
    assert len(shares) == 2 and shares == pytest.approx([1 / 3] * 2, abs=0.03)
    checkpoint = load_checkpoint('out-late/ckpt.pt')
    assert checkpoint.noise_schedule() is SCHEDULES['late']
    del SCHEDULES['late']
    with pytest.raises(UserError, match="noise_schedule='late', but .* linear, cosine, geometric; add its row"):
        checkpoint.noise_schedule()


def test_a_quality_metric_is_told_and_kept(run, tmp_path, capsys):
    run('vowels.py', '--iterations=3', '--save_json=run.json')
    out = capsys.readouterr().out
    kept = json.loads((tmp_path / 'run.json').read_text())
    shares = [(text.count('a') + text.count('e')) / T for text in kept['texts']]
    assert kept['vowels'] == shares and len(set(shares)) > 1 and kept['self_confidence'] is None
    assert [f'--- sample {number} (vowels {share:.3f})' in out for number, share in enumerate(shares)] == [True] * 4
    assert f'\nvowels {sum(shares) / 4:.3f}\n' in out


def test_a_gauge_is_in_the_log(run, small_corpus, tmp_path):
    run('norms.py', *SMALL)
    *_, last = (record for record in read_metrics(tmp_path / 'out-norms' / 'metrics.jsonl')
                if record['kind'] == 'iteration')
    model = build_model(load_checkpoint('out-norms/ckpt.pt'), use_ema=False)
    norm = torch.cat([weight.flatten() for weight in model.parameters()]).double().norm().item()
    assert last['train/weight_norm'] == pytest.approx(norm, rel=1e-5) and 'train/grad_norm' in last


def test_the_loop_of_the_page_is_that_of_the_program(run, tmp_path, capsys):
    """Token for token."""
    found = run('loop.py')
    made, _ = sample(tmp_path / 'out', '--temperature=1.0', '--iterations=4')
    assert torch.equal(found['tokens'], made.tokens) and (made.tokens != found['model'].config.mask_token_id).all()
    drawn = [int(words[2]) for line in capsys.readouterr().out.splitlines() if (words := line.split())[0] == 'step']
    assert drawn == [4 * T, 4 * 15, 4 * 8, 4]


def test_every_script_of_the_page_has_a_test():
    tests = Path(__file__).read_text(encoding='utf-8')
    assert len(SCRIPTS) == PAGE.count('```python\n') == 7
    assert [name for name in SCRIPTS if f"run('{name}'" not in tests] == []


def test_the_tables_lie_where_the_page_says():
    rows = re.findall(r'^\|.*?\| `(\w+)` in `([\w/]+)\.py` \|', PAGE, re.M)
    found = [getattr(importlib.import_module(path.replace('/', '.').removesuffix('.__init__')), name) for name, path in rows]
    assert len(rows) == len(TABLES) and all(one is other for one, other in zip(found, TABLES))


def names_in_help(options, option):
    """The words that --help says of an option."""
    [described] = (one.metadata['help'] for one in dataclasses.fields(options) if one.name == option)
    return set(re.findall(r'\w+', described))


@pytest.mark.parametrize('option, table', [
    ('noise_schedule', SCHEDULES), ('reward', REWARDS), ('sampler_kind', SAMPLER_KINDS)])
def test_a_name_that_no_table_of_training_has_is_refused(option, table, small_corpus):
    assert f"{option} is 'x', but must be one of {', '.join(table)}" in refused(f'--{option}=x')
    assert set(table) <= names_in_help(TrainConfig, option)


@pytest.mark.parametrize('option, names', [
    ('guidance', ['auto', *GUIDES]), ('sampling_policy', POLICIES), ('schedule_type', [*REMASKING_SCHEDULES, 'custom']),
    ('quality_metric', [*QUALITY_METRICS, 'none']), ('preset', PRESETS)])
def test_a_name_that_no_table_of_sampling_has_is_refused(option, names, tmp_path):
    with pytest.raises(UserError, match=f"{option} is 'x', but must be one of {', '.join(names)}"):
        sample(tmp_path, f'--{option}=x')
    assert option == 'sampling_policy' or set(names) <= names_in_help(SampleConfig, option)  # policies have a list
