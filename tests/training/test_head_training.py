"""Heads on a pretrained model's frozen trunk: they learn, the trunk does not, and their file serves sampling and
evaluation."""

import pytest
import torch

pytest.importorskip('transformers')

from configurator import configure
from core.batches import unmasking_batches
from core.common.errors import UserError
from core.common.runtime import Runtime
from core.evaluation.options import EvaluateConfig
from core.evaluation.run import run_evaluation
from core.head_training import HeadRun, often_whole, train_head
from core.noise import SCHEDULES
from core.options import TrainConfig
from core.pretrained.head_file import load_with_head
from core.pretrained.loading import Source
from helpers.pretrained import save_tiny

CPU = torch.device('cpu')
LINES = ['MKMKMKMKMKMK', 'KMKMKMKMKMKM']  # each residue tells the next, and both are as frequent everywhere


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return save_tiny('esm', tmp_path_factory.mktemp('model') / 'esm')


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text.txt').write_text('\n'.join(LINES * 30) + '\n')
    return tmp_path


def options(folder, *arguments):
    return configure(TrainConfig, ['config/train_head_on_pretrained.py', f'--model={folder}', '--text_file=text.txt',
                                   '--device=cpu', '--max_iters=120', '--eval_interval=60', '--warmup_iters=5',
                                   '--log_interval=40', '--learning_rate=0.03', '--out_dir=head', *arguments])


def train(folder, *arguments):
    configuration = options(folder, *arguments)
    train_head(configuration.config, configuration.explicit, configuration.notes)


def likelihoods(folder, head, calls='[1]'):
    configuration = configure(EvaluateConfig, [
        f'--model={folder}', '--text_file=text.txt', f'--sampler_head={head}', '--measure=likelihood', '--device=cpu',
        '--policies=random', f'--trunk_calls={calls}', '--windows=8'])
    rows = run_evaluation(configuration.config, configuration.explicit, lambda line: None)['likelihood']
    return {(row['trunk_calls'], row['head']): row['nats'] for row in rows}


def test_a_head_lowers_the_likelihood_and_its_blind_control_is_never_better(folder, here):
    train(folder)
    found = likelihoods(folder, here / 'head' / 'head.safetensors', '[1,2,4,12]')
    assert found[1, 'wave'] < found[1, 'none'] / 3  # the first residue costs ln 2, the others nothing
    train(folder, '--sampler_zero_hidden=True', '--sampler_gate=False', '--out_dir=blind')
    blind = load_with_head(Source(str(folder)), str(here / 'blind' / 'head.safetensors'), CPU, None).model
    assert blind.sampler_head.zero_hidden and not blind.sampler_head.residual
    control = likelihoods(folder, here / 'blind' / 'head.safetensors', '[1,2,4,12]')
    for calls in (1, 2, 4, 12):
        assert found[calls, 'wave'] < control[calls, 'wave'] + 0.02


def test_a_head_that_sees_neighbours_alone_learns_too(folder, here):
    train(folder, '--sampler_kind=neighbours', '--sampler_output=own', '--max_iters=60')
    found = likelihoods(folder, here / 'head' / 'head.safetensors')
    assert found[1, 'wave'] < found[1, 'none'] / 2


@pytest.mark.parametrize('name', SCHEDULES)
def test_a_quarter_of_the_rows_is_masked_entirely(folder, here, name):
    run = HeadRun(options(folder, f'--noise_schedule={name}').config, Runtime(CPU, torch.float32, False), None,
                  lambda line: None)
    rows = torch.cat([batch.inputs == run.model.config.mask_token_id for iteration in range(25)
                      for batch in unmasking_batches(run.plan, iteration, int)])  # [400, T]
    plain = run.plan._replace(noise=run.masking)
    usual = torch.cat([batch.inputs == run.model.config.mask_token_id for iteration in range(25)
                       for batch in unmasking_batches(plain, iteration, int)])
    whole = rows.all(1)
    assert 100 <= whole.sum() < 100 + 1.4 * usual.all(1).sum() + 20  # others are masked entirely by chance
    shares = rows.double().mean(1)[~whole], usual.double().mean(1)[~usual.all(1)]
    assert shares[0].mean().item() == pytest.approx(shares[1].mean().item(), abs=0.08)
    times = torch.linspace(0.01, 0.74, 9, dtype=torch.float64)
    schedule = often_whole(SCHEDULES[name])
    torch.testing.assert_close(schedule.time_of(schedule.mask_probability(times)), times)
    assert schedule.mask_probability(torch.tensor([0.75, 1.0])).min() > 1 - 1e-6


def test_the_trunk_stays_as_it_is_and_is_called_once_a_batch(folder, here):
    configuration = options(folder, '--add_critic_head=True', '--start_critic_iteration=2')
    run = HeadRun(configuration.config, Runtime(CPU, torch.float32, False), None, lambda line: None)
    before = {name: weight.clone() for name, weight in run.model.network.state_dict().items()}
    heads = {name: weight.clone() for name, weight in run.heads.state_dict().items()}
    calls = []
    run.model.network.register_forward_hook(lambda *given: calls.append(torch.is_grad_enabled()))
    for iteration in range(4):
        run.step(iteration)
    assert calls == [False] * 6  # one a batch, and one more for the text that the critic reads from iteration 2 on
    assert all(torch.equal(before[name], weight) for name, weight in run.model.network.state_dict().items())
    moved = {name.split('.')[0] for name, weight in run.heads.state_dict().items()
             if not torch.equal(heads[name], weight)}
    assert moved == {'sampler_head', 'critic_head'}


def test_two_runs_are_the_same(folder, here):
    for name in ('first', 'second'):
        train(folder, '--max_iters=6', '--eval_interval=6', f'--out_dir={name}')
    assert (here / 'first' / 'head.safetensors').read_bytes() == (here / 'second' / 'head.safetensors').read_bytes()


@pytest.mark.parametrize('arguments, words', [
    (['--init_from=resume'], 'init_from is resume, but heads on a pretrained model keep no state'),
    (['--n_layer=3'], 'n_layer does not apply to model'), (['--model='], 'model is empty'),
    (['--text_file=none.txt'], 'none.txt.* is not there'), (['--add_sampler_head=False'], 'no head is to be trained'),
    (['--dataset=tiny'], 'model and dataset were both given'), (['--sampler_n_embd=7'], 'sampler_n_embd is 7'),
    (['--sampler_kind=layr', '--noise_schedule=x'], "sampler_kind is 'layr', but must be one of .* did you mean 'layer'")])
def test_what_does_not_go_together(folder, here, arguments, words):
    with pytest.raises(UserError, match=words):
        train(folder, *arguments)


def test_a_head_is_not_written_over(folder, here):
    train(folder, '--max_iters=2', '--eval_interval=2')
    with pytest.raises(UserError, match='head.safetensors exists; name another --out_dir'):
        train(folder)
    train(folder, '--max_iters=2', '--eval_interval=2', '--overwrite=True')
