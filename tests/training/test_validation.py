"""Validation: fixed, independent of batching, and equal to the enumerated bound."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from core.batches import BatchPlan, RowShare, unmasking_batches
from core.common.drawing import allowed_ids
from core.common.randomness import keyed
from core.common.runtime import Runtime
from core.noise import SCHEDULES, Masking, draw_mask, low_discrepancy_times, seen_neighbours
from core.objective import Objective
from core.stages import Stage
from core.validation import HeldOut, bits_of, fixed_windows, training_shares, validate_generator
from helpers.toys import awake
from model import GPT, GPTConfig

RUNTIME = Runtime(torch.device('cpu'), torch.float32, False)


def model_of(corpus, **changes) -> GPT:
    vocabulary = corpus.vocabulary
    config = GPTConfig(block_size=4, vocab_size=vocabulary.size, n_layer=1, n_head=2, n_embd=8,
                       mask_token_id=vocabulary.mask_token_id, **changes)
    return awake(GPT(config)).eval()


def test_validation_is_the_enumerated_bound(small_corpus):
    """Every window of four with every mask, in float64, against many stratified windows with one mask each."""
    corpus, V0 = small_corpus, small_corpus.vocabulary.base_size
    model, allowed = model_of(corpus), allowed_ids(corpus.vocabulary.size, corpus.vocabulary.base_size)
    windows = fixed_windows(corpus.tokens('val'), 4000, 4)
    exact = torch.zeros(len(windows)).double()
    with torch.no_grad():
        for mask in torch.tensor(list(itertools.product([False, True], repeat=4)))[1:]:
            logits = model(windows.masked_fill(mask, V0)).logits.double()[..., :V0]
            cost = -torch.log_softmax(logits, -1).gather(-1, windows[..., None]).squeeze(-1)
            exact += (cost * mask).sum(1) / mask.sum() / (4 * math.comb(4, int(mask.sum())))
    found = validate_generator(model, HeldOut(corpus, RUNTIME, 4000, 500), allowed)
    assert abs(found.value - exact.mean().item()) < 4 * found.standard_error
    assert found.standard_error < 0.02
    assert found.further['bits'] == pytest.approx(found.value / math.log(2)) and found.bits_per == 'character'


def exact_conditionals(model, text, V0):
    """{mask pattern: float64 [4]}, log p of each token of text [4] given the tokens that the pattern leaves."""
    masks = torch.tensor(list(itertools.product([False, True], repeat=4)))
    with torch.no_grad():
        logits = model(text.expand(16, 4).masked_fill(masks, V0)).logits.double()[..., :V0]
    found = torch.log_softmax(logits, -1).gather(-1, text.expand(16, 4)[..., None]).squeeze(-1)
    return {tuple(mask): row for mask, row in zip(masks.tolist(), found)}


def test_the_any_order_mixture_is_at_least_as_likely_as_the_bound_says(small_corpus):
    """Ancestral sampling with one reveal per step draws from the mean of p over all orders; Jensen's inequality, and
    the mean over all orders of -log p is the NELBO exactly."""
    corpus, V0 = small_corpus, small_corpus.vocabulary.base_size
    model, mixture, bound = model_of(corpus).double(), [], []
    for text in fixed_windows(corpus.tokens('val'), 60, 4):
        table, orders = exact_conditionals(model, text, V0), []
        for order in itertools.permutations(range(4)):
            hidden, total = [True] * 4, 0.0
            for place in order:
                total += table[tuple(hidden)][place].item()
                hidden[place] = False
            orders.append(total)
        mixture.append(-torch.tensor(orders).double().exp().mean().log().item() / 4)
        bound.append(-sum(orders) / len(orders) / 4)
        nelbo = -sum((row * torch.tensor(mask)).sum().item() / sum(mask) / (4 * math.comb(4, sum(mask)))
                     for mask, row in table.items() if any(mask))
        assert bound[-1] == pytest.approx(nelbo, rel=1e-9) and mixture[-1] <= bound[-1]
    assert sum(mixture) < sum(bound) - 1e-3
    found = validate_generator(model, HeldOut(corpus, RUNTIME, 60, 60), allowed_ids(corpus.vocabulary.size, V0))
    assert sum(mixture) / 60 < found.value + 3 * found.standard_error


def test_the_bound_agrees_with_its_form_in_time(small_corpus):
    """Sum over masked positions of CE / t, t drawn as in training: within three standard errors and the bias of about
    a thousandth that `low_discrepancy_times` states."""
    corpus, V0, rows = small_corpus, small_corpus.vocabulary.base_size, 20_000
    model = model_of(corpus).double()
    windows, generator = fixed_windows(corpus.tokens('val'), rows, 4), keyed(7, 0, 0, rows)
    times = low_discrepancy_times(generator, rows)
    mask = draw_mask(generator, times, 4)
    with torch.no_grad():
        logits = model(windows.masked_fill(mask, V0)).logits[..., :V0]
    cost = -torch.log_softmax(logits, -1).gather(-1, windows[..., None]).squeeze(-1)
    terms = (cost * mask).sum(1) / times / 4
    found = validate_generator(model, HeldOut(corpus, RUNTIME, rows, 4000), allowed_ids(corpus.vocabulary.size, V0))
    errors = math.hypot(found.standard_error, (terms.std() / math.sqrt(rows)).item())
    assert abs(terms.mean().item() - found.value) < 3 * errors + 1e-3 * found.value and errors < 0.04


def test_bits_are_of_the_real_text(small_corpus):
    assert bits_of(math.log(2), small_corpus, 'val') == (pytest.approx(1), 'character')
    bytewise = dataclasses.replace(small_corpus, vocabulary=SimpleNamespace(kind='bpe'), sizes={'val': 100},
                                   utf8_bytes={'val': 250})
    assert bits_of(5 * math.log(2), bytewise, 'val') == (pytest.approx(2), 'byte')


def test_validation_depends_on_nothing_but_the_model(small_corpus):
    model, allowed = model_of(small_corpus), allowed_ids(small_corpus.vocabulary.size,
                                                         small_corpus.vocabulary.base_size)
    values = []
    for batch_size, noise in ((8, 0), (8, 5), (5, 1)):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        values.append(validate_generator(model, HeldOut(small_corpus, RUNTIME, 40, batch_size), allowed).value)
        assert torch.equal(state, torch.get_rng_state())
    assert values[0] == values[1] and values[2] == pytest.approx(values[0], rel=1e-6)


def test_causal_validation_is_the_exact_likelihood(small_corpus):
    model, V0 = model_of(small_corpus, attention_type='causal'), small_corpus.vocabulary.base_size
    found = validate_generator(model, HeldOut(small_corpus, RUNTIME, 10, 4),
                               allowed_ids(small_corpus.vocabulary.size, V0))
    windows, total = fixed_windows(small_corpus.tokens('val'), 10, 5), 0.0
    with torch.no_grad():
        for row in windows:
            for place in range(4):
                logits = model(row[None, :place + 1]).logits[0, -1, :V0].double()
                total -= torch.log_softmax(logits, 0)[row[place + 1]].item()
    assert found.value == pytest.approx(total / 40, rel=1e-5)


def test_windows_reach_from_the_first_to_the_last_token(small_corpus):
    tokens = small_corpus.tokens('val')
    windows = fixed_windows(tokens, 7, 4)
    assert windows[0].tolist() == tokens[:4].tolist() and windows[-1].tolist() == tokens[-4:].tolist()
# As training weighs it ------------------------------------------------------------------------------------------------

def objective_on(corpus, model, noise, rows, seed):
    """What gives iteration's losses of training and the number of masked positions that they are means over."""
    allowed, length = allowed_ids(corpus.vocabulary.size, corpus.vocabulary.base_size), model.config.block_size
    plan, objective = BatchPlan(corpus.tokens('val'), seed, length, RowShare(rows), noise), Objective(model, allowed)

    def losses(iteration):
        batch, = unmasking_batches(plan, iteration, lambda count: count)
        return objective(batch, Stage({'sampler': 1.0}, True), keyed(seed, iteration, 0, rows)), 1 / batch.main_weights[0]

    return losses


@pytest.fixture(scope='module')
def half_trained():
    """A model with a sampler head that knows more of a text the more it sees of it."""
    def of(corpus):
        model = GPT(GPTConfig(block_size=12, vocab_size=corpus.vocabulary.size, n_layer=1, n_head=2, n_embd=16,
                              mask_token_id=corpus.vocabulary.mask_token_id, add_sampler_head=True), seed=1)
        noise = Masking(corpus.vocabulary.mask_token_id, neighbours=seen_neighbours(model.config))
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), objective_on(corpus, model, noise, 64, 1)
        for iteration in range(150):
            losses(iteration)[0].total.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.eval().requires_grad_(False)

    return of


def test_the_losses_beside_the_bound_are_what_training_minimises(small_corpus, half_trained):
    """Against the objective itself on many batches drawn as in training, of the same text and model, by each noise
    schedule."""
    corpus, model, mains = small_corpus, half_trained(small_corpus), []
    allowed = allowed_ids(corpus.vocabulary.size, corpus.vocabulary.base_size)
    plain = validate_generator(model, HeldOut(corpus, RUNTIME, 4000, 1000), allowed)
    for schedule in SCHEDULES.values():
        noise = Masking(corpus.vocabulary.mask_token_id, neighbours=seen_neighbours(model.config), schedule=schedule)
        found = validate_generator(model, HeldOut(corpus, RUNTIME, 4000, 1000), allowed, noise)
        losses, sums = objective_on(corpus, model, noise, 1000, 3), torch.zeros(3).double()
        for iteration in range(6):
            made, masked = losses(iteration)
            sums += torch.stack([masked, made.main * masked, made.heads['sampler'] * masked])
        assert found.further['loss_main'] == pytest.approx((sums[1] / sums[0]).item(), rel=0.03)
        assert found.further['loss_sampler'] == pytest.approx((sums[2] / sums[0]).item(), rel=0.03)
        assert plain.value == found.value and plain.further == {'bits': found.further['bits']}
        mains.append(found.further['loss_main'])
    assert mains[0] > 1.06 * plain.value and abs(mains[1] - mains[0]) > 0.05 * mains[0]  # each a number of its own


def test_a_bound_that_training_minimises_has_no_second_name(small_corpus):
    noise = Masking(small_corpus.vocabulary.mask_token_id, 'elbo')
    found = validate_generator(model_of(small_corpus), HeldOut(small_corpus, RUNTIME, 8, 4),
                               allowed_ids(small_corpus.vocabulary.size, small_corpus.vocabulary.base_size), noise)
    assert found.further.keys() == {'bits'}


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_shares_are_how_often_training_masks_so_many_positions(schedule):
    """Against masks drawn as in training."""
    noise, length, rows = Masking(0, schedule=SCHEDULES[schedule]), 6, 200_000
    generator = keyed(5, 0, 0, rows)
    mask = draw_mask(generator, noise.schedule.mask_probability(low_discrepancy_times(generator, rows)), length)
    counted = torch.bincount(mask.sum(1), minlength=length + 1) / rows
    shares = training_shares(noise, torch.arange(length + 1), length)
    assert shares.tolist() == pytest.approx(counted.tolist(), abs=4e-3) and shares.sum().item() == pytest.approx(1)
    if schedule == 'linear':
        assert shares.tolist() == pytest.approx([1 / 7] * 7, rel=1e-6)
