"""The exact oracle of the policies' tests (helpers/policy_laws.py) once more, as a model of another library with ids in
another order, a frame and a shift: likelihoods and draws through the adapter follow the same enumerated laws."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from core.common.drawing import DrawRule
from core.common.errors import UserError
from core.common.randomness import RowRandom, keyed
from core.common.timing import TimingAccumulator
from core.pretrained.trunk import Framing, PretrainedTrunk, detach_output_layer, sees_both_sides
from core.sampling.generation import GenerationSettings, generate
from core.sampling.network import Network
from core.sampling.path_likelihood import Scorer, log_likelihood
from core.sampling.policies import POLICIES
from core.sampling.prompt import Layout
from helpers import policy_laws as laws
from helpers.policy_laws import ORACLE, T, V, V0, law_of, tokens_of
from model import GPTConfig

MASK, BEGIN, END = 0, 5, 6  # ids of the model under the adapter, whose text has the ids 2, 4 and 1
THEIRS = torch.tensor([2, 4, 1, MASK, 3, BEGIN, END])  # the id under the adapter of each of the oracle's ids
OURS = THEIRS.argsort()
ALLOWED = torch.zeros(V, dtype=torch.bool).index_fill(0, THEIRS[:V0], True)


class OracleNetwork(nn.Module):
    """The oracle in the form of the transformers library. next_token: each position predicts the one after it."""

    def __init__(self, next_token, extra_bias=False):
        super().__init__()
        self.next_token = next_token
        self.decoder = nn.Linear(V, V, bias=False, dtype=torch.float64)
        self.decoder.weight = nn.Parameter(torch.eye(V, dtype=torch.float64))
        self.bias = nn.Parameter(torch.linspace(0, 3, V, dtype=torch.float64)) if extra_bias else None
        self.broken = False

    def get_output_embeddings(self):
        return self.decoder

    def forward(self, input_ids, attention_mask=None):
        assert attention_mask is None and (input_ids[:, 0] == BEGIN).all() and (input_ids[:, -1] == END).all()
        hidden = ORACLE.encode(OURS[input_ids[:, 1:-1]])[..., OURS]  # [B, T, V], columns in the order of THEIR ids
        if self.bias is not None:
            hidden = hidden - self.bias
        framed = torch.full((len(input_ids), T + 2, V), 9.0, dtype=torch.float64)
        framed[:, 0 if self.next_token else 1:][:, :T] = hidden
        logits = self.decoder(framed) if self.bias is None else self.decoder(framed) + self.bias
        return SimpleNamespace(logits=logits.square() if self.broken else logits)


def make(next_token, extra_bias=False):
    network = OracleNetwork(next_token, extra_bias)
    tap, lm_head = detach_output_layer(network, torch.tensor([[BEGIN, *THEIRS[[0, 1, 2, 0]].tolist(), END]]))
    config = GPTConfig(block_size=T, vocab_size=V, n_layer=1, n_head=1, n_embd=V, position_encoding='absolute',
                       mask_token_id=MASK)
    return PretrainedTrunk(network, tap, lm_head, Framing((BEGIN,), (END,)), config, next_token)


WAYS = {'own position': make(False), 'next position': make(True), 'a bias of its own': make(False, True)}
LAWS = {'left_to_right': laws.left_to_right, 'strided': laws.strided, 'margin': laws.margin, 'entropy': laws.entropy}


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('policy', LAWS)
def test_the_exact_likelihood_is_the_enumerated_law(way, policy):
    texts = THEIRS[torch.tensor(list(product(range(V0), repeat=T)))]
    for calls in (2, 3, 4):
        scorer = Scorer(POLICIES[policy].make(iterations=calls), 'none', ALLOWED)
        network = Network(WAYS[way], TimingAccumulator())
        found = log_likelihood(network, texts, scorer, RowRandom(3, 0, torch.full((len(texts),), 11))).exp()
        torch.testing.assert_close(found, tokens_of(law_of(LAWS[policy](calls), calls)), rtol=1e-9, atol=1e-12)
        assert network.trunk_calls == calls


@pytest.mark.parametrize('way', WAYS)
def test_samples_follow_the_law_and_hold_no_special_id(way):
    rows, steps = 20_000, 2
    layout = Layout(torch.full((rows, T), MASK), torch.zeros(rows, T, dtype=torch.bool))
    settings = GenerationSettings('diffusion', DrawRule(ALLOWED), POLICIES['margin'].make(iterations=steps))
    made = generate(Network(WAYS[way], TimingAccumulator()), layout, settings, keyed(5, 0, 0, rows)).tokens
    assert ALLOWED[made].all()
    weights = torch.tensor([V0 ** (T - 1 - place) for place in range(T)])
    counts = torch.bincount((OURS[made] * weights).sum(1), minlength=V0 ** T).double()
    expected = tokens_of(law_of(laws.margin(steps), steps)) * rows
    kept = expected > 5
    statistic = ((counts - expected).square() / expected)[kept].sum().item()
    degrees = int(kept.sum()) - 1
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


def test_logits_that_are_no_product_are_refused():
    network = OracleNetwork(False)
    network.broken = True
    with pytest.raises(UserError, match='are not its output matrix times hidden states'):
        detach_output_layer(network, torch.tensor([[BEGIN, 2, 4, 1, 2, END]]))


def test_whether_it_sees_both_sides():
    texts = torch.tensor([[MASK, MASK, MASK, 2], [MASK, MASK, MASK, 4]])
    assert sees_both_sides(WAYS['own position'], texts)
    assert not sees_both_sides(WAYS['own position'], texts[:1].expand(2, -1))
