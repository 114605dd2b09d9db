"""Checkpoints in Hugging Face's form: loaded there without this program, and back here token for token."""

import json
import subprocess
import sys

import pytest
import torch

from configurator import configure
from core.checkpoints.__main__ import main
from core.checkpoints.hugging_face.export import export_to_hugging_face
from core.checkpoints.hugging_face.tokenizer import merges_of, tokenizer_description
from core.common.errors import UserError
from core.data.learning import character_vocabulary, train_bpe
from core.sampling.options import SampleConfig
from core.sampling.run import run_sampling
from helpers.toys import model_over, save_model

TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind 123 to suffer\n" * 8


@pytest.fixture
def characters():
    return character_vocabulary(TEXT)


def export(tmp_path, vocabulary, **changes):
    """A checkpoint's path, its model, and the folder that it was exported to."""
    model = model_over(vocabulary, **{'n_layer': 2, **changes})
    save_model(tmp_path / 'run' / 'ckpt_best.pt', vocabulary, model, config={'dataset': 'hamlet', 'seed': 5})
    folder, _ = export_to_hugging_face(tmp_path / 'run' / 'ckpt_best.pt', tmp_path / 'hf')
    return tmp_path / 'run' / 'ckpt_best.pt', model, folder


SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
folder, text = sys.argv[1:]
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer(text)['input_ids'][:12]
ids[3] = tokenizer.mask_token_id
with torch.no_grad():
    logits = model(input_ids=torch.tensor([ids])).logits
    padded = model(input_ids=torch.tensor([ids + [tokenizer.pad_token_id] * 2]),
                   attention_mask=torch.tensor([[1] * 12 + [0] * 2])).logits
print(json.dumps([ids, logits[0].tolist(), padded[0, :12].tolist(), tokenizer.decode(ids[:3])]))
"""


@pytest.mark.parametrize('changes', [{}, {'position_encoding': 'absolute', 'bias': True, 'n_head': 4}])
def test_a_process_without_this_program_gets_the_same_logits(tmp_path, characters, changes):
    pytest.importorskip('transformers')
    _, model, folder = export(tmp_path, characters, **changes)
    (tmp_path / 'alone').mkdir()
    found = subprocess.run([sys.executable, '-I', '-c', SCRIPT, str(folder), TEXT[:40]], cwd=tmp_path / 'alone',
                           env={'HF_HOME': str(tmp_path / 'cache'), 'HF_HUB_OFFLINE': '1', 'PATH': ''},
                           capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    ids, logits, padded, decoded = json.loads(found.stdout.splitlines()[-1])
    assert decoded == TEXT[:3] and ids[3] == characters.mask_token_id
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(padded), expected, rtol=1e-4, atol=1e-5)


def sample(*arguments):
    configuration = configure(SampleConfig, ['--device=cpu', '--quality_metric=self', '--num_samples=3', *arguments])
    return run_sampling(configuration.config, configuration.explicit, lambda line: None)


@pytest.mark.parametrize('policy', ['remask', 'margin', 'mdlm'])
@pytest.mark.parametrize('head', [False, True])
def test_samples_come_back_token_for_token(tmp_path, characters, policy, head):
    pytest.importorskip('transformers')
    path, _, folder = export(tmp_path, characters, **({'add_sampler_head': True, 'sampler_context': 2} if head else {}))
    options = [f'--sampling_policy={policy}', '--iterations=5', '--sequence_length=24']
    own = sample(f'--out_dir={path.parent}', *options)
    heads = [f'--sampler_head={folder / "heads" / "head.safetensors"}'] if head else []
    back = sample(f'--model={folder}', '--trust_remote_code=True', *heads, *options)
    assert torch.equal(own.tokens, back.tokens) and own.texts == back.texts
    assert own.trunk_calls == back.trunk_calls and own.waves == back.waves
    assert back.scores == pytest.approx(own.scores, abs=1e-5)


def test_likelihoods_come_back(tmp_path, characters):
    pytest.importorskip('transformers')
    from core.common.drawing import allowed_ids
    from core.common.randomness import keyed
    from core.common.timing import TimingAccumulator
    from core.pretrained.head_file import load_with_head
    from core.pretrained.loading import Source
    from core.sampling.network import Network
    from core.sampling.path_likelihood import Scorer, log_likelihood
    from core.sampling.policies import POLICIES

    _, model, folder = export(tmp_path, characters, add_sampler_head=True)
    back = load_with_head(Source(str(folder), trust_remote_code=True), str(folder / 'heads' / 'head.safetensors'),
                          torch.device('cpu'), None)
    assert torch.equal(back.vocabulary.allowed, allowed_ids(characters.size, characters.base_size))
    assert back.vocabulary.encode(TEXT) == characters.encode(TEXT) and back.vocabulary.kind == 'characters'
    texts = torch.tensor([characters.encode(TEXT[start:start + 16]) for start in (0, 9, 30)])
    for head in ('none', 'wave'):
        found = [log_likelihood(Network(one, TimingAccumulator()), texts, Scorer(
            POLICIES['random'].make(iterations=4), head, back.vocabulary.allowed), keyed(1, 0, 0, 3))
            for one in (model, back.model)]
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_byte_level_vocabulary_cuts_text_alike(tmp_path):
    library = pytest.importorskip('tokenizers')
    vocabulary = train_bpe(TEXT, 290)
    theirs = library.Tokenizer.from_str(json.dumps(tokenizer_description(vocabulary)))
    for text in (TEXT, "It's  12345 words,\n\n\tand é漢😀 signs --\r\n ?! \n", 'x'):
        assert theirs.encode(text).ids == vocabulary.encode(text)
        assert theirs.decode(vocabulary.encode(text)) == text


def test_merges_are_those_that_were_learnt():
    vocabulary = train_bpe(TEXT, 290)
    learnt = vocabulary.tokens
    assert [left + right for left, right in merges_of(learnt)] == list(learnt[256:])
    for left, right in merges_of(learnt):  # both parts are there before what they make
        assert max(learnt.index(left), learnt.index(right)) < learnt.index(left + right)


def test_the_folder_tells_what_it_is_and_replaces_nothing_else(tmp_path, characters):
    path, _, folder = export(tmp_path, characters, add_sampler_head=True)
    card = (folder / 'README.md').read_text()
    assert 'Corpus `hamlet`' in card and '| seed | 5 |' in card and 'Steps: 100' in card and 'not recorded' in card
    assert {one.name for one in folder.iterdir()} == {
        'model.safetensors', 'config.json', 'tokenizer.json', 'tokenizer_config.json', 'modeling_masked_diffusion.py',
        'README.md', 'heads'}
    main(['export', str(path), str(folder), '--to=hf'])
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'config.json').write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match='holds files that no export with --to=hf wrote'):
        main(['export', str(path), str(tmp_path / 'mine'), '--to=hf'])
    assert (tmp_path / 'mine' / 'config.json').read_text() == '{"model_type": "bert"}'


def test_what_is_no_diffusion_model_is_refused(tmp_path, characters):
    save_model(tmp_path / 'c.pt', characters, model_over(characters, attention_type='causal'), kind='causal')
    with pytest.raises(UserError, match="kind 'causal' with causal attention"):
        export_to_hugging_face(tmp_path / 'c.pt', tmp_path / 'hf')
