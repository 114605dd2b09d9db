"""Losses against formulas written out in float64, on a model small enough to enumerate."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import core.objective
from core.batches import causal_batches, unmasking_batches
from core.common.drawing import allowed_ids
from core.common.randomness import keyed
from core.noise import MINIMUM_TIME, SCHEDULES, low_discrepancy_times
from core.objective import Objective, weighted_cross_entropy
from core.stages import Stage
from core.validation import any_order_terms
from helpers.toys import V0, awake, toy_config, toy_plan
from model import GPT

ALLOWED = allowed_ids(V0 + 4, V0)
MAIN, SAMPLER, CRITIC = Stage({}), Stage({'sampler': 1.0}), Stage({'sampler': 1.0, 'critic': 0.25})


def one(count):
    """A count over a single rank."""
    return count


def position_losses(model: GPT, inputs: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """-log p(truth) [B, T] in float64, the softmax over the base vocabulary alone."""
    logits = model(inputs).logits.double()[..., :V0]
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted.exp().sum(-1).log() - shifted.gather(-1, truth[..., None]).squeeze(-1)


@pytest.mark.parametrize('weighting', ['elbo', 'masked_mean'])
def test_main_loss_against_the_formula(weighting):
    model, plan = awake(GPT(toy_config())), toy_plan(batch_size=6, loss_weighting=weighting)
    batch, = unmasking_batches(plan, 3, one)
    losses = position_losses(model, batch.inputs, batch.targets)
    times = low_discrepancy_times(keyed(1, 3, 0, 6), 6)
    expected, masked = 0.0, 0
    for row, column in itertools.product(range(6), range(4)):
        if batch.inputs[row, column] == V0:
            expected += losses[row, column] / (times[row] * 6 * 4 if weighting == 'elbo' else 1)
            masked += 1
        else:
            assert batch.inputs[row, column] == batch.targets[row, column]
    expected = expected / (1 if weighting == 'elbo' else masked)
    found = Objective(model, ALLOWED)(batch, MAIN, keyed(1, 3, 0, 6))
    assert found.main.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.total is found.main and found.heads == {}


@pytest.mark.parametrize('name', SCHEDULES)
def test_estimator_and_validation_against_the_enumerated_bound(name):
    """All 81 sequences and 16 masks: the mean of the estimator in time is its expectation under the schedule, the
    any-order form's is the NELBO, and they differ by no more than the stated bias."""
    schedule = SCHEDULES[name]
    model = awake(GPT(toy_config()))
    sequences = torch.tensor(list(itertools.product(range(V0), repeat=4)))  # [81, 4]
    text = sequences.flatten().numpy().astype(np.uint16)
    masks = torch.tensor(list(itertools.product([False, True], repeat=4)))[1:]  # [15, 4]
    starts = torch.arange(len(text) - 3)
    windows = torch.from_numpy(text.astype(np.int64))[starts[:, None] + torch.arange(4)]  # every window of the corpus
    order, in_time, begin = (torch.zeros(len(windows)).double() for _ in range(3))
    fine = MINIMUM_TIME + (1 - MINIMUM_TIME) * (torch.arange(20_000).double() + 0.5) / 20_000  # quadrature over t
    share, weight = schedule.mask_probability(fine), schedule.elbo_weight(fine)
    with torch.no_grad():
        for mask in masks:
            n = int(mask.sum())
            cost = (position_losses(model, windows.masked_fill(mask, V0), windows) * mask).sum(1)
            order += cost / n / (4 * math.comb(4, n))
            integrand = weight * share ** n * (1 - share) ** (4 - n) / 4
            in_time, begin = in_time + cost * integrand.mean(), begin + cost * integrand[0]
            found = any_order_terms(model, windows, torch.full((len(windows),), n), mask.expand(len(windows), 4),
                                    ALLOWED)
            assert torch.allclose(found, cost / n, rtol=1e-5)
    bias = MINIMUM_TIME * (order.mean() - begin.mean())  # as `low_discrepancy_times` states it
    assert in_time.mean().item() == pytest.approx((order.mean() + bias).item(), rel=1e-5)

    plan, objective, values = toy_plan(tokens=text, batch_size=64, schedule=schedule), Objective(model, ALLOWED), []
    with torch.no_grad():
        for iteration in range(400):
            batch, = unmasking_batches(plan, iteration, one)
            values.append(objective(batch, MAIN, keyed(1, iteration, 0, 64)).main.double())
    values = torch.stack(values)
    assert abs(values.mean() - in_time.mean()) < 4 * values.std() / 400 ** 0.5


def test_no_masked_position_gives_zero_and_no_nan():
    model = awake(GPT(toy_config(add_sampler_head=True, add_critic_head=True)))
    batch, = unmasking_batches(toy_plan(sampler_context=1), 0, one)
    blank = batch._replace(inputs=batch.targets, main_weights=torch.zeros_like(batch.main_weights),
                           mean_weights=torch.zeros_like(batch.mean_weights))
    losses = Objective(model, ALLOWED)(blank, CRITIC, keyed(1, 0, 0, 4))
    assert losses.main == 0 and losses.heads == {'sampler': 0, 'critic': 0}
    losses.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() and p.grad.abs().max() == 0 for p in model.parameters())


def test_batches_without_masks_are_made_of_padding():
    plan = toy_plan(batch_size=1)
    empty = [batch for iteration in range(300) for batch in unmasking_batches(plan, iteration, one)
             if not (batch.inputs == V0).any()]
    assert empty and all((batch.main_weights == 0).all() for batch in empty)


@pytest.mark.parametrize('weighting', ['elbo', 'masked_mean'])
def test_two_micro_steps_add_up_to_one(weighting):
    model = awake(GPT(toy_config(add_sampler_head=True)))
    objective = Objective(model, ALLOWED)
    found = []
    for micro_steps, size in ((1, 8), (2, 4)):
        batches = unmasking_batches(toy_plan(micro_steps=micro_steps, batch_size=size, loss_weighting=weighting,
                                             sampler_context=1), 5, one)
        losses = [objective(batch, SAMPLER, keyed(1, 5, 0, size)) for batch in batches]
        model.zero_grad()
        sum(loss.total for loss in losses).backward()
        found.append((sum(loss.main for loss in losses), sum(loss.heads['sampler'] for loss in losses),
                      [p.grad.clone() for p in model.parameters()]))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5) and torch.allclose(found[0][1], found[1][1], rtol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0][2], found[1][2]))


@pytest.mark.parametrize('output', ['own', 'shared_detached'])
@pytest.mark.parametrize('residual', [True, False])
def test_sampler_loss_moves_the_head_alone(output, residual):
    model = awake(GPT(toy_config(add_sampler_head=True, sampler_output=output, sampler_residual=residual)))
    batch, = unmasking_batches(toy_plan(sampler_context=1), 1, one)
    Objective(model, ALLOWED)(batch, SAMPLER, keyed(1, 1, 0, 4)).heads['sampler'].backward()
    for name, parameter in model.named_parameters():
        if name.startswith('sampler_head.'):
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_main_loss_moves_the_trunk_alone():
    model = awake(GPT(toy_config(add_sampler_head=True)))
    batch, = unmasking_batches(toy_plan(sampler_context=1), 1, one)
    Objective(model, ALLOWED)(batch, SAMPLER, keyed(1, 1, 0, 4)).main.backward()
    for name, parameter in model.named_parameters():
        if name.startswith('sampler_head.'):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.abs().max() > 0, name


def test_sampler_loss_is_plain_cross_entropy_at_masked_positions_given_shown_neighbours():
    """Against a loop that calls the head position by position."""
    model = awake(GPT(toy_config(add_sampler_head=True)))
    batch, = unmasking_batches(toy_plan(sampler_context=1), 2, one)
    hidden = model.encode(batch.inputs)
    embedding, expected, masked = model.neighbour_embedding(), 0.0, 0
    for slot, position in enumerate(batch.positions.tolist()):
        row, column = divmod(position, 4)
        if batch.mean_weights[slot] == 0:
            continue
        assert batch.inputs[row, column] == V0
        parts = []
        for side, place in ((0, column - 1), (1, column + 1)):
            token = batch.neighbours[slot, side].item()
            inside = 0 <= place < 4
            if not inside:
                assert token == -1
            elif batch.inputs[row, place] != V0:
                assert token == batch.targets[row, place]  # a revealed neighbour is always shown
            else:
                assert token in (-1, batch.targets[row, place].item())  # a masked one as its true token, or not
            parts.append(embedding[token] if token >= 0 else torch.zeros(8))
        logits = model.sampler_head(torch.cat((parts[0], hidden[row, column], parts[1]))[None],
                                    model.lm_head(hidden[row, column])[None], model.lm_head.weight)
        expected += -torch.log_softmax(logits[0, :V0].double(), 0)[batch.targets[row, column]]
        masked += 1
    found = Objective(model, ALLOWED)(batch, SAMPLER, keyed(1, 2, 0, 4)).heads['sampler']
    assert masked == (batch.inputs == V0).sum() and found.item() == pytest.approx((expected / masked).item(), rel=1e-5)


@pytest.mark.parametrize('scope, gradient', [('masked_only', 'trunk'), ('masked_and_ignore', 'head')])
def test_critic_loss_labels_and_gradient(scope, gradient):
    """Binary cross-entropy over the labelled positions of every second row; its gradient goes where it is let."""
    model = awake(GPT(toy_config(add_sampler_head=True, add_critic_head=True, critic_target_scope=scope,
                                 critic_gradient=gradient, critic_row_stride=2)))
    plan = toy_plan(batch_size=8, sampler_context=1, critic_row_stride=2, critic_scope=scope)
    batch, = unmasking_batches(plan, 1, one)
    objective, seen = Objective(model, ALLOWED), []
    inner = objective.critic_loss
    objective.critic_loss = lambda *given: seen.append(given) or inner(*given)
    losses = objective(batch, CRITIC, keyed(1, 1, 0, 8))
    (tokens, labels, weights), = seen
    masked = batch.inputs[::2] == V0
    assert (tokens < V0).all() and torch.equal(tokens[~masked], batch.targets[::2][~masked])
    assert torch.equal(labels.bool(), tokens != batch.targets[::2])
    labelled = masked if scope == 'masked_only' else torch.ones_like(masked)
    assert torch.equal(weights > 0, labelled) and weights.sum().item() == pytest.approx(1)
    chance = torch.sigmoid(model.critic_logits(model.encode(tokens)).double())
    expected = -torch.where(labels.bool(), chance.log(), (1 - chance).log())[labelled].mean()
    assert losses.heads['critic'].item() == pytest.approx(expected.item(), rel=1e-5)
    parts = losses.main + losses.heads['sampler'] + 0.25 * losses.heads['critic']
    assert losses.total.item() == pytest.approx(parts.item(), rel=1e-6)
    losses.heads['critic'].backward()
    assert model.critic_head.weight.grad.abs().max() > 0
    reached = [p.grad is not None for name, p in model.named_parameters() if name.startswith('transformer.h')]
    assert all(reached) if gradient == 'trunk' else not any(reached)


def test_special_ids_have_no_share_of_the_softmax():
    logits = torch.randn(5, V0 + 4)
    raised = logits.clone()
    raised[:, V0:] += 50
    targets, weights = torch.tensor([0, 1, 2, 0, 1]), torch.rand(5)
    assert torch.equal(weighted_cross_entropy(logits, targets, weights, ALLOWED),
                       weighted_cross_entropy(raised, targets, weights, ALLOWED))


BASE = 60  # a vocabulary that outweighs the toy's other tensors


def large_vocabulary(**changes):
    """(double-precision objective over 64 ids, batch of 72 predicted positions, padding among them)."""
    special = {name: BASE + place for place, name in
               enumerate(('mask_token_id', 'wrong_token_id', 'pad_token_id', 'cls_token_id'))}
    config = toy_config(vocab_size=BASE + 4, add_sampler_head=True, **special, **changes)
    tokens = np.random.default_rng(0).integers(0, BASE, 400).astype(np.uint16)
    batch, = unmasking_batches(toy_plan(tokens=tokens, batch_size=32, mask_token_id=BASE, sampler_context=1), 0, one)
    assert len(batch.positions) == 72 and (batch.main_weights == 0).any()
    return Objective(awake(GPT(config)).double(), allowed_ids(BASE + 4, BASE)), batch


def is_logits(tensor):
    """Whether it has a row for every id, and is not the output matrix [V, 8] the other way round."""
    return tensor.ndim == 2 and tensor.size(1) == BASE + 4 and tensor.size(0) != 8


def losses_and_gradients(losses_of, objective, batch):
    """(main loss, sampler loss, every gradient of their sum, numbers of rows of the logits kept for it)."""
    objective.zero_grad()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        main, sampler, _ = losses_of(batch, True)
    (main + sampler).backward()
    return (main, sampler, [parameter.grad.clone() for parameter in objective.parameters()],
            {tensor.size(0) for tensor in kept if is_logits(tensor)})


@pytest.mark.parametrize('output, residual, compiled, rows', [
    ('own', True, False, 10), ('shared_detached', True, False, 10), ('shared_detached', False, False, 10),
    ('shared_detached', True, True, 40)])
def test_chunks_of_positions_give_the_losses_and_gradients_of_the_whole(output, residual, compiled, rows, monkeypatch):
    """72 positions in chunks of at most `rows`, against all at once and against the formula; backward keeps no logits;
    compiled without a break."""
    objective, batch = large_vocabulary(sampler_output=output, sampler_residual=residual)
    whole = losses_and_gradients(objective.trunk_and_sampler_losses, objective, batch)
    places, truth = batch.positions, batch.targets.flatten()[batch.positions]
    cost = -torch.log_softmax(objective.model(batch.inputs).logits[..., :BASE], -1).flatten(0, 1)[places, truth]
    assert whole[0].item() == pytest.approx((cost * batch.main_weights).sum().item(), rel=1e-6)
    monkeypatch.setattr(core.objective, 'MOST_LOGITS', rows * (BASE + 4) + 1)
    chunked = objective.trunk_and_sampler_losses
    if compiled:
        chunked = torch.compile(chunked, fullgraph=True, dynamic=False, backend='aot_eager')
    found = losses_and_gradients(chunked, objective, batch)
    assert torch.allclose(whole[0], found[0], rtol=1e-6) and torch.allclose(whole[1], found[1], rtol=1e-6)
    assert all(torch.allclose(first, second, rtol=1e-5, atol=1e-8) for first, second in zip(whole[2], found[2]))
    assert whole[3] == {72} and not found[3]


class LogitsSeen(TorchDispatchMode):
    """Notes the numbers of rows of all logits that are computed, their gradients included."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor) and is_logits(tensor):
                self.rows.add(tensor.size(0))
        return found


@pytest.mark.parametrize('limit, rows', [(core.objective.MOST_LOGITS, 72), (10 * (BASE + 4) + 1, 9), (1, 1)])
def test_no_logits_beyond_those_of_a_chunk_are_made(limit, rows, monkeypatch):
    """Neither forward nor backward; the chunks are of equal size, and of one position where no more are allowed."""
    monkeypatch.setattr(core.objective, 'MOST_LOGITS', limit)
    objective, batch = large_vocabulary(sampler_output='shared_detached')
    with LogitsSeen() as seen:
        losses_and_gradients(objective.trunk_and_sampler_losses, objective, batch)
    assert seen.rows == {rows}


def test_causal_batches_predict_the_next_token():
    plan = toy_plan(tokens=np.arange(200, dtype=np.uint16))
    batch, = causal_batches(plan, 0, one)
    assert torch.equal(batch.targets, batch.inputs + 1) and batch.main_weights.sum() == pytest.approx(1)


def test_rows_are_the_same_whoever_holds_them():
    """Ranks and micro-steps cut one global batch of 8 rows; windows, masks and neighbours stay the rows' own."""
    whole, = unmasking_batches(toy_plan(batch_size=8, sampler_context=1), 4, one)
    first_rank = unmasking_batches(toy_plan(batch_size=2, micro_steps=2, rank=0, world_size=2, sampler_context=1), 4,
                                   one)
    second_rank = unmasking_batches(toy_plan(batch_size=2, micro_steps=2, rank=1, world_size=2, sampler_context=1), 4,
                                    one)
    parts = [first_rank[0], second_rank[0], first_rank[1], second_rank[1]]
    assert torch.equal(whole.rows, torch.cat([part.rows for part in parts]))
    assert torch.equal(whole.inputs, torch.cat([part.inputs for part in parts]))
    assert torch.equal(whole.targets, torch.cat([part.targets for part in parts]))
