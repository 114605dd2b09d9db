"""Where exact arithmetic is done: the one place that knows which devices have no float64.

Random numbers, draws, scores, likelihoods and sums of validation are float64. On a processor and on a CUDA GPU they
stay where the network is. Apple GPUs ('mps') have no float64. Their network's outputs are copied to the processor,
which computes everything exact with the same operations. So code that uses a network's outputs calls `to_exact` first,
and makes new tensors for them on `exact_device`.
"""

import torch
from torch import Tensor

_WITHOUT_FLOAT64 = ('mps',)


def exact_device(device: torch.device | str) -> torch.device:
    """The device for the float64 tensors of a network on `device`."""
    device = torch.device(device)
    return torch.device('cpu') if device.type in _WITHOUT_FLOAT64 else device


def to_exact(tensor: Tensor) -> Tensor:
    """`tensor` [...] on a device that has float64: itself, or its copy on the processor. Values and dtype stay."""
    return tensor.to(exact_device(tensor.device))
