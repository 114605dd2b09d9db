"""Muon, the learning rate, and which parameter is in which group."""

import math

import pytest
import torch

import core.optimizer
from core.optimizer import (Muon, iterates_squares, learning_rate_at, make_optimizers, orthogonalise,
                            set_learning_rate)
from helpers.toys import toy_config
from model import GPT

CPU = torch.device('cpu')


def test_learning_rate_warms_up_and_falls():
    values = {'learning_rate': 1.0, 'min_lr': 0.1, 'warmup_iters': 4, 'lr_decay_iters': 14}
    rates = [learning_rate_at(i, **values, decay_lr=True) for i in (0, 3, 4, 9, 14, 50)]
    assert rates == pytest.approx([0.25, 1.0, 1.0, 0.55, 0.1, 0.1])
    assert learning_rate_at(50, **values, decay_lr=False) == 1.0


def test_muon_updates_are_orthogonal_and_sized():
    matrices = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalise(matrices, torch.float32))
    assert (singular > 0.6).all() and (singular < 1.3).all()
    assert torch.allclose(orthogonalise(matrices.mT, torch.float32), orthogonalise(matrices, torch.float32).mT,
                          atol=1e-5)
    left, _, right = torch.linalg.svd(matrices[0].double(), full_matrices=False)
    alignment = (orthogonalise(matrices, torch.float32)[0].double() * (left @ right)).sum() / 6
    assert 0.7 < alignment < 1.2
    parameter = torch.nn.Parameter(torch.ones(6, 10))
    parameter.grad = matrices[0].clone()
    optimizer = Muon([parameter], lr=0.1, momentum=0.95, weight_decay=0.5, dtype=torch.float32)
    optimizer.step()
    update = (torch.ones(6, 10) * (1 - 0.1 * 0.5) - parameter.detach()) / (0.1 * 0.2 * math.sqrt(10))
    assert torch.allclose(update, orthogonalise(matrices[:1], torch.float32)[0], atol=1e-4)


@pytest.mark.parametrize('shape', [(2, 12, 36), (2, 48, 12), (1, 5, 10), (2, 12, 16)])
@pytest.mark.parametrize('smallest', [0.1, 1e-6])
def test_orthogonalised_in_float32_is_the_iteration_as_published(shape, smallest):
    """Of matrices with singular values from 1 down to `smallest`, in either way of computing it."""
    generator, rank = torch.Generator().manual_seed(1), min(shape[1:])
    left, right = (torch.linalg.qr(torch.randn(shape[0], side, rank, dtype=torch.float64, generator=generator))[0]
                   for side in shape[1:])
    matrices = left * torch.logspace(0, math.log10(smallest), rank, dtype=torch.float64) @ right.mT
    expected = matrices / matrices.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        product = expected @ expected.mT
        expected = 3.4445 * expected - 4.7750 * product @ expected + 2.0315 * product @ product @ expected
    found = orthogonalise(matrices.float(), torch.float32)
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize('name', ['muon', 'adamw'])
def test_every_parameter_is_in_one_group_that_says_what_becomes_of_it(name):
    model = GPT(toy_config(add_sampler_head=True, add_critic_head=True))
    optimizers = make_optimizers(model, name, 0.1, 0.5, (0.9, 0.99), torch.float32)
    assert [type(one).__name__ for one in optimizers] == ['Muon', 'AdamW'][name == 'adamw':]
    places = {id(parameter): (type(one).__name__, group) for one in optimizers for group in one.param_groups
              for parameter in group['params']}
    assert len(places) == len([*model.parameters()]) == sum(
        len(group['params']) for one in optimizers for group in one.param_groups)
    inside = ('transformer.h.', 'sampler_head.input.weight', 'sampler_head.hidden.weight')
    for key, parameter in model.named_parameters():
        kind, group = places[id(parameter)]
        assert (kind == 'Muon') == (name == 'muon' and key.startswith(inside) and parameter.ndim == 2), key
        assert group['trunk'] == key.startswith('transformer.') and group['weight_decay'] == 0.5 * (parameter.ndim >= 2)
    set_learning_rate(optimizers, 0.2, 0.5)
    assert {(group['trunk'], group['lr']) for one in optimizers for group in one.param_groups} == {
        (True, 0.1), (False, 0.2)}


def test_a_refused_step_of_muon_changes_nothing():
    parameter = torch.nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([parameter], lr=0.1, momentum=0.95, weight_decay=0.5, dtype=torch.float32)
    for refused in (0.0, 1.0):
        before = parameter.detach().clone()
        kept = optimizer.state[parameter].get('momentum_buffer', torch.zeros(4, 6)).clone()
        parameter.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)) * (math.nan if refused else 1)
        optimizer.found_inf = torch.tensor(refused)
        optimizer.step()
        assert torch.equal(before, parameter.detach()) == bool(refused)
        assert torch.equal(kept, optimizer.state[parameter]['momentum_buffer']) == bool(refused)


def test_squares_are_iterated_in_exact_float32_alone(monkeypatch):
    wide = 64, 256
    assert iterates_squares(*wide, torch.float32, CPU) and not iterates_squares(256, 256, torch.float32, CPU)
    assert not iterates_squares(*wide, torch.bfloat16, CPU)
    monkeypatch.setattr(torch, 'get_float32_matmul_precision', lambda: 'high')
    assert iterates_squares(*wide, torch.float32, CPU)
    assert not iterates_squares(*wide, torch.float32, torch.device('cuda'))


def test_tf32_loses_nothing_where_matrices_and_not_squares_are_iterated(monkeypatch):
    """TF32 keeps 10 bits of each factor's mantissa."""
    def rounded(values):
        return ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(2, 32, 4, generator=generator) @ torch.randn(2, 4, 128, generator=generator) \
        + 0.01 * torch.randn(2, 32, 128, generator=generator)
    exact, found = orthogonalise(matrices, torch.float32), {}
    product, sum_of = torch.Tensor.__matmul__, torch.baddbmm
    monkeypatch.setattr(torch.Tensor, '__matmul__', lambda one, other: product(rounded(one), rounded(other)))
    monkeypatch.setattr(torch, 'baddbmm', lambda to, one, other, **scales: sum_of(to, rounded(one), rounded(other),
                                                                                   **scales))
    for squares in (True, False):
        monkeypatch.setattr(core.optimizer, 'iterates_squares', lambda *asked: squares)
        found[squares] = ((orthogonalise(matrices, torch.float32) - exact).norm() / exact.norm()).item()
    assert found[False] < 2e-3 < 2e-2 < found[True]
