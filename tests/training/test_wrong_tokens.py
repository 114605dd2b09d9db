"""Where wrong tokens come from: drawn at random, from nearby places, from a generator, or each way; and the model that
names their source."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

import train as script
from configurator import configure
from core.batches import RowShare, remasking_batches
from core.checkpoints.checkpoint import load_checkpoint
from core.common.drawing import allowed_ids
from core.common.randomness import keyed
from core.logger import read_metrics
from core.noise import SOURCES, Corruption, corrupt, draw_mask, nearby_tokens, replace_tokens
from core.objective import Objective, remasking_loss
from core.sampling.options import SampleConfig
from core.sampling.run import run_sampling
from core.stages import Stage
from core.trainer import train
from core.training_kinds import TRAINING, training_of
from core.training_step import TrainingState, training_step
from core.validation import HeldOut, auroc, validate_remasking
from helpers.toys import CPU, SPECIAL, V0, awake, model_over, toy_config, toy_plan, toy_settings
from model import GPT

NEAR = 8  # places on each side
MIXED = Corruption(V0, SPECIAL['cls_token_id'], sources=('random', 'shuffled', 'model'))
CLASSES = {'mode': 'token_classifier', 'num_token_classes': 4}


def repeating(tokens, mask, generator):
    """A generator's stand-in: writes the token that follows in the alphabet, in every third row the right one."""
    return torch.where(mask & (generator.rows[:, None] % 3 > 0), (tokens + 1) % V0, tokens)


def one(count):
    """A count over a single rank."""
    return count


# Nearby tokens ------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 99), length=st.integers(1, 40), share=st.floats(0, 1))
def test_a_nearby_token_comes_from_another_place_of_the_row_at_most_eight_away(seed, length, share):
    """Tokens that are all different tell where each came from; what is not chosen stays."""
    tokens = torch.arange(3 * length).view(3, length) * 7
    generator = keyed(seed, 2, 5, 3)
    mask = draw_mask(generator, torch.full((3,), share), length)
    found = nearby_tokens(generator, tokens, mask)
    assert torch.equal(found[~mask], tokens[~mask])
    for row, place in mask.nonzero().tolist():
        near = [tokens[row, other].item() for other in range(max(0, place - NEAR), min(length, place + NEAR + 1))
                if other != place]
        assert found[row, place].item() in (near or [tokens[row, place].item()])


@pytest.mark.parametrize('place, inside', [(0, range(1, 9)), (3, [*range(3), *range(4, 12)]),
                                           (10, [*range(2, 10), *range(11, 19)]), (19, range(11, 19))])
def test_each_place_nearby_is_as_likely_as_the_others_at_the_ends_of_the_row_too(place, inside):
    """Whatever was masked: the draw of the place is none of the numbers that chose the positions."""
    tokens, generator = torch.arange(20).expand(8000, 20), keyed(4, 0, 0, 8000)
    mask = draw_mask(generator, torch.full((8000,), 0.4), 20)
    found = nearby_tokens(generator, tokens, mask)[mask[:, place], place]
    counts = Counter(found.tolist())
    assert set(counts) == set(inside)
    mean = len(found) / len(inside)
    assert all(abs(count - mean) < 5 * mean ** 0.5 for count in counts.values())


# Each way at a third of the places ----------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), share=st.floats(0, 1))
def test_each_position_gets_what_its_source_alone_writes_and_only_a_wrong_token_has_one(seed, share):
    generator = keyed(seed, 3, 0, 30)
    tokens = (generator.uniform(1, 20) * V0).long()
    mask = draw_mask(generator, torch.full((30,), share), 20)
    alone = [replace_tokens(generator, tokens, mask, V0), nearby_tokens(generator, tokens, mask),
             repeating(tokens, mask, generator)]
    for name, expected in zip(('random', 'shuffled', 'model'), alone):
        text, sources = corrupt(MIXED._replace(fill=repeating, sources=(name,)), generator, tokens, mask)
        assert torch.equal(text, expected) and not len(sources)
    text, sources = corrupt(MIXED._replace(fill=repeating), generator, tokens, mask)
    assert torch.equal(sources > 0, text != tokens) and not (sources[~mask] > 0).any()
    for number, expected in enumerate(alone, 1):
        assert torch.equal(text[sources == number], expected[sources == number])


def test_the_three_sources_are_equally_likely_whatever_was_masked():
    """Each writes a token that tells it: random ones always differ, the row is one repeated token, the generator writes
    the token after it."""
    tokens, generator = torch.zeros(6000, 6).long(), keyed(1, 0, 0, 6000)
    mask = draw_mask(generator, torch.full((6000,), 0.3), 6)
    text, sources = corrupt(MIXED._replace(base_size=1000, fill=lambda tokens, mask, generator: tokens + 17 * mask),
                            generator, tokens, mask)
    shares = torch.bincount(sources[mask], minlength=4) / mask.sum()
    assert ((shares - torch.tensor([1 / 3, 1 / 3, 0, 1 / 3])).abs() < 0.02).all()  # a nearby token is the right one
    assert (text[sources == 3] == 17).all() and (text[sources == 1] > 0).all()


def test_rows_and_their_sources_are_the_same_whoever_holds_them():
    plan = toy_plan(batch_size=8, corruption=MIXED._replace(fill=repeating))
    whole, = remasking_batches(plan, 4, one)
    parts = [remasking_batches(plan._replace(rows=RowShare(2, 2, rank, 2)), 4, one) for rank in (0, 1)]
    parts = [parts[0][0], parts[1][0], parts[0][1], parts[1][1]]
    for name in ('rows', 'inputs', 'targets', 'sources'):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
    assert set(whole.sources.flatten().tolist()) == {0, 1, 2, 3}


# The model that names the source ------------------------------------------------------------------------------------

@pytest.mark.parametrize('loss_type', ['all_positions', 'balanced'])
def test_loss_and_sums_of_a_multiclass_model_against_the_formula(loss_type):
    """Right or wrong is decided by all sources together, even where no single one is more probable than *right*."""
    model = awake(GPT(toy_config(**CLASSES)))
    batch, = remasking_batches(toy_plan(batch_size=12, corruption=MIXED._replace(fill=repeating, loss_type=loss_type)),
                               1, one)
    losses = Objective(model, allowed_ids(V0 + 4, V0), remasking_loss)(batch, Stage({}), keyed(1, 1, 0, 12))
    logits, sums, together = model(batch.inputs).logits.detach().double(), torch.zeros(5, 4).double(), 0
    for row in range(12):
        for place in range(4):
            shares, source = logits[row, place].softmax(0), batch.sources[row, place].item()
            wrong = batch.inputs[row, place] != batch.targets[row, place]
            assert wrong == (source > 0)
            called = 1 - shares[0] > 0.5
            together += bool(called and shares.argmax() == 0)
            terms = torch.tensor([1, -shares[source].log(), called == wrong, shares[1:].argmax() + 1 == source])
            for kind in [int(wrong)] + ([1 + source] if wrong else []):
                sums[kind] += terms.double()
    assert together > 0 and torch.allclose(losses.sums.double(), sums, rtol=1e-5)
    clean, corrupted = sums[:2, 1] / sums[:2, 0]
    expected = {'all_positions': sums[:2, 1].sum() / 48, 'balanced': (clean + corrupted) / 2}[loss_type]
    assert losses.main.item() == pytest.approx(expected.item(), rel=1e-5)


def tiny(corpus, **changes):
    return model_over(corpus.vocabulary, block_size=12, **changes)


def mixed(corpus):
    """Wrong tokens of a corpus; the generator's stand-in writes the last letter everywhere."""
    size = corpus.vocabulary.base_size
    return Corruption(size, corpus.vocabulary.cls_token_id, 'balanced',
                      lambda tokens, mask, generator: torch.where(mask, size - 1, tokens), tuple(SOURCES))


def test_validation_says_how_often_each_source_is_found_and_named_whatever_the_batches(small_corpus, monkeypatch):
    import core.validation as module

    allowed = allowed_ids(small_corpus.vocabulary.size, small_corpus.vocabulary.base_size)
    model, seen, inner = tiny(small_corpus, **CLASSES), [], module.corrupt
    monkeypatch.setattr(module, 'corrupt', lambda *given: seen.append(inner(*given)) or seen[-1])
    found = validate_remasking(model, HeldOut(small_corpus, CPU, 30, 30), allowed, mixed(small_corpus))
    (text, sources), = seen
    with torch.no_grad():
        shares = model(text).logits.double().softmax(-1)
    loss = -shares.gather(-1, sources[..., None]).log()[..., 0]
    wrong, called, named = sources > 0, shares[..., 0] < 0.5, shares[..., 1:].argmax(-1) + 1 == sources
    assert found.value == pytest.approx((loss[wrong].mean() + loss[~wrong].mean()).item() / 2, rel=1e-5)
    expected = {'auroc': auroc((1 - shares[..., 0]).flatten(), wrong.flatten()),
                'loss_clean': loss[~wrong].mean(), 'accuracy_clean': (~called)[~wrong].double().mean(),
                'loss_corrupted': loss[wrong].mean(), 'accuracy_corrupted': called[wrong].double().mean(),
                'source_accuracy': named[wrong].double().mean()}
    for number, name in enumerate(('random', 'shuffled', 'model'), 1):
        mine = sources == number
        expected |= {f'accuracy_{name}': called[mine].double().mean(),
                     f'source_accuracy_{name}': named[mine].double().mean()}
    assert found.further == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)
    again = validate_remasking(model, HeldOut(small_corpus, CPU, 30, 7), allowed, mixed(small_corpus))
    assert again.further == pytest.approx(found.further, rel=1e-4)
    binary = validate_remasking(tiny(small_corpus, mode='token_classifier'), HeldOut(small_corpus, CPU, 30, 30), allowed,
                                mixed(small_corpus)).further
    assert set(binary) == {name for name in expected if not name.startswith('source')}


def test_a_multiclass_model_learns_to_find_wrong_tokens_and_to_name_their_source(small_corpus):
    """One that guessed would name a third, and always the same source all of that one."""
    allowed = allowed_ids(small_corpus.vocabulary.size, small_corpus.vocabulary.base_size)
    plan = toy_plan(tokens=small_corpus.tokens('train'), block_size=24, batch_size=16, corruption=mixed(small_corpus))
    model = GPT(model_over(small_corpus.vocabulary, block_size=24, n_embd=32, **CLASSES).config)
    state = TrainingState(model, allowed, CPU, plan, 'multiclass', toy_settings(weight_decay=0.0))
    for iteration in range(120):
        training_step(state, iteration, 1e-2)
    found = state.training.validate(state.averaged, HeldOut(small_corpus, CPU, 64, 64), allowed, plan.noise).further
    assert found['auroc'] > 0.8 and found['source_accuracy'] > 0.5
    assert all(found[f'source_accuracy_{name}'] > 0.35 for name in SOURCES)


SMALL = ('--dataset=tiny --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --max_iters=6 '
         '--lr_decay_iters=6 --warmup_iters=2 --eval_interval=3 --eval_iters=2 --log_interval=1 --device=cpu '
         '--compile=False').split()


def run(*arguments: str):
    train(configure(script.TrainConfig, [*SMALL, *arguments]).config, [])


def test_a_run_from_a_generator_is_logged_by_source_goes_on_exactly_and_guides_sampling(small_corpus, capsys):
    run('--out_dir=out', '--sample_length=0')
    options = ['--training_type=remasking', '--remasking_kind=multiclass', '--remasking_corruption=mixed',
               '--remasking_loss_type=balanced', '--corruption_checkpoint=out/ckpt_best.pt',
               '--init_from_checkpoint=out/ckpt_best.pt']
    run('--out_dir=whole', *options)
    assert 'classifier is not in the checkpoint and starts fresh' in capsys.readouterr().out
    saved, records = load_checkpoint('whole/ckpt_multiclass_balanced_6.pt'), read_metrics(Path('whole/metrics.jsonl'))
    assert saved.kind == 'multiclass' and saved.model_config['num_token_classes'] == 4
    assert all(0 <= record[f'{"train" if record["kind"] == "iteration" else "val"}/source_accuracy'] <= 1
               for record in records)
    assert 'val/source_accuracy_shuffled' in records[-1] and 'train/accuracy_random' in records[1]
    run('--out_dir=parts', *options, '--max_iters=3')
    run('--out_dir=parts', *options, '--init_from=resume')
    again = load_checkpoint('parts/ckpt.pt')
    assert all(torch.equal(weight, again.model[name]) for name, weight in load_checkpoint('whole/ckpt.pt').model.items())
    configuration = configure(SampleConfig, ['--device=cpu', '--remasking_checkpoint_name=whole/ckpt_best.pt',
                                             '--iterations=4', '--num_samples=2'])
    result = run_sampling(configuration.config, configuration.explicit, lambda line: None)
    assert (result.trunk_calls, result.network_calls) == (4, 7)


@pytest.mark.parametrize('corruption, read', [('random', []), ('shuffled', []), ('model', ['corruption_checkpoint']),
                                              ('mixed', ['corruption_checkpoint'])])
def test_a_run_must_find_the_same_generator_again_where_it_reads_one(corruption, read):
    config = configure(script.TrainConfig, ['--training_type=remasking', f'--remasking_corruption={corruption}',
                                            '--corruption_checkpoint=g.pt']).config
    assert TRAINING[training_of(config)].reads(config) == read


def test_nearby_tokens_need_no_generator(small_corpus):
    run('--training_type=remasking', '--remasking_corruption=shuffled', '--remasking_loss_type=balanced')
    last = read_metrics(Path('out/metrics.jsonl'))[-1]
    assert 'val/auroc' in last and 'val/accuracy_shuffled' not in last
