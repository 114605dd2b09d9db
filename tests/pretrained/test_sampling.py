"""sample.py with --model: every policy through the adapter, heads in files of their own, and what does not go
together."""

import pytest
import torch

pytest.importorskip('transformers')

from configurator import configure
from core.common.errors import UserError
from core.pretrained.head_file import base_of, head_weights, load_with_head, save_head
from core.pretrained.loading import Source, load_pretrained
from core.sampling.options import SampleConfig
from core.sampling.policies import POLICIES
from core.sampling.run import run_sampling
from helpers.pretrained import save_tiny

CPU = torch.device('cpu')
HEADS = {'add_sampler_head': True, 'sampler_context': 2, 'sampler_output': 'shared_detached'}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return save_tiny('bert', tmp_path_factory.mktemp('model') / 'bert')


@pytest.fixture(scope='module')
def head(folder, tmp_path_factory):
    """A head's file, its weights random, for the model in `folder`."""
    base = load_pretrained(Source(str(folder)), CPU, heads=HEADS)
    generator = torch.Generator().manual_seed(3)
    for weight in base.model.sampler_head.parameters():
        weight.data += torch.randn(weight.shape, generator=generator)
    path = tmp_path_factory.mktemp('head') / 'head.safetensors'
    save_head(path, base_of(base), (base.model.config, {}), head_weights(base.model), 7)
    return path


def sample(folder, *arguments):
    configuration = configure(SampleConfig, [f'--model={folder}', '--device=cpu', '--quality_metric=none', *arguments])
    lines = []
    return run_sampling(configuration.config, configuration.explicit, lines.append), '\n'.join(lines)


@pytest.mark.parametrize('policy', [name for name, row in POLICIES.items() if not row.needs_critic])
def test_every_policy_writes_words_alone(folder, policy):
    steps = ['--iterations=3'] if 'iterations' in POLICIES[policy].options or policy == 'remask' else []
    result, _ = sample(folder, f'--sampling_policy={policy}', '--sequence_length=6', '--num_samples=2', *steps)
    allowed = load_pretrained(Source(str(folder)), CPU).vocabulary.allowed
    assert result.tokens.shape == (2, 6) and allowed[result.tokens].all()


def test_infilling_keeps_what_is_given_and_a_prompt_comes_first(folder):
    result, said = sample(folder, '--infill_text=the ___ says to be', '--num_samples=3', '--use_verbose_logging=True')
    words = load_pretrained(Source(str(folder)), CPU).vocabulary
    assert result.tokens.shape == (3, 7)
    assert words.decode(result.tokens[0][:1].tolist()) == 'the'
    assert (result.tokens[:, 4:] == torch.tensor(words.encode('says to be'))).all()
    assert 'BertForMaskedLM' in said and '12 tokens may be drawn, the other 8 ids never' in said
    result, _ = sample(folder, '--start_text=to be', '--max_new_tokens=3', '--sampling_method=standard')
    assert (result.tokens[:, :2] == torch.tensor(words.encode('to be'))).all() and result.tokens.size(1) == 5


def test_a_text_longer_than_the_model_reads_goes_by_windows(folder):
    result, _ = sample(folder, '--sequence_length=50', '--num_samples=1', '--iterations=2')
    assert result.tokens.shape == (1, 50)
    result, _ = sample(folder, '--num_samples=1', '--iterations=2')
    assert result.tokens.shape == (1, 22)


def test_a_head_is_used_and_is_what_was_saved(folder, head):
    plain, _ = sample(folder, '--sampling_policy=random', '--iterations=1', '--sequence_length=12')
    drawn, said = sample(folder, '--sampling_policy=random', '--iterations=1', '--sequence_length=12',
                         f'--sampler_head={head}', '--sampling_method=sampler')
    assert drawn.waves > 0 and plain.waves == 0 and 'waves' in said
    first = load_with_head(Source(str(folder)), str(head), CPU, None).model
    assert first.config.sampler_context == 2 and first.sampler_head.output_head is None
    again, _ = sample(folder, '--sampling_policy=random', '--iterations=1', '--sequence_length=12',
                      f'--sampler_head={head}')
    assert torch.equal(again.tokens, drawn.tokens)


def test_a_head_of_another_base_is_refused(folder, head, tmp_path):
    other = save_tiny('bert', tmp_path / 'other', hidden_act='relu')
    with pytest.raises(UserError, match='was trained on .* but the model given is'):
        sample(other, f'--sampler_head={head}')


def test_a_damaged_head_is_refused(folder, head, tmp_path):
    whole, words = head.read_bytes(), head.with_suffix('.json').read_text()
    copy = tmp_path / 'head.safetensors'
    for data, text, problem in ((whole[:-4] + b'\1\2\3\4', words, 'SHA-256'),
                                (whole, words.replace('"steps": 7', '"steps": 8'), 'checksum'),
                                (whole, None, 'no such file')):
        copy.write_bytes(data)
        copy.with_suffix('.json').unlink(missing_ok=True)
        if text is not None:
            copy.with_suffix('.json').write_text(text)
        with pytest.raises(UserError, match=problem):
            sample(folder, f'--sampler_head={copy}')


@pytest.mark.parametrize('arguments, words', [
    (['--checkpoint_name=ckpt.pt'], 'model and checkpoint_name were both given'),
    (['--judge_checkpoint_name=x', '--quality_metric=judge'], 'judge_checkpoint_name does not apply to model'),
    (['--sampling_method=sampler'], 'has no sampler head; .*give --sampler_head=FILE'),
    (['--sampler_head=none.safetensors'], 'is no head that this program can read'),
    (['--infill_text=the [MASK] says'], 'a special token of the model'),
    (['--start_text=wizard'], "no tokens for 'wizard'")])
def test_what_does_not_go_together(folder, arguments, words):
    with pytest.raises(UserError, match=words):
        sample(folder, *arguments)
