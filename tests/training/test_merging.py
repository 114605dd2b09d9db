"""python -m core.merging: the weights between two models, their validation, and what cannot be merged."""

from pathlib import Path

import pytest
import torch

import train as script
from configurator import configure
from core.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from core.checkpoints.weights import build_model
from core.common.errors import UserError
from core.data.vocabulary import Vocabulary
from core.merging import main
from core.trainer import train
from helpers.toys import model_over, save_model

SMALL = ('--dataset=tiny --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --max_iters=2 '
         '--lr_decay_iters=2 --warmup_iters=0 --eval_interval=2 --eval_iters=2 --device=cpu --compile=False '
         '--sample_length=0').split()


def run(*arguments):
    train(configure(script.TrainConfig, [*SMALL, *arguments]).config, [])


@pytest.fixture
def two(small_corpus):
    """An unmasking and a remasking model of one architecture."""
    run('--out_dir=one')
    run('--out_dir=other', '--training_type=remasking', '--seed=2')
    return 'one/ckpt_best.pt', 'other/ckpt_best.pt'


@pytest.mark.parametrize('weight', [0.0, 0.25, 1.0])
def test_a_merged_model_lies_between_the_two_and_is_validated_as_both_kinds(two, weight, capsys):
    capsys.readouterr()
    main([*two, f'--weight={weight}'])
    first, second, merged = (load_checkpoint(path) for path in (*two, 'one/ckpt_merged.pt'))
    assert merged.kind == 'unmasking'
    for name, tensor in merged.model.items():
        expected = (1 - weight) * first.weights()[name].double() + weight * second.weights()[name].double()
        assert torch.allclose(tensor.double(), expected, atol=1e-6)
    lines = capsys.readouterr().out.splitlines()
    values = [float(line.split(': val ')[1].split()[0]) for line in lines[:6]]
    assert [line.split(': val')[0].split(', as ')[1] for line in lines[:6]] == ['unmasking'] * 3 + ['remasking'] * 3
    assert merged.best_value == pytest.approx(values[0], abs=1e-4)
    if weight in (0, 1):
        assert values[0] == values[1 + int(weight)] and values[3] == values[4 + int(weight)]
    model = build_model(merged)
    assert model.lm_head.weight.data_ptr() == model.transformer['wte'].weight.data_ptr()


def test_the_output_may_be_named_and_one_kind_is_validated_once(two, capsys):
    capsys.readouterr()
    main([two[0], two[0], '--output=mixed.pt'])
    before = Path('mixed.pt').read_bytes()
    with pytest.raises(UserError, match='mixed.pt is there already and is not replaced'):
        main([two[0], two[0], '--output=mixed.pt'])
    assert Path('mixed.pt').read_bytes() == before
    out = capsys.readouterr().out
    assert out.count(': val ') == 3 and 'mixed.pt: 0.5 of one/ckpt_best.pt' in out
    assert Path('mixed.pt').stat().st_size < 1.05 * Path(two[0]).stat().st_size  # tied weights are stored once


def test_judges_are_merged_and_validated_on_the_texts_that_they_were_trained_on(two, capsys):
    for seed in (1, 2):
        run(f'--out_dir=judge{seed}', '--training_type=judge', f'--corruption_checkpoint={two[0]}', f'--seed={seed}')
    capsys.readouterr()
    main(['judge1/ckpt_best.pt', 'judge2/ckpt_best.pt'])
    out = capsys.readouterr().out
    assert out.count('as judge: val ') == out.count('above filled') == 3


HEADED = ('--add_sampler_head=True', '--add_critic_head=True')


@pytest.mark.parametrize('second, dropped', [
    ((), ['sampler', 'critic']), (('--add_sampler_head=True',), ['critic']), (HEADED, []),
    ((*HEADED, '--sampler_n_embd=24'), ['sampler']), ((*HEADED, '--sampler_context=2'), ['sampler'])])
def test_heads_that_are_not_alike_are_dropped_and_told(small_corpus, capsys, second, dropped):
    run('--out_dir=heads', *HEADED)
    run('--out_dir=second', '--seed=2', *second)
    capsys.readouterr()
    main(['heads/ckpt_best.pt', 'second/ckpt_best.pt'])
    said = capsys.readouterr().out
    assert [line.split()[1] for line in said.splitlines() if line.endswith('and is dropped')] == dropped
    merged, one, other = (load_checkpoint(path) for path in (
        'heads/ckpt_merged.pt', 'heads/ckpt_best.pt', 'second/ckpt_best.pt'))
    kept = {f'{name}_head' for name in ('sampler', 'critic') if name not in dropped}
    model = build_model(merged)
    assert {name.split('.')[0] for name in merged.model if '_head' in name.replace('lm_head', '')} == kept
    assert (model.sampler_head is not None, model.critic_head is not None) == tuple(
        f'{name}_head' in kept for name in ('sampler', 'critic'))
    for name, tensor in merged.model.items():
        assert torch.allclose(tensor, (one.weights()[name] + other.weights()[name]) / 2, atol=1e-6)


@pytest.mark.parametrize('output, words', [('absent/x.pt', 'create it first'), ('', 'output is empty'),
                                           ('n' * 300, '300 bytes'), ('one', 'there already')])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(two, output, words, capsys):
    with pytest.raises(UserError, match=words):
        main([*two, f'--output={output}'])
    assert capsys.readouterr().out == ''


def test_what_cannot_be_merged_is_one_sentence(two):
    other_shape, other_words = Path('wide.pt'), Path('words.pt')
    checkpoint = load_checkpoint(two[0])
    run('--out_dir=wide', '--n_embd=32')
    save_checkpoint(other_shape, load_checkpoint('wide/ckpt_best.pt').to_payload())
    vocabulary = Vocabulary(kind='characters', tokens=tuple('abc'))
    save_model(other_words, vocabulary, model_over(vocabulary), config=checkpoint.config)
    for second, weight, words in ((other_shape, 0.5, 'different architectures (n_embd 16 and 32)'),
                                  (other_words, 0.5, 'different vocabularies'), (two[1], 1.5, 'weight is 1.5')):
        with pytest.raises(UserError) as caught:
            main([two[0], str(second), f'--weight={weight}'])
        assert words in str(caught.value)
    assert not Path('one/ckpt_merged.pt').exists()
