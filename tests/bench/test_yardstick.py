"""The yardstick of training against the formulas in float64, and one step of its optimizer by hand."""

import math

import numpy as np
import pytest
import torch

from core.bench.yardstick import BETAS, GRAD_CLIP, LEARNING_RATE, WEIGHT_DECAY, Baseline, BaselineTraining

V, T, D, H = 11, 6, 8, 2


def awake(bias: bool) -> Baseline:
    """A small model in float64 in which every weight counts."""
    model = Baseline(T, V, 2, H, D, bias).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    return model


def by_formula(model: Baseline, inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, float]:
    """Logits and loss of one row at a time, head by head and position by position."""
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}

    def linear(name, x):
        return x @ weights[f'{name}.weight'].T + weights.get(f'{name}.bias', 0.0)

    def norm(name, x):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-5)
        return scaled * weights[f'{name}.weight'] + weights.get(f'{name}.bias', 0.0)

    def gelu(x):
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    logits, losses = [], []
    for row, truth in zip(inputs, targets):
        x = weights['tokens.weight'][row] + weights['positions.weight'][:len(row)]
        for layer in range(2):
            block = f'blocks.{layer}'
            joined = linear(f'{block}.to_query_key_value', norm(f'{block}.attention_norm', x))
            mixed = np.zeros_like(x)
            for head in range(H):
                query, key, value = (joined[:, part * D + head * D // H:part * D + (head + 1) * D // H]
                                     for part in range(3))
                for position in range(len(row)):
                    scores = np.exp(key[:position + 1] @ query[position] / math.sqrt(D // H))
                    mixed[position, head * D // H:(head + 1) * D // H] = \
                        (scores / scores.sum()) @ value[:position + 1]
            x = x + linear(f'{block}.from_attention', mixed)
            x = x + linear(f'{block}.narrow', gelu(linear(f'{block}.widen', norm(f'{block}.mlp_norm', x))))
        logits.append(norm('norm', x) @ weights['tokens.weight'].T)
        losses += [np.log(np.exp(logits[-1][position]).sum()) - logits[-1][position, token]
                   for position, token in enumerate(truth)]
    return np.stack(logits), float(np.mean(losses))


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('length', [T, T - 2])
def test_logits_and_loss_are_those_of_the_formulas(bias, length):
    model, random = awake(bias), np.random.default_rng(0)
    inputs, targets = random.integers(0, V, (2, 3, length))
    assert any(name.endswith('bias') for name, _ in model.named_parameters()) == bias
    logits, loss = model(torch.from_numpy(inputs), torch.from_numpy(targets))
    expected, expected_loss = by_formula(model, inputs, targets)
    assert np.abs(logits.detach().numpy() - expected).max() < 1e-10
    assert loss.item() == pytest.approx(expected_loss, abs=1e-12)


def test_a_fresh_model_knows_nothing_and_its_residual_parts_start_smaller():
    model = Baseline(64, 67, 4, 2, 64)
    tokens = torch.randint(67, (8, 64), generator=torch.Generator().manual_seed(0))
    assert model(tokens, tokens.roll(1, 0))[1].item() == pytest.approx(math.log(67), abs=0.1)
    block = model.blocks[2]
    for weight, deviation in ((block.widen, 0.02), (block.to_query_key_value, 0.02), (model.tokens, 0.02),
                              (block.narrow, 0.02 / math.sqrt(8)), (block.from_attention, 0.02 / math.sqrt(8))):
        assert weight.weight.std().item() == pytest.approx(deviation, rel=0.05)


def test_one_step_is_clipped_decayed_adam_on_the_next_token(monkeypatch):
    model, tokens = awake(bias=True), np.random.default_rng(1).integers(0, V, 40, dtype=np.uint16)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    training = BaselineTraining(model, tokens, 3, T)
    monkeypatch.setattr(torch, 'randint', lambda high, size, generator: torch.tensor([0, 7, high - 1]))
    loss = training.step()
    windows = np.stack([tokens[start:start + T + 1].astype(np.int64) for start in (0, 7, 40 - T - 1)])
    twin = awake(bias=True)
    expected = twin(torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:]))[1]
    expected.backward()
    assert loss.item() == expected.item() and not loss.requires_grad
    total = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in twin.parameters()))
    assert total > GRAD_CLIP, 'clipping must show'
    for (name, now), reference in zip(model.named_parameters(), twin.parameters()):
        gradient = reference.grad * GRAD_CLIP / (total + 1e-6)
        moment = training.optimizer.state[now]['exp_avg']
        assert torch.allclose(moment, (1 - BETAS[0]) * gradient, rtol=1e-6, atol=1e-12), name
        decay = 1 - LEARNING_RATE * (WEIGHT_DECAY if now.ndim == 2 else 0.0)
        updated = before[name] * decay - LEARNING_RATE * gradient / (gradient.abs() + 1e-8)
        assert torch.allclose(now, updated, rtol=1e-6, atol=1e-9), name
        assert now.grad is None


def test_it_learns_a_text_that_repeats():
    tokens = np.tile(np.arange(V, dtype=np.uint16), 30)
    training = BaselineTraining(Baseline(T, V, 2, H, 32), tokens, 8, T)
    losses = [training.step().item() for _ in range(150)]
    assert losses[0] > 2.2 and losses[-1] < 0.5
