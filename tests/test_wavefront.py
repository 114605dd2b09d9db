"""The wavefront fill: schedule, bootstrap, and what the sampler head is shown."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sample_utils
from core.common.drawing import DrawRule, allowed_ids, allowed_log_probabilities, draw_tokens
from core.common.randomness import RowRandom, keyed
from core.common.waves import follow_on_schedule, group_schedule, wave_schedule
from helpers.toys import awake
from model import GPT, GPTConfig
from core.sampler_head import SamplerWindow, opening
from sample_utils import (FillTask, Filler, _bootstrap_fill_by_confidence, draw_wave, independent_fill,
                          neighbour_tokens, predict_and_sample_tokens, prepare_sampler_inputs, sampler_wavefront_fill)

BASE, MASK, V, T = 10, 10, 14, 24
SHAPE = {'block_size': T, 'vocab_size': V, 'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'mask_token_id': MASK,
         'wrong_token_id': 11, 'pad_token_id': 12, 'cls_token_id': 13, 'add_sampler_head': True, 'sampler_context': 2}


@pytest.fixture(scope='module')
def model():
    """A small rotary model in float64 whose head has something to say."""
    return awake(GPT(GPTConfig(**SHAPE), seed=3).double()).eval().requires_grad_(False)


RULE = DrawRule(allowed_ids(V, BASE))


def some_tokens(rows=5, seed=0, share=0.7):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(BASE, (rows, T), generator=generator)
    tokens[torch.rand(rows, T, generator=generator) < share] = MASK
    tokens[0] = MASK
    return tokens


def slow_wave_schedule(masked):
    """The rule, position by position."""
    revealed = [index for index, flag in enumerate(masked) if not flag]
    waves = []
    for index, flag in enumerate(masked):
        left = min((index - other for other in revealed if other < index), default=10 ** 6)
        right = min((other - index for other in revealed if other > index), default=10 ** 6)
        waves.append(0 if not flag else min(left, right) + (right == left - 1))
    return waves


@settings(max_examples=150, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40).filter(lambda row: not all(row)))
def test_waves_follow_distance_and_never_hold_two_neighbours(row):
    masked = torch.tensor([row])
    waves = wave_schedule(masked)[0]
    assert waves.tolist() == slow_wave_schedule(row)
    for order in ('wave', 'left_to_right'):
        waves = wave_schedule(masked, order)[0]
        assert ((waves > 0) == masked[0]).all()
        assert not ((waves[1:] == waves[:-1]) & masked[0, 1:] & masked[0, :-1]).any()
        for index in waves.nonzero().squeeze(1).tolist():  # a neighbour is filled earlier
            beside = [waves[other] for other in (index - 1, index + 1) if 0 <= other < len(row)]
            assert min(beside) < waves[index]


def test_left_to_right_runs_from_the_left_of_each_gap_and_from_the_right_of_the_first():
    masked = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1]]).bool()
    assert wave_schedule(masked, 'left_to_right').tolist() == [[2, 1, 0, 1, 2, 3, 0, 1]]
    assert wave_schedule(masked, 'wave').tolist() == [[2, 1, 0, 1, 2, 1, 0, 1]]
    assert wave_schedule(torch.tensor([[0, 1, 1, 0]]).bool()).tolist() == [[0, 1, 2, 0]]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_group_stages_start_once_per_run_and_spread(row):
    for order in ('wave', 'left_to_right'):
        stages = group_schedule(torch.tensor([row]), order)[0].tolist()
        runs = sum(flag and (index == 0 or not row[index - 1]) for index, flag in enumerate(row))
        assert [stage > 0 for stage in stages] == row and stages.count(1) == runs
        for index, stage in enumerate(stages):
            if stage > 1:
                assert stage - 1 in stages[max(0, index - 1):index + 2]
            if stage:
                assert stage not in stages[index + 1:index + 2]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.data())
def test_bootstrap_takes_the_asked_count_never_adjacent(length, data):
    count = data.draw(st.integers(1, (length + 1) // 2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    confidence, key = torch.randn(3, length, generator=generator), torch.rand(3, length, generator=generator)
    chosen = _bootstrap_fill_by_confidence(confidence, key, count, 1e-6)
    assert chosen.sum(1).tolist() == [count] * 3
    assert not (chosen[:, 1:] & chosen[:, :-1]).any()
    if count == 1:
        assert chosen.byte().argmax(1).equal(confidence.argmax(1))


def slow_bootstrap(confidence, key, count):
    """The rule, position by position: the most confident one that leaves room for the rest; equal ones by the key."""
    free, chosen = set(range(len(confidence))), []
    for rest in range(count - 1, -1, -1):
        fitting = [place for place in free if room(free - {place - 1, place, place + 1}) >= rest]
        best = max(confidence[place] for place in fitting)
        pick = max((key[place], place) for place in fitting if confidence[place] == best)[1]
        chosen.append(pick)
        free -= {pick - 1, pick, pick + 1}
    return chosen


def room(free):
    """How many positions of a set can be taken, none adjacent: every second one of each run, from its first."""
    taken, last = 0, -2
    for place in sorted(free):
        if place > last + 1:
            taken, last = taken + 1, place
    return taken


@settings(max_examples=200, deadline=None)
@given(st.integers(3, 24), st.data())
def test_several_bootstrap_positions_are_the_most_confident_that_fit_and_ties_go_by_the_key(length, data):
    count = data.draw(st.integers(2, (length + 1) // 2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    confidence = -torch.randint(3, (4, length), generator=generator).double()  # three values, so that many are equal
    key = torch.rand(4, length, generator=generator, dtype=torch.float64)
    chosen = _bootstrap_fill_by_confidence(confidence, key, count, 1e-6)
    for row in range(4):
        expected = slow_bootstrap(confidence[row].tolist(), key[row].tolist(), count)
        assert chosen[row].nonzero().squeeze(1).tolist() == sorted(expected)


def test_rounding_does_not_decide_between_equal_positions():
    key = torch.tensor([[0.1, 0.9, 0.5]])
    noise = torch.tensor([[2e-7, 0.0, 1e-7]])
    assert _bootstrap_fill_by_confidence(-1.0 + noise, key, 1, 1e-4).tolist() == [[False, True, False]]


def test_bootstrap_positions_differ_between_rows_of_a_fully_masked_batch(model):
    fill = predict_and_sample_tokens(model, torch.full((32, T), MASK), RULE, keyed(1, 0, 0, 32), use_sampler_head=True)
    assert fill.statistics.bootstrapped == 32 and len({tuple(row) for row in fill.tokens.tolist()}) == 32
    tokens, everywhere = torch.full((32, T), MASK), torch.ones(32, T).bool()
    task = FillTask(tokens, model.encode(tokens), RULE, keyed(1, 0, 0, 32))
    seeds = sample_utils._fill_stages(model, task, everywhere, everywhere, 'wave')[0] == 1
    assert len(set(seeds.byte().argmax(1).tolist())) > 10  # the row's key decides, not the position


@pytest.mark.parametrize('order', ['wave', 'left_to_right'])
def test_everything_is_filled_and_nothing_else_changes(model, order):
    tokens = some_tokens()
    before = tokens.clone()
    fill = predict_and_sample_tokens(model, tokens, RULE, keyed(1, 0, 0, 5), use_sampler_head=True, order=order)
    assert tokens.equal(before) and (fill.tokens < BASE).all()
    assert fill.tokens[tokens != MASK].equal(tokens[tokens != MASK])
    statistics = fill.statistics
    assert sum(statistics.tokens_per_wave) + statistics.bootstrapped == int((tokens == MASK).sum())
    assert statistics.bootstrapped == 1 and statistics.waves == len(statistics.tokens_per_wave)
    assert (fill.log_probabilities[tokens != MASK] == 0).all() and (fill.log_probabilities[tokens == MASK] < 0).all()


def slow_fill(model, tokens, hidden, uniform, stage):
    """Position by position through the head's plain forward pass; also the log-probabilities."""
    start, tokens, total = tokens, tokens.clone(), torch.zeros(tokens.shape, dtype=torch.float64)
    for wave in range(1, int(stage.max()) + 1):
        before = tokens.clone()  # tokens of one wave do not see each other, also two steps apart
        for row, column in (stage == wave).nonzero().tolist():
            flat = torch.tensor([row * tokens.size(1) + column])
            logits = model.lm_head(hidden[row, column])[None]
            if wave > 1:
                beside = neighbour_tokens(before, flat, SamplerWindow(2, 2), MASK)
                inputs = prepare_sampler_inputs(hidden[row, column][None], beside,
                                                model.neighbour_embedding()).sampler_input
                fresh = (beside >= 0) & (neighbour_tokens(start, flat, SamplerWindow(2, 2), MASK) < 0)
                logits = model.sampler_head(inputs, logits, model.lm_head.weight, fresh.sum(1))
            log_probabilities = allowed_log_probabilities(logits, RULE.allowed)
            token = draw_tokens(log_probabilities, uniform[row, column][None])
            tokens[row, column], total[row, column] = token, log_probabilities[0, token]
    return tokens, total


@pytest.mark.parametrize('grouped', [False, True])
@pytest.mark.parametrize('gated', [False, True])
def test_the_fast_fill_is_the_plain_one(model, gated, grouped):
    """Table sums, gathers and scatters against the head's forward pass; catches neighbours that are always zero, and a
    gate that counts neighbours of its own wave as filled."""
    if gated:
        model = awake(GPT(GPTConfig(**SHAPE, sampler_gate=True), seed=3).double()).eval().requires_grad_(False)
    tokens, generator = some_tokens(seed=1), keyed(4, 2, 0, 5)
    hidden, masked = model.encode(tokens), tokens == MASK
    positions = masked & (torch.arange(T) % 5 < 3) if grouped else masked
    task = FillTask(tokens, hidden, RULE, generator, positions if grouped else None)
    stage = sample_utils._fill_stages(model, task, masked, positions, 'wave')[0]
    fill = sampler_wavefront_fill(model, task)
    expected, log_probabilities = slow_fill(model, tokens, hidden, generator.uniform(8, T), stage)
    assert fill.tokens.equal(expected)
    torch.testing.assert_close(fill.log_probabilities, log_probabilities)
    assert fill.drawn.equal(positions)


def test_a_group_is_drawn_by_the_head_only_beside_fresh_tokens(model):
    tokens = torch.full((1, T), MASK)
    tokens[0, 0] = 3
    positions = torch.zeros(1, T, dtype=torch.bool)
    positions[0, [1, 5, 6, 7, 12]] = True
    fill = sampler_wavefront_fill(model, FillTask(tokens, model.encode(tokens), RULE, keyed(1, 0, 0, 1), positions))
    assert fill.statistics.bootstrapped == 3 and fill.statistics.tokens_per_wave == (2,)
    assert (fill.tokens != MASK).equal(positions | (tokens != MASK))


def test_a_row_does_not_depend_on_its_batch(model):
    tokens = some_tokens(6, seed=2)
    hidden = model.encode(tokens)
    together = sampler_wavefront_fill(model, FillTask(tokens, hidden, RULE, keyed(7, 1, 10, 6))).tokens
    for row in range(6):
        alone = sampler_wavefront_fill(model, FillTask(tokens[row:row + 1], hidden[row:row + 1], RULE,
                                                       keyed(7, 1, 10 + row, 1)))
        assert alone.tokens[0].equal(together[row])
    order = torch.tensor([3, 0, 5])
    some = sampler_wavefront_fill(model, FillTask(tokens[order], hidden[order], RULE, RowRandom(7, 1, order + 10)))
    assert some.tokens.equal(together[order])


def test_temperature_zero_ignores_the_random_numbers(model):
    tokens = some_tokens()[1:]
    rule = DrawRule(RULE.allowed, temperature=0.0)
    first, second = (predict_and_sample_tokens(model, tokens, rule, keyed(seed, 0, 0, 4), use_sampler_head=True)
                     for seed in (1, 2))
    assert first.tokens.equal(second.tokens) and (first.log_probabilities == 0).all()
    assert (first.confidence[tokens == MASK] < 0).all()  # one scale, whatever the temperature


def test_a_changed_neighbour_moves_the_logits_and_a_missing_one_is_zero(model):
    tokens = torch.tensor([[MASK, 4, MASK, MASK, 5, MASK]])
    beside = neighbour_tokens(tokens, torch.tensor([0, 2, 5]), SamplerWindow(2, 2), MASK)
    assert beside.tolist() == [[-1, -1, 4, -1], [-1, 4, -1, 5], [-1, 5, -1, -1]]
    hidden = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    embedding = model.neighbour_embedding()
    inputs = prepare_sampler_inputs(hidden, beside, embedding).sampler_input.view(3, 5, 16)
    assert inputs[:, 2].equal(hidden) and (inputs[0, [0, 1, 4]] == 0).all() and inputs[0, 3].equal(embedding[4])
    changed = beside.clone()
    changed[1, 1] = 7
    logits = [model.sampler_head(prepare_sampler_inputs(hidden, tokens, embedding).sampler_input, model.lm_head(hidden),
                                 model.lm_head.weight) for tokens in (beside, changed)]
    assert logits[0][0].equal(logits[1][0]) and (logits[0][1] - logits[1][1]).abs().max() > 1e-3


def test_neighbours_never_cross_a_row():
    tokens = torch.tensor([[1, MASK], [MASK, 2]])
    assert neighbour_tokens(tokens, torch.tensor([1, 2]), SamplerWindow(1, 1), MASK).tolist() == [[1, -1], [-1, 2]]


@pytest.mark.parametrize('changes', [{}, {'sampler_gate': True}, {'sampler_output': 'shared_detached'},
                                     {'sampler_kind': 'layer_neighbours'},
                                     {'sampler_kind': 'rerun', 'sampler_context': 1}])
def test_log_probabilities_of_draws_have_their_true_gradient(changes):
    """Through head, trunk and embeddings, against finite differences of the same draws: what policy gradients need."""
    trained = awake(GPT(GPTConfig(**{**SHAPE, **changes}), seed=1).double())
    tokens = some_tokens()[1:]
    fill = predict_and_sample_tokens(trained, tokens, RULE, keyed(1, 0, 0, 4), use_sampler_head=True, no_grad=False)
    assert fill.statistics.waves > 1
    fill.log_probabilities.sum().backward()

    def total():
        with torch.no_grad():
            task = FillTask(tokens, trained.encode(tokens), RULE, keyed(1, 0, 0, 4), truth=fill.tokens)
            return sampler_wavefront_fill(trained, task).log_probabilities.sum().item()

    generator = torch.Generator().manual_seed(3)
    for name, parameter in trained.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slope = (parameter.grad * direction).sum().item()
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(total())
                parameter.sub_(direction, alpha=step)
        assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3, abs=1e-4), name
        assert 'transformer' not in name or parameter.grad.abs().sum() > 0, name


def test_the_inputs_of_the_sampler_head_are_named(model):
    hidden, targets = torch.ones(3, 16, dtype=torch.float64), torch.tensor([4, 5, 6])
    beside = torch.tensor([[-1, 1, 2, 3], [0, 1, -1, 3], [0, 1, 2, -1]])
    inputs = prepare_sampler_inputs(hidden, beside, model.neighbour_embedding(), 2, targets)
    assert inputs._fields == ('sampler_input', 'sampler_targets', 'num_positions')
    assert inputs.sampler_targets is targets and inputs.num_positions == 3 and inputs.sampler_input.shape == (3, 5 * 16)
    assert (inputs.sampler_input[0, :16] == 0).all() and (inputs.sampler_input[:, 32:48] == 1).all()


def test_a_prediction_finds_head_rule_and_generator_by_itself(model):
    """As the documents call it: a model and tokens. torch's own seed repeats the draws, and the next call has
    others."""
    tokens = torch.full((32, T), MASK)
    torch.manual_seed(3)
    first, second = predict_and_sample_tokens(model, tokens), predict_and_sample_tokens(model, tokens)
    torch.manual_seed(3)
    again = predict_and_sample_tokens(model, tokens)
    assert first.tokens.equal(again.tokens) and not first.tokens.equal(second.tokens)
    assert first.statistics.waves > 1  # the head
    assert first.tokens.unique().tolist() == [*range(BASE)]  # no special id
    given = {'rule': RULE, 'generator': keyed(1, 0, 0, 32)}
    assert predict_and_sample_tokens(model, tokens, **given).tokens.equal(
        predict_and_sample_tokens(model, tokens, **given, use_sampler_head=True).tokens)
    assert predict_and_sample_tokens(model, tokens, use_sampler_head=False).statistics is None
    headless = awake(GPT(GPTConfig(**SHAPE | {'add_sampler_head': False}), seed=3)).eval()
    assert predict_and_sample_tokens(headless, tokens).statistics is None


def test_drawing_keeps_no_graph_unless_it_is_asked_for(model):
    trained = GPT(model.config, seed=1)
    tokens = some_tokens()[1:]
    fill = predict_and_sample_tokens(trained, tokens, RULE, keyed(1, 0, 0, 4), use_sampler_head=True, no_grad=False)
    silent = predict_and_sample_tokens(trained, tokens, RULE, keyed(1, 0, 0, 4), use_sampler_head=True)
    assert not silent.log_probabilities.requires_grad and silent.tokens.equal(fill.tokens)


def test_a_wave_is_one_graph_and_draws_the_same_tokens(model):
    """Compiled by the tracer alone, which refuses whatever would break the graph; tables made once serve again."""
    tokens = torch.full((4, T), MASK)
    hidden = model.encode(tokens)
    wave = torch.compile(draw_wave, dynamic=True, fullgraph=True, backend='eager')
    for temperature in (1.0, 0.7):
        rule = replace(RULE, temperature=temperature)
        task = FillTask(tokens, hidden, rule, keyed(2, 0, 0, 4))
        plain, traced = sampler_wavefront_fill(model, task), Filler(model, 'wave', wave).fill(task)
        assert torch.equal(plain.tokens, traced.tokens) and plain.statistics.waves > 1
        torch.testing.assert_close(plain.log_probabilities, traced.log_probabilities)


def test_a_filler_fills_as_its_head_says(model):
    """The one way from hidden states to tokens, for each who fills."""
    tokens = some_tokens(seed=3)
    task = FillTask(tokens, model.encode(tokens), RULE, keyed(6, 0, 0, 5), positions=torch.arange(T) % 5 < 3)
    made = {head: Filler(model, head).fill(task) for head in sample_utils.FILLS}
    assert set(made) == set(get_args(sample_utils.Head))
    expected = {'none': independent_fill(model, task), 'wave': sampler_wavefront_fill(model, task),
                'left_to_right': sampler_wavefront_fill(model, task, 'left_to_right')}
    for head, fill in made.items():
        assert fill.tokens.equal(expected[head].tokens) and fill.drawn.equal(expected[head].drawn)
    assert made['none'].statistics is None and made['wave'].statistics != made['left_to_right'].statistics
    waves = Filler(model, 'wave')
    assert waves.fill(task).tokens.equal(waves.fill(task).tokens) and waves.tables is waves.tables


@pytest.mark.parametrize('penalty', [1.0, 1.5])
@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_the_most_logits_held_at_once_change_nothing(model, monkeypatch, temperature, penalty):
    """From all positions of the fill at once down to each wave by itself."""
    rule = replace(RULE, temperature=temperature, repetition_penalty=penalty)
    tokens = torch.full((4, T), MASK)
    hidden = model.encode(tokens)
    task = FillTask(tokens, hidden, rule, keyed(2, 0, 0, 4))
    whole = sampler_wavefront_fill(model, task)
    for most in (1, 5 * V):
        monkeypatch.setattr(sample_utils, '_CHUNK', most)
        parts = sampler_wavefront_fill(model, task)
        assert torch.equal(whole.tokens, parts.tokens)
        torch.testing.assert_close(whole.log_probabilities, parts.log_probabilities)
        torch.testing.assert_close(whole.confidence, parts.confidence)
        assert (whole.confidence == whole.log_probabilities).all() == (temperature == penalty == 1)


# A head trained from left to right ------------------------------------------------------------------------------------

ORDERED = {**SHAPE, 'sampler_order': 'left_to_right', 'sampler_context_left': 3, 'sampler_context_right': 1,
           'sampler_gate': True}


@pytest.fixture(scope='module')
def ordered():
    return awake(GPT(GPTConfig(**ORDERED), seed=3).double()).eval().requires_grad_(False)


@given(st.lists(st.sampled_from('rmg'), min_size=1, max_size=14).map(''.join), st.integers(1, 4))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_group_is_filled_from_left_to_right(row, left):
    """r revealed, m masked and staying so, g of the group. The head draws what no mask precedes, after all it sees."""
    masked, group = (torch.tensor([[letter in letters for letter in row]]) for letters in ('mg', 'g'))
    stages, expected = follow_on_schedule(masked, group, left)[0].tolist(), []
    for place, letter in enumerate(row):
        seen = [stage for stage in expected[max(0, place - left):place] if stage > 1]
        by_head = place == 0 or row[place - 1] != 'm'
        expected.append(0 if letter != 'g' else max(seen, default=1) + 1 if by_head else 1)
    assert stages == expected


@pytest.mark.parametrize('grouped', [False, True])
@pytest.mark.parametrize('with_context', [False, True])
def test_the_fill_from_left_to_right_is_the_plain_one(ordered, grouped, with_context):
    """Token by token through the head's forward pass, which is told how many of the neighbours are new."""
    tokens, generator, window = some_tokens(seed=1), keyed(4, 2, 0, 5), ordered.config.sampler_window
    hidden, masked = ordered.encode(tokens), tokens == MASK
    positions = masked & (torch.arange(T) % 5 < 3) if grouped else masked
    context = torch.tensor([[1, 2, 3]]).expand(5, -1) if with_context else None
    fill = sampler_wavefront_fill(ordered, FillTask(tokens, hidden, RULE, generator, positions, left_context=context))
    uniform, stages = generator.uniform(8, T), follow_on_schedule(masked, positions, 3)
    for row in range(5):
        made = tokens[row].clone()
        for column in positions[row].nonzero().squeeze(1).tolist():
            logits = ordered.lm_head(hidden[row, column])[None]
            if stages[row, column] > 1:
                before = [1, 2, 3] if with_context else [MASK] * 3
                wide = torch.tensor([*before, *made.tolist(), MASK])[None]
                shown = neighbour_tokens(wide, torch.tensor([column + 3]), window, MASK)
                was = neighbour_tokens(torch.tensor([*before, *tokens[row].tolist(), MASK])[None],
                                       torch.tensor([column + 3]), window, MASK)
                inputs = prepare_sampler_inputs(hidden[row, column][None], shown, ordered.neighbour_embedding(),
                                                3).sampler_input
                new = ((shown >= 0) & (was < 0)).sum(1)
                logits = ordered.sampler_head(inputs, logits, ordered.lm_head.weight, new)
            log_probabilities = allowed_log_probabilities(logits, RULE.allowed)
            made[column] = draw_tokens(log_probabilities, uniform[row, column][None])
            assert fill.log_probabilities[row, column].item() == pytest.approx(
                log_probabilities[0, made[column]].item(), abs=1e-9)
        assert torch.equal(made, fill.tokens[row])


def test_a_gate_begins_with_all_of_the_trunk_and_with_less_after_a_draw():
    head = GPT(GPTConfig(**ORDERED), seed=3).sampler_head
    logits, new = torch.randn(3, V), torch.tensor([0, 1, 4])
    found = head(torch.randn(3, 5 * 16), logits, torch.zeros(V, 16), new)
    torch.testing.assert_close(found, logits * torch.tensor([1.0, 0.3, 0.3])[:, None])


def test_a_gate_never_opens_further_than_twice():
    """Outputs of 30 and more came up in training. The factor has no jump at 0, nor has its slope."""
    gate = torch.tensor([-40.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 40.0, 1000.0], requires_grad=True)
    factor = opening(gate)
    torch.testing.assert_close(factor[:4], gate[:4].exp())
    torch.testing.assert_close(factor[4:], 1 + gate[4:].tanh())
    slope, = torch.autograd.grad(factor.sum(), gate)
    assert slope.isfinite().all() and slope[2:5].tolist() == pytest.approx([1, 1, 1], abs=1e-3)
    head = GPT(GPTConfig(**ORDERED), seed=3).sampler_head
    head.gate.bias.data.fill_(1000.0)
    logits, new = torch.randn(3, V), torch.tensor([0, 1, 4])
    found = head(torch.randn(3, 5 * 16), logits, torch.zeros(V, 16), new)
    torch.testing.assert_close(found, 2 * logits * torch.tensor([1.0, 0.3, 0.3])[:, None])
