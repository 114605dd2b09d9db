"""Training of remasking models and judges: corruption, targets, losses against float64, freezing, validation, names."""

import copy
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import train as script
from configurator import configure
from core.batches import RowShare, judge_batches, remasking_batches, unmasking_batches
from core.checkpoints.checkpoint import load_checkpoint
from core.checkpoints.helpers import one_shot_fill
from core.checkpoints.kinds import CheckpointKind
from core.common.drawing import allowed_ids
from core.common.errors import UserError
from core.common.randomness import RowRandom, keyed
from core.common.runtime import Runtime
from core.logger import read_metrics
from core.noise import Corruption, draw_mask, judged_text, low_discrepancy_times, replace_tokens
from core.objective import Objective, judge_loss, remasking_loss
from core.stages import Stage
from core.trainer import train
from core.training_kinds import run_label, wandb_name
from core.training_step import TrainingState, training_step
from core.validation import HeldOut, auroc, validate_judge, validate_remasking
from helpers.toys import SPECIAL, V0, awake, toy_config, toy_plan, toy_settings, toy_state
from model import GPT
from sample_utils import wrong_probabilities

ALLOWED = allowed_ids(V0 + 4, V0)
MAIN = Stage({})
RUNTIME = Runtime(torch.device('cpu'), torch.float32, False)
ROOT = Path(__file__).parent.parent.parent
KINDS = {'remasking': {}, 'classifier': {'mode': 'token_classifier'}}
RANDOM = Corruption(V0, SPECIAL['cls_token_id'])


def one(count):
    """A count over a single rank."""
    return count


def generator_fill(head=True):
    """(a generator over the toy, what it writes at masked positions)"""
    model = awake(GPT(toy_config(add_sampler_head=head), seed=11)).eval()
    return model, one_shot_fill(model, head, V0, RUNTIME.autocast)


# Corruption ---------------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), base=st.integers(2, 30), share=st.floats(0, 1))
def test_a_replaced_token_is_never_the_same_and_others_stay(seed, base, share):
    tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, base, (4, 20)))
    generator = keyed(seed, 3, 0, 4)
    mask = draw_mask(generator, torch.full((4,), share), 20)
    found = replace_tokens(generator, tokens, mask, base)
    assert torch.equal(found != tokens, mask) and found.min() >= 0 and found.max() < base


def test_replacements_are_uniform_over_the_other_tokens_whatever_was_masked():
    """Also at few masked positions: the draw of the token is none of the numbers that chose the positions."""
    tokens, generator = torch.full((4000, 5), 2), keyed(1, 0, 0, 4000)
    mask = draw_mask(generator, torch.full((4000,), 0.3), 5)
    found = replace_tokens(generator, tokens, mask, 6)[mask]
    shares = torch.bincount(found, minlength=6) / found.numel()
    assert shares[2] == 0 and ((shares[[0, 1, 3, 4, 5]] - 0.2).abs() < 0.025).all()


def test_random_batches_corrupt_what_diffusion_would_mask():
    plan = toy_plan(batch_size=8, corruption=RANDOM)
    batch, = remasking_batches(plan, 5, one)
    masked, = unmasking_batches(toy_plan(batch_size=8), 5, one)
    assert torch.equal(batch.targets, masked.targets) and (batch.inputs < V0).all()
    assert torch.equal(batch.inputs != batch.targets, masked.inputs == V0)


def test_model_batches_hold_one_shot_fills_and_a_fill_that_hits_the_truth_is_clean():
    model, fill = generator_fill()
    plan = toy_plan(batch_size=32, corruption=RANDOM._replace(fill=fill, sources=('model',)))
    batch, = remasking_batches(plan, 2, one)
    generator = keyed(1, 2, 0, 32)
    mask = draw_mask(generator, low_discrepancy_times(generator, 32), 4)
    wrong = batch.inputs != batch.targets
    assert not (wrong & ~mask).any() and (batch.inputs < V0).all()
    assert 0.2 < wrong[mask].float().mean() < 0.95  # some draws hit the truth
    assert torch.equal(batch.main_weights.view(32, 4) > 0, torch.ones_like(mask))
    assert not torch.equal(batch.inputs, remasking_batches(plan._replace(noise=RANDOM), 2, one)[0].inputs)
    again = fill(batch.targets, mask, generator)
    assert torch.equal(again, batch.inputs)


@pytest.mark.parametrize('loss_type', ['corrupted_only', 'all_positions', 'balanced'])
def test_weights_add_up_as_each_loss_type_says_over_micro_steps(loss_type):
    plan = toy_plan(batch_size=4, micro_steps=3, corruption=RANDOM._replace(loss_type=loss_type))
    batches = remasking_batches(plan, 1, one)
    weights = torch.cat([batch.main_weights for batch in batches]).double()
    wrong = torch.cat([(batch.inputs != batch.targets).flatten() for batch in batches])
    on_wrong, on_clean = weights[wrong], weights[~wrong]
    assert on_wrong.unique().numel() == on_clean.unique().numel() == 1
    expected = {'corrupted_only': 1.0, 'all_positions': wrong.double().mean().item(), 'balanced': 0.5}[loss_type]
    assert on_wrong.sum().item() == pytest.approx(expected, rel=1e-6)
    assert on_clean.sum().item() == pytest.approx(1 - expected, abs=1e-6)


@pytest.mark.parametrize('maker', [remasking_batches, judge_batches])
def test_rows_are_the_same_whoever_holds_them(maker):
    _, fill = generator_fill()
    plan = toy_plan(batch_size=8, corruption=RANDOM._replace(fill=fill, sources=('model',)))
    whole, = maker(plan, 4, one)
    parts = [maker(plan._replace(rows=RowShare(2, 2, rank, 2)), 4, one) for rank in (0, 1)]
    parts = [parts[0][0], parts[1][0], parts[0][1], parts[1][1]]
    for name in ('rows', 'inputs', 'targets'):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name


# Losses -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('loss_type', ['corrupted_only', 'all_positions', 'balanced'])
def test_remasking_loss_and_its_parts_against_the_formula(kind, loss_type):
    """Targets as in the plan's table: the token itself where it is right, the wrong id (or class 1) where it is not."""
    model = awake(GPT(toy_config(**KINDS[kind])))
    batch, = remasking_batches(toy_plan(batch_size=6, corruption=RANDOM._replace(loss_type=loss_type)), 1, one)
    losses = Objective(model, ALLOWED, remasking_loss)(batch, MAIN, keyed(1, 1, 0, 6))
    logits, sums = model(batch.inputs).logits.detach().double(), torch.zeros(2, 4).double()
    ids = [0, 1] if kind == 'classifier' else [0, 1, 2, SPECIAL['wrong_token_id']]
    for row, place in itertools.product(range(6), range(4)):
        wrong = int(batch.inputs[row, place] != batch.targets[row, place])
        target = wrong if kind == 'classifier' else \
            SPECIAL['wrong_token_id'] if wrong else batch.targets[row, place].item()
        scores = logits[row, place]
        loss = scores[ids].logsumexp(0) - scores[target]
        corrected = kind == 'remasking' and scores[:V0].argmax() == batch.targets[row, place]
        best = ids[scores[ids].argmax()]
        sums[wrong] += torch.tensor([1, loss, best == target, corrected]).double()
    clean, corrupted = sums[:, 1] / sums[:, 0]
    expected = {'corrupted_only': corrupted, 'all_positions': sums[:, 1].sum() / 24,
                'balanced': (clean + corrupted) / 2}[loss_type]
    assert losses.main.item() == pytest.approx(expected.item(), rel=1e-5) and losses.total is losses.main
    assert torch.allclose(losses.sums.double(), sums, rtol=1e-5)
    losses.total.backward()
    assert model.transformer['wte'].weight.grad.isfinite().all()


def test_special_ids_other_than_wrong_have_no_share():
    model = awake(GPT(toy_config()))
    batch, = remasking_batches(toy_plan(corruption=RANDOM), 1, one)
    objective = Objective(model, ALLOWED, remasking_loss)
    before = objective(batch, MAIN, keyed(1, 1, 0, 4)).main.item()
    with torch.no_grad():  # ids that the input does not hold
        model.lm_head.weight[[SPECIAL[name] for name in ('mask_token_id', 'pad_token_id', 'cls_token_id')]] += 9
    assert objective(batch, MAIN, keyed(1, 1, 0, 4)).main.item() == before
    with torch.no_grad():
        model.lm_head.weight[SPECIAL['wrong_token_id']] += 1
    assert objective(batch, MAIN, keyed(1, 1, 0, 4)).main.item() != before


def test_judge_batches_begin_with_cls_and_end_with_the_text_and_the_target_is_the_share_of_wrong_tokens():
    _, fill = generator_fill()
    plan = toy_plan(batch_size=60, corruption=RANDOM._replace(fill=fill))
    batch, = judge_batches(plan, 3, one)
    assert batch.inputs.shape == (60, 4)  # CLS and three tokens: the whole block
    assert (batch.inputs[:, 0] == SPECIAL['cls_token_id']).all() and (batch.inputs[:, 1:] < V0).all()
    model = awake(GPT(toy_config(mode='sequence_scorer')))
    error, shares = 0.0, []
    for inputs, targets in zip(batch.inputs, batch.targets):
        shares.append(sum(inputs[place] != targets[place] for place in (1, 2, 3)).item() / 3)
        error += (model(inputs[None]).logits.double().sigmoid().item() - shares[-1]) ** 2 / 60
    found = Objective(model, ALLOWED, judge_loss)(batch, MAIN, keyed(1, 3, 0, 60))
    assert found.main.item() == pytest.approx(error, rel=1e-5)
    assert {round(3 * share) for share in shares} == {0, 1, 2, 3} and shares.count(0) >= 12


def test_a_judge_reads_clean_replaced_and_filled_texts_alike_often():
    seen, (_, fill) = [], generator_fill()

    def watched(tokens, mask, generator):
        seen.append(generator.rows)
        return fill(tokens, mask, generator)

    text, generator = torch.zeros(3000, 4).long(), keyed(2, 0, 0, 3000)
    mask = torch.ones_like(text).bool()
    judged = judged_text(RANDOM._replace(fill=watched), generator, text, mask)
    filled = torch.zeros(3000).bool()
    filled[seen[0]] = True
    clean, replaced = (judged == 0).all(1) & ~filled, (judged != 0).all(1) & ~filled
    assert (clean | replaced | filled).all() and 900 < filled.sum() < 1100 and 900 < clean.sum() < 1100
    alone = fill(text[seen[0]], mask[seen[0]], RowRandom(2, 0, seen[0]))
    assert torch.equal(judged[seen[0]], alone)
    without = judged_text(RANDOM, generator, text, mask)
    assert 1400 < (without == 0).all(1).sum() < 1600 and ((without == 0).all(1) | (without != 0).all(1)).all()


# Freezing -----------------------------------------------------------------------------------------------------------

FROZEN = {'freeze_transformer': True, 'unfreeze_at_iteration': 3, 'unfreeze_lr_multiplier': 0.25, 'dropout': 0.3}
HELPERS = {'classifier': {'mode': 'token_classifier'}, 'judge': {'mode': 'sequence_scorer'}}


def frozen_state(kind):
    return toy_state(toy_config(**HELPERS[kind], **FROZEN), toy_plan(micro_steps=2, corruption=RANDOM), kind)


@pytest.mark.parametrize('kind', HELPERS)
def test_only_the_output_layer_trains_until_the_trunk_is_let_go_and_the_multiplier_lasts(kind):
    state = frozen_state(kind)
    for iteration in range(6):
        before = copy.deepcopy(state.model.state_dict())
        training_step(state, iteration, 1e-2)
        moved = {name.split('.')[0] for name, weight in state.model.state_dict().items()
                 if not torch.equal(weight, before[name])}
        head = {'classifier': 'classifier', 'judge': 'scorer'}[kind]
        assert moved == ({head} if iteration < 3 else {head, 'transformer'})
        rates = {(group['trunk'], group['lr']) for optimizer in state.optimizers for group in optimizer.param_groups}
        assert rates == {(True, 0.0025), (False, 0.01)}


@pytest.mark.parametrize('kind', HELPERS)
@pytest.mark.parametrize('stop', [2, 3, 4, 6])
def test_resume_is_exact_before_at_and_after_the_unfreezing(kind, stop):
    whole, first, second = frozen_state(kind), frozen_state(kind), frozen_state(kind)
    losses = [training_step(whole, iteration, 1e-2).main for iteration in range(7)]
    for iteration in range(stop):
        training_step(first, iteration, 1e-2)
    second.model.load_state_dict(first.model.state_dict())
    second.averaged.load_state_dict(first.averaged.state_dict())
    for optimizer, values in zip(second.optimizers, first.optimizers):
        optimizer.load_state_dict(copy.deepcopy(values.state_dict()))
    for iteration in range(stop, 7):
        assert torch.equal(training_step(second, iteration, 1e-2).main, losses[iteration])
    for ours, theirs in ((whole.model, second.model), (whole.averaged, second.averaged)):
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))


# Validation ---------------------------------------------------------------------------------------------------------

def test_auroc_is_the_share_of_ordered_pairs():
    generator = np.random.default_rng(3)
    scores = torch.from_numpy(generator.integers(0, 6, 80) / 5.0)
    labels = torch.from_numpy(generator.random(80) < 0.3 + 0.4 * (scores.numpy() > 0.5))
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
    assert auroc(scores, labels) == pytest.approx(float(sum(pairs)) / len(pairs))
    assert auroc(labels.double(), labels) == 1 and auroc(-labels.double(), labels) == 0
    assert auroc(torch.ones(80), labels) == 0.5 and math.isnan(auroc(scores, torch.zeros(80).bool()))


def tiny_model(corpus, **changes):
    vocabulary = corpus.vocabulary
    ids = {f'{name}_token_id': getattr(vocabulary, f'{name}_token_id') for name in ('mask', 'wrong', 'pad', 'cls')}
    return awake(GPT(toy_config(**{'vocab_size': vocabulary.size, 'block_size': 12, **ids, **changes}))).eval()


def random_corruption(corpus, loss_type='balanced'):
    return Corruption(corpus.vocabulary.base_size, corpus.vocabulary.cls_token_id, loss_type)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('loss_type', ['all_positions', 'balanced'])
def test_remasking_validation_is_the_loss_and_the_auroc_of_its_windows_whatever_the_batches(
        small_corpus, kind, loss_type, monkeypatch):
    import core.validation as module

    allowed = allowed_ids(small_corpus.vocabulary.size, small_corpus.vocabulary.base_size)
    model, seen = tiny_model(small_corpus, **KINDS[kind]), []
    inner = module.corrupt
    monkeypatch.setattr(module, 'corrupt', lambda *given: seen.append((given[2], inner(*given))) or seen[-1][1])
    corruption = random_corruption(small_corpus, loss_type)
    found = validate_remasking(model, HeldOut(small_corpus, RUNTIME, 30, 30), allowed, corruption)
    (truth, (inputs, _)), = seen
    wrong = inputs != truth
    assert set(wrong.sum(1).tolist()) == {*range(1, 13)}  # every number of wrong tokens occurs
    probability = wrong_probabilities(model, inputs)
    assert found.further['auroc'] == pytest.approx(auroc(probability.flatten(), wrong.flatten()), abs=1e-6)
    if kind == 'classifier':
        losses = -torch.where(wrong, probability, 1 - probability).log()
        expected = losses.mean() if loss_type == 'all_positions' else (losses[wrong].mean() + losses[~wrong].mean()) / 2
        assert found.value == pytest.approx(expected.item(), rel=1e-5)
        assert found.further['loss_clean'] == pytest.approx(losses[~wrong].mean().item(), rel=1e-5)
        right = (probability > 0.5) == wrong
        assert found.further['accuracy_corrupted'] == pytest.approx(right[wrong].double().mean().item(), rel=1e-6)
        assert 'correction_accuracy' not in found.further
        if loss_type == 'all_positions':  # windows of equal length: the error of a plain mean
            assert found.standard_error == pytest.approx(losses.mean(1).std().item() / 30 ** 0.5, rel=1e-4)
    again = validate_remasking(model, HeldOut(small_corpus, RUNTIME, 30, 7), allowed, corruption)
    assert again.value == pytest.approx(found.value, rel=1e-5)
    assert again.further == pytest.approx(found.further, rel=1e-4)


def test_judge_validation_compares_each_window_with_itself_made_wrong(small_corpus, monkeypatch):
    """A judge that counts one letter (by construction here: the true share) ranks every pair; one that knows nothing
    ranks one half."""
    model = tiny_model(small_corpus, mode='sequence_scorer')
    corruption = random_corruption(small_corpus)
    corruption = corruption._replace(fill=lambda tokens, mask, generator: (tokens + mask) % corruption.base_size)
    held_out = {}

    def all_knowing(inputs):
        assert inputs.shape[1] == 12 and (inputs[:, 0] == corruption.cls_token_id).all()
        return (inputs[:, 1:] != held_out['text']).float().mean(1)

    import core.validation as module
    real = module.fixed_windows
    monkeypatch.setattr(module, 'fixed_windows', lambda *given: held_out.setdefault('text', real(*given)))
    monkeypatch.setattr(model, 'sequence_scores', all_knowing)
    found = validate_judge(model, HeldOut(small_corpus, RUNTIME, 20, 20), ALLOWED, corruption)
    assert found.value == 0 and found.further == {'above_random': 1.0, 'above_filled': 1.0}
    monkeypatch.setattr(model, 'sequence_scores', lambda inputs: torch.full((len(inputs),), 0.25))
    found = validate_judge(model, HeldOut(small_corpus, RUNTIME, 20, 8), ALLOWED, corruption._replace(fill=None))
    assert found.further == {'above_random': 0.5} and 0 < found.value < 1 and found.standard_error > 0


# Learning -----------------------------------------------------------------------------------------------------------

def trained(corpus, kind, loss_type, iterations, **changes):
    """A model over 24 tokens of the made-up text after some steps on randomly replaced tokens, and its validation."""
    size, block = corpus.vocabulary.base_size, 24 + (kind == 'judge')
    corruption = Corruption(size, corpus.vocabulary.cls_token_id, loss_type)
    allowed = allowed_ids(corpus.vocabulary.size, size)
    plan = toy_plan(tokens=corpus.tokens('train'), block_size=block, batch_size=16, corruption=corruption)
    config = tiny_model(corpus, block_size=block, n_embd=32, **changes).config
    state = TrainingState(GPT(config), allowed, RUNTIME, plan, CheckpointKind(kind), toy_settings(weight_decay=0.0))
    for iteration in range(iterations):
        training_step(state, iteration, 1e-2)
    return state.training.validate(state.averaged, HeldOut(corpus, RUNTIME, 64, 64), allowed, corruption)


def test_models_learn_to_find_wrong_tokens_unless_every_target_is_the_same(small_corpus):
    """Approach A has one target, the wrong id, and so learns to say it everywhere."""
    both = trained(small_corpus, 'remasking', 'all_positions', 120).further
    only = trained(small_corpus, 'remasking', 'corrupted_only', 60).further
    assert both['auroc'] > 0.8 and both['accuracy_clean'] > 0.6 and both['accuracy_corrupted'] > 0.6
    assert only['accuracy_corrupted'] == 1 and only['accuracy_clean'] == 0 and only['auroc'] < 0.65


def test_a_judge_learns_which_share_is_wrong(small_corpus):
    """The best constant has a squared error of 0.1."""
    found = trained(small_corpus, 'judge', 'all_positions', 120, mode='sequence_scorer')
    assert found.further['above_random'] > 0.7 and found.value < 0.09


# Runs ---------------------------------------------------------------------------------------------------------------

SMALL = ('--dataset=tiny --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --max_iters=6 '
         '--lr_decay_iters=6 --warmup_iters=2 --eval_interval=3 --eval_iters=2 --log_interval=1 --device=cpu '
         '--compile=False').split()


def run(*arguments: str):
    config = configure(script.TrainConfig, [*SMALL, *arguments]).config
    train(config, [])
    return config


@pytest.fixture
def generator(small_corpus):
    """A trained generator with a sampler head in out-generator/."""
    run('--out_dir=out-generator', '--add_sampler_head=True', '--sample_length=0')
    return 'out-generator/ckpt_best.pt'


def test_remasking_runs_log_both_kinds_of_position_and_name_their_files(generator, capsys):
    run('--training_type=remasking', '--remasking_corruption=model', f'--corruption_checkpoint={generator}',
        '--remasking_loss_type=balanced', '--seed=5')
    saved = load_checkpoint('out/ckpt_remasking_balanced_6.pt')
    assert saved.kind == 'remasking' and saved.model_config['mode'] == 'language_model'
    records = read_metrics(Path('out/metrics.jsonl'))
    for record in records:
        group = 'train' if record['kind'] == 'iteration' else 'val'
        clean, corrupted = record[f'{group}/loss_clean'], record[f'{group}/loss_corrupted']
        assert record[f'{group}/loss'] == pytest.approx((clean + corrupted) / 2, rel=1e-4)
        for name in ('accuracy_clean', 'accuracy_corrupted', 'correction_accuracy'):
            assert 0 <= record[f'{group}/{name}'] <= 1
    assert sum('val/auroc' in record for record in records) == 3
    assert 'step 6: val loss ' in capsys.readouterr().out and Path('out/loss.png').stat().st_size > 0


def test_a_binary_model_starts_from_a_generator_with_its_trunk_frozen(generator, capsys):
    """Frozen until step 2, then slower; stopped there and resumed, it ends as if never stopped."""
    options = ['--training_type=remasking', '--remasking_kind=binary', '--remasking_loss_type=balanced',
               '--freeze_transformer=True', '--unfreeze_at_iteration=3']
    start = f'--init_from_checkpoint={generator}'
    run(*options, '--out_dir=whole', start)
    out = capsys.readouterr().out
    assert 'classifier is not in the checkpoint and starts fresh' in out and 'sampler_head of the checkpoint' in out
    run(*options, '--out_dir=parts', start, '--max_iters=3')
    before, origin = load_checkpoint('parts/ckpt.pt'), load_checkpoint(generator)
    assert all(torch.equal(before.model[name], origin.model[name]) for name in before.model if 'transformer' in name)
    run(*options, '--out_dir=parts', start, '--init_from=resume')  # start is not read again
    whole, parts = load_checkpoint('whole/ckpt.pt'), load_checkpoint('parts/ckpt.pt')
    assert all(torch.equal(whole.model[name], parts.model[name]) for name in whole.model)
    assert not torch.equal(whole.model['transformer.wte.weight'], origin.model['transformer.wte.weight'])
    assert whole.kind == 'classifier' and Path('whole/ckpt_classifier_balanced_6.pt').exists()


def test_judge_runs_with_and_without_a_generator(generator):
    run('--training_type=judge', f'--corruption_checkpoint={generator}', '--block_size=17')
    saved, record = load_checkpoint('out/ckpt_judge_6.pt'), read_metrics(Path('out/metrics.jsonl'))[-1]
    assert saved.kind == 'judge' and saved.model_config['mode'] == 'sequence_scorer'
    assert 0 <= record['val/above_random'] <= 1 and 0 <= record['val/above_filled'] <= 1
    run('--training_type=judge', '--out_dir=plain')
    assert 'val/above_filled' not in read_metrics(Path('plain/metrics.jsonl'))[-1]


@pytest.mark.parametrize('arguments, label, name', [
    ([], 'unmasking', 'run'),
    (['--attention_type=causal'], 'causal', 'run'),
    (['--training_type=remasking'], 'remasking_corrupted_only', 'run_remasking_corrupted_only'),
    (['--training_type=remasking', '--remasking_loss_type=all_positions', '--wandb_run_name=mine'],
     'remasking_all_positions', 'mine_remasking_all_positions'),
    (['--training_type=remasking', '--remasking_kind=binary', '--remasking_loss_type=balanced'], 'classifier_balanced',
     'run_classifier_balanced'),
    (['--training_type=remasking', '--remasking_kind=multiclass', '--remasking_loss_type=balanced'],
     'multiclass_balanced', 'run_multiclass_balanced'),
    (['--training_type=judge'], 'judge', 'run_judge'),
])
def test_snapshots_and_runs_are_named_after_what_is_trained(arguments, label, name):
    config = configure(script.TrainConfig, arguments).config
    assert (run_label(config), wandb_name(config)) == (label, name)


@pytest.mark.parametrize('arguments, words', [
    (['--training_type=remasking', '--remasking_corruption=model'], 'no model is named; add --corruption_checkpoint'),
    (['--training_type=remasking', '--remasking_corruption=model', '--corruption_checkpoint=gone.pt'],
     'corruption_checkpoint is gone.pt, but there is no such file; train one with: python train.py'),
    (['--training_type=remasking', '--remasking_kind=binary', '--remasking_loss_type=corrupted_only'],
     'a binary remasking model would never see a right token'),
    (['--training_type=remasking', '--remasking_kind=multiclass', '--remasking_loss_type=balanced'],
     'with remasking_corruption=random all wrong tokens have one source; take --remasking_corruption=mixed'),
    (['--training_type=remasking', '--remasking_kind=multiclass', '--remasking_corruption=mixed',
      '--corruption_checkpoint=x.pt'], 'a multiclass remasking model would never see a right token'),
    (['--training_type=remasking', '--remasking_corruption=mixed'],
     'remasking_corruption is mixed, but no model is named; add --corruption_checkpoint'),
    (['--training_type=remasking', '--add_sampler_head=True'], 'add_sampler_head is True, but training_type=remasking'),
    (['--training_type=judge', '--attention_type=causal'], 'reads a text from both sides'),
    (['--training_type=judge', '--init_from_checkpoint=gone.pt'],
     'no such file; a judge starts from a remasking model, trained with: python train.py config/train_char_remasking.py'),
    (['--training_type=judge', '--block_size=1'], 'a judge reads CLS and at least one token'),
    (['--training_type=remasking', '--freeze_transformer=True', '--init_from_checkpoint=x.pt'], 'nothing to train'),
])
def test_options_that_do_not_fit_are_one_sentence(small_corpus, arguments, words):
    with pytest.raises(UserError) as caught:
        run(*arguments)
    assert words in str(caught.value)


def test_a_generator_that_was_replaced_is_not_taken_for_the_old_one(generator):
    arguments = '--training_type=judge', f'--corruption_checkpoint={generator}', '--out_dir=judge'
    run(*arguments, '--max_iters=3')
    run('--out_dir=out-generator', '--add_sampler_head=True', '--sample_length=0', '--seed=9', '--overwrite=True')
    with pytest.raises(UserError, match='but that file was replaced since the run was saved'):
        run(*arguments, '--init_from=resume')


def test_what_cannot_corrupt_or_go_on_is_refused(generator):
    run('--training_type=judge', '--out_dir=judge')
    for arguments, words in (
            (['judge', '--corruption_checkpoint=judge/ckpt.pt'], "kind 'judge', which fills no masks"),
            (['judge', f'--corruption_checkpoint={generator}', '--block_size=18'], 'must read 17 tokens'),
            (['remasking', '--init_from=resume', '--out_dir=judge'], "of kind 'judge', but the options")):
        arguments = [f'--training_type={arguments[0]}', *arguments[1:]]
        with pytest.raises(UserError) as caught:
            run(*arguments)
        assert words in str(caught.value)


@pytest.mark.parametrize('name, block', [('train_char_remasking', 256), ('train_char_judge', 257)])
def test_configs_shrink_on_a_cpu_and_say_so(name, block):
    found = {}
    for device in ('cpu', 'cuda'):
        configuration = configure(script.TrainConfig, [str(ROOT / 'config' / f'{name}.py')],
                                  resolve_device=lambda asked: device)
        found[device] = configuration.config
        assert bool(configuration.notes) == (device == 'cpu')
    assert (found['cuda'].n_embd, found['cuda'].block_size) == (384, block)
    assert found['cpu'].max_iters == found['cpu'].lr_decay_iters == found['cuda'].max_iters / 4
    assert found['cpu'].block_size - 1 == (found['cuda'].block_size - 1) / 2 or block == 256
