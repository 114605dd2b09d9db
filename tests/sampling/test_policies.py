"""Every sampling policy against enumerated laws under an exact oracle, its limits, and its promises as properties.

Chi-square tests have fixed seeds; each would fail a correct sampler with probability ALARM.
"""

import dataclasses
import math
from functools import cache
from itertools import combinations, product

from helpers import policy_laws as laws
import pytest
import torch
from helpers.toys import awake
from hypothesis import given, settings as hypothesis_settings, strategies
from helpers.policy_laws import MASK, ORACLE, T, V, V0, law_of, tokens_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from core.common.drawing import DrawRule, allowed_ids
from core.common.randomness import RowRandom, keyed
from core.common.timing import TimingAccumulator
from core.noise import LINEAR, SCHEDULES
from core.sampling.generation import Block, Generation, GenerationSettings, WindowRun, generate, run_block, windows
from core.sampling.network import Network, Soundness
from core.sampling.options import SampleConfig
from core.sampling.policies import GUIDES, POLICIES, Open, Policy, Prediction
from core.sampling.policies.guides import by_critic_or_confidence
from core.sampling.policy_options import build_policy, four_at_once, make_policy
from core.sampling.prompt import Layout, lay_out_prompt
from core.sampling.trace import Trace
from model import GPT, GPTConfig
from sample_utils import linear_remasking_schedule

ALARM = 1e-4
ROWS = 20_000
RULE = DrawRule(allowed_ids(V, V0))
VALUES = {'iterations': 3, 'start_ratio': 0.75, 'end_ratio': 0.25, 'idle_cache': True, 'choice_temperature': 1.5,
          'remdm_eta': 0.4, 'loop_on': 0.7, 'loop_off': 0.4, 'loop_alpha': 0.6, 'planner_eta': 1.5,
          'entropy_bound': 0.9, 'confidence_threshold': 0.6, 'parallel_factor': 0.9, 'selection_noise': 0.8}


def make(name, **changes):
    values = {**VALUES, **changes}
    if name == 'remask':
        ratios = linear_remasking_schedule(values['iterations'] - 1, values['start_ratio'], values['end_ratio'])
        return POLICIES[name].make(ratios, 'ratio', 0.5, by_critic_or_confidence)
    return POLICIES[name].make(**{option: values[option] for option in POLICIES[name].options})


def run(policy, rows=ROWS, model=ORACLE, rule=RULE, tokens=None, seed=3, watch=None, **changes):
    """Generate from masks, or from tokens [rows, T] all of which are free; the loop expects masks where it may write,
    so there the network is one that computes every position."""
    settings = GenerationSettings('diffusion', rule, policy, use_critic=True, **changes)
    network = Network(model, TimingAccumulator(), encode=None if tokens is None else model.encode)
    tokens = torch.full((rows, T), MASK) if tokens is None else tokens
    layout = Layout(tokens, torch.zeros_like(tokens, dtype=torch.bool))
    return generate(network, layout, settings, keyed(seed, 0, 0, len(tokens)), watch), network


def p_value(tokens, law, size=V0):
    """Chi-square of tokens int64 [rows, T] against law float64 [size ** T]; rare outcomes are counted together."""
    weight = torch.tensor([size ** (T - 1 - position) for position in range(T)])
    counts = torch.bincount((tokens * weight).sum(1), minlength=len(law)).double()
    expected = law * len(tokens)
    assert counts[law == 0].sum() == 0
    rare = expected < 8
    if expected[rare].sum() > 0:
        counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    else:
        counts, expected = counts[~rare], expected[~rare]
    if len(counts) == 1:
        return 1.0  # one outcome, and all rows have it
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


LAWS = {  # name: (options, step law, most steps)
    'mdlm': ({}, lambda: laws.mdlm(3), 3),
    'first_hitting': ({}, laws.first_hitting, 4),
    'random': ({}, lambda: laws.random(3), 3),
    'llada': ({}, lambda: laws.llada(3), 3),
    'top_probability': ({}, lambda: laws.top_probability(3), 3),
    'margin': ({}, lambda: laws.margin(3), 3),
    'entropy': ({}, lambda: laws.entropy(3), 3),
    'maskgit': ({}, lambda: laws.maskgit(3, 1.5), 3),
    'remdm_cap': ({'remdm_eta': 0.4}, lambda: laws.remdm_cap(3, 0.4), 3),
    'remdm_rescale': ({'remdm_eta': 0.6}, lambda: laws.remdm_rescale(3, 0.6), 3),
    'remdm_conf': ({}, lambda: laws.remdm_conf(3), 3),
    'remdm_loop': ({'iterations': 5}, lambda: laws.remdm_loop(5, 0.4, 0.7, 0.4, 0.6), 5),
    'p2_self': ({}, lambda: laws.p2(3, 1.5, False), 3),
    'p2_critic': ({}, lambda: laws.p2(3, 1.5, True), 3),
    'entropy_bounded': ({}, lambda: laws.entropy_bounded(0.9), 4),
    'fast_dllm_threshold': ({}, lambda: laws.fast_dllm_threshold(0.6), 4),
    'fast_dllm_factor': ({}, lambda: laws.fast_dllm_factor(0.9), 4),
    'token_critic': ({}, lambda: laws.token_critic(3, 0.8), 3),
    'dilated': ({}, laws.dilated, 2),
    'strided': ({}, lambda: laws.strided(3), 3),
    'left_to_right': ({}, lambda: laws.left_to_right(3), 3),
}


@cache
def step_laws(name):
    """The enumerated law of the state, masks included, after each step of a policy of `LAWS`."""
    _, step_of, steps = LAWS[name]
    return laws.laws_of(step_of(), steps)


@cache
def law(name):
    """float64 [V0 ** T]: of the finished sequence."""
    return tokens_of(step_laws(name)[-1])


def assert_each_step_follows(trace, expected):
    """The states that a run passed through against their laws; a run that ended early stays where it was."""
    for step, states in enumerate(expected):
        reached = [seen.tokens for seen in trace.steps if seen.step <= step and seen.event != 'start'][-1]
        assert p_value(reached, tokens_of(states, V0 + 1), V0 + 1) > ALARM, step


@pytest.mark.parametrize('name', LAWS)
def test_the_sampled_law_is_the_enumerated_one(name):
    options, _, steps = LAWS[name]
    assert law(name).sum() == pytest.approx(1)
    trace = Trace({}, torch.zeros(1))
    made, network = run(make(name, **options), watch=trace.add)
    assert p_value(made.tokens, law(name)) > ALARM
    assert_each_step_follows(trace, step_laws(name))
    assert network.trunk_calls <= steps


def cosine(t):
    """alpha(t) of MD4's cosine schedule."""
    return 1 - math.cos(math.pi / 2 * (1 - t))


def cosine_loop(t, on=0.7, off=0.4, held=0.6):
    """The cosine schedule run until it has revealed `held`, stopped between on and off, and run to its end."""
    stopped = 1 - math.acos(1 - held) * 2 / math.pi
    return cosine(1 - (1 - t) * (1 - stopped) / (1 - on)) if t > on else held if t >= off else cosine(stopped * t / off)


@pytest.mark.parametrize('name, options, steps, step_of', [
    ('mdlm', {}, 3, lambda: laws.remdm(3, cosine, lambda state, mine, t, largest: {None: 0.0})),
    ('remdm_cap', {}, 3, lambda: laws.remdm(3, cosine, lambda state, mine, t, largest: {None: min(0.4, largest)})),
    ('remdm_loop', {'iterations': 5}, 5, lambda: laws.remdm(5, cosine_loop, lambda state, mine, t, largest: {
        None: min(0.4, largest) if 0.4 < t <= 0.7 else 0.0}))])
def test_policies_in_time_follow_the_schedule_of_the_model(name, options, steps, step_of):
    values = {option: {**VALUES, **options}[option] for option in POLICIES[name].options}
    trace = Trace({}, torch.zeros(1))
    run(POLICIES[name].make(**values, schedule=SCHEDULES['cosine']), watch=trace.add)
    assert_each_step_follows(trace, laws.laws_of(step_of(), steps))
    first, linear = (tokens_of(one[0], V0 + 1) for one in (laws.laws_of(step_of(), steps), step_laws(name)))
    assert (first - linear).abs().sum() > 0.2  # so that the linear schedule cannot be mistaken for it
    assert {name for name, row in POLICIES.items() if row.timed} == {
        'mdlm', 'remdm_cap', 'remdm_rescale', 'remdm_conf', 'remdm_loop'}


@pytest.mark.parametrize('levels, mode, randomness, guidance', [
    ((0.75, 0.5), 'ratio', 0.5, 'self'), ((0.75, 0.5), 'ratio', 0.0, None), ((0.75, 0.5), 'ratio', 0.5, 'critic'),
    ((0.7, 0.4), 'threshold', 0.0, 'self'), ((0.4, 0.7), 'threshold', 0.0, 'critic')])
def test_the_law_of_the_remasking_lifecycle(levels, mode, randomness, guidance):
    policy = POLICIES['remask'].make(levels, mode, randomness, GUIDES[guidance or 'random'].wrongness)
    tokens, steps = torch.full((ROWS, T), MASK), len(levels) + 1
    expected, trace = laws.laws_of(laws.remask(levels, mode, randomness, guidance), steps), Trace({}, torch.zeros(1))
    settings = GenerationSettings('diffusion', RULE, policy, use_critic=guidance == 'critic')
    network = Network(ORACLE, TimingAccumulator())
    made = generate(network, Layout(tokens, tokens != MASK), settings, keyed(3, 0, 0, ROWS), trace.add)
    assert p_value(made.tokens, tokens_of(expected[-1])) > ALARM and network.trunk_calls == steps
    assert_each_step_follows(trace, expected)


def test_every_policy_has_a_law():
    assert {*LAWS, 'remask'} == set(POLICIES)


def test_the_laws_differ_so_that_one_cannot_stand_for_another():
    for first, second in combinations(LAWS, 2):
        assert (law(first) - law(second)).abs().sum() / 2 > 0.01, (first, second)


@pytest.mark.parametrize('name', LAWS)
def test_a_sampler_that_draws_at_a_lowered_temperature_is_caught(name):
    made, _ = run(make(name, **LAWS[name][0]), ROWS // 2, rule=dataclasses.replace(RULE, temperature=0.75))
    assert p_value(made.tokens, law(name)) < ALARM / 100


# Limits --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['first_hitting', 'random', 'left_to_right'])
def test_one_reveal_per_call_reproduces_the_joint(name):
    made, network = run(make(name, iterations=T))
    assert p_value(made.tokens, ORACLE.joint) > ALARM and network.trunk_calls == T


def test_the_ancestral_law_approaches_the_joint_as_steps_grow():
    errors = [float((tokens_of(law_of(laws.mdlm(steps), steps)) - ORACLE.joint).abs().sum() / 2)
              for steps in (1, 2, 4, 8, 16, 32)]
    assert all(after < 0.65 * before for before, after in zip(errors, errors[1:])) and errors[-1] < 0.02
    made, network = run(make('mdlm', iterations=96), rows=6000)
    assert p_value(made.tokens, ORACLE.joint) > ALARM and network.trunk_calls <= 96


@cache
def noisy_law(alpha):
    """The exact law of the state at revealed share alpha: every token of the joint masked with 1 - alpha."""
    law = {}
    for outcome, weight in zip(product(range(V0), repeat=T), ORACLE.joint.tolist()):
        for hidden, chance in laws.subsets(dict.fromkeys(range(T), 1 - alpha)):
            state = tuple((MASK if position in hidden else token, 1.0) for position, token in enumerate(outcome))
            law[state] = law.get(state, 0.0) + weight * chance
    return law


def marginals(law):
    """float64 [T, V0 + 1] of law float64 [(V0 + 1) ** T]."""
    table = law.view(*[V0 + 1] * T)
    return torch.stack([table.sum([other for other in range(T) if other != position]) for position in range(T)])


@pytest.mark.parametrize('name', ['remdm_cap', 'remdm_rescale'])
def test_one_remdm_step_keeps_marginals_and_its_joint_error_falls(name):
    reference, errors = {'remdm_cap': laws.remdm_cap, 'remdm_rescale': laws.remdm_rescale}[name], []
    for steps in (4, 8, 16):
        exact = tokens_of(noisy_law(0.5 + 1 / steps), V0 + 1)
        after = tokens_of(laws.advance(noisy_law(0.5), reference(steps, 0.1)(steps // 2, range(T))), V0 + 1)
        torch.testing.assert_close(marginals(after), marginals(exact))
        errors.append(float((after - exact).abs().sum() / 2))
    # the remasked share stays eta however short the step, so the error that is left is eta's
    assert all(later < earlier for earlier, later in zip(errors, errors[1:]))
    short = [float((tokens_of(laws.advance(noisy_law(0.5), reference(steps, 1 / steps)(steps // 2, range(T))), V0 + 1)
                    - tokens_of(noisy_law(0.5 + 1 / steps), V0 + 1)).abs().sum() / 2) for steps in (4, 8, 16)]
    assert all(later < 0.35 * earlier for earlier, later in zip(short, short[1:]))  # falls as the square of the step


@pytest.mark.parametrize('name', ['remdm_cap', 'remdm_rescale'])
def test_one_sampled_remdm_step_follows_its_law(name):
    before, steps = noisy_law(0.5), 4
    states = torch.tensor([[token for token, _ in state] for state in before])
    generator = torch.Generator().manual_seed(2)
    drawn = torch.multinomial(torch.tensor(list(before.values())), ROWS, replacement=True, generator=generator)
    policy, trace = make(name, iterations=steps, remdm_eta=0.3), Trace({}, torch.zeros(1))
    shifted = dataclasses.replace(
        policy, limit=lambda most: 2, remask=lambda view: policy.remask(dataclasses.replace(view, step=steps // 2)),
        reveal=lambda view: None if view.step else policy.reveal(dataclasses.replace(view, step=steps // 2)))
    run(shifted, tokens=states[drawn], watch=trace.add)
    reached = next(step.tokens for step in trace.steps if step.event == 'remask')
    expected = tokens_of(laws.advance(before, {'remdm_cap': laws.remdm_cap, 'remdm_rescale': laws.remdm_rescale}[name](
        steps, 0.3)(steps // 2, range(T))), V0 + 1)
    assert p_value(reached, expected, V0 + 1) > ALARM
    exact = marginals(tokens_of(noisy_law(0.75), V0 + 1))
    shares = torch.stack([torch.bincount(reached[:, position], minlength=V0 + 1) for position in range(T)]) / ROWS
    assert ((shares - exact).abs() < 5 * (exact * (1 - exact) / ROWS).sqrt()).all()


def test_each_block_is_finished_before_the_next():
    for name, step_of in (('mdlm', laws.mdlm(2)), ('llada', laws.llada(1)), ('p2_self', laws.p2(2, 1.5, False))):
        steps = 1 if name == 'llada' else 2
        made, network = run(make(name, iterations=steps), block_length=2)
        assert p_value(made.tokens, tokens_of(law_of(step_of, steps, block_length=2))) > ALARM
        assert network.trunk_calls <= 2 * steps
    trace = Trace({}, torch.zeros(1))
    run(make('remask'), rows=5, block_length=3, watch=trace.add)
    shown = [(int((step.tokens[:, :3] == MASK).sum()), int((step.tokens[:, 3] == MASK).sum())) for step in trace.steps]
    assert all(first == 0 for first, last in shown if last < 5) and shown[-1] == (0, 0)


def test_the_sampler_head_draws_what_the_policy_chose():
    """The group rule: one position of each run from the trunk, the others given their neighbours; waves at the end."""
    for name, step_of in (('random', laws.random(2, laws.waves)), ('mdlm', laws.mdlm(2, laws.waves))):
        expected = tokens_of(law_of(step_of, 2))
        assert p_value(run(make(name, iterations=2), head='wave')[0].tokens, expected) > ALARM
        assert p_value(run(make(name, iterations=2))[0].tokens, expected) < 1e-6


# Promises ------------------------------------------------------------------------------------------------------------

def make_model():
    config = GPTConfig(block_size=8, vocab_size=14, n_layer=1, n_head=1, n_embd=8, mask_token_id=10,
                       add_sampler_head=True, add_critic_head=True)
    return awake(GPT(config)).double().eval().requires_grad_(False)


SMALL = make_model()
SMALL_RULE = DrawRule(allowed_ids(14, 10))


def write(policy, length=8, rows=3, prompt=(), rule=SMALL_RULE, seed=9, first=0, watch=None, **changes):
    network = Network(SMALL, TimingAccumulator())
    generator = keyed(seed, 0, first, rows)
    layout = lay_out_prompt(prompt, length, 10, generator, 'random')
    chosen = GenerationSettings('diffusion', rule, policy, **{'use_critic': True, **changes})
    return generate(network, layout, chosen, generator, watch), network, layout


def call_limits(name, iterations, layout, block_length):
    """The fewest and the most trunk calls that a policy may make on `layout`."""
    least = most = 0
    length = layout.tokens.size(1)
    for start, stop, first_new in windows(length, 8):
        width = min(stop - start, block_length or 8)
        for offset in range(start, stop, width):
            free = ~layout.protected[:, max(offset, first_new):min(offset + width, stop)]
            if free.numel() == 0 or not free.any():
                continue
            n = int(free.sum(1).max())
            calls = {'n': n, 'at most n': n, 'min(iterations, n)': min(iterations, n), 'iterations': iterations,
                     'at most iterations': iterations, 'ceil(log2 n)': max(1, math.ceil(math.log2(n)))}
            most += calls[POLICIES[name].calls]
            least += 1 if POLICIES[name].calls.startswith('at most') else calls[POLICIES[name].calls]
    return least, most


@pytest.mark.parametrize('name', POLICIES)
@hypothesis_settings(max_examples=6, deadline=None, derandomize=True)
@given(length=strategies.integers(1, 14), iterations=strategies.integers(1, 6), rows=strategies.integers(1, 4),
       prompt=strategies.lists(strategies.integers(0, 9), max_size=6), top_p=strategies.floats(0.05, 1),
       temperature=strategies.sampled_from([0.0, 0.7, 1.0]), head=strategies.booleans(),
       block_length=strategies.none() | strategies.integers(1, 8), share=strategies.floats(0, 1))
def test_no_mask_is_left_nothing_protected_is_touched_and_calls_are_as_stated(
        name, length, iterations, rows, prompt, top_p, temperature, head, block_length, share):
    policy = make(name, iterations=iterations, remdm_eta=share, confidence_threshold=share, entropy_bound=5 * share,
                  start_ratio=share, end_ratio=1 - share)
    made, network, layout = write(policy, length, rows, prompt[:length], dataclasses.replace(
        SMALL_RULE, top_p=top_p, temperature=temperature), head='wave' if head else 'none',
        block_length=block_length)
    assert (made.tokens < 10).all() and made.tokens.shape == (rows, length)
    assert made.tokens[layout.protected].equal(layout.tokens[layout.protected])
    assert (made.confidence[layout.protected] == 0).all() and (made.confidence[~layout.protected] < 0).all()
    least, most = call_limits(name, iterations, layout, block_length)
    assert least <= network.trunk_calls <= most


@pytest.mark.parametrize('name', POLICIES)
def test_a_row_does_not_depend_on_its_batch(name):
    """On logits supplied by the oracle, so to the last bit."""
    together, _ = run(make(name), rows=64)
    apart = torch.cat([run_rows(make(name), rows) for rows in torch.arange(64).flip(0).split(27)]).flip(0)
    assert together.tokens.equal(apart)
    assert len(together.tokens.unique(dim=0)) > 8


def run_rows(policy, rows):
    tokens = torch.full((len(rows), T), MASK)
    settings = GenerationSettings('diffusion', RULE, policy, use_critic=True)
    layout = Layout(tokens, torch.zeros_like(tokens, dtype=torch.bool))
    return generate(Network(ORACLE, TimingAccumulator()), layout, settings, RowRandom(3, 0, rows)).tokens


def test_two_different_flags_give_different_results():
    texts = {name: write(make(name, iterations=4, confidence_threshold=0.2, parallel_factor=2.4), rows=8)[0].tokens
             for name in POLICIES}
    for first, second in combinations(POLICIES, 2):
        assert not texts[first].equal(texts[second]), (first, second)


OPTIONS = [
    ('maskgit', 'choice_temperature', (0.0, 9.0)), ('remdm_cap', 'remdm_eta', (0.1, 0.9)),
    ('remdm_rescale', 'remdm_eta', (0.1, 0.9)), ('remdm_loop', 'remdm_eta', (0.1, 0.9)),
    ('remdm_loop', 'loop_on', (0.5, 0.9)), ('remdm_loop', 'loop_off', (0.1, 0.5)),
    ('remdm_loop', 'loop_alpha', (0.3, 0.8)), ('p2_self', 'planner_eta', (0.0, 3.0)),
    ('p2_critic', 'planner_eta', (0.0, 3.0)), ('entropy_bounded', 'entropy_bound', (0.0, 9.0)),
    ('fast_dllm_threshold', 'confidence_threshold', (0.1, 0.9)), ('fast_dllm_factor', 'parallel_factor', (0.5, 5.0)),
    ('token_critic', 'selection_noise', (0.0, 5.0)),
    *((name, 'iterations', (2, 6)) for name in POLICIES if 'iterations' in POLICIES[name].options)]


@pytest.mark.parametrize('name, option, values', OPTIONS)
def test_every_option_has_an_effect(name, option, values):
    texts = [write(make(name, **{'iterations': 8, option: value}), rows=8)[0].tokens for value in values]
    assert not texts[0].equal(texts[1])


@pytest.mark.parametrize('option, values, others', [
    ('start_ratio', (0.95, 0.5), {}), ('end_ratio', (0.05, 0.5), {}), ('schedule_type', ('linear', 'cosine'), {}),
    ('masking_ratios', ([0.9, 0.1], [0.5, 0.5]), {'schedule_type': 'custom'}),
    ('schedule_mode', ('ratio', 'threshold'), {}), ('randomness_strength', (0.0, 1.0), {}),
    ('intelligent_remasking', (True, False), {'randomness_strength': 0.0}),
    ('start_threshold', (0.1, 0.6), {'schedule_mode': 'threshold'}),
    ('end_threshold', (0.5, 0.9), {'schedule_mode': 'threshold'})])
def test_every_option_of_the_lifecycle_has_an_effect(option, values, others):
    texts = [write(build_policy(SampleConfig(**{'iterations': 8, **others, option: value})), rows=8,
                   use_critic=False)[0].tokens for value in values]
    assert not texts[0].equal(texts[1])


def test_the_options_with_an_effect_are_all_options():
    """Except that the idle cache has none on the text, and that a guide serves a whole run: tests of their own show it."""
    lifecycle = {mark.args[1][place][0] for mark in test_every_option_of_the_lifecycle_has_an_effect.pytestmark
                 for place in range(len(mark.args[1]))}
    assert {('remask', option) for option in lifecycle} | {(name, option) for name, option, _ in OPTIONS} == {
        (name, option) for name, row in POLICIES.items() for option in row.options
        if option not in ('idle_cache', 'guidance')}


def test_old_tokens_that_path_planning_trusts_stay():
    trace = Trace({}, torch.zeros(1))
    run(make('p2_self', planner_eta=0.0, iterations=4), rows=200, watch=trace.add)
    for before, after in zip(trace.steps[2::2], trace.steps[4::2]):  # after the remaskings
        settled = before.tokens != MASK
        assert after.tokens[settled].equal(before.tokens[settled])


@pytest.mark.parametrize('name', ['p2_self', 'p2_critic'])
def test_path_planning_keeps_a_token_from_the_first_step_on_however_many_steps(name):
    trace = Trace({}, torch.zeros(1))
    run(make(name, iterations=11), rows=20, watch=trace.add)
    masked = [(step.tokens == MASK).sum(1).tolist() for step in trace.steps if step.event == 'remask']
    assert masked == [[T * (10 - step) // 11] * 20 for step in range(10)] and masked[0] == [T - 1] * 20


@pytest.mark.parametrize('name', POLICIES)
def test_logits_are_computed_for_open_positions_only(name):
    """Once to choose among the masked positions, once more to draw the chosen ones; tokens that were drawn to be
    chosen from are not drawn again."""
    rows, trace, policy = [], Trace({}, torch.zeros(1)), make(name)
    handle = ORACLE.lm_head.register_forward_hook(lambda module, given, logits: rows.append(logits.size(0)))
    run(policy, rows=50, block_length=3, watch=trace.add)
    handle.remove()
    drawn = sum(int(step.changed.sum()) for step in trace.steps if step.event == 'predict')
    asked = 0
    for before, after in zip(trace.steps, trace.steps[1:]):
        if after.event == 'predict':
            mine = slice(0, 3) if after.step < policy.limit(3) else slice(3, 4)
            asked += int((before.tokens[:, mine] == MASK).sum())
    assert drawn <= sum(rows) <= drawn + asked
    if name in ('mdlm', 'random', 'left_to_right', 'dilated', 'strided', 'remask'):  # these choose without logits
        assert sum(rows) == drawn
    if name in ('llada', 'maskgit', 'fast_dllm_threshold', 'fast_dllm_factor'):
        assert sum(rows) == asked


def test_a_revealed_candidate_is_the_token_that_would_be_drawn():
    tokens = torch.tensor([[10, 2, 10, 10, 4, 10, 10, 10], [10, 10, 1, 10, 10, 7, 7, 10]])
    open = (tokens == 10) & (torch.arange(8) > 0)
    chosen, rule = open & (torch.arange(8) % 3 != 1), dataclasses.replace(SMALL_RULE, top_p=0.8, repetition_penalty=1.3)
    fresh, asked = (Prediction(Network(SMALL, TimingAccumulator()), Open(tokens, open), rule, keyed(4, 2, 0, 2))
                    for _ in range(2))
    assert (asked.candidates.tokens[open] < 10).all() and (asked.candidates.tokens[~open] == tokens[~open]).all()
    for taken, drawn in zip(asked.fill(chosen)[:4], fresh.fill(chosen, int(chosen.sum()))[:4]):
        torch.testing.assert_close(taken, drawn)
    assert asked.fill(chosen).drawn.equal(chosen)


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for the device: reading a number, or how many positions there are."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        indices = arguments[1] if function is torch.ops.aten.index.Tensor else ()
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default,
                                   torch.ops.aten.equal.default)
        self.count += any(index is not None and index.dtype == torch.bool for index in indices)
        return function(*arguments, **(options or {}))

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        plain = torch.Tensor.tolist  # reads the memory of a CPU tensor past the dispatcher

        def tolist(tensor):
            self.count += 1
            return plain(tensor)

        self.patch.setattr(torch.Tensor, 'tolist', tolist)
        return super().__enter__()

    def __exit__(self, *problem):
        self.patch.undo()
        return super().__exit__(*problem)


COUNTING = {'mdlm', 'remdm_cap', 'remdm_rescale', 'remdm_conf', 'remdm_loop',  # chance decides, and whether to idle
            'entropy_bounded', 'fast_dllm_threshold', 'fast_dllm_factor'}  # the network decides, and when to stop


@pytest.mark.parametrize('name', POLICIES)
def test_a_step_waits_for_the_device_only_to_decide_to_stop_or_idle(name):
    """One read a step where chance or the network decides how many positions come, none where the policy counts."""
    counts, steps = [], []
    for iterations, length in ((2, 4), (4, 6)):
        trace = Trace({}, torch.zeros(1))
        policy = make(name, iterations=iterations)
        write(policy, length, rows=1, watch=trace.add)
        steps.append(sum(step.event == 'predict' for step in trace.steps))
        with HostReads() as reads:
            write(policy, length, rows=1)
        counts.append(reads.count)
    assert steps[1] > steps[0]
    assert counts[1] - counts[0] == (steps[1] - steps[0]) * (name in COUNTING)


@pytest.mark.parametrize('name', POLICIES)
@hypothesis_settings(max_examples=5, deadline=None, derandomize=True)
@given(lengths=strategies.lists(strategies.integers(0, 8), min_size=1, max_size=4).filter(any),
       iterations=strategies.integers(1, 9))
def test_the_masks_left_after_each_step_are_as_many_as_the_policy_says(name, lengths, iterations):
    policy, trace = make(name, iterations=iterations), Trace({}, torch.zeros(1))
    assert (policy.left is None) == (name in COUNTING)
    if policy.left is None:
        return
    protected = torch.arange(8) >= torch.tensor(lengths)[:, None]
    layout = Layout(torch.where(protected, 3, 10), protected)
    settings = GenerationSettings('diffusion', SMALL_RULE, policy, use_critic=POLICIES[name].needs_critic)
    generate(Network(SMALL, TimingAccumulator()), layout, settings, keyed(3, 0, 0, len(lengths)), trace.add)
    for step in range(policy.limit(max(lengths))):
        after = [shown for shown in trace.steps if shown.event != 'start' and shown.step <= step][-1]
        assert (after.tokens == 10).sum(1).tolist() == [policy.left(step, length) for length in lengths]


@pytest.mark.parametrize('name', sorted(set(POLICIES) - COUNTING))
def test_a_whole_block_runs_without_reading_the_device(name):
    """Tensors without values: the first thing that needs one raises."""
    policy = make(name, iterations=3)
    with FakeTensorMode():
        model = GPT(SMALL.config)
        free = torch.zeros(2, 8, dtype=torch.bool)
        window = WindowRun(0, 0, free, RowRandom(1, 0, torch.arange(2)), None, Soundness('cpu'))
        settings = GenerationSettings(
            'diffusion', dataclasses.replace(SMALL_RULE, allowed=torch.ones(SMALL.config.vocab_size, dtype=torch.bool)),
            policy, use_critic=POLICIES[name].needs_critic)
        with torch.no_grad():
            made = run_block(Network(model, TimingAccumulator()), settings, window,
                             Block(free, [8, 8], 0, policy.limit(8)),
                             Generation(torch.full((2, 8), 10), torch.zeros(2, 8, dtype=torch.float64), 0))
    assert made.tokens.shape == (2, 8)


def test_the_loop_guards_other_blocks_and_the_prompt_from_a_careless_policy():
    careless = Policy(lambda most: 2, lambda view: torch.ones_like(view.protected),
                      lambda view: torch.ones_like(view.protected))
    made, network, layout = write(careless, prompt=(1, 2, 3), block_length=3)
    assert made.tokens[layout.protected].equal(layout.tokens[layout.protected]) and network.trunk_calls <= 6
    assert (made.tokens < 10).all()
    trace = Trace({}, torch.zeros(1))
    run(careless, rows=4, block_length=3, watch=trace.add)
    assert not any(step.changed[:, 3].any() for step in trace.steps if step.step < 2)


# The idle cache ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['mdlm', 'remdm_cap', 'remdm_rescale', 'remdm_conf', 'remdm_loop'])
@pytest.mark.parametrize('head', [False, True])
def test_the_idle_cache_changes_no_token(name, head):
    made = [write(make(name, iterations=12, idle_cache=cached, remdm_eta=0.05), 9, 2, (3,),
                  head='wave' if head else 'none') for cached in (True, False)]
    (cached, saving, _), (plain, costly, _) = made
    assert cached.tokens.equal(plain.tokens) and cached.confidence.equal(plain.confidence)
    assert costly.trunk_calls == 12 * len(windows(9, 8)) and saving.trunk_calls < 0.8 * costly.trunk_calls


def test_ancestral_calls_are_at_most_one_per_step_and_position():
    _, network, _ = write(make('mdlm', iterations=200), rows=1)
    assert network.trunk_calls <= 8


# Finished rows -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['entropy_bounded', 'fast_dllm_threshold', 'fast_dllm_factor'])
@pytest.mark.parametrize('head', [False, True])
def test_what_is_finished_is_computed_no_more_and_nothing_else_changes(name, head):
    lengths, read = (0, 1, 8, 3), []
    protected = torch.arange(8) >= torch.tensor(lengths)[:, None]
    settings = GenerationSettings('diffusion', SMALL_RULE, make(name, entropy_bound=0.01, confidence_threshold=0.99,
                                                                parallel_factor=0.01),
                                  head='wave' if head else 'none')

    class Reader(Network):
        def encode(self, tokens, cache=None, positions=None):
            read.append((len(tokens), None if positions is None else len(positions)))
            return super().encode(tokens, cache, positions)

    made = []
    for encode in (None, SMALL.encode):  # given a compiled call, every shape stays the same
        network = Reader(SMALL, TimingAccumulator(), encode=encode)
        made.append(generate(network, Layout(torch.where(protected, 3, 10), protected), settings, keyed(3, 0, 0, 4)))
    assert made[0].tokens.equal(made[1].tokens)
    torch.testing.assert_close(made[0].confidence, made[1].confidence)
    # a position a call; of rows and positions, the masked ones
    assert read == [(3, 12), (2, 9), (2, 7), (1, 5), (1, 4), (1, 3), (1, 2), (1, 1), *[(4, None)] * 8]


# Defaults ------------------------------------------------------------------------------------------------------------

def test_a_policy_made_by_name_has_the_defaults_of_sample_py(monkeypatch):
    """For whoever makes one: a default changed in the options' table changes every policy that reads it."""
    seen = {}
    for name, row in POLICIES.items():
        monkeypatch.setitem(POLICIES, name, row._replace(make=lambda *levels, name=name, **given: seen.update(
            {name: levels or given})))
        make_policy(name)
    offered = {one.name: one.default for one in dataclasses.fields(SampleConfig)} | four_at_once(1.9)
    levels, *rest = seen.pop('remask')
    assert levels == pytest.approx([0.95 - 0.9 * step / 48 for step in range(49)]) and \
        rest[:3] == ['ratio', 0.85, by_critic_or_confidence]
    timed = {True: {'schedule': LINEAR}, False: {}}
    assert seen == {name: {option: offered[option] for option in row.options} | timed[row.timed]
                    for name, row in POLICIES.items() if name != 'remask'}
    make_policy('maskgit', iterations=7)
    assert seen['maskgit'] == {'iterations': 7, 'choice_temperature': 4.5}
