"""Verified drafts: the causal model's own law whatever the drafts, fewer calls, and the call that checks."""

import pytest
import torch

from core.common.drawing import DrawRule, allowed_ids
from core.common.randomness import keyed
from core.common.timing import TimingAccumulator
from core.evaluation.likelihood import Scorer, log_likelihood
from core.sampling.block_network import BlockNetwork
from core.sampling.generation import GenerationSettings
from core.sampling.network import Network
from core.sampling.policies import POLICIES
from core.sampling.prompt import Layout
from core.sampling.verified import check, write_verified
from helpers.toys import V0, awake, toy_config
from model import GPT

T, MASK = 6, V0
ALLOWED = allowed_ids(V0 + 4, V0)
WINDOW = {'sampler_context_left': 2, 'sampler_context_right': 1}


def mixture(scale=0.4, **changes):
    config = toy_config(block_size=T, attention_type='block', block_length=(1, 3), n_layer=2, add_sampler_head=True,
                        sampler_order='left_to_right', sampler_gate=True, **{
                            **({} if 'sampler_kind' in changes else WINDOW), **changes})
    model = awake(GPT(config)).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(scale)  # so that no text is rare
    return model


def written(model, rows, length, prompt=0, seed=4, temperature=1.0):
    tokens = torch.full((rows, length), MASK)
    tokens[:, :prompt] = torch.arange(prompt) % V0
    network = Network(model, TimingAccumulator())
    settings = GenerationSettings('diffusion', DrawRule(ALLOWED, temperature), head='left_to_right', block_length=3)
    return write_verified(network, Layout(tokens, tokens != MASK), settings, keyed(seed, 0, 0, rows), None), network


@pytest.mark.parametrize('predicts', ['own', 'next'])
@pytest.mark.parametrize('positions', ['rotary', 'absolute'])
def test_the_checking_call_reads_what_blocks_of_one_read(positions, predicts):
    model, text = mixture(1.0, position_encoding=positions, predicts=predicts), torch.randint(0, V0, (3, T))
    whole = model.encode_streams(torch.full_like(text, MASK), text, 1)
    cache, found = model.new_cache(3, spare=4), []
    for first in (0, 2, 4):
        unread = text[:, max(0, first - 2):first]
        found.append(model.encode_next(torch.cat((unread, text[:, first:first + 2]), dim=1), cache, unread.size(1)))
        assert cache.length == first
        again = model.encode_next(text[:, first:first + 2], cache, 0)
        torch.testing.assert_close(again, found[-1])
    torch.testing.assert_close(torch.cat(found, dim=1), whole)


@pytest.mark.parametrize('length, changes', [(4, {}), (5, {}), (5, {'predicts': 'next'}),
                                             (5, {'sampler_kind': 'layer_neighbours'})])
def test_texts_come_as_often_as_the_causal_model_writes_them(length, changes):
    """Counted against the enumerated law of the model at blocks of one; blocks of three, the last one shorter."""
    model, rows = mixture(**changes), 60_000
    made, _ = written(model, rows, length)
    texts = torch.cartesian_prod(*[torch.arange(V0)] * length)
    scorer = Scorer(POLICIES['left_to_right'].make(iterations=1), 'none', ALLOWED, 1)
    law = log_likelihood(Network(model, TimingAccumulator()), texts, scorer, keyed(1, 0, 0, len(texts))).exp()
    assert law.sum().item() == pytest.approx(1, abs=1e-9) and (rows * law).min() > 5
    counts = (made.tokens * (V0 ** torch.arange(length - 1, -1, -1))).sum(1).bincount(minlength=len(texts))
    degrees = len(texts) - 1
    statistic = ((counts - rows * law) ** 2 / (rows * law)).sum()
    assert abs(statistic - degrees) < 4 * (2 * degrees) ** 0.5
    expected = log_likelihood(Network(model, TimingAccumulator()), made.tokens[:50], scorer, keyed(1, 0, 0, 50))
    torch.testing.assert_close(made.confidence[:50].sum(1), expected)


def test_a_draft_from_the_target_itself_is_always_kept():
    scores = torch.randn(4000, 3, V0, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(-1)
    drafts = torch.randint(0, V0, (4000, 3), generator=torch.Generator().manual_seed(2))
    found = check(scores, scores, drafts, torch.zeros(4000, dtype=torch.int64), keyed(1, 0, 0, 4000))
    assert torch.equal(found.tokens, drafts) and (found.kept == 3).all()


def test_one_position_has_the_law_of_the_target_whatever_the_draft():
    rows, target = 200_000, torch.tensor([0.6, 0.3, 0.1]).double().log()
    draft = torch.tensor([0.1, 0.2, 0.7]).double()
    drafts = torch.multinomial(draft, 2 * rows, replacement=True, generator=torch.Generator().manual_seed(3))
    found = check(target.expand(rows, 2, 3), draft.log().expand(rows, 2, 3), drafts.view(rows, 2),
                  torch.zeros(rows, dtype=torch.int64), keyed(2, 0, 0, rows))
    share = found.tokens[:, 0].bincount(minlength=3) / rows
    assert share.tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.005)
    assert (found.kept > 1).double().mean().item() == pytest.approx(0.1 + 0.2 + 0.1, abs=0.005)  # 1 - TV(p, q)


def test_prompts_stay_rows_do_not_depend_on_their_batch_and_calls_are_counted():
    model = mixture(1.0)
    made, network = written(model, 4, 14, prompt=4)
    assert torch.equal(made.tokens[:, :4], torch.arange(4).expand(4, -1) % V0) and (made.tokens < V0).all()
    tokens = torch.full((1, 14), MASK)
    tokens[:, :4] = torch.arange(4) % V0
    settings = GenerationSettings('diffusion', DrawRule(ALLOWED), head='left_to_right', block_length=3)
    for row in range(4):
        alone = Network(model, TimingAccumulator())
        found = write_verified(alone, Layout(tokens, tokens != MASK), settings, keyed(4, 0, row, 1), None)
        assert torch.equal(found.tokens[0], made.tokens[row]) and alone.trunk_calls <= network.trunk_calls


def test_a_block_is_drafted_from_one_trunk_call(monkeypatch):
    calls, encode = [], BlockNetwork.encode
    monkeypatch.setattr(BlockNetwork, 'encode', lambda self, tokens: calls.append(1) or encode(self, tokens))
    made, network = written(mixture(1.0), 4, 9)
    assert len(calls) == 3 and network.trunk_calls > 6  # three blocks; each row refuses something now and then
    assert (made.tokens < V0).all()
