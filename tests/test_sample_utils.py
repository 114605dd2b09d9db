"""Exact draws, remasking, critic artifacts and self-confidence."""

import math

import pytest
import torch

from core.common.drawing import DrawRule, allowed_ids, allowed_log_probabilities, draw, draw_tokens, penalise_repetition
from core.common.errors import UserError
from core.common.randomness import keyed
from core.sampling.self_confidence import self_confidence
from model import GPT, GPTConfig
from sample_utils import (FillTask, apply_remasking_step, build_critic_artifacts_from_logits, cosine_remasking_schedule,
                          independent_fill, linear_remasking_schedule, nucleus_sample, predict_and_sample_tokens)

V, BASE, MASK = 9, 5, 5
ALLOWED = allowed_ids(V, BASE)
NUMBERS = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000  # every quantile


def logits_of(probabilities):
    """Special ids get by far the highest logits: they must not matter."""
    return torch.cat((torch.tensor(probabilities).log(), torch.full((V - len(probabilities),), 30.0)))


def frequencies(tokens):
    return torch.bincount(tokens, minlength=V).double() / len(tokens)


def chi_square(tokens, expected):
    counts = torch.bincount(tokens, minlength=V).double()
    kept = expected > 0
    assert (counts[~kept] == 0).all()
    return float(((counts - expected * len(tokens)) ** 2)[kept].div(expected[kept] * len(tokens)).sum())


@pytest.mark.parametrize('temperature', [1.0, 0.5, 2.0])
def test_draws_follow_the_tempered_distribution(temperature):
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.08, 0.02, 0, 0, 0, 0], dtype=torch.float64)
    expected = probabilities ** (1 / temperature)
    expected = expected / expected.sum()
    logits = logits_of([0.4, 0.3, 0.2, 0.08, 0.02]).expand(20_000, V)
    uniform = keyed(11, 0, 0, 20_000).uniform(8, 1).squeeze(1)
    drawn = draw(logits, DrawRule(ALLOWED, temperature), uniform)
    assert chi_square(drawn.tokens, expected) < 18.5  # 4 degrees of freedom: false alarm 1 in 1,000
    torch.testing.assert_close(drawn.log_probabilities.exp(), expected[drawn.tokens])
    torch.testing.assert_close(drawn.confidence.exp(), probabilities[drawn.tokens], atol=1e-6, rtol=1e-5)
    lowered = draw(logits, DrawRule(ALLOWED, temperature * 0.9), uniform)  # a planted fault is seen
    assert chi_square(lowered.tokens, expected) > 18.5


def test_the_inverse_distribution_function_is_exact():
    log_probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64).log()
    uniform = torch.tensor([2.0 ** -33, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0 ** -33], dtype=torch.float64)
    assert draw_tokens(log_probabilities.expand(6, 6), uniform).tolist() == [1, 1, 3, 3, 4, 4]


def test_special_ids_and_impossible_ids_never_come_out():
    logits = torch.full((1000, V), 50.0)
    logits[:, 1:BASE] = -1e30
    for rule in (DrawRule(ALLOWED), DrawRule(ALLOWED, 0.0), DrawRule(ALLOWED, 5.0), DrawRule(ALLOWED, 1.0, 3),
                 DrawRule(ALLOWED, 1.0, None, 0.9)):
        assert (draw(logits, rule, NUMBERS[::200]).tokens == 0).all()


def test_top_p_keeps_the_smallest_set_and_top_k_the_most_probable():
    logits = logits_of([0.4, 0.3, 0.2, 0.08, 0.02])
    kept = allowed_log_probabilities(logits, ALLOWED, top_p=0.65).exp()
    torch.testing.assert_close(kept[:2].float(), torch.tensor([4 / 7, 3 / 7]))
    assert (kept[2:] == 0).all()
    kept = allowed_log_probabilities(logits, ALLOWED, top_k=3).exp()
    torch.testing.assert_close(kept[:3].float(), torch.tensor([4 / 9, 3 / 9, 2 / 9]))
    assert (kept[3:] == 0).all()
    assert (allowed_log_probabilities(logits, ALLOWED, top_p=1e-9).exp()[0] - 1).abs() < 1e-12
    tokens = nucleus_sample(logits.expand(len(NUMBERS), V), NUMBERS, ALLOWED, 0.65)
    torch.testing.assert_close(frequencies(tokens)[:2], torch.tensor([4 / 7, 3 / 7], dtype=torch.float64), atol=1e-4,
                               rtol=0)


def test_temperature_zero_is_greedy_and_nan_is_seen():
    logits = logits_of([0.2, 0.4, 0.3, 0.05, 0.05])
    drawn = draw(logits.expand(5, V), DrawRule(ALLOWED, 0.0), NUMBERS[:5])
    assert drawn.tokens.tolist() == [1] * 5 and drawn.log_probabilities.tolist() == [0.0] * 5
    for temperature in (0.0, 1.0):
        broken = draw(torch.full((1, V), math.nan), DrawRule(ALLOWED, temperature), NUMBERS[:1])
        assert broken.log_probabilities.isnan().all()


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits, seen = torch.tensor([[2.0, -2.0, 2.0, -2.0]]), torch.tensor([[True, True, False, False]])
    assert penalise_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_schedules_begin_and_end_where_they_say():
    assert linear_remasking_schedule(3, 0.9, 0.1) == pytest.approx([0.9, 0.5, 0.1])
    assert cosine_remasking_schedule(3, 0.9, 0.1) == pytest.approx([0.9, 0.1 + 0.8 * math.sqrt(0.5), 0.1])
    assert linear_remasking_schedule(1, 0.9, 0.1) == cosine_remasking_schedule(1, 0.9, 0.1) == [0.9]
    assert linear_remasking_schedule(0, 0.9, 0.1) == cosine_remasking_schedule(0, 0.9, 0.1) == []


def test_ratio_mode_takes_the_share_of_unprotected_positions():
    protected = torch.zeros(2, 20, dtype=torch.bool)
    protected[1, :10] = True
    wrongness = torch.arange(20).flip(0).expand(2, 20) / 20
    remasked = apply_remasking_step(protected, wrongness, 0.3, keyed(1, 0, 0, 2))
    assert remasked[0].nonzero().squeeze(1).tolist() == [0, 1, 2, 3, 4, 5]
    assert remasked[1].nonzero().squeeze(1).tolist() == [10, 11, 12]  # protected ones are neither counted nor touched


def test_randomness_strength_is_a_share_of_the_remasked_positions():
    rows, width = 500, 40
    protected = torch.zeros(rows, width, dtype=torch.bool)
    wrongness = (torch.arange(width) < 20).float().expand(rows, width)
    remasked = apply_remasking_step(protected, wrongness, 0.5, keyed(2, 0, 0, rows), randomness_strength=0.4)
    assert (remasked.sum(1) == 20).all()
    # 12 by guidance from the first 20; 8 uniformly from the other 28, of which 8 lie in the first 20
    assert abs(float(remasked[:, :20].sum(1).double().mean()) - (12 + 8 * 8 / 28)) < 0.2
    uniform = apply_remasking_step(protected, wrongness, 0.5, keyed(2, 0, 0, rows), randomness_strength=1.0)
    assert abs(float(uniform[:, :20].sum(1).double().mean()) - 10) < 0.3


def test_equal_wrongness_goes_by_the_rows_key_not_by_position():
    protected = torch.zeros(400, 10, dtype=torch.bool)
    remasked = apply_remasking_step(protected, torch.ones(400, 10), 0.5, keyed(3, 0, 0, 400))
    assert (remasked.double().mean(0) - 0.5).abs().max() < 0.1


def test_threshold_mode_takes_all_that_exceed_and_needs_guidance():
    protected = torch.tensor([[False, False, True, False]])
    wrongness = torch.tensor([[0.6, 0.5, 0.9, 0.51]])
    remasked = apply_remasking_step(protected, wrongness, 0.5, keyed(1, 0, 0, 1), mode='threshold')
    assert remasked.tolist() == [[True, False, False, True]]
    with pytest.raises(UserError, match='threshold'):
        apply_remasking_step(protected, None, 0.5, keyed(1, 0, 0, 1), mode='threshold')


@pytest.fixture(scope='module')
def model():
    config = GPTConfig(block_size=12, vocab_size=V, n_layer=1, n_head=2, n_embd=8, mask_token_id=MASK, wrong_token_id=6,
                       pad_token_id=7, cls_token_id=8, add_sampler_head=True, add_critic_head=True)
    return GPT(config, seed=1).eval()


@pytest.mark.parametrize('head', [False, True])
@pytest.mark.parametrize('scope', ['masked_only', 'masked_and_ignore'])
def test_critic_labels(model, head, scope):
    model.config.critic_target_scope = scope
    targets = torch.randint(BASE, (3, 12), generator=torch.Generator().manual_seed(1))
    tokens = targets.clone()
    tokens[:, ::2] = MASK
    targets[:, 10] = -100            # truth unknown, masked
    targets[:, 11] = tokens[:, 11] = 7  # padding
    made = build_critic_artifacts_from_logits(model, tokens, targets, model.encode(tokens), DrawRule(ALLOWED),
                                              keyed(1, 0, 0, 3), use_sampler_head=head)
    known = torch.arange(12) < 10
    assert made.labelled.equal((known & ((torch.arange(12) % 2 == 0) | (scope == 'masked_and_ignore'))).expand(3, 12))
    assert (made.tokens[:, :11] < BASE).all() and made.tokens[:, 1::2].equal(tokens[:, 1::2])
    assert made.labels.bool().equal((made.tokens != targets) & known)
    assert 0 < made.labels.sum() < 15 and (made.labels[:, 1::2] == 0).all()


@pytest.mark.parametrize('head', [False, True])
def test_a_critic_may_learn_from_text_that_it_had_revised(model, monkeypatch, head):
    """A critic that finds the token 0 wrong, and nothing else, has less of it left; what was visible stays."""
    rows, asked = 40, []
    targets = torch.randint(BASE, (rows, 12), generator=torch.Generator().manual_seed(1))
    tokens = targets.masked_fill(torch.arange(12) % 2 == 0, MASK)

    def made(fill, first_row=0, count=rows):
        monkeypatch.setattr(model.config, 'critic_fill', fill)
        part = slice(first_row, first_row + count)
        return build_critic_artifacts_from_logits(model, tokens[part], targets[part], model.encode(tokens[part]),
                                                  DrawRule(ALLOWED), keyed(1, 0, first_row, count), use_sampler_head=head)

    def scores(model, text):
        asked.append(1)
        return (text == 0).double()

    monkeypatch.setattr(model.config, 'critic_target_scope', 'masked_only')
    monkeypatch.setattr(type(model), 'critic_scores', scores)
    once = made('one_shot')
    assert not asked
    revised = made('revised')
    assert len(asked) == 3 and (revised.tokens < BASE).all() and revised.tokens[:, 1::2].equal(tokens[:, 1::2])
    assert (revised.tokens == 0)[:, ::2].sum() < 0.7 * (once.tokens == 0)[:, ::2].sum()
    assert revised.labelled.equal(once.labelled) and revised.labels.bool().equal(
        (revised.tokens != targets) & revised.labelled)
    assert made('revised', 7, 3).tokens.equal(revised.tokens[7:10])  # a row does not depend on its batch


def test_independent_draws_do_not_depend_on_the_batch_and_keep_the_graph(model):
    tokens = torch.full((4, 12), MASK)
    hidden = model.encode(tokens)
    fill = independent_fill(model, FillTask(tokens, hidden, DrawRule(ALLOWED), keyed(5, 0, 0, 4)))
    for row in range(4):
        alone = independent_fill(model, FillTask(tokens[row:row + 1], hidden[row:row + 1], DrawRule(ALLOWED),
                                                 keyed(5, 0, row, 1)))
        assert alone.tokens[0].equal(fill.tokens[row])
    kept = predict_and_sample_tokens(model, tokens, DrawRule(ALLOWED), keyed(5, 0, 0, 4), use_sampler_head=False,
                                     no_grad=False)
    assert kept.tokens.equal(fill.tokens)
    gradient, = torch.autograd.grad(kept.log_probabilities.sum(), model.lm_head.weight)
    assert gradient.abs().sum() > 0


def test_self_confidence_never_reads_a_visible_token(model):
    """With one group everything is masked: the value is the sum of the model's fully masked log-probabilities."""
    tokens = torch.randint(BASE, (2, 12), generator=torch.Generator().manual_seed(2))
    scored = torch.ones(2, 12, dtype=torch.bool)
    found = self_confidence(model, tokens, scored, ALLOWED, keyed(1, 0, 0, 2), groups=1)
    logits = model(torch.full((2, 12), MASK)).logits[..., :BASE].double()
    expected = logits.log_softmax(-1).gather(2, tokens[..., None]).sum((1, 2))
    torch.testing.assert_close(found.total, expected)
    assert found.count.tolist() == [12, 12] and found.network_calls == 1
    in_groups = self_confidence(model, tokens, scored & (torch.arange(12) > 3), ALLOWED, keyed(1, 0, 0, 2), groups=3)
    assert in_groups.count.tolist() == [8, 8] and in_groups.network_calls == 3
