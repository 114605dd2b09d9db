"""Where exact arithmetic is done: the one place that knows which devices have no float64.

Random numbers, draws, scores, likelihoods and sums of validation are float64. On a processor and on a CUDA GPU they
stay where the network is. Apple GPUs ('mps') have no float64: there the network's outputs come to the processor as they
are, and everything exact is computed there, with the same operations. So whoever takes outputs of a network out of it
calls `to_exact` first, and tensors that are made for them are made on `exact_device`.
"""

import torch
from torch import Tensor

_WITHOUT_FLOAT64 = ('mps',)


def exact_device(device: torch.device | str) -> torch.device:
    """Where float64 belongs that goes with tensors on `device`."""
    device = torch.device(device)
    return torch.device('cpu') if device.type in _WITHOUT_FLOAT64 else device


def to_exact(tensor: Tensor) -> Tensor:
    """`tensor` [...] where float64 exists: itself, or its copy on the processor; values and dtype stay."""
    return tensor.to(exact_device(tensor.device))
