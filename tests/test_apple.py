"""Everything runs on an emulated GPU, with the numbers of a CPU: on an Apple GPU, which has no float64 and no pinned
memory, and on one that has float64, where no tensor of the processor may meet one of the device."""

from pathlib import Path

import pytest
import torch

from configurator import configure
from core.checkpoints.checkpoint import load_checkpoint
from core.common import precision
from core.common.randomness import keyed
from core.common.runtime import resolve_device
from core.data.vocabulary import Vocabulary
from core.evaluation.options import EvaluateConfig
from core.evaluation.run import measured_rows
from core.logger import read_metrics
from core.sampling.options import SampleConfig
from core.sampling.policies import POLICIES
from core.sampling.run import run_sampling
from helpers.apple import AppleTensor, Refused, emulated_gpu, emulated_mps
from helpers.runs import run
from helpers.toys import model_over, save_model


def test_the_emulated_device_refuses_what_the_real_one_refuses():
    with emulated_mps():
        held = torch.arange(3.0).to('mps')
        assert isinstance(held + 1, AppleTensor) and (held + 1).tolist() == [1.0, 2.0, 3.0]
        for wrong in (held.double, lambda: torch.zeros(2, dtype=torch.float64, device='mps'), held.pin_memory,
                      lambda: held + torch.ones(3), lambda: torch.ones(3, dtype=torch.float64).to('mps')):
            with pytest.raises((Refused, RuntimeError)):
                wrong()
        assert held.cpu().double().tolist() == [0.0, 1.0, 2.0] and held[torch.tensor([2])].tolist() == [2.0]


def test_a_processor_tensor_is_not_indexed_from_the_device():
    with emulated_mps():
        places = torch.tensor([2]).to('mps')
        with pytest.raises(Refused, match='on the device and on the CPU'):
            torch.ones(3)[places]


@pytest.fixture(params=[emulated_mps, emulated_gpu], ids=['apple', 'float64'])
def emulated(request):
    return request.param


def test_auto_takes_the_device_that_is_there():
    with emulated_mps():
        assert resolve_device('auto') == 'mps' and resolve_device('mps') == 'mps'
    assert resolve_device('auto') != 'mps'


def test_a_missing_conversion_is_found(monkeypatch):
    monkeypatch.setattr(precision, '_WITHOUT_FLOAT64', ())
    with emulated_mps(), pytest.raises(Refused, match='float64'):
        keyed(1, 0, 0, 2, 'mps').uniform(1, 4)


BLOCK_MODEL = {'attention_type': 'block', 'block_length': [4, 8], 'sampler_order': 'left_to_right', 'sampler_gate': True,
               'sampler_context_left': 7, 'sampler_context_right': 0}
BLOCKS = ('--attention_type=block', '--block_length=[4,8]', '--sampler_order=left_to_right', '--sampler_gate=True',
          '--sampler_context_left=7', '--sampler_context_right=0', '--add_critic_head=False')


def trained(emulated, out, *arguments):
    with emulated():
        run('--device=mps', f'--out_dir={out}', '--sample_length=0', *arguments)


def values(folder):
    kept = ('train/loss', 'train/loss_main', 'train/loss_sampler', 'train/loss_critic')
    return [{name: value for name, value in record.items() if name in kept or name.startswith('val/')}
            for record in read_metrics(folder / 'metrics.jsonl')]


@pytest.mark.parametrize('further', [
    (), BLOCKS, (*BLOCKS, '--block_mask_shares=[0.3,0.8]', '--block_length_from=[0,3]', '--sampler_gradient=trunk'),
    ('--attention_type=causal', '--add_sampler_head=False', '--add_critic_head=False')])
def test_training_with_all_heads_and_stages_gives_the_numbers_of_a_cpu(small_corpus, emulated, further):
    small = ('--dropout=0.0', '--max_iters=7', '--start_sampler_iteration=1', '--start_critic_iteration=3',
             '--end_critic_iteration=5')
    run('--out_dir=cpu', *small, *further)
    trained(emulated, 'apple', *small, '--sample_length=12', *further)
    assert len(values(Path('cpu'))) == 10
    for expected, found in zip(values(Path('cpu')), values(Path('apple')), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_run_is_taken_up(small_corpus, emulated=emulated_mps):  # torch.load knows no emulated device with float64
    small = '--start_sampler_iteration=1', '--start_critic_iteration=2', '--end_critic_iteration=3', '--max_iters=5'
    trained(emulated, 'whole', *small)
    trained(emulated, 'parts', *small, '--max_iters=3')
    trained(emulated, 'parts', *small, '--init_from=resume')
    whole, parts = (load_checkpoint(f'{name}/ckpt.pt') for name in ('whole', 'parts'))
    assert parts.iteration == 5
    for name, tensor in whole.model.items():
        torch.testing.assert_close(parts.model[name], tensor)


@pytest.mark.parametrize('kind',
                         [('--training_type=remasking',),
                          ('--training_type=remasking', '--remasking_kind=binary', '--remasking_loss_type=balanced'),
                          ('--training_type=judge',)])
def test_helpers_train(small_corpus, emulated, kind):
    trained(emulated, 'helper', *kind, '--add_sampler_head=False', '--add_critic_head=False', '--max_iters=3')
    assert load_checkpoint('helper/ckpt.pt').iteration == 3


def test_a_generator_learns_from_rewards(small_corpus, emulated):
    trained(emulated, 'start', '--max_iters=3', '--start_sampler_iteration=1', '--start_critic_iteration=2',
            '--end_critic_iteration=3')
    trained(emulated, 'grpo', '--training_type=grpo', '--init_from_checkpoint=start/ckpt_best.pt', '--max_iters=2',
            '--group_size=2', '--add_critic_head=False', '--reward=line_ends', '--prompt_length=4', '--draw_calls=2',
            '--dropout=0.0')
    assert load_checkpoint('grpo/ckpt.pt').iteration == 2


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A run folder with a network that has both heads, one that writes in blocks, and one from left to right."""
    vocabulary, folder = Vocabulary(kind='characters', tokens=tuple('\n abcdefgh')), tmp_path_factory.mktemp('run')
    heads = {'add_sampler_head': True, 'add_critic_head': True}
    save_model(folder / 'ckpt_best.pt', vocabulary, model_over(vocabulary, **heads))
    save_model(folder / 'block.pt', vocabulary, model_over(vocabulary, **BLOCK_MODEL, **heads), kind='block')
    save_model(folder / 'causal.pt', vocabulary, model_over(vocabulary, attention_type='causal'), kind='causal')
    save_model(folder / 'wrong.pt', vocabulary, model_over(vocabulary), kind='remasking')
    save_model(folder / 'judge.pt', vocabulary, model_over(vocabulary, mode='sequence_scorer', block_size=33), 'judge')
    return folder


def sample(folder, device, *arguments):
    configuration = configure(SampleConfig, [f'--out_dir={folder}', f'--device={device}', '--dtype=float32',
                                             '--num_samples=2', '--batch_size=2', *arguments])
    return run_sampling(configuration.config, configuration.explicit, lambda line: None)


def policy_way(name):
    return f'--sampling_policy={name}', *(('--iterations=3',) if 'iterations' in POLICIES[name].options else ()), \
        '--quality_metric=none'


BLOCK = '--checkpoint_name=block.pt'
EVERY_RUN = ('remask', 'mdlm', 'remdm_conf', 'p2_critic', 'fast_dllm_threshold', 'margin')  # one of each kind
WAYS = [policy_way(name) for name in EVERY_RUN] + [(BLOCK, *policy_way(name)) for name in ('remask', 'random')] + [
    ('--use_sampler_head=False', '--iterations=3', '--top_k=5', '--repetition_penalty=1.2', '--save_json=run.json'),
    ('--schedule_mode=threshold', '--iterations=3', '--quality_metric=none'),
    ('--iterations=3', '--remasking_checkpoint_name=wrong.pt', '--start_text=ab'),
    ('--iterations=3', '--quality_metric=judge', '--judge_checkpoint_name=judge.pt', '--sequence_length=24'),
    (BLOCK, '--iterations=2', '--sequence_length=24', '--start_text=abc', '--block_length=4'),
    (BLOCK, '--sampling_method=standard', '--sequence_length=12'),
    ('--sampling_method=multinomial', '--iterations=3'), ('--sampling_method=standard', '--sequence_length=6'),
    ('--sampling_method=sampler', '--iterations=1', '--temperature=0'),
    ('--sampling_method=standard', '--checkpoint_name=causal.pt', '--sequence_length=20', '--top_p=0.9')]
FURTHER = [(*checkpoint, *policy_way(name)) for checkpoint in ((), (BLOCK,)) for name in POLICIES]


@pytest.mark.parametrize('way', [*WAYS, *(pytest.param(way, marks=pytest.mark.long) for way in FURTHER
                                          if way not in WAYS)], ids=' '.join)
def test_samples_are_those_of_a_cpu(folder, emulated, way, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    expected = sample(folder, 'cpu', *way)
    with emulated():
        assert sample(folder, 'mps', *way).texts == expected.texts


@pytest.mark.parametrize('kind, measure', [
    ('unmasking', ('--measure=nelbo', '--windows=8')),
    ('unmasking', ('--measure=likelihood', '--trunk_calls=[1,4]', '--policies=random,margin', '--windows=4')),
    ('unmasking', ('--measure=errors', '--windows=16')),
    ('block', ('--measure=nelbo', '--windows=8')),
    ('block', ('--measure=likelihood', '--trunk_calls=[1,3]', '--policies=random,margin', '--windows=4'))])
def test_evaluation_gives_the_numbers_of_a_cpu(small_corpus, emulated, kind, measure):
    model = model_over(small_corpus.vocabulary, add_sampler_head=True, add_critic_head=True,
                       **(BLOCK_MODEL if kind == 'block' else {}))

    def rows(device):
        save_model(Path(device) / 'ckpt_best.pt', small_corpus.vocabulary, model, kind, config={'dataset': 'tiny'})
        configuration = configure(EvaluateConfig, [f'--out_dir={device}', f'--device={device}', *measure])
        return measured_rows(configuration.config, configuration.explicit, lambda line: None)

    expected = rows('cpu')
    with emulated():
        found = rows('mps')
    assert len(expected) > 0
    for one, other in zip(expected, found, strict=True):
        numbers = {name: value for name, value in one.items() if isinstance(value, float)
                   and name not in ('elapsed', 'seconds')}
        assert numbers and {name: other[name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
