"""Exact likelihood: a distribution for every policy and head, equal to enumerated laws, to a plain second
implementation, and to what the sampler itself says of the texts it draws."""

import math
from itertools import product

from helpers import policy_laws as laws
import pytest
import torch
from core.common.drawing import DrawRule, allowed_ids
from core.common.randomness import Purpose, RowRandom, keyed
from core.common.timing import TimingAccumulator
from core.evaluation.likelihood import (HEADS, SCORING, asked_calls, call_problems, head_problems, policy_problems,
                                        window_likelihoods)
from core.sampling.generation import GenerationSettings, generate
from core.sampling.network import Network
from core.sampling.path_likelihood import Scorer, log_likelihood
from core.sampling.policies import POLICIES
from core.sampling.prompt import Layout
from core.validation import fixed_windows
from helpers.policy_laws import ORACLE, T, V, V0, law_of, tokens_of
from helpers.toys import awake, toy_config
from model import GPT

ALLOWED = allowed_ids(V, V0)


def every_text(length):
    return torch.tensor(list(product(range(V0), repeat=length)))


def score(model, texts, policy, calls, head, generator=None, network=None):
    network = network or Network(model, TimingAccumulator())
    generator = generator or RowRandom(3, 0, torch.full((len(texts),), 11))  # one random order for all texts
    return log_likelihood(network, texts, Scorer(POLICIES[policy].make(iterations=calls), head, ALLOWED), generator)


def make_model(**changes):
    values = {'block_size': 5, 'add_sampler_head': True, **changes}
    return awake(GPT(toy_config(**values))).double().eval().requires_grad_(False)


MODELS = {'the head of the sources': make_model(), 'absolute positions, a wide head': make_model(
    position_encoding='absolute', sampler_context=2, sampler_n_embd=12), 'blind to the trunk': make_model(
        sampler_context=3, sampler_zero_hidden=True), 'shared matrix': make_model(sampler_output='shared_detached')}


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('policy', SCORING)
def test_the_probabilities_of_all_texts_sum_to_one(name, policy):
    texts = every_text(5)
    for calls, head in product((1, 2, 3, 5), HEADS):
        total = score(MODELS[name], texts, policy, calls, head).exp().sum().item()
        assert total == pytest.approx(1, abs=1e-9), (calls, head)


DETERMINISTIC = {'left_to_right': laws.left_to_right, 'strided': laws.strided, 'margin': laws.margin,
                 'entropy': laws.entropy, 'top_probability': laws.top_probability}


def filled_by_waves(step_of):
    """The law's step with its positions filled by the head: the positions are those that the step fills."""
    def of(step, mine):
        def step_law(state):
            one = next(iter(step_of(step, mine)(state)))[0]
            positions = [place for place in range(T) if state[place][0] != one[place][0]]
            return laws.waves(state, positions)
        return step_law
    return of


@pytest.mark.parametrize('policy', DETERMINISTIC)
@pytest.mark.parametrize('calls', [2, 3, 4])
def test_under_an_exact_oracle_it_is_the_enumerated_law(policy, calls):
    texts, step_of = every_text(T), DETERMINISTIC[policy](calls)
    for head, law in (('none', step_of), ('wave', filled_by_waves(step_of))):
        found = score(ORACLE, texts, policy, calls, head).exp()
        torch.testing.assert_close(found, tokens_of(law_of(law, calls)), rtol=1e-9, atol=1e-12)


def test_one_token_per_call_under_an_exact_oracle_is_the_joint():
    for policy in SCORING:
        torch.testing.assert_close(score(ORACLE, every_text(T), policy, T, 'none').exp(), ORACLE.joint)


# A second implementation, one position after another ------------------------------------------------------------------

def chosen(policy, tokens, logits, step, calls, keys):
    """The positions of a step, by the words of the policy."""
    free = [place for place, token in enumerate(tokens) if token == V0]
    count = -(-len(free) // (calls - step))
    if policy == 'random':
        return sorted(sorted(free, key=lambda place: -keys[place])[:count])
    if policy == 'left_to_right':
        return free[:count]
    sure = [max(torch.softmax(row, -1).tolist()) for row in logits]
    return sorted(sorted(free, key=lambda place: -sure[place])[:count])


def stages(tokens, positions, logits, order):
    """{position: (stage, by the head?)} of one fill, by the words of docs/sampler.md."""
    free = [place for place, token in enumerate(tokens) if token == V0]
    shown = [place for place, token in enumerate(tokens) if token != V0]
    found = {}
    if positions == free:
        if not shown:
            seed = max(free, key=lambda place: max(torch.log_softmax(logits[place], -1).tolist()))
            found[seed], shown = (0, False), [seed]
        for place in positions:
            left = min((place - other for other in shown if other < place), default=None)
            right = min((other - place for other in shown if other > place), default=None)
            if place in found:
                continue
            if order == 'left_to_right':
                found[place] = (left if left is not None else right, True)
            else:
                far = 10 ** 6
                left, right = far if left is None else left, far if right is None else right
                found[place] = (min(left, right + (right == left - 1)), True)
        return found
    start = 0
    for index in range(1, len(positions) + 1):
        if index == len(positions) or positions[index] != positions[index - 1] + 1:
            run, start = positions[start:index], index
            first = run[0] if order == 'left_to_right' else (run[0] + run[-1]) // 2
            found |= {place: (abs(place - first), place != first) for place in run}
    return found


def plain_log_likelihood(model, text, policy, calls, head, generator):
    tokens, total, context = [V0] * len(text), 0.0, model.config.sampler_context
    table = model.neighbour_embedding()
    for step in range(calls):
        output = model(torch.tensor([tokens]))
        logits, hidden = output.logits[0, :, :V0], output.hidden_states[0]
        keys = generator.at(step).uniform(Purpose.ORDER, len(text), 1)[0].tolist()
        positions = chosen(policy, tokens, logits, step, calls, keys)
        order = {place: (0, False) for place in positions} if head == 'none' else \
            stages(tokens, positions, logits, head)
        for stage in sorted({stage for stage, _ in order.values()}):
            before = list(tokens)
            for place in (place for place, (own, _) in order.items() if own == stage):
                mine = logits[place]
                if order[place][1]:
                    beside = [torch.zeros_like(hidden[0]) if not 0 <= place + offset < len(text)
                              or before[place + offset] == V0 else table[before[place + offset]]
                              for offset in (*range(-context, 0), *range(1, context + 1))]
                    slots = torch.cat((*beside[:context], hidden[place], *beside[context:]))
                    mine = model.sampler_head(slots, output.logits[0, place], model.lm_head.weight)[:V0]
                total += torch.log_softmax(mine, -1)[text[place]].item()
                tokens[place] = int(text[place])
    assert tokens == text.tolist()
    return total


@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('policy', ['random', 'left_to_right', 'top_probability'])
def test_it_equals_a_plain_second_implementation(policy, head):
    model = make_model(block_size=9, position_encoding='absolute', sampler_context=2)
    texts = torch.randint(V0, (4, 9), generator=torch.Generator().manual_seed(4))
    for calls in (1, 2, 4):
        found = score(model, texts, policy, calls, head, keyed(5, 0, 20, 4))
        expected = [plain_log_likelihood(model, text, policy, calls, head, keyed(5, 0, 20 + row, 1))
                    for row, text in enumerate(texts)]
        assert found.tolist() == pytest.approx(expected, rel=1e-9), calls


# The sampler's own path, counts and batches --------------------------------------------------------------------------

@pytest.mark.parametrize('policy', SCORING)
@pytest.mark.parametrize('head', ['none', 'wave'])
def test_it_is_what_the_sampler_says_of_the_texts_that_it_draws(policy, head):
    model, rows = make_model(block_size=8), 20
    start = torch.full((rows, 8), V0)
    settings = GenerationSettings('diffusion', DrawRule(ALLOWED), POLICIES[policy].make(iterations=3),
                                  head=head)
    generator = keyed(2, 0, 40, rows)
    made = generate(Network(model, TimingAccumulator()), Layout(start, start < 0), settings, generator)
    assert len(made.tokens.unique(dim=0)) > 8
    torch.testing.assert_close(score(model, made.tokens, policy, 3, head, generator), made.confidence.sum(1))


@pytest.mark.parametrize('policy', SCORING)
def test_the_counted_trunk_calls_are_those_that_hooks_see(policy):
    model, seen, rows = make_model(block_size=8), [], []
    model.transformer['h'][0].register_forward_hook(lambda *_: seen.append(1))
    model.lm_head.register_forward_hook(lambda module, given, logits: rows.append(logits[..., 0].numel()))
    network, windows = Network(model, TimingAccumulator()), torch.zeros(10, 8, dtype=torch.int64)
    found = window_likelihoods(network, windows, Scorer(POLICIES[policy].make(iterations=3), 'none', ALLOWED), seed=1,
                               batch_size=4)
    assert found.trunk_calls == 3 and len(seen) == network.trunk_calls == network.network_calls == 9
    if policy in ('random', 'left_to_right', 'strided'):  # these ask for no probabilities, so each position costs once
        assert sum(rows) == 80


@pytest.mark.parametrize('head', HEADS)
def test_the_batch_size_changes_nothing_and_the_seed_changes_random_orders(small_corpus, head):
    model = awake(GPT(toy_config(block_size=8, vocab_size=small_corpus.vocabulary.size, add_sampler_head=True,
                                 **{f'{name}_token_id': getattr(small_corpus.vocabulary, f'{name}_token_id')
                                    for name in ('mask', 'wrong', 'pad', 'cls')}))).double().eval()
    windows = fixed_windows(small_corpus.tokens('val'), 10, 8)
    allowed = allowed_ids(small_corpus.vocabulary.size, small_corpus.vocabulary.base_size)
    found = {(seed, size): window_likelihoods(
        Network(model, TimingAccumulator()), windows, Scorer(POLICIES['random'].make(iterations=3), head, allowed),
        seed=seed, batch_size=size).nats for seed, size in ((1, 10), (1, 3), (2, 10))}
    torch.testing.assert_close(found[1, 10], found[1, 3])
    whole = log_likelihood(Network(model, TimingAccumulator()), windows,
                           Scorer(POLICIES['random'].make(iterations=3), head, allowed), keyed(1, 0, 0, 10))
    torch.testing.assert_close(found[1, 10], -whole / 8)
    assert (found[1, 10] - found[2, 10]).abs().min() > 1e-6
    assert found[1, 10].shape == (10,) and (found[1, 10] > 0).all()


def test_every_deterministic_policy_keeps_its_word():
    """The others mask again, choose by drawn tokens, or decide the number of calls themselves."""
    assert set(SCORING) == {'random', 'left_to_right', 'strided', 'top_probability', 'margin', 'entropy'}
    for name in SCORING:
        policy = POLICIES[name].make(iterations=3)
        assert policy.remask is None and not policy.asks and POLICIES[name].options == ('iterations',)


def test_bad_input_is_answered_in_words():
    assert policy_problems(['random', 'margin']) == []
    assert "did you mean 'random'?" in policy_problems(['randon'])[0]
    for name in ('llada', 'remask', 'p2_self', 'mdlm', 'fast_dllm_threshold'):
        assert 'no exact likelihood' in policy_problems([name])[0] and name in policy_problems([name])[0]
    assert 'empty' in policy_problems([])[0] and 'empty' in call_problems([], 8)[0]
    assert call_problems([1.0, 8.0], 8) == []
    for number in (0.0, 9.0, 2.5):
        assert f'holds {number:g}' in call_problems([number], 8)[0]
    assert 'no trained sampler head' in head_problems(['none', 'wave'], False)[0]
    assert head_problems(['none'], False) == [] and 'must be of' in head_problems(['head'], True)[0]
    assert asked_calls(None, 8) == [1, 2, 4, 8] and asked_calls(None, 6) == [1, 2, 4, 6]
    assert asked_calls([4.0, 4.0, 1.0], 8) == [4.0, 1.0]


def test_the_head_helps_where_neighbours_decide():
    """A trunk that knows nothing and a head that copies its left neighbour: log p of a constant text from one call."""
    model = make_model(position_encoding='absolute', sampler_context=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        table = torch.eye(8, dtype=torch.float64)[:7] * math.sqrt(8)
        model.transformer['wte'].weight.copy_(table)
        model.sampler_head.input.weight[:, :8] = 4 * torch.eye(8)
        model.sampler_head.hidden.weight.copy_(4 * torch.eye(8))
        for norm in (model.sampler_head.norm_1, model.sampler_head.norm_2):
            norm.weight.fill_(1)
        model.sampler_head.output_head.weight.copy_(6 * torch.eye(8)[:7])
    texts = torch.tensor([[1] * 5, [1, 2, 1, 2, 0]])
    alone, helped = score(model, texts, 'left_to_right', 1, 'none'), score(model, texts, 'left_to_right', 1, 'wave')
    assert alone.tolist() == pytest.approx([-5 * math.log(3)] * 2)
    assert helped[0] > -math.log(3) * 2.2 - 1 and helped[1] < alone[1]


# Block models ---------------------------------------------------------------------------------------------------------

ORDERED = {'sampler_order': 'left_to_right', 'sampler_context_left': 2, 'sampler_context_right': 1,
           'sampler_gate': True}


def block_score(model, texts, policy, calls, head, b):
    generator = RowRandom(3, 0, torch.full((len(texts),), 11))  # one random order for all texts
    scorer = Scorer(POLICIES[policy].make(iterations=calls), head, ALLOWED, b)
    return log_likelihood(Network(model, TimingAccumulator()), texts, scorer, generator)


@pytest.mark.parametrize('policy', SCORING)
@pytest.mark.parametrize('b, changes', [(2, ORDERED), (3, ORDERED), (3, {}), (1, ORDERED)])
def test_the_probabilities_of_all_texts_of_a_block_model_sum_to_one(policy, b, changes):
    model = make_model(block_size=6, attention_type='block', block_length=(b,), **changes)
    texts, head = every_text(6), model.config.sampler_order
    for calls, way in product(range(1, b + 1), ('none', head)):
        assert block_score(model, texts, policy, calls, way, b).exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize('calls', [1, 2])
def test_texts_of_a_block_model_come_as_often_as_their_likelihood_says(calls):
    """Drawn by the generation loop, counted, against the enumerated law."""
    model, rows = make_model(block_size=4, attention_type='block', block_length=(2,), **ORDERED), 40_000
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4)  # so that no text is rare
    settings = GenerationSettings('diffusion', DrawRule(ALLOWED), POLICIES['strided'].make(iterations=calls),
                                  head='left_to_right', block_length=2)
    start = torch.full((rows, 4), V0)
    made = generate(Network(model, TimingAccumulator()), Layout(start, torch.zeros_like(start).bool()), settings,
                    keyed(9, 0, 0, rows)).tokens
    law = block_score(model, every_text(4), 'strided', calls, 'left_to_right', 2).exp()
    counts = (made * torch.tensor([27, 9, 3, 1])).sum(1).bincount(minlength=81)
    assert (rows * law).min() > 5
    statistic = ((counts - rows * law) ** 2 / (rows * law)).sum()  # chi-squared with 80 degrees of freedom
    assert 45 < statistic < 125


def test_one_block_is_the_whole_window():
    model = make_model(block_size=4, attention_type='block', block_length=(2, 4))
    texts = every_text(4)
    torch.testing.assert_close(block_score(model, texts, 'margin', 2, 'wave', None),
                               score(make_model(block_size=4), texts, 'margin', 2, 'wave'))
