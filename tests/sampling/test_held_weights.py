"""Held weights: the numbers of autocast, from weights that are cast once."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from core.common.layers import attend_from_one
from core.sampling.held_weights import HeldLinear, with_held_weights
from model import GPT, GPTConfig

LENGTH = 16


def made(**changes: object) -> GPT:
    """A small model with random weights everywhere, so that every matrix counts."""
    model = GPT(GPTConfig(block_size=LENGTH, vocab_size=20, n_layer=2, n_head=2, n_embd=32, mask_token_id=16, **changes))
    generator = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        weight.data = weight.data + 0.1 * torch.randn(weight.shape, generator=generator)
    return model.eval().requires_grad_(False)


def causal_reading(model: GPT) -> torch.Tensor:
    """Hidden states of one text, token by token with a cache, in bfloat16."""
    tokens = torch.arange(LENGTH).remainder(16)[None].repeat(2, 1)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        cache = model.new_cache(2)
        return torch.cat([model.encode(tokens[:, place:place + 1], cache=cache) for place in range(LENGTH)], dim=1)


def block_reading(model: GPT) -> torch.Tensor:
    """Hidden states of a call that reads a finished block and the next one, in bfloat16."""
    tokens = torch.arange(8).remainder(16)[None].repeat(2, 1)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        return model.encode_blocks(tokens, 4, model.new_cache(2), 4)


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('read, kind', [(causal_reading, {'attention_type': 'causal'}),
                                        (block_reading, {'attention_type': 'block', 'block_length': (4,)})])
def test_held_weights_give_the_numbers_of_autocast(read: Callable[[GPT], torch.Tensor], kind: dict, bias: bool) -> None:
    model = made(bias=bias, **kind)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    held = with_held_weights(model, torch.bfloat16)
    assert torch.equal(read(held), read(model))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    layers = [part for layer in held.transformer['h'] for part in layer.modules()]
    assert sum(isinstance(part, HeldLinear) for part in layers) == 8
    assert not any(isinstance(part, nn.Linear) for part in layers)
    assert all(part.weight.dtype is torch.bfloat16 for part in layers if isinstance(part, HeldLinear))


def test_weights_that_cannot_be_packed_are_cast_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(attention_type='causal')
    monkeypatch.setattr('core.sampling.held_weights.can_pack', lambda weight: False)
    held = with_held_weights(model, torch.bfloat16)
    assert torch.equal(causal_reading(held), causal_reading(model))


def test_float32_samples_from_the_model_itself() -> None:
    model = made(attention_type='causal')
    assert with_held_weights(model, None) is model


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_one_query_attends_as_all_do(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(3, 2, size, 16, generator=generator).to(dtype) for size in (1, 9, 9))
    weights = (query.double() @ key.double().transpose(2, 3) / 4).softmax(-1)
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype is torch.bfloat16):
        found = attend_from_one(query, key, value)
    assert found.dtype is dtype
    expected = weights @ value.double()
    torch.testing.assert_close(found, expected.to(dtype), rtol=0.004 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)
