"""evaluate.py: numbers of a small checkpoint, the cache that adds only what is new, and plain words for bad input."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from configurator import configure
from core.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from core.checkpoints.weights import build_model, model_config_to_dict
from core.common.drawing import allowed_ids
from core.common.errors import UserError, run_script
from core.common.runtime import Runtime
from core.data.vocabulary import Vocabulary
from core.evaluation import likelihood
from core.evaluation.measure import CACHE_FORMAT
from core.evaluation.options import EvaluateConfig
from core.evaluation.run import run_evaluation, table
from core.validation import HeldOut, validate_generator
from evaluate import main
from helpers.toys import awake
from model import GPT, GPTConfig


def write_checkpoint(corpus, name, kind='unmasking', vocabulary=None, config=None, broken=False, **changes):
    vocabulary = vocabulary or corpus.vocabulary
    model_config = GPTConfig(**{'block_size': 8, 'vocab_size': vocabulary.size, 'n_layer': 1, 'n_head': 2, 'n_embd': 8,
                                'mask_token_id': vocabulary.mask_token_id, **changes})
    weights = {key: value * float('nan') if broken else value
               for key, value in awake(GPT(model_config)).state_dict().items()}
    checkpoint = Checkpoint(kind=kind, model_config=model_config_to_dict(model_config),
                            config={'dataset': 'tiny'} if config is None else config, vocabulary=vocabulary.to_meta(),
                            vocabulary_hash=vocabulary.hash, data_hash=corpus.data_hash, data_sizes={}, model=weights,
                            iteration=100)
    Path('out').mkdir(exist_ok=True)
    save_checkpoint(Path('out') / name, checkpoint.to_payload())


@pytest.fixture
def checkpoints(small_corpus):
    write_checkpoint(small_corpus, 'ckpt_best.pt', add_sampler_head=True)
    write_checkpoint(small_corpus, 'plain.pt')
    write_checkpoint(small_corpus, 'causal.pt', kind='causal', attention_type='causal')
    return small_corpus


def evaluate(*arguments):
    configuration = configure(EvaluateConfig, ['--device=cpu', *arguments])
    lines = []
    return run_evaluation(configuration.config, configuration.explicit, lines.append), '\n'.join(lines)


def test_the_bound_is_that_of_the_validation(checkpoints):
    found, said = evaluate('--measure=nelbo', '--windows=20', '--split=train', '--checkpoint_name=plain.pt')
    model = build_model(load_checkpoint('out/plain.pt'))
    held_out = HeldOut(checkpoints, Runtime(torch.device('cpu'), torch.float32, False), 20, 64, 'train')
    expected = validate_generator(model, held_out,
                                  allowed_ids(model.config.vocab_size, checkpoints.vocabulary.base_size))
    (row,) = found['nelbo']
    assert row['nats'] == pytest.approx(expected.value, rel=1e-6)
    assert row['bits'] == pytest.approx(expected.further['bits'], rel=1e-6)
    assert f'{expected.value:.4f}' in said and row['split'] == 'train' and row['unit'] == 'character'
    causal, _ = evaluate('--measure=nelbo', '--windows=20', '--checkpoint_name=causal.pt')
    assert causal['nelbo'][0]['kind'] == 'causal'


def test_likelihood_gives_a_table_a_picture_and_a_cache_that_grows(checkpoints, monkeypatch):
    options = ('--measure=likelihood', '--windows=6', '--policies=random,margin')
    found, said = evaluate(*options, '--trunk_calls=[1,4]')
    assert len(found['likelihood']) == 2 * 2 * 3 and {row['head'] for row in found['likelihood']} == {
        'none', 'wave', 'left_to_right'}
    first = found['likelihood'][0]
    assert f'{first["nats"]:.4f} ({first["standard_error"]:.4f})' in said
    assert "the sampler head takes" in said and "% of the trunk's multiply-adds" in said
    assert Path('out/likelihood.png').read_bytes().startswith(b'\x89PNG')
    kept = json.loads(Path('out/evaluation.json').read_text())
    assert len(kept['results']) == 12 and kept['format'] == CACHE_FORMAT
    computed = []
    monkeypatch.setattr(likelihood, '_result', lambda *given: computed.append(given[2].head) or {
        'nats': 1.0, 'standard_error': 0.5, 'bits': 1.4, 'unit': 'character', 'seconds': 0.1, 'window_nats': [1.0],
        'head_share': 0.0})
    monkeypatch.setattr(likelihood, 'plot_likelihood', lambda *given: None)
    again, said = evaluate(*options, '--trunk_calls=[1,2,4]')
    assert computed == [*likelihood.HEADS] * 2
    new = [row for row in again['likelihood'] if row['nats'] == 1.0]
    assert [(row['policy'], row['head']) for row in new] == [(policy, head) for policy in ('random', 'margin')
                                                             for head in likelihood.HEADS]
    assert '12 of 18 results are known already' in said
    assert [row for row in again['likelihood'] if row['trunk_calls'] != 2] == found['likelihood']
    evaluate(*options, '--trunk_calls=[1]', '--seed=2')
    evaluate(*options, '--trunk_calls=[1]', '--checkpoint_name=plain.pt')
    assert len(computed) == 6 + 6 + 2  # another seed, another checkpoint: without a sampler head there is one way


@pytest.mark.parametrize('arguments, words', [
    (['--measure=nelbos'], "measure is 'nelbos'.*did you mean 'nelbo'"),
    (['--measure=nelbo', '--windows=1'], 'windows is 1, but a standard error needs at least 2'),
    (['--measure=nelbo', '--batch_size=0'], 'batch_size is 0'),
    (['--measure=nelbo', '--checkpoint_name=none.pt'],
     'there is no checkpoint out/none.pt; out has .*ckpt_best.pt.* --checkpoint_name='),
    (['--measure=nelbo', '--split=ref'], 'corpus tiny has no ref.bin'),
    (['--measure=nelbo', '--dataset=zzzz'], "unknown dataset 'zzzz': "),
    (['--measure=nelbo', '--dtype=float16'], "dtype is 'float16'"),
    (['--measure=likelihood', '--trunk_calls=[1,9]'], 'trunk_calls holds 9.*from 1 to the window length \\(8\\)'),
    (['--measure=likelihood', '--trunk_calls=[1.5]'], 'trunk_calls holds 1.5'),
    (['--measure=likelihood', '--policies=margins'], "policies holds 'margins'.*did you mean 'margin'"),
    (['--measure=likelihood', '--policies=remask'], 'no exact likelihood.*under the policy remask'),
    (['--measure=likelihood', '--policies=llada,random'], 'under the policy llada'),
    (['--measure=likelihood', '--heads=both'], "heads holds 'both', but must be of none, wave, left_to_right"),
    (['--measure=likelihood', '--checkpoint_name=plain.pt', '--heads=wave'], 'no trained sampler head'),
    (['--measure=likelihood', '--checkpoint_name=causal.pt'], 'needs a diffusion checkpoint.*--measure=nelbo'),
])
def test_bad_input_is_answered_in_one_sentence(checkpoints, arguments, words):
    with pytest.raises(UserError, match=words):
        evaluate(*arguments)


def test_results_that_have_no_place_are_refused_before_the_work_with_a_cure_that_works(checkpoints, monkeypatch):
    options = ('--measure=nelbo', '--windows=4')
    (Path('out') / 'evaluation.json').mkdir()
    with pytest.raises(UserError, match='out/evaluation.json, which cannot be written .*keep them elsewhere') as caught:
        evaluate(*options)
    Path('mine').mkdir()
    cure = str(caught.value).rpartition('elsewhere: ')[2].replace('FOLDER', 'mine').split(' ', 1)
    found, _ = evaluate(*options, *cure)
    assert found['nelbo'] and Path('mine/evaluation.json').is_file()


def test_checkpoints_that_do_not_fit_are_named(small_corpus):
    other = Vocabulary(kind='characters', tokens=tuple('abc'))
    write_checkpoint(small_corpus, 'other.pt', vocabulary=other)
    write_checkpoint(small_corpus, 'judge.pt', kind='judge', mode='sequence_scorer', cls_token_id=0)
    write_checkpoint(small_corpus, 'nameless.pt', config={})
    write_checkpoint(small_corpus, 'long.pt', block_size=100_000)
    write_checkpoint(small_corpus, 'young.pt', add_sampler_head=True, start_sampler_iteration=500)
    write_checkpoint(small_corpus, 'broken.pt', broken=True)
    for name, words in (('other.pt', 'vocabulary of 3 tokens, corpus tiny another one'),
                        ('judge.pt', "of kind 'judge'"), ('nameless.pt', '--dataset='),
                        ('long.pt', 'windows of 100000 are asked for'),
                        ('broken.pt', 'weights that are not numbers')):
        with pytest.raises(UserError, match=words):
            evaluate('--measure=nelbo', '--windows=4', f'--checkpoint_name={name}')
    found, said = evaluate('--measure=likelihood', '--windows=4', '--checkpoint_name=young.pt', '--trunk_calls=[2]')
    assert 'the sampler head is ignored' in said and {row['head'] for row in found['likelihood']} == {'none'}


@pytest.mark.parametrize('nats', [float('nan'), float('-inf'), 1e300])
def test_a_result_that_is_no_number_is_refused_and_not_kept(checkpoints, monkeypatch, nats):
    monkeypatch.setattr(likelihood, '_result', lambda *given: {'nats': nats, 'bits': 1.0})
    with pytest.raises(UserError, match=r'is no number \(nats\).*take an earlier one'):
        evaluate('--measure=likelihood', '--windows=4', '--trunk_calls=[2]')
    assert not Path('out/evaluation.json').exists()


def test_another_text_than_that_of_the_training_is_said(checkpoints):
    write_checkpoint(dataclasses.replace(checkpoints, data_hash='0'), 'moved.pt')
    assert 'hashes differ' not in evaluate('--measure=nelbo', '--windows=4', '--checkpoint_name=plain.pt')[1]
    assert 'hashes differ' in evaluate('--measure=nelbo', '--windows=4', '--checkpoint_name=moved.pt')[1]


def test_a_table_lines_up():
    assert table('x', ('name', 'nats'), [{'name': 'random', 'nats': 1.5}, {'name': 'b', 'nats': None}]) == [
        'x:', '  name    nats', 'random  1.5000', '     b       -']


def test_the_script_ends_with_code_two_and_help_lists_measures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['evaluate.py', f'--out_dir={tmp_path}/none'])
    with pytest.raises(SystemExit) as ended:
        run_script(main)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith('error: ') and 'python train.py' in said
    with pytest.raises(SystemExit) as ended:
        main(['--help'])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and '  nelbo ' in said and '  likelihood ' in said and '--trunk_calls' in said
