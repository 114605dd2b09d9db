"""Sampler heads that read whole rows: their law, their order, what they know, and how they are trained."""

import math
from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.batches import unmasking_batches
from core.common.drawing import DrawRule, allowed_ids
from core.common.randomness import Purpose, RowRandom, keyed
from core.common.timing import TimingAccumulator
from core.common.waves import fill_turns, sees_in_turn
from core.noise import BlockNoise, SeenNeighbours, drawn_groups, seen_neighbours
from core.objective import Objective
from core.sampling.generation import GenerationSettings, generate
from core.sampling.network import Network
from core.sampling.path_likelihood import Scorer, log_likelihood
from core.sampling.policies import POLICIES
from core.sampling.prompt import Layout
from core.stages import Stage
from core.validation import one_call_terms
from helpers.toys import V0, awake, toy_config, toy_plan
from model import GPT, GPTConfig
from sample_utils import FillTask, Filler, independent_fill, logits_in_turn

T, MASK, V = 5, V0, V0 + 4
ALLOWED = allowed_ids(V, V0)
RULE = DrawRule(ALLOWED)
KINDS = ('layer', 'layer_neighbours', 'rerun')
SAMPLER = Stage({'sampler': 1.0})


def row_model(kind='layer', scale=1.0, **changes):
    values = {'block_size': T, 'add_sampler_head': True, 'sampler_kind': kind, 'sampler_order': 'left_to_right',
              **changes}
    model = awake(GPT(toy_config(**values))).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(scale)
    return model


def texts_of(length):
    return torch.tensor(list(product(range(V0), repeat=length)))


def score(model, texts, policy, calls, block_length=None):
    network = Network(model, TimingAccumulator())
    scorer = Scorer(POLICIES[policy].make(iterations=calls), model.config.sampler_order, ALLOWED, block_length)
    return log_likelihood(network, texts, scorer, RowRandom(3, 0, torch.full((len(texts),), 11)))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('changes', [{}, {'sampler_order': 'wave'}, {'sampler_zero_hidden': True, 'sampler_n_embd': 6},
                                     {'sampler_gate': True, 'sampler_attention_n_embd': 4},
                                     {'sampler_output': 'shared_detached', 'position_encoding': 'absolute'}])
def test_the_probabilities_of_all_texts_sum_to_one(kind, changes):
    model = row_model(kind, **changes)
    for policy, calls in product(('random', 'strided'), (1, 2)):  # two or more tokens a group
        assert score(model, texts_of(T), policy, calls).exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize('kind', KINDS)
def test_the_probabilities_of_all_texts_of_a_block_model_sum_to_one(kind):
    model = row_model(kind, block_size=6, attention_type='block', block_length=(3,))
    for calls in (1, 2):
        assert score(model, texts_of(6), 'random', calls, 3).exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize('kind, changes, block_length', [
    ('layer', {}, None), ('layer_neighbours', {'sampler_order': 'wave'}, None), ('rerun', {}, None),
    ('layer_neighbours', {'attention_type': 'block', 'block_length': (2,)}, 2)])
def test_texts_come_as_often_as_their_likelihood_says(kind, changes, block_length):
    """Drawn one after another by the generation loop and counted, against the enumerated law; two tokens a group."""
    model, rows, calls = row_model(kind, 0.7, block_size=4, **changes), 12_000, 2 if block_length is None else 1
    start = torch.full((rows, 4), MASK)
    settings = GenerationSettings('diffusion', RULE, POLICIES['strided'].make(iterations=calls),
                                  head=model.config.sampler_order, block_length=block_length)
    made = generate(Network(model, TimingAccumulator()), Layout(start, start < 0), settings, keyed(2, 0, 0, rows))
    law = score(model, texts_of(4), 'strided', calls, block_length).exp()
    counts = (made.tokens * (V0 ** torch.arange(3, -1, -1))).sum(1).bincount(minlength=81)
    assert (rows * law).min() > 5 and law.std() > 0.001
    statistic = ((counts - rows * law) ** 2 / (rows * law)).sum()
    assert abs(statistic - 80) < 4 * (2 * 80) ** 0.5
    torch.testing.assert_close(made.confidence.sum(1).exp(), law[(made.tokens * torch.tensor([27, 9, 3, 1])).sum(1)])


# Against a second implementation --------------------------------------------------------------------------------------

def plain_logits(model, hidden, tokens, known, place):
    """Logits of one position of a row, hidden [T, D] and tokens [T], by the words of the docstrings; known: the places
    whose tokens it sees."""
    head, attention, table = model.sampler_head, model.sampler_head.attention, model.neighbour_embedding()
    hidden = torch.zeros_like(hidden) if head.zero_hidden else hidden
    heads, width = attention.n_head, attention.query.out_features // attention.n_head

    def turned(x, at, gain):
        x = x / (x.square().mean() + 1e-6).sqrt() * gain
        first, second = x[:width // 2], x[width // 2:]
        angle = at * 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()))

    asked = attention.query.weight @ hidden[place] + attention.query_start
    found = []
    for number in range(heads):
        part = slice(number * width, (number + 1) * width)
        query = turned(asked[part], place, attention.query_norm.weight)
        scores, values = [torch.zeros(1, dtype=torch.float64)], [torch.zeros(width, dtype=torch.float64)]
        for other in range(len(hidden)):
            if other not in known and not attention.sees_masks:
                continue
            token = int(tokens[other]) if other in known else MASK
            made = attention.content.weight @ hidden[other] + attention.token.weight @ table[token]
            key = turned(made[part], other, attention.key_norm.weight)
            scores.append((query @ key / width ** 0.5)[None])
            values.append(made[attention.query.out_features:][part])
        found.append((torch.cat(scores).softmax(0)[:, None] * torch.stack(values)).sum(0))
    slots = []
    for offset in (*range(-head.window.left, 0), 0, *range(1, head.window.right + 1)):
        beside = place + offset
        slots.append(hidden[place] if offset == 0 else table[int(tokens[beside])] if beside in known else
                     torch.zeros_like(hidden[0]))
    x = head.input(torch.cat(slots)) + attention.output.weight @ torch.cat(found)
    x = head.norm_1(torch.nn.functional.silu(x))
    logits = head.output_head(head.norm_2(torch.nn.functional.silu(head.hidden(x))))
    return logits + (model.lm_head(hidden[place]) if head.residual else 0)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('changes', [{}, {'sampler_zero_hidden': True}, {'sampler_order': 'wave'}])
@pytest.mark.parametrize('grouped', [False, True])
def test_a_fill_and_its_likelihood_are_the_plain_ones(kind, changes, grouped):
    model = row_model(kind, block_size=8, **changes)
    tokens = torch.randint(V0, (3, 8), generator=torch.Generator().manual_seed(2))
    tokens[torch.rand(3, 8, generator=torch.Generator().manual_seed(3)) < 0.7] = MASK
    tokens[0] = MASK
    masked, hidden = tokens == MASK, model.encode(tokens)
    positions = masked & (torch.arange(8) % 4 != 2) if grouped else masked
    task = FillTask(tokens, hidden, RULE, keyed(4, 0, 0, 3), positions)
    made = Filler(model, model.config.sampler_order).fill(task)
    assert (made.tokens != MASK).equal(~masked | positions) and made.tokens[~masked].equal(tokens[~masked])
    assert made.statistics.bootstrapped == 0 and made.statistics.waves == int(positions.sum(1).max())
    placed = Filler(model, model.config.sampler_order).fill(FillTask(tokens, hidden, RULE, keyed(4, 0, 0, 3), positions,
                                                                     truth=made.tokens))
    for row in range(3):
        known = set((~masked[row]).nonzero()[:, 0].tolist())
        for place in in_order(positions[row].tolist(), model.config.sampler_order):
            logits = plain_logits(model, hidden[row], made.tokens[row], known, place)
            expected = logits[:V0].log_softmax(0)[made.tokens[row, place]].item()
            assert made.log_probabilities[row, place].item() == pytest.approx(expected, abs=1e-6)
            assert placed.log_probabilities[row, place].item() == pytest.approx(expected, abs=1e-6)
            known.add(place)
    assert (placed.log_probabilities[~positions] == 0).all() and placed.tokens.equal(made.tokens)


def in_order(flags, order):
    """The places of a group in the order of its fill, by the words of `fill_turns`."""
    places = [place for place, flag in enumerate(flags) if flag]
    if order == 'left_to_right':
        return places

    def distance(place):
        start = end = place
        while start > 0 and flags[start - 1]:
            start -= 1
        while end + 1 < len(flags) and flags[end + 1]:
            end += 1
        return abs(place - (start + end) // 2)

    return sorted(places, key=lambda place: (distance(place), place))


@given(st.lists(st.integers(-1, 2), min_size=1, max_size=12), st.sampled_from(['wave', 'left_to_right']))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_turns_are_the_order_of_each_group(row, order):
    turns = fill_turns(torch.tensor([row]), order)
    sees = sees_in_turn(torch.tensor([row]) >= 0, turns)[0]
    for number in set(row) - {-1}:
        flags = [one == number for one in row]
        expected = in_order(flags, order)
        assert sorted(expected, key=lambda place: turns.turn[0, place].item()) == expected
        for seen, place in enumerate(expected):
            known = {other for other, group in enumerate(row) if group == -1} | set(expected[:seen])
            assert set(sees[place].nonzero()[:, 0].tolist()) == known


# Verified drafts ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind, changes, temperature', [
    ('layer', {}, 1.0), ('layer_neighbours', {'sampler_order': 'wave'}, 1.0), ('rerun', {}, 1.5)])
def test_verified_drafts_have_the_law_of_one_draw_after_another(kind, changes, temperature):
    """Whole rows of four from one trunk call, counted, against the law of the head enumerated prefix by prefix."""
    model, rows = row_model(kind, 0.7, block_size=4, **changes), 12_000
    rule, texts = DrawRule(ALLOWED, temperature), texts_of(4)
    masks = torch.full((rows, 4), MASK)
    hidden = model.encode(masks[:1])
    placed = Filler(model, 'wave').fill(FillTask(masks[:81], hidden.expand(81, -1, -1), rule, keyed(0, 0, 0, 81),
                                                 truth=texts))
    law = placed.log_probabilities.sum(1).exp()
    task = FillTask(masks, hidden.expand(rows, -1, -1), rule, keyed(3, 0, 0, rows))
    made = Filler(model, 'wave', verified=True).fill(task)
    counts = (made.tokens * (V0 ** torch.arange(3, -1, -1))).sum(1).bincount(minlength=81)
    assert law.sum().item() == pytest.approx(1) and (rows * law).min() > 4 and law.std() > 0.002
    statistic = ((counts - rows * law) ** 2 / (rows * law)).sum()
    assert abs(statistic - 80) < 4 * (2 * 80) ** 0.5
    number = (made.tokens * torch.tensor([27, 9, 3, 1])).sum(1)
    torch.testing.assert_close(made.log_probabilities.sum(1).exp(), law[number])
    assert 1 < made.statistics.waves <= 5 and made.drawn.all()


def test_verified_drafts_are_the_function_that_their_random_numbers_say():
    """Token after token: kept where the test says so, else from the surplus; rows do not depend on their batch."""
    model, rows = row_model('layer_neighbours', block_size=8), 6
    tokens = torch.randint(V0, (rows, 8), generator=torch.Generator().manual_seed(5))
    tokens[torch.rand(rows, 8, generator=torch.Generator().manual_seed(6)) < 0.8] = MASK
    positions = (tokens == MASK) & (torch.arange(8) != 3)
    hidden, numbers = model.encode(tokens), keyed(4, 0, 20, rows)
    made = Filler(model, 'left_to_right', verified=True).fill(FillTask(tokens, hidden, RULE, numbers, positions))
    uniform = [numbers.uniform(*one) for one in ((Purpose.TOKEN, 8), (Purpose.VERIFY, 8), (Purpose.VERIFY, 8, 1))]
    kept = []
    for row in range(rows):
        known = set((tokens[row] != MASK).nonzero()[:, 0].tolist())
        for place in positions[row].nonzero()[:, 0].tolist():
            p = plain_logits(model, hidden[row], made.tokens[row], known, place)[:V0].softmax(0)
            q = model.lm_head(hidden[row, place])[:V0].softmax(0)
            first, keep, again = (one[row, place].item() for one in uniform)
            token = int((q.cumsum(0) <= first).sum())
            kept.append(keep < p[token] / q[token])
            if not kept[-1]:
                rest = (p - q).clamp(min=0)
                token = int((rest.cumsum(0) <= again * rest.sum()).sum())
            assert made.tokens[row, place] == token
            known.add(place)
        mine = slice(row, row + 1)
        alone = FillTask(tokens[mine], hidden[mine], RULE, keyed(4, 0, 20 + row, 1), positions[mine])
        assert Filler(model, 'left_to_right', verified=True).fill(alone).tokens[0].equal(made.tokens[row])
    assert 0.2 < sum(kept) / len(kept) < 0.95
    assert made.tokens[~positions].equal(tokens[~positions])


def test_a_head_that_is_the_trunk_keeps_every_draft_in_one_call():
    model = GPT(toy_config(block_size=8, add_sampler_head=True, sampler_kind='layer'), seed=4).double()
    tokens = torch.full((4, 8), MASK)
    task = FillTask(tokens, model.encode(tokens), RULE, keyed(1, 0, 0, 4))
    made = Filler(model, 'wave', verified=True).fill(task)
    assert made.statistics.waves == 1 and made.tokens.equal(independent_fill(model, task).tokens)
    none = FillTask(made.tokens, task.hidden_states, RULE, keyed(1, 0, 0, 4))
    assert Filler(model, 'wave', verified=True).fill(none).tokens.equal(made.tokens)


# Training -------------------------------------------------------------------------------------------------------------

def row_plan(config, **changes):
    return toy_plan(neighbours=seen_neighbours(config), loss_weighting='masked_mean', **changes)


def one(count):
    return count


@pytest.mark.parametrize('kind', KINDS)
def test_the_loss_is_that_of_fills_in_the_groups_of_the_batch(kind):
    """Every group of every row scored by a fill of it, against the loss of one pass over the batch."""
    model = row_model(kind)
    plan = row_plan(model.config, block_size=T, batch_size=6)
    sizes = set()
    for iteration in range(4):
        batch, = unmasking_batches(plan, iteration, one)
        hidden, total, masked = model.encode(batch.inputs), 0.0, batch.inputs == MASK
        groups = batch.turns[..., 0]
        for number in groups.unique().tolist():
            if number >= 0:
                sizes.add(int((groups == number).sum(1).max()))
                task = FillTask(batch.inputs, hidden, RULE, keyed(1, 0, 0, 6), groups == number, truth=batch.targets)
                total -= Filler(model, 'left_to_right').fill(task).log_probabilities.sum().item()
        found = Objective(model, ALLOWED)(batch, SAMPLER, keyed(1, 1, 0, 6)).heads['sampler']
        assert found.item() == pytest.approx(total / int(masked.sum()), rel=1e-6)
    assert max(sizes) > 2


@pytest.mark.parametrize('kind', KINDS)
def test_the_loss_of_a_block_model_is_that_of_fills_of_its_blocks(kind):
    """Each block filled by itself, as generation does, given its own positions and the neighbours before it."""
    model = row_model(kind, block_size=6, attention_type='block', block_length=(3,))
    left = model.config.sampler_window.left
    plan = row_plan(model.config, block_size=6, batch_size=8, blocks=BlockNoise((3,)))
    batch, = unmasking_batches(plan, 2, one)
    hidden, total = model.encode_streams(batch.inputs, batch.targets, 3), 0.0
    for number, start in ((number, start) for number in batch.turns[..., 0].unique().tolist() if number >= 0
                          for start in (0, 3)):
        here, context = slice(start, start + 3), torch.full((8, left), MASK)
        if start and left:
            context = batch.targets[:, start - left:start]
        task = FillTask(batch.inputs[:, here], hidden[:, here], RULE, keyed(1, 0, 0, 8),
                        batch.turns[:, here, 0] == number, truth=batch.targets[:, here], left_context=context)
        total -= Filler(model, 'left_to_right').fill(task).log_probabilities.sum().item()
    found = Objective(model, ALLOWED)(batch, SAMPLER, keyed(1, 1, 0, 8)).heads['sampler']
    assert found.item() == pytest.approx(total / int((batch.inputs == MASK).sum()), rel=1e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_validation_of_a_block_model_says_what_one_call_a_block_is_worth(kind):
    """In one pass over all blocks, against the likelihood block by block."""
    model = row_model(kind, block_size=6, attention_type='block', block_length=(3,))
    texts = torch.randint(V0, (5, 6), generator=torch.Generator().manual_seed(1))
    found = one_call_terms(model, texts, 3, ALLOWED)
    torch.testing.assert_close(found, -score(model, texts, 'left_to_right', 1, 3) / 6, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('changes', [{}, {'attention_type': 'block', 'block_length': (2,)}])
def test_the_loss_moves_the_whole_head_and_nothing_else(kind, changes):
    model = row_model(kind, block_size=4, sampler_gate=True, **changes).float().train().requires_grad_(True)
    plan = row_plan(model.config, batch_size=16)
    if changes:
        plan = plan._replace(noise=plan.noise._replace(blocks=BlockNoise((2,))))
    batch, = unmasking_batches(plan, 1, one)
    losses = Objective(model, ALLOWED)(batch, SAMPLER, keyed(1, 1, 0, 16))
    losses.heads['sampler'].backward()
    for name, parameter in model.named_parameters():
        if name.startswith('sampler_head.'):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_an_untrained_head_is_the_trunk_and_changes_nothing_of_it():
    plain = GPT(toy_config(block_size=T), seed=4)
    for kind in KINDS:
        model = GPT(toy_config(block_size=T, add_sampler_head=True, sampler_kind=kind), seed=4)
        for name, parameter in plain.named_parameters():
            assert parameter.equal(dict(model.named_parameters())[name])
        tokens = torch.tensor([[0, MASK, MASK, 1, MASK]])
        task = FillTask(tokens, model.encode(tokens), RULE, keyed(1, 0, 0, 1))
        _, logits = next(logits_in_turn(model, task, torch.zeros_like(tokens), tokens == MASK))
        assert torch.equal(logits, model.lm_head(task.hidden_states[tokens == MASK]))


def test_a_position_knows_earlier_tokens_of_its_group_and_no_others():
    """The token of a position, of a later one and of another group change nothing; an earlier one does."""
    model = row_model(block_size=6)
    tokens = torch.tensor([[MASK, 1, MASK, MASK, MASK, MASK]])
    groups = torch.tensor([[0, -1, 0, 1, 0, 1]])
    turns, text = fill_turns(groups, 'left_to_right'), torch.tensor([[0, 1, 0, 0, 0, 0]])
    hidden, table = model.encode(tokens), model.neighbour_embedding()

    def read(text):
        return model.sampler_head.attention(hidden, table[text], table[MASK], sees_in_turn(tokens == MASK, turns))[0]

    before = read(text)
    for place, expected in ((0, {2, 4}), (2, {4}), (4, set()), (3, {5}), (5, set())):
        changed = text.clone()
        changed[0, place] = 2
        moved = (read(changed) - before).abs().amax(1) > 1e-6
        assert {other for other in moved.nonzero()[:, 0].tolist() if other != 1} == expected, place


@pytest.mark.parametrize('blocks', [False, True])
def test_masked_positions_are_dealt_out_to_groups_of_every_kind_and_size(blocks):
    rows, length = 600, 12
    mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(1)) < 0.8
    block = (torch.arange(length) // 4).expand(rows, length) if blocks else torch.zeros(rows, length).long()
    groups = drawn_groups(keyed(1, 0, 0, rows), mask, block if blocks else None)
    assert (groups >= 0).equal(mask)
    kinds, sizes = Counter(), []
    for row in range(rows):
        for part in range(int(block.max()) + 1):
            places = (mask[row] & (block[row] == part)).nonzero()[:, 0].tolist()
            mine = [groups[row, place].item() for place in places]
            sizes.append(max((mine.count(number) for number in mine), default=0))
            others = set(groups[row, block[row] != part].tolist())
            assert not set(mine) & (others - {-1})
            if len(places) >= 6 and len(set(mine)) == 2:
                kinds.update(['runs' if mine == sorted(mine) else 'strided' if len(set(mine[::2])) == 1 and
                          len(set(mine[1::2])) == 1 else 'random'])
    assert blocks or all(kinds[name] > 0.2 * kinds.total() for name in ('runs', 'strided', 'random'))
    share = torch.tensor(sizes).bincount(minlength=13) / len(sizes)
    assert (share[1:5 if blocks else 10] > 0.02).all()
    if not blocks:  # sizes are log-uniform: half of them below the root of the length
        assert (torch.tensor(sizes) <= math.floor(math.sqrt(length))).double().mean().item() == pytest.approx(
            math.log(math.floor(math.sqrt(length)) + 1) / math.log(length), abs=0.05)


def test_one_call_gives_asked_hidden_states_and_all_of_them():
    model = awake(GPT(toy_config(block_size=6, n_layer=2))).eval()
    tokens, positions = torch.tensor([[0, MASK, 2, MASK, MASK, 1]] * 2), torch.tensor([1, 3, 10])
    asked, every = model.encode_all(tokens, positions)
    assert asked.equal(model.encode(tokens, positions=positions)) and asked.requires_grad and not every.requires_grad
    torch.testing.assert_close(every, model.encode(tokens))


def test_a_wrong_kind_is_refused_in_words():
    for changes, words in (
            ({'sampler_kind': 'layers'}, 'sampler_kind'),
            ({'sampler_kind': 'layer', 'sampler_context': 2}, 'sampler_context is 2'),
            ({'sampler_kind': 'rerun', 'sampler_context_left': 0}, 'sampler_context_left is 0'),
            ({'sampler_kind': 'layer', 'sampler_attention_n_embd': 6}, 'n_head (2) times an even number'),
            ({'sampler_kind': 'layer', 'sampler_gradient': 'trunk'}, 'take sampler_gradient=head'),
            ({'sampler_attention_n_embd': 8}, 'has no attention')):
        with pytest.raises(ValueError, match=words.replace('(', r'\(').replace(')', r'\)')):
            toy_config(add_sampler_head=True, **changes)


def test_operations_are_those_of_the_matrices():
    config = toy_config(block_size=T, add_sampler_head=True, sampler_kind='layer_neighbours', sampler_n_embd=12,
                        sampler_attention_n_embd=4)
    shape, head = config.sampler_shape, GPT(config).sampler_head
    used = {'hidden': head.hidden, 'output': head.output_head, 'query': head.attention.query,
            'read': head.attention.output}
    matrices = sum(layer.weight.numel() for layer in used.values()) + 12 * 8  # of the first the hidden state's part
    assert shape.operations_per_token() == 2 * (matrices + 2 * T * 4)
    assert shape.operations_per_read_token() == 2 * head.attention.content.weight.numel()
    whole = shape.operations_per_token() + shape.operations_per_read_token()
    assert GPT(config).sampler_operations_per_token() == whole


def test_neighbours_alone_are_what_training_showed_before():
    assert seen_neighbours(GPTConfig(add_sampler_head=True, mask_token_id=65)) == SeenNeighbours((1, 1))
    layer = toy_config(add_sampler_head=True, sampler_kind='layer')
    assert seen_neighbours(layer) == SeenNeighbours((0, 0), 'wave', True)
