"""What a run says while it trains and at its end."""

import pytest

import core.trainer
from core.checkpoints.kinds import CheckpointKind
from helpers.runs import run


def test_a_stage_that_begins_is_named(small_corpus, capsys):
    run('--out_dir=out', '--max_iters=8', '--start_sampler_iteration=2', '--start_critic_iteration=4',
        '--end_critic_iteration=6')
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith('from iteration')]
    assert said == ['from iteration 0 on: trunk', 'from iteration 2 on: trunk, sampler head',
                    'from iteration 4 on: trunk, sampler head, critic']


def test_the_last_line_is_the_next_command(small_corpus, capsys):
    run('--out_dir=one run', '--max_iters=3')
    assert capsys.readouterr().out.splitlines()[-1] == "next: python sample.py --out_dir='one run'"
    assert CheckpointKind.JUDGE.next_command('j') == \
        'python sample.py --quality_metric=judge --judge_checkpoint_name=j/ckpt_best.pt'
    assert CheckpointKind.CLASSIFIER.next_command('r') == 'python sample.py --remasking_checkpoint_name=r/ckpt_best.pt'


@pytest.mark.parametrize('seconds, drawn', [(0.0, 4), (1e9, 1)])
def test_the_curve_is_drawn_again_while_a_run_goes_on(small_corpus, monkeypatch, seconds, drawn):
    pictures = []
    monkeypatch.setattr(core.trainer, 'SECONDS_BETWEEN_CURVES', seconds)
    monkeypatch.setattr(core.trainer, 'plot_loss_curve', lambda *given, **named: pictures.append(given))
    run('--out_dir=out', '--max_iters=8', '--eval_interval=4')
    assert len(pictures) == drawn  # at 0, 4 and 8, and at the end
