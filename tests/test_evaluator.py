"""Validation: fixed, independent of batching, and equal to the enumerated bound."""

import itertools
import math

import pytest
import torch

from conftest import awake
from core.evaluator import fixed_windows, validate
from core.runtime import Runtime
from model import GPT, GPTConfig
from sample_utils import allowed_ids

RUNTIME = Runtime(torch.device('cpu'), torch.float32, False)


def model_of(corpus, **changes) -> GPT:
    vocabulary = corpus.vocabulary
    config = GPTConfig(block_size=4, vocab_size=vocabulary.size, n_layer=1, n_head=2, n_embd=8,
                       mask_token_id=vocabulary.mask_token_id, **changes)
    return awake(GPT(config)).eval()


def test_validation_is_the_enumerated_bound(small_corpus):
    """Every window of four with every mask, in float64, against many stratified windows with one mask each."""
    corpus, V0 = small_corpus, small_corpus.vocabulary.base_size
    model, allowed = model_of(corpus), allowed_ids(corpus.vocabulary.size, corpus.vocabulary.base_size)
    windows = fixed_windows(corpus.tokens('val'), 4000, 4)
    exact = torch.zeros(len(windows)).double()
    with torch.no_grad():
        for mask in torch.tensor(list(itertools.product([False, True], repeat=4)))[1:]:
            logits = model(windows.masked_fill(mask, V0)).logits.double()[..., :V0]
            cost = -torch.log_softmax(logits, -1).gather(-1, windows[..., None]).squeeze(-1)
            exact += (cost * mask).sum(1) / mask.sum() / (4 * math.comb(4, int(mask.sum())))
    found = validate(model, corpus, RUNTIME, allowed, windows=4000, batch_size=500)
    assert abs(found.value - exact.mean().item()) < 4 * found.standard_error
    assert found.standard_error < 0.02
    assert found.bits == pytest.approx(found.value / math.log(2)) and found.unit == 'character'


def test_validation_depends_on_nothing_but_the_model(small_corpus):
    model, allowed = model_of(small_corpus), allowed_ids(small_corpus.vocabulary.size, small_corpus.vocabulary.base_size)
    values = []
    for batch_size, noise in ((8, 0), (8, 5), (5, 1)):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        values.append(validate(model, small_corpus, RUNTIME, allowed, windows=40, batch_size=batch_size).value)
        assert torch.equal(state, torch.get_rng_state())
    assert values[0] == values[1] and values[2] == pytest.approx(values[0], rel=1e-6)


def test_causal_validation_is_the_exact_likelihood(small_corpus):
    model, V0 = model_of(small_corpus, attention_type='causal'), small_corpus.vocabulary.base_size
    found = validate(model, small_corpus, RUNTIME, allowed_ids(small_corpus.vocabulary.size, V0), windows=10, batch_size=4)
    windows, total = fixed_windows(small_corpus.tokens('val'), 10, 5), 0.0
    with torch.no_grad():
        for row in windows:
            for place in range(4):
                logits = model(row[None, :place + 1]).logits[0, -1, :V0].double()
                total -= torch.log_softmax(logits, 0)[row[place + 1]].item()
    assert found.value == pytest.approx(total / 40, rel=1e-5)


def test_windows_reach_from_the_first_to_the_last_token(small_corpus):
    tokens = small_corpus.tokens('val')
    windows = fixed_windows(tokens, 7, 4)
    assert windows[0].tolist() == tokens[:4].tolist() and windows[-1].tolist() == tokens[-4:].tolist()
