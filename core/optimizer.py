"""The optimizers: Muon for the matrices inside the network, fused AdamW for everything else.

`torch.optim.Muon` casts every gradient to bfloat16 and works matrix by matrix. On a processor without bfloat16
arithmetic that costs more than the training step itself (docs/LOG.md). The Muon of this file orthogonalises all
matrices of one shape as a batch, in a dtype that is fast on the machine.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from core.checkpoints.heads import HEADS

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, "Muon": the quintic with the steepest slope at zero
_ITERATIONS = 5


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest semi-orthogonal matrices to `matrices` [K, rows, columns], approximately: singular values go to
    about 0.7 .. 1.2 (Newton-Schulz iteration, Jordan et al. 2024)."""
    linear, cubic, quintic = _COEFFICIENTS
    transposed = matrices.size(1) > matrices.size(2)
    x = (matrices.mT if transposed else matrices).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if iterates_squares(*x.shape[1:], dtype, x.device):
        x = _polynomial_of(x @ x.mT) @ x
    else:
        for _ in range(_ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic), x, beta=linear)
    return (x.mT if transposed else x).to(matrices.dtype)


def iterates_squares(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `orthogonalise` iterates the square matrices x @ x.mT instead of the wide matrices x.

    That takes fewer operations if there are at least three columns for two rows. But x @ x.mT holds the squares of the
    singular values. bfloat16 would lose the small ones, and so would TF32, which a GPU uses for float32 (docs/LOG.md,
    16).
    """
    exact = device.type != 'cuda' or torch.get_float32_matmul_precision() == 'highest'
    return dtype != torch.bfloat16 and exact and columns >= 2 * rows


def _polynomial_of(gram: Tensor) -> Tensor:
    """[K, b, b]: the product of all steps, a polynomial of gram = x @ x.mT. Its product with x [K, b, a] is the result
    of the iteration. Polynomials of one matrix commute, so the next x @ x.mT is step @ gram @ step."""
    linear, cubic, quintic = _COEFFICIENTS
    found = None
    for number in range(_ITERATIONS):
        step = torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic)
        step.diagonal(dim1=1, dim2=2).add_(linear)
        found = step if found is None else step @ found
        if number < _ITERATIONS - 1:
            gram = step @ gram @ step
    return found


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), scaled to the size of an AdamW update (Liu et al. 2025).

    Takes matrices only. One learning rate serves both optimizers: an update has root mean square 0.2 * lr. If
    `found_inf` (float32 scalar on the device; the name is torch's) is 1, a step changes nothing.
    """

    def __init__(self, parameters: Iterable, lr: float, momentum: float, weight_decay: float,
                 dtype: torch.dtype) -> None:
        super().__init__(parameters, {'lr': lr, 'momentum': momentum, 'weight_decay': weight_decay})
        self.dtype = dtype
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group['params']:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                self._update(parameters, shape, group)

    def _update(self, parameters: list[nn.Parameter], shape: torch.Size, group: dict) -> None:
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            if 'momentum_buffer' not in self.state[parameter]:
                self.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]['momentum_buffer'] for parameter in parameters]
        decay, taken = 1 - group['lr'] * group['weight_decay'], 1.0
        if self.found_inf is not None:
            refused = self.found_inf > 0
            gradients = [torch.where(refused, *pair) for pair in zip(buffers, gradients)]
            taken = 1 - self.found_inf
            decay = torch.where(refused, 1.0, decay)
        torch._foreach_lerp_(buffers, gradients, 1 - group['momentum'])
        nesterov = torch._foreach_lerp(gradients, buffers, group['momentum'])
        scale, rate = 0.2 * math.sqrt(max(shape)), group['lr']
        if isinstance(rate, Tensor):
            taken, rate = taken * rate, 1.0
        updates = (orthogonalise(torch.stack(nesterov), self.dtype) * taken).unbind()
        torch._foreach_mul_(parameters, decay)
        torch._foreach_add_(parameters, updates, alpha=-rate * scale)


_HEAD_MATRICES = frozenset(f'{head.module}.{name}' for head in HEADS for name in head.matrices)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes the parameter. It takes the matrices inside the trunk's layers and inside heads, but no
    embeddings, output layers, gains and biases."""
    return parameter.ndim == 2 and (name.startswith('transformer.h.') or name in _HEAD_MATRICES)


def make_optimizers(model: nn.Module, name: str, learning_rate: float, weight_decay: float, betas: tuple[float, float],
                    matrix_dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """The optimizers of `model`: name 'muon' gives [Muon, AdamW], 'adamw' gives [AdamW].

    Weight decay acts on matrices and embeddings, not on gains and biases. Every group says whether it belongs to the
    trunk. matrix_dtype is what Muon multiplies in.
    """
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = defaultdict(list)
    for key, parameter in model.named_parameters():
        matrix = name == 'muon' and is_matrix(key, parameter)
        groups[matrix, key.startswith('transformer.'), parameter.ndim >= 2].append(parameter)
    described = {matrix: [{'params': parameters, 'trunk': trunk, 'weight_decay': weight_decay if decays else 0.0}
                          for (is_muon, trunk, decays), parameters in groups.items() if is_muon == matrix]
                 for matrix in (True, False)}
    adamw = torch.optim.AdamW(described[False], lr=learning_rate, betas=betas, fused=True)
    muon = [Muon(described[True], learning_rate, 0.95, weight_decay, matrix_dtype)] if described[True] else []
    return [*muon, adamw]


def make_capturable(optimizers: Sequence[torch.optim.Optimizer], device: torch.device) -> None:
    """Keep the learning rate of every group in a tensor on `device`, where a recorded step reads it."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = torch.tensor(group['lr'], device=device)
            group['capturable'] = True  # torch's own optimizers require it


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], learning_rate: float,
                      trunk_multiplier: float = 1.0) -> None:
    """Set the learning rate of every group. The trunk's groups get trunk_multiplier times this rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = learning_rate * (trunk_multiplier if group['trunk'] else 1.0)
            if isinstance(group['lr'], Tensor):
                group['lr'].fill_(rate)
            else:
                group['lr'] = rate


def learning_rate_at(iteration: int, *, learning_rate: float, min_lr: float, warmup_iters: int, lr_decay_iters: int,
                     decay_lr: bool) -> float:
    """Linear warm-up over warmup_iters, then a half cosine down to min_lr at lr_decay_iters, then min_lr."""
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / warmup_iters
    if not decay_lr:
        return learning_rate
    progress = min(1.0, (iteration - warmup_iters) / max(1, lr_decay_iters - warmup_iters))
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)
