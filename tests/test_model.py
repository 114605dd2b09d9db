"""The model: configuration errors, heads as additions, attention, cache and the two ways into the sampler head."""

import pytest
import torch

from helpers.toys import SPECIAL, awake, toy_config
from model import GPT, ModelMode
from sample_utils import prepare_sampler_inputs

TOKENS = torch.tensor([[0, 1, 3, 2], [3, 3, 1, 0]])


@pytest.mark.parametrize('changes, words', [
    ({'mode': ModelMode.TOKEN_CLASSIFIER}, 'Sampler head only supported for LANGUAGE_MODEL mode'),
    ({'attention_type': 'causal'}, 'Sampler head requires bidirectional attention'),
    ({'mask_token_id': None}, 'Sampler head requires mask_token_id to be configured'),
    ({'sampler_context': 0}, 'sampler_context is 0'),
    ({'n_head': 3}, 'n_embd is 8, but must be a multiple of n_head (3)'),
    ({'dropout': 1.0}, 'dropout is 1.0'),
    ({'pad_token_id': 99}, 'pad_token_id is 99'),
])
def test_a_wrong_configuration_is_refused(changes, words):
    with pytest.raises(ValueError, match=words.replace('(', r'\(').replace(')', r'\)')):
        toy_config(add_sampler_head=True, **changes)


def test_all_problems_are_listed_together():
    with pytest.raises(ValueError) as caught:
        toy_config(add_sampler_head=True, attention_type='causal', mask_token_id=None, dropout=-1.0)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize('position_encoding', ['rotary', 'absolute'])
def test_heads_change_nothing_of_a_model(position_encoding):
    plain = GPT(toy_config(position_encoding=position_encoding), seed=9)
    headed = GPT(toy_config(position_encoding=position_encoding, add_sampler_head=True, add_critic_head=True), seed=9)
    names = dict(headed.named_parameters())
    assert {name for name in names if not name.startswith(('sampler_head', 'critic_head'))} == \
        dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, names[name])
    assert torch.equal(plain(TOKENS).logits, headed(TOKENS).logits)


@pytest.mark.parametrize('recompute', [False, True])
def test_positions_alone_are_what_the_whole_has_there(recompute):
    positions = torch.tensor([1, 2, 4, 7, 0, 0])  # as a batch pads them: the first again, which then counts thrice
    model = awake(GPT(toy_config(n_layer=2)))
    for block in model.transformer['h']:
        block.recompute = recompute
    weights, gradients = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), []
    for hidden in (model.encode(TOKENS).flatten(0, 1)[positions], model.encode(TOKENS, positions=positions)):
        model.zero_grad()
        (hidden * weights).sum().backward()
        gradients.append([hidden, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for whole, alone in zip(*gradients):
        torch.testing.assert_close(alone, whole)


def test_embedding_and_output_are_tied():
    model = GPT(toy_config())
    assert model.lm_head.weight is model.transformer['wte'].weight


@pytest.mark.parametrize('position_encoding', ['rotary', 'absolute'])
def test_causal_attention_sees_nothing_later_and_bidirectional_does(position_encoding):
    for attention_type, sees in (('causal', False), ('bidirectional', True)):
        model = awake(GPT(toy_config(attention_type=attention_type, position_encoding=position_encoding)))
        changed = TOKENS.clone()
        changed[:, -1] = 1
        difference = (model(TOKENS).logits - model(changed).logits)[:, :-1].abs().max()
        assert (difference > 1e-3) == sees


def test_positions_matter():
    for position_encoding in ('rotary', 'absolute'):
        model = awake(GPT(toy_config(position_encoding=position_encoding)))
        swapped = TOKENS[:, [1, 0, 2, 3]]
        assert not torch.allclose(model(TOKENS).logits[:, 2:], model(swapped).logits[:, 2:], atol=1e-4)


def test_padding_is_not_attended_to():
    """A padded row gives the same outputs as the row alone: True in the mask means attend."""
    model = awake(GPT(toy_config(block_size=6)))
    alone = model(TOKENS[:1]).logits
    padded = torch.cat((TOKENS[:1], torch.full((1, 2), SPECIAL['pad_token_id'])), dim=1)
    attend = padded != SPECIAL['pad_token_id']
    assert torch.allclose(model(padded, attend).logits[:, :4], alone, atol=1e-5)
    assert not torch.allclose(model(padded).logits[:, :4], alone, atol=1e-3)


@pytest.mark.parametrize('position_encoding', ['rotary', 'absolute'])
def test_a_cached_causal_model_reads_the_same(position_encoding):
    model = awake(GPT(toy_config(attention_type='causal', block_size=8, position_encoding=position_encoding)))
    tokens = torch.tensor([[0, 1, 2, 2, 1, 0, 0]])
    cache = model.new_cache(1)
    parts = [model.encode(piece, cache=cache) for piece in tokens.split([3, 1, 2, 1], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), model.encode(tokens), atol=1e-5)


@pytest.mark.parametrize('context, output, residual, changes', [
    (1, 'own', True, {}), (2, 'own', False, {'sampler_n_embd': 12}), (1, 'shared_detached', True, {}),
    (2, 'own', True, {'sampler_zero_hidden': True, 'sampler_n_embd': 6})])
def test_tables_give_what_the_whole_matrix_gives(context, output, residual, changes):
    model = awake(GPT(toy_config(add_sampler_head=True, sampler_context=context, sampler_output=output,
                                 sampler_residual=residual, **changes)))
    head, embedding = model.sampler_head, model.neighbour_embedding()
    hidden = torch.randn(5, 8)
    neighbours = torch.randint(-1, 3, (5, 2 * context))
    trunk_logits = model.lm_head(hidden)
    whole = head(prepare_sampler_inputs(hidden, neighbours, embedding).sampler_input, trunk_logits,
                 model.lm_head.weight)
    tables = head.neighbour_tables(embedding)  # [2C, V, D]
    projection = head.hidden_projection(hidden)
    for slot in range(2 * context):
        shown = neighbours[:, slot] >= 0
        projection = projection + tables[slot][neighbours[:, slot].clamp(min=0)] * shown[:, None]
    assert torch.allclose(head.later_layers(model.lm_head.weight).logits(projection, trunk_logits), whole, atol=1e-5)


def test_a_head_with_zero_hidden_sees_its_neighbours_alone():
    """Hidden state and trunk logits change nothing, a neighbour does, and training moves the hidden slot nowhere."""
    model = awake(GPT(toy_config(add_sampler_head=True, sampler_zero_hidden=True)))
    head, neighbours = model.sampler_head, torch.tensor([[0, 1], [2, -1]])

    def logits(hidden, beside):
        sampler_input = prepare_sampler_inputs(hidden, beside, model.neighbour_embedding()).sampler_input
        return head(sampler_input, model.lm_head(hidden), model.lm_head.weight)

    base, moved = logits(torch.randn(2, 8), neighbours), logits(torch.randn(2, 8), neighbours)
    assert base.equal(moved) and not base.allclose(logits(torch.randn(2, 8), neighbours.flip(1)))
    assert head.hidden_projection(torch.randn(3, 8)).equal(head.input.bias.expand(3, 8))
    base.sum().backward()
    slots = head.input.weight.grad.view(8, 3, 8)
    assert (slots[:, 1] == 0).all() and (slots[:, 0] != 0).any() and head.output_head.weight.grad.any()
    assert GPT(toy_config(add_sampler_head=True, sampler_zero_hidden=True)).sampler_head.output_head.weight.any()


def test_the_width_of_the_head_is_an_option():
    plain, narrow = (GPT(toy_config(add_sampler_head=True, **changes)) for changes in ({}, {'sampler_n_embd': 5}))
    assert plain.sampler_head.input.weight.shape == (8, 24) and plain.sampler_head.output_head.weight.shape == (7, 8)
    assert narrow.sampler_head.input.weight.shape == (5, 24) and narrow.sampler_head.hidden.weight.shape == (5, 5)
    assert narrow.sampler_head.output_head.weight.shape == (7, 5)
    with pytest.raises(ValueError, match='sampler_n_embd is 0'):
        toy_config(add_sampler_head=True, sampler_n_embd=0)
    with pytest.raises(ValueError, match='sampler_n_embd is 5.*shared_detached'):
        toy_config(add_sampler_head=True, sampler_n_embd=5, sampler_output='shared_detached')


def test_slots_stand_where_they_should():
    """A head whose first matrix reads only one slot answers to that neighbour alone."""
    model = awake(GPT(toy_config(add_sampler_head=True, sampler_context=2, sampler_residual=False)))
    hidden, embedding = torch.randn(1, 8), model.neighbour_embedding()
    base = torch.tensor([[0, 1, 2, 0]])
    for slot, column in ((0, 0), (1, 1), (2, 3), (3, 4)):  # column 2 is the hidden state
        with torch.no_grad():
            model.sampler_head.input.weight.zero_()
            model.sampler_head.input.weight[:, column * 8:(column + 1) * 8] = torch.eye(8)
        for changed in range(4):
            other = base.clone()
            other[0, changed] = (other[0, changed] + 1) % 3
            inputs = [prepare_sampler_inputs(hidden, one, embedding).sampler_input for one in (base, other)]
            outputs = [model.sampler_head(one, torch.zeros(1, 7), model.lm_head.weight) for one in inputs]
            assert torch.allclose(*outputs) == (changed != slot)


def test_modes_give_their_shapes_and_ranges():
    classifier = GPT(toy_config(mode='token_classifier', num_token_classes=2))
    assert classifier(TOKENS).logits.shape == (2, 4, 2) and classifier.lm_head is None
    scorer = awake(GPT(toy_config(mode='sequence_scorer')))
    scores = scorer.sequence_scores(TOKENS)
    assert scores.shape == (2,) and (0 < scores).all() and (scores < 1).all()
    critic = awake(GPT(toy_config(add_critic_head=True)))
    assert torch.allclose(critic.critic_scores(TOKENS),
                          torch.sigmoid(critic.critic_logits(critic.encode(TOKENS)).double()))


def test_the_count_of_operations_is_that_of_the_matrices():
    """Against a count by hooks on every linear layer, and attention counted by its two products."""
    config = toy_config(n_layer=2)
    model, counted = GPT(config), 0

    def count(module, inputs, output):
        nonlocal counted
        counted += 2 * module.weight.numel() * inputs[0].numel() // inputs[0].size(-1)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    model(TOKENS[:1])
    counted += 2 * 2 * config.n_layer * 4 * 4 * config.n_embd  # scores and their product with the values
    assert counted == 4 * model.operations_per_token()


@pytest.mark.parametrize('width, blind', [(None, False), (5, False), (5, True)])
def test_the_sampler_heads_operations_are_those_of_its_matrices(width, blind):
    model = GPT(toy_config(add_sampler_head=True, sampler_context=2, sampler_n_embd=width, sampler_zero_hidden=blind))
    head = model.sampler_head
    one_slot = head.input.weight.numel() // 5  # the other four are neighbours, read from tables
    own = (0 if blind else one_slot) + head.hidden.weight.numel() + head.output_head.weight.numel()
    assert model.sampler_operations_per_token() == 2 * own


def test_rotary_scores_depend_on_distance_only():
    from core.common.layers import rotary_tables, rotate

    cosine, sine = rotary_tables(16, 8)
    query, key = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    at = lambda x, place: rotate(x, cosine[place:place + 1], sine[place:place + 1])  # noqa: E731
    scores = [(at(query, place) * at(key, place + 3)).sum() for place in (0, 5, 12)]
    assert torch.allclose(torch.stack(scores), scores[0].expand(3), atol=1e-5)
    assert not torch.isclose((at(query, 0) * at(key, 5)).sum(), scores[0], atol=1e-3)


def test_normalisation_is_that_of_the_paper():
    from core.common.layers import Norm

    x = torch.randn(3, 8)
    expected = x / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(Norm(8)(x).double(), expected.double(), atol=1e-6)


def test_bfloat16_autocast_gives_nearly_the_same():
    """With rotary positions, padding and a cache: no operation meets two precisions."""
    model = awake(GPT(toy_config(block_size=8)))
    attend = torch.ones(2, 4, dtype=torch.bool)
    causal = awake(GPT(toy_config(block_size=8, attention_type='causal')))
    exact = model(TOKENS, attend).logits, causal(TOKENS).logits
    with torch.autocast('cpu', torch.bfloat16):
        found = model(TOKENS, attend).logits
        cache = causal.new_cache(2)
        cached = causal.lm_head(torch.cat([causal.encode(part, cache=cache) for part in TOKENS.split(2, 1)], 1))
    assert found.dtype == torch.bfloat16 and cache.keys[0].dtype == torch.bfloat16
    assert (found - exact[0]).abs().max() < 0.15 * exact[0].abs().max()
    assert (cached - exact[1]).abs().max() < 0.15 * exact[1].abs().max()
