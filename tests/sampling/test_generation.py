"""The loop: schedule semantics, counts of calls, protected positions, blocks, and independence of the batch."""

import dataclasses

import pytest
import torch

from core.common.drawing import DrawRule, allowed_ids
from core.common.errors import UserError
from core.common.randomness import keyed
from core.common.timing import TimingAccumulator
from core.sampling.generation import GenerationSettings, generate, score_confidence, windows
from core.sampling.network import Network
from core.sampling.policies import Policy, remask_policy
from core.sampling.policies.guides import by_critic_or_confidence
from core.sampling.prompt import Layout, lay_out_infill, lay_out_prompt, split_infill
from core.sampling.trace import Trace
from model import GPT, GPTConfig

BASE, MASK, V, T = 10, 10, 14, 16
RULE = DrawRule(allowed_ids(V, BASE))


def make_model(**changes):
    heads = {} if changes.get('attention_type') == 'causal' else {'add_sampler_head': True, 'add_critic_head': True}
    config = GPTConfig(**{'block_size': T, 'vocab_size': V, 'n_layer': 2, 'n_head': 2, 'n_embd': 16,
                          'mask_token_id': MASK, **heads, **changes})
    model = GPT(config).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model


MODEL, CAUSAL = make_model(), make_model(attention_type='causal')


def settings(method='diffusion', levels=(0.9, 0.5, 0.1), mode='ratio', randomness=0.4, wrongness=by_critic_or_confidence, **changes):
    return GenerationSettings(method, RULE, remask_policy(levels, mode, randomness, wrongness), iterations=3,
                              head='wave' if changes.pop('head', True) else 'none', **changes)


def run(settings, length=T, rows=3, prompt=(1, 2), model=MODEL, first=0, watch=None, placement='prefix'):
    generator = keyed(9, 0, first, rows)
    layout = lay_out_prompt(prompt, length, MASK, generator, placement)
    network = Network(model, TimingAccumulator())
    return generate(network, layout, settings, generator, watch), network, layout


@pytest.mark.parametrize('method', ['diffusion', 'multinomial', 'standard'])
@pytest.mark.parametrize('length', [1, 7, T, T + 1, 3 * T + 5])
def test_every_method_fills_all_and_keeps_the_prompt(method, length):
    for model in (MODEL, CAUSAL) if method == 'standard' else (MODEL,):
        for prompt in ((), (3,)):
            made, _, layout = run(settings(method), length, prompt=prompt, model=model)
            assert made.tokens.shape == (3, length) and (made.tokens < BASE).all()
            assert made.tokens[layout.protected].equal(layout.tokens[layout.protected])
            assert (made.confidence[~layout.protected] < 0).all() and (made.confidence[layout.protected] == 0).all()


@pytest.mark.parametrize('method, head', [('diffusion', True), ('diffusion', False), ('multinomial', False),
                                          ('standard', False)])
def test_a_row_is_the_same_in_every_batch(method, head):
    chosen = settings(method, head=head, use_critic=head)
    together, _, _ = run(chosen, 2 * T, rows=4, placement='random')
    for row in range(4):
        alone, _, _ = run(chosen, 2 * T, rows=1, first=row, placement='random')
        assert alone.tokens[0].equal(together.tokens[row])
    assert len({tuple(row) for row in together.tokens.tolist()}) == 4


def test_a_causal_row_is_the_same_in_every_batch():
    together, _, _ = run(settings('standard'), 2 * T, rows=4, model=CAUSAL)
    assert run(settings('standard'), 2 * T, rows=1, first=2, model=CAUSAL)[0].tokens[0].equal(together.tokens[2])


def test_remasking_follows_the_levels_first_and_last():
    trace = Trace({}, torch.zeros(1))
    _, network, _ = run(settings(levels=(0.9, 0.5, 0.1)), prompt=(1, 2, 3, 4, 5, 6), watch=trace.add)
    assert [step.event for step in trace.steps] == ['start', *['predict', 'remask'] * 3, 'predict']
    shares = [step.changed.sum(1).tolist() for step in trace.steps if step.event == 'remask']
    assert shares == [[9] * 3, [5] * 3, [1] * 3]  # of ten unprotected positions
    assert network.trunk_calls == network.network_calls == 4
    for before, after in zip(trace.steps, trace.steps[1:]):
        changed = before.tokens != after.tokens
        assert (changed <= after.changed).all()
        if after.event == 'remask':
            assert (after.tokens[after.changed] == MASK).all()


def test_the_critic_is_a_network_call_and_guides():
    trace = Trace({}, torch.zeros(1))
    _, network, _ = run(settings(levels=(0.25,), randomness=0.0, use_critic=True), prompt=(), watch=trace.add)
    assert (network.trunk_calls, network.network_calls) == (2, 3)
    filled, remasked = trace.steps[1].tokens, trace.steps[2].changed
    scores = MODEL.critic_scores(filled)
    for row in range(3):
        assert set(remasked[row].nonzero().squeeze(1).tolist()) == set(scores[row].topk(4).indices.tolist())


def test_self_confidence_remasks_what_was_least_likely_when_drawn():
    trace = Trace({}, torch.zeros(1))
    run(settings(levels=(0.25, 0.25), randomness=0.0), prompt=(), watch=trace.add)
    for predicted, remasked in zip(trace.steps[1::2], trace.steps[2::2]):
        for row in range(3):
            lowest = predicted.confidence[row].topk(4, largest=False).values
            torch.testing.assert_close(predicted.confidence[row][remasked.changed[row]].sort().values, lowest)
    kept = ~trace.steps[2].changed  # old tokens keep the confidence of their own draw
    assert trace.steps[3].confidence[kept].equal(trace.steps[1].confidence[kept])


def test_the_run_ends_when_nothing_is_left_to_remask():
    made, network, _ = run(settings(levels=(1.0, 1.0, 1.0), mode='threshold'))
    assert network.trunk_calls == 1 and (made.tokens < BASE).all()
    _, network, _ = run(settings(levels=(0.5, 0.0, 0.5)))
    assert network.trunk_calls == 2


def test_counts_of_calls_of_the_other_methods():
    assert run(settings('multinomial'))[1].trunk_calls == 3
    assert run(settings('standard'))[1].trunk_calls == T - 2  # one per new token
    assert run(settings('standard'), model=CAUSAL)[1].trunk_calls == T - 2
    assert run(settings(levels=()), 2 * T)[1].trunk_calls == len(windows(2 * T, T))


def test_multinomial_redraws_visible_positions_and_never_the_prompt():
    trace = Trace({}, torch.zeros(1))
    run(settings('multinomial'), watch=trace.add)
    first, second = trace.steps[1], trace.steps[2]
    assert second.changed[:, 2:].all() and not second.changed[:, :2].any()
    assert (first.tokens != second.tokens).any()


def test_the_key_value_cache_changes_nothing():
    """Greedy text read with the cache equals greedy text from whole forward passes."""
    chosen = dataclasses.replace(settings('standard'), rule=dataclasses.replace(RULE, temperature=0.0))
    made, _, _ = run(chosen, model=CAUSAL, rows=1)
    tokens = torch.tensor([[1, 2]])
    while tokens.size(1) < T:
        logits = CAUSAL(tokens).logits[:, -1, :BASE]
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
    assert made.tokens.equal(tokens)


@pytest.mark.parametrize('length, block', [(5, 8), (8, 8), (9, 8), (12, 8), (13, 8), (40, 8), (9, 1), (7, 3)])
def test_windows_write_each_position_once_with_half_a_block_before(length, block):
    found = windows(length, block)
    assert found[0].start == 0 and found[-1].stop == length
    for before, after in zip(found, found[1:]):
        assert after.first_new == before.stop and after.stop - after.start == block
        assert after.first_new - after.start >= block // 2 and after.stop > after.first_new


def test_later_blocks_read_the_carried_context():
    trace = Trace({}, torch.zeros(1))
    made, _, _ = run(settings(levels=()), 2 * T, watch=trace.add)
    started = [step for step in trace.steps if step.event == 'start']
    assert [step.start for step in started] == [0, T // 2, T]
    assert started[1].tokens[:, :T // 2].equal(made.tokens[:, T // 2:T])  # half a block, written before
    assert (started[1].tokens[:, T // 2:] == MASK).all()
    drawn = [step.changed for step in trace.steps if step.event == 'predict']
    assert not drawn[1][:, :T // 2].any() and drawn[1][:, T // 2:].all()


def test_logits_that_are_not_numbers_are_an_error():
    broken = make_model()
    broken.transformer['ln_f'].weight.fill_(float('nan'))
    for method in ('diffusion', 'multinomial', 'standard'):
        with pytest.raises(UserError, match='NaN'):
            run(settings(method), model=broken)
    broken = make_model(attention_type='causal')
    broken.transformer['ln_f'].weight.fill_(float('nan'))
    with pytest.raises(UserError, match='NaN'):
        run(settings('standard'), model=broken)


def test_a_step_without_numbers_is_an_error_though_all_is_drawn_anew():
    """The host asks at the end of the window, so that no step waits for it."""
    def encode(tokens):
        return MODEL.encode(tokens) * (float('nan') if network.trunk_calls == 1 else 1.0)

    network, generator = Network(MODEL, TimingAccumulator(), encode=encode), keyed(9, 0, 0, 3)
    chosen = settings(levels=(1.0, 1.0), randomness=1.0)
    with pytest.raises(UserError, match='not numbers'):
        generate(network, lay_out_prompt((1,), T, MASK, generator), chosen, generator)
    assert network.trunk_calls == 3


def test_nobody_sees_letters_of_a_network_without_numbers():
    broken, trace = make_model(), Trace({}, torch.zeros(1))
    broken.transformer['ln_f'].weight.fill_(float('nan'))
    for method in ('diffusion', 'multinomial', 'standard'):
        with pytest.raises(UserError, match='NaN'):
            run(settings(method), model=broken, watch=trace.add)
    assert [step.event for step in trace.steps] == ['start'] * 3


@pytest.mark.parametrize('helper, words', [('critic', "critic's scores are not numbers .*checkpoint_name"),
                                           ('model', "remasking model's scores .*remasking_checkpoint_name")])
def test_a_critic_without_numbers_is_an_error(monkeypatch, helper, words):
    """Even one number of one call, and though all positions are drawn again afterwards."""
    calls = []

    def scores(*given):
        calls.append(torch.full(given[-1].shape, 0.5, dtype=torch.float64))
        calls[0][1, 3] = float('nan')
        return calls[-1]

    model = make_model()
    monkeypatch.setattr(model, 'critic_scores', scores)
    monkeypatch.setattr('core.sampling.network.wrong_probabilities', scores)
    generator = keyed(9, 0, 0, 3)
    network = Network(model, TimingAccumulator(), remasking_model=model if helper == 'model' else None)
    chosen = settings(levels=(1.0, 1.0), randomness=0.5, use_critic=True)
    with pytest.raises(UserError, match=words):
        generate(network, lay_out_prompt((1,), T, MASK, generator), chosen, generator)
    assert len(calls) == 2


def test_a_prompt_stands_where_it_should():
    rows = keyed(1, 0, 0, 50)
    layout = lay_out_prompt((7, 8), 6, MASK, rows, 'random')
    starts = (layout.tokens == 7).byte().argmax(1)
    assert set(starts.tolist()) == {0, 1, 2, 3, 4}
    assert (layout.tokens.gather(1, starts[:, None] + 1) == 8).all() and (layout.protected.sum(1) == 2).all()
    with pytest.raises(UserError, match='3 tokens, but the sequence holds 2'):
        lay_out_prompt((1, 2, 3), 2, MASK, rows)


def test_infilling_keeps_what_is_known():
    assert split_infill('_ab__c', '_') == [1, 'ab', 2, 'c']
    assert split_infill('ab', '_') == ['ab'] and split_infill('__', '_') == [2]
    layout = lay_out_infill([1, [4, 5], 2, [6]], 8, MASK, keyed(1, 0, 0, 2))
    assert layout.tokens[0].tolist() == [MASK, 4, 5, MASK, MASK, 6, MASK, MASK]
    generator = keyed(1, 0, 0, 2)
    made = generate(Network(MODEL, TimingAccumulator()), layout, settings(), generator)
    assert made.tokens[:, [1, 2, 5]].tolist() == [[4, 5, 6]] * 2


def test_self_confidence_scores_each_new_token_once():
    made, network, layout = run(settings(levels=()), 3 * T)
    found = score_confidence(network, made.tokens, layout.protected, RULE.allowed, keyed(9, 0, 0, 3), 4)
    assert found.count.tolist() == [3 * T - 2] * 3 and (found.total < 0).all()
    text = made.tokens[:, :T]
    layout = Layout(text, torch.zeros_like(text).bool())
    exact = score_confidence(Network(CAUSAL, TimingAccumulator()), *layout, RULE.allowed, keyed(9, 0, 0, 3), 4)
    expected = CAUSAL(text).logits[..., :BASE].log_softmax(-1)[:, :-1].gather(2, text[:, 1:, None]).sum((1, 2))
    torch.testing.assert_close(exact.total, expected)


def test_the_loop_protects_the_prompt_from_a_careless_policy():
    careless = Policy(lambda most: 3, lambda view: None, lambda view: torch.ones_like(view.protected), asks=True)
    made, _, layout = run(dataclasses.replace(settings(), policy=careless))
    assert made.tokens[:, :2].equal(layout.tokens[:, :2])


def test_blocks_do_not_share_random_numbers():
    """A model that knows nothing: equal numbers would give equal text in two whole blocks."""
    blank = make_model()
    blank.transformer['wte'].weight.zero_()
    trace = Trace({}, torch.zeros(1))
    run(settings(levels=(), head=False), 2 * T, rows=1, prompt=(), watch=trace.add, model=blank)
    second, third = (step.tokens[0, T // 2:] for step in trace.steps[3::2])
    assert not second.equal(third) and not trace.steps[1].tokens[0, T // 2:].equal(second)
