"""The loop and train.py as a person runs them: files, gates in the log, resume, signals, wrong input."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model
import train as script
from configurator import configure
from core.checkpoints.checkpoint import load_checkpoint
from core.common.errors import UserError
from core.common.printing import failed_decorations
from core.data.text_figures import TextFigures, corpus_figures
from core.logger import read_metrics
from core.noise import SCHEDULES
from helpers.runs import ROOT, SMALL, equal_runs, refused, run


def test_a_run_leaves_everything_in_its_folder(small_corpus, capsys):
    run()
    out, folder = capsys.readouterr().out, Path('out')
    for name in ('ckpt.pt', 'ckpt_previous.pt', 'ckpt_best.pt', 'ckpt_unmasking_12.pt', 'config.json',
                 'environment.json', 'metrics.jsonl', 'loss.png'):
        assert (folder / name).stat().st_size > 0, name
    lines = [line for line in out.splitlines() if line.startswith('iter ')]
    assert len(lines) == 12
    for iteration, line in enumerate(lines):
        assert re.match(rf'iter {iteration}: loss .*, time [\d.]+ms, mfu [\d.]+%, [\d,]+ tokens/s$', line)
        assert ('sampler' in line) == (iteration >= 3) and ('critic' in line) == (iteration >= 6)
    records = [record for record in read_metrics(folder / 'metrics.jsonl') if record['kind'] == 'iteration']
    for record in records:
        parts = record['train/loss_main'] + record.get('train/loss_sampler', 0)
        alpha = 0.5 * min(1, (record['iteration'] - 5) / 3)
        assert record['train/loss'] == pytest.approx(parts + alpha * record.get('train/loss_critic', 0), rel=1e-5)
        assert record.get('train/critic_alpha') == (None if record['iteration'] < 6 else pytest.approx(alpha))
        assert ('train/grad_norm_sampler' in record) == (record['iteration'] >= 3) and record['train/grad_norm'] > 0
        assert record['train/tokens_per_second'] == pytest.approx(4 * 16 / record['seconds'])
    for line in lines:  # what is printed adds up
        total, parts = re.match(r'iter \d+: loss ([\d.]+) \((.*)\), time', line).groups()
        summed = sum(math.prod(map(float, re.findall(r'\d+\.?\d*', part))) for part in parts.split(', '))
        assert float(total) == pytest.approx(summed, abs=2e-4)
    validations = [record for record in read_metrics(folder / 'metrics.jsonl') if record['kind'] == 'evaluation']
    assert [('val/loss_main' in one, 'val/loss_sampler' in one) for one in validations] == [
        (True, False), (True, True), (True, True), (True, True)]  # at iterations 0, 4, 8 and 12; the head begins at 3
    assert [line for line in out.splitlines() if line.startswith('step 12: val nelbo')]
    best = load_checkpoint(folder / 'ckpt_best.pt')
    assert best.iteration == 12 and best.extra['best_is_final']  # the first after the critic's schedule
    block = json.loads((folder / 'config.json').read_text())['block_size']
    assert TextFigures.from_builtins(best.extra['text_figures']) == corpus_figures(small_corpus, block)
    assert json.loads((folder / 'config.json').read_text())['n_embd'] == 16


def test_a_stopped_run_goes_on_exactly(small_corpus):
    """Stopped by a request after 5 steps (stage 2, off the evaluation grid), then by the end of max_iters at 8."""
    import core.trainer

    run('--out_dir=whole')
    step = core.trainer.Run.step

    def step_and_stop(self):
        step(self)
        if self.iteration == 5:
            self.on_signal(signal.SIGTERM, None)

    core.trainer.Run.step = step_and_stop
    try:
        with pytest.raises(SystemExit) as stopped:
            run('--out_dir=parts')
    finally:
        core.trainer.Run.step = step
    assert stopped.value.code == 143 and load_checkpoint('parts/ckpt.pt').iteration == 5
    run('--out_dir=parts', '--init_from=resume')
    equal_runs(Path('whole'), Path('parts'))


def test_a_resumed_run_goes_on_with_its_run_at_wandb(small_corpus, monkeypatch):
    given = []
    wandb = SimpleNamespace(Settings=dict, Table=lambda columns, data: data)
    wandb.init = lambda **options: given.append(options) or SimpleNamespace(
        log=lambda numbers, step: None, finish=lambda: None, settings=SimpleNamespace(mode='offline'))
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    run('--wandb_log=True', '--max_iters=4')
    run('--wandb_log=True', '--init_from=resume')
    run('--wandb_log=True', '--out_dir=another')
    ids = [one['id'] for one in given]
    assert ids[0] == ids[1] != ids[2] and load_checkpoint('out/ckpt.pt').extra['wandb_id'] == ids[0]


def test_nothing_that_is_logged_touches_training(small_corpus, monkeypatch):
    """Every line with its norms and rates, and W&B with samples, against a run that says next to nothing."""
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(Settings=dict, Table=list, init=lambda **_: 1 / 0))
    run('--out_dir=loud', '--log_interval=1', '--eval_interval=1', '--wandb_log=True')
    failed_decorations.clear()
    run('--out_dir=quiet', '--log_interval=12', '--eval_interval=12', '--sample_length=0')
    loud, quiet = load_checkpoint('loud/ckpt.pt'), load_checkpoint('quiet/ckpt.pt')
    assert all(torch.equal(loud.model[name], quiet.model[name]) for name in loud.model)
    last = [read_metrics(Path(name) / 'metrics.jsonl')[-2] for name in ('loud', 'quiet')]
    assert last[0]['train/loss'] == last[1]['train/loss'] and last[0]['train/grad_norm'] == last[1]['train/grad_norm']


def test_evaluation_and_samples_do_not_touch_training(small_corpus):
    run('--out_dir=often', '--eval_interval=1')
    run('--out_dir=seldom', '--eval_interval=12', '--sample_length=0')
    often, seldom = load_checkpoint('often/ckpt.pt'), load_checkpoint('seldom/ckpt.pt')
    assert all(torch.equal(often.model[name], seldom.model[name]) for name in often.model)


def test_activation_checkpointing_reaches_the_layers(small_corpus, monkeypatch):
    """Both trunk calls of the one step have one layer each; validation and the sample compute nothing again."""
    layers = []
    monkeypatch.setattr(model, 'checkpoint', lambda layer, *given, **how: layers.append(layer) or layer(*given))
    options = ['--max_iters=1', '--start_sampler_iteration=0', '--start_critic_iteration=0']
    run(*options)
    assert not layers
    run(*options, '--activation_checkpointing=True', '--out_dir=again')
    assert [type(layer.__self__) for layer in layers] == [model.Block] * 2


def test_accumulation_does_not_change_the_run(small_corpus):
    run('--out_dir=whole', '--dropout=0.0')
    run('--out_dir=parts', '--dropout=0.0', '--batch_size=2', '--gradient_accumulation_steps=2', '--eval_iters=4')
    losses = [[record['train/loss_main'] for record in read_metrics(Path(name) / 'metrics.jsonl')
               if record['kind'] == 'iteration'] for name in ('whole', 'parts')]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_best_checkpoint_is_chosen_among_those_with_all_heads(small_corpus, monkeypatch):
    """The lowest value before the critic's schedule has ended loses to any after it; among these the lowest wins."""
    import core.trainer

    values = iter([9.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    real = core.trainer.Run.validate
    monkeypatch.setattr(core.trainer.Run, 'validate', lambda run: dataclasses.replace(real(run), value=next(values)))
    run('--max_iters=15', '--eval_interval=3')  # evaluated at 0, 3, 6, 9, 12, 15; all heads trained from 9
    best = load_checkpoint('out/ckpt_best.pt')
    assert (best.iteration, best.best_value) == (12, 4.0)


def test_eval_only_says_one_value_and_keeps_the_folder(small_corpus, capsys):
    run()
    before = {path.name: path.read_bytes() for path in Path('out').iterdir() if path.is_file() and path.suffix == '.pt'}
    lines = len(read_metrics(Path('out/metrics.jsonl')))
    capsys.readouterr()
    run('--init_from=resume', '--eval_only=True')
    assert 'step 12: val nelbo' in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in Path('out').iterdir()
                      if path.is_file() and path.suffix == '.pt'}
    assert len(read_metrics(Path('out/metrics.jsonl'))) == lines


def test_always_save_does_not_lose_the_best_value(small_corpus, monkeypatch):
    import core.trainer

    values, real = iter([9.0, 1.0, 2.0]), core.trainer.Run.validate
    monkeypatch.setattr(core.trainer.Run, 'validate', lambda run: dataclasses.replace(real(run), value=next(values)))
    run('--max_iters=8', '--add_critic_head=False', '--always_save_checkpoint=True')
    best = load_checkpoint('out/ckpt_best.pt')
    assert (best.iteration, best.best_value) == (8, 1.0)


def test_a_diverged_run_is_not_saved(small_corpus, monkeypatch):
    import core.trainer

    values, real = iter([9.0, 1.0, float('nan')]), core.trainer.Run.validate
    monkeypatch.setattr(core.trainer.Run, 'validate', lambda run: dataclasses.replace(real(run), value=next(values)))
    assert 'training diverged' in refused('--max_iters=12')
    assert load_checkpoint('out/ckpt.pt').iteration == 4 and load_checkpoint('out/ckpt_best.pt').iteration == 4


def test_a_run_is_trained_by_its_noise_schedule_and_the_checkpoint_says_so(small_corpus, capsys):
    found = {}
    for name in ('linear', 'cosine'):
        run(f'--out_dir={name}', f'--noise_schedule={name}', '--max_iters=4')
        assert load_checkpoint(f'{name}/ckpt.pt').noise_schedule() is SCHEDULES[name]
        found[name] = read_metrics(Path(name) / 'metrics.jsonl')
    losses, bounds = ([[record[key] for record in found[name] if key in record] for name in found]
                      for key in ('train/loss_main', 'val/nelbo'))
    assert losses[0] != losses[1] and bounds[0][0] == bounds[1][0]  # validation of the same weights knows no schedule
    older = load_checkpoint('cosine/ckpt.pt')
    del older.config['noise_schedule']
    assert older.noise_schedule() is SCHEDULES['linear']
    older.config['noise_schedule'] = ['cosine']
    with pytest.raises(UserError, match='knows linear, cosine, geometric'):
        older.noise_schedule()
    capsys.readouterr()
    run('--out_dir=cosine', '--noise_schedule=linear', '--max_iters=5', '--init_from=resume')
    assert 'noise_schedule was cosine and is now linear' in capsys.readouterr().out


def test_a_resumed_run_takes_changed_options_and_says_so(small_corpus, capsys):
    run('--max_iters=4')
    run('--max_iters=8', '--init_from=resume', '--weight_decay=0.5', '--beta2=0.5')
    out = capsys.readouterr().out
    assert 'weight_decay was 0.05 and is now 0.5' in out and 'beta2 was 0.99 and is now 0.5' in out
    groups = load_checkpoint('out/ckpt.pt').optimizers[-1]['param_groups']
    assert {group['weight_decay'] for group in groups} == {0.5, 0.0}
    assert {tuple(group['betas']) for group in groups} == {(0.9, 0.5)}
    assert 'optimizer=muon' in refused('--init_from=resume', '--optimizer=adamw')


def test_starting_from_a_checkpoint_with_other_heads(small_corpus, capsys):
    run('--add_critic_head=False', '--out_dir=first')
    run('--add_sampler_head=False', '--out_dir=second', '--init_from_checkpoint=first/ckpt_best.pt', '--max_iters=1',
        '--learning_rate=0', '--min_lr=0')
    out = capsys.readouterr().out
    assert 'critic_head' in out and 'sampler_head' in out
    first, second = load_checkpoint('first/ckpt_best.pt'), load_checkpoint('second/ckpt.pt')
    for name in second.model:
        if not name.startswith('critic_head'):
            assert torch.equal(first.model[name], second.model[name])


def test_causal_runs_report_their_own_loss(small_corpus, capsys):
    run('--attention_type=causal', '--add_sampler_head=False', '--add_critic_head=False')
    assert 'step 12: val loss' in capsys.readouterr().out
    assert load_checkpoint('out/ckpt.pt').kind == 'causal'


@pytest.mark.parametrize('arguments, words', [
    (['--batch_size=0'], 'batch_size is 0, but must be at least 1'),
    (['--attention_type=causal'], 'Sampler head requires bidirectional attention'),
    (['--block_size=9999999'], 'block_size'),
    (['--start_critic_iteration=1'], 'start_critic_iteration is 1'),
    (['--dataset=nowhere'], 'nowhere'),
    (['--init_from=resume'], 'there is no run folder out to resume from'),
    (['--out_dir='], 'out_dir is empty'),
    (['--out_dir=.'], 'no run of this program wrote'),
    (['--init_from_checkpoint=gone.pt'], 'there is no checkpoint gone.pt'),
    (['--eval_only=True'], 'eval_only validates trained weights'),
    (['--freeze_transformer=True'], 'freeze_transformer leaves nothing to train at iteration 0'),
    (['--unfreeze_at_iteration=3'], 'unfreeze_at_iteration is 3, but nothing is frozen'),
    (['--critic_row_stride=3'], 'batch_size is 4, but must be a multiple of critic_row_stride (3)'),
    (['--min_lr=1'], 'min_lr is 1'),
    (['--sample_length=-1'], 'sample_length is -1'),
])
def test_wrong_input_is_one_clear_sentence(small_corpus, arguments, words):
    assert words in refused(*arguments)


def test_resuming_another_architecture_lists_the_differences(small_corpus):
    run()
    message = refused('--init_from=resume', '--n_embd=32', '--add_critic_head=False')
    assert 'n_embd' in message and '16' in message and '32' in message and 'add_critic_head' in message


def call(*arguments: str, folder: Path, **options):
    return subprocess.run([sys.executable, str(ROOT / 'train.py'), *arguments], cwd=folder, capture_output=True,
                          text=True, timeout=120, env={**os.environ, 'OMP_NUM_THREADS': '1'}, **options)


def test_a_typo_is_answered_with_the_nearest_option(tmp_path):
    result = call('--batchsize=4', '--n_layer=two', folder=tmp_path)
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert 'batch_size' in result.stderr and 'n_layer' in result.stderr
    assert not list(tmp_path.iterdir())


def test_sigterm_saves_and_exits_with_143(small_corpus):
    process = subprocess.Popen([sys.executable, str(ROOT / 'train.py'), *SMALL, '--max_iters=100000'], cwd=Path.cwd(),
                               stdout=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    for line in process.stdout:
        if line.startswith('iter 8:'):
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    assert process.wait(60) == 143
    assert load_checkpoint('out/ckpt.pt').iteration >= 9


def test_every_model_option_of_train_is_one_of_the_model():
    """The names agree with GPTConfig's, so that no option is silently without effect."""
    from model import GPTConfig

    model = {field.name: field for field in dataclasses.fields(GPTConfig)}
    options = {field.name for field in dataclasses.fields(script.TrainConfig)}
    decided_by_the_corpus = {'vocab_size', 'mask_token_id', 'wrong_token_id', 'pad_token_id', 'cls_token_id'}
    later = {'mode', 'num_token_classes', 'ignore_index'}
    assert set(model) - options == decided_by_the_corpus | later


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as done:
        script.main(['--help'])
    out = capsys.readouterr().out
    assert done.value.code == 0 and all(f'--{field.name}=' in out for field in dataclasses.fields(script.TrainConfig))


@pytest.mark.parametrize('name', ['train_char_diffusion_sampler', 'train_char_diffusion', 'train_char_ar'])
def test_configs_shrink_on_a_cpu_in_proportion_and_say_so(name):
    sizes = {}
    for device in ('cpu', 'cuda'):
        configuration = configure(script.TrainConfig, [str(ROOT / 'config' / f'{name}.py')],
                                  resolve_device=lambda asked: device)
        sizes[device] = configuration.config
        assert bool(configuration.notes) == (device == 'cpu')
    assert (sizes['cuda'].n_layer, sizes['cuda'].n_embd, sizes['cuda'].block_size) == (6, 384, 256)
    schedule = ('start_sampler_iteration', 'start_critic_iteration', 'end_critic_iteration', 'warmup_iters',
                'max_iters')
    for key in schedule if name.endswith('sampler') else schedule[3:]:
        assert getattr(sizes['cuda'], key) == 4 * getattr(sizes['cpu'], key)
    assert sizes['cpu'].lr_decay_iters == sizes['cpu'].max_iters

