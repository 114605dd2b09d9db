"""A trained float32 network: what a policy chooses is the same whatever the batch, and whatever the rounding."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings as hypothesis_settings, strategies as st

from core.common.drawing import DrawRule, allowed_ids
from core.common.randomness import keyed
from core.common.timing import TimingAccumulator
from core.sampling.generation import GenerationSettings, generate
from core.sampling.network import Network
from core.sampling.policies import GUIDES, POLICIES
from core.sampling.prompt import Layout
from core.sampling.trace import Trace
from model import GPT, GPTConfig

BASE, MASK, V, T, ROWS = 6, 6, 10, 12, 16
RULE = DrawRule(allowed_ids(V, BASE), temperature=0.8)
VALUES = {'iterations': 5, 'idle_cache': True, 'choice_temperature': 1.5, 'remdm_eta': 0.3, 'loop_on': 0.7,
          'loop_off': 0.4, 'loop_alpha': 0.6, 'planner_eta': 1.5, 'entropy_bound': 1.2, 'confidence_threshold': 0.6,
          'parallel_factor': 1.5, 'selection_noise': 0.4}


def trained(**changes):
    """A network that has learned a little: texts that count upwards modulo 6, a fifth of their tokens left to chance,
    seen with some tokens masked and, for the critic, some replaced."""
    model = GPT(GPTConfig(**{'block_size': T, 'vocab_size': V, 'n_layer': 2, 'n_head': 2, 'n_embd': 32,
                             'mask_token_id': MASK, 'wrong_token_id': 7, 'pad_token_id': 8, 'cls_token_id': 9,
                             **changes}))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)

    def chance(shape, share):
        return torch.rand(shape, generator=generator) < share

    for _ in range(40):
        texts = (torch.randint(BASE, (32, 1), generator=generator) + torch.arange(T)) % BASE  # [32, T]
        noise = torch.randint(BASE, texts.shape, generator=generator)
        texts = torch.where(chance(texts.shape, 0.2), noise, texts)
        masked = chance(texts.shape, torch.rand(32, 1, generator=generator))
        wrong = chance(texts.shape, 0.3) & (noise != texts)
        shown = torch.where(wrong, noise, texts)
        if model.lm_head is None:
            loss = F.cross_entropy(model(shown).logits.flatten(0, 1), wrong.long().flatten())
        else:
            loss = F.cross_entropy(model(texts.masked_fill(masked, MASK)).logits.flatten(0, 1), texts.flatten())
            loss = loss + F.binary_cross_entropy_with_logits(model.critic_logits(model.encode(shown)), wrong.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


MODEL = trained(add_critic_head=True, add_sampler_head=True)
REMASKING = trained(mode='token_classifier', num_token_classes=2)
LIFECYCLE = {  # name: (levels, mode, randomness, guide)
    'remask by the critic': ((0.9, 0.6, 0.3), 'ratio', 0.0, 'critic'),
    'remask by self-confidence, a part at random': ((0.9, 0.6, 0.3), 'ratio', 0.4, 'self'),
    'remask at random': ((0.9, 0.6, 0.3), 'ratio', 0.0, 'random'),
    'remask above a threshold of the critic': ((0.1, 0.2, 0.3), 'threshold', 0.0, 'critic'),
    'remask above a threshold of self-confidence': ((0.3, 0.5, 0.7), 'threshold', 0.0, 'self')}
CASES = [*(name for name in POLICIES if name != 'remask'), *LIFECYCLE, 'remask by a remasking model']


def settings_of(case, head):
    levels, mode, randomness, guide = LIFECYCLE.get(case, ((0.9, 0.6, 0.3), 'ratio', 0.0, 'critic'))
    policy = POLICIES['remask'].make(levels, mode, randomness, GUIDES[guide].wrongness) if case.startswith('remask ') else \
        POLICIES[case].make(**{option: VALUES[option] for option in POLICIES[case].options})
    return GenerationSettings('diffusion', RULE, policy, head='wave' if head else 'none', use_critic=GUIDES[guide].asks_critic)


def run(case, head, batch, seed=4):
    """Per row what each step left in it, for all rows."""
    found = []
    for first in range(0, ROWS, batch):
        count, trace = min(batch, ROWS - first), Trace({}, torch.zeros(1))
        network = Network(MODEL, TimingAccumulator(),
                          remasking_model=REMASKING if case == 'remask by a remasking model' else None)
        tokens = torch.full((count, T), MASK)
        generate(network, Layout(tokens, tokens != MASK), settings_of(case, head), keyed(seed, 0, first, count),
                 trace.add)
        for row in range(count):  # a row that is finished earlier than its batch stays as it is
            states = [tuple(step.tokens[row].tolist()) for step in trace.steps]
            found.append([state for state, before in zip(states, [None, *states]) if state != before])
    return found


@pytest.mark.parametrize('head', [False, True])
@pytest.mark.parametrize('case', CASES)
def test_a_row_takes_the_same_steps_in_every_batch(case, head):
    alone = run(case, head, 1)
    assert len({tuple(row[-1]) for row in alone}) > 8
    assert run(case, head, 3) == alone and run(case, head, 16) == alone


@contextmanager
def rounding_errors(seed, size=1e-6):
    """Everything that the network says, off by a relative error of `size`."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(module, given, said):
        return said * (1 + size * torch.randn(said.shape, generator=generator))

    hooks = [module.register_forward_hook(disturb) for module in (
        MODEL.lm_head, MODEL.critic_head, MODEL.sampler_head.output_head, REMASKING.classifier)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize('case', CASES)
@hypothesis_settings(max_examples=4, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10 ** 6))
def test_a_rounding_error_changes_no_step(case, seed):
    """Fixed examples: with others a drawn token or a score at the very border may change, about one run in a
    hundred."""
    plain = run(case, True, ROWS, seed)
    with rounding_errors(seed):
        assert run(case, True, ROWS, seed) == plain


def test_the_disturbance_is_felt():
    tokens = torch.full((2, T), MASK)
    plain = MODEL(tokens).logits
    with rounding_errors(1):
        error = (MODEL(tokens).logits / plain - 1).abs().max()
    assert 1e-7 < error < 1e-5
    scores = plain.log_softmax(-1).amax(-1)
    assert (scores - scores[:, :1]).abs().max() < 1e-5  # all positions of an empty row are equal but for rounding
