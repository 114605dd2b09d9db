"""GPUs that are not there: tensors that say 'mps', hold their values on the CPU, and refuse what a GPU refuses.

    with emulated_mps():            an Apple GPU
        GPT(config).to('mps')
    with emulated_gpu():            the same with float64, as on a CUDA GPU: exact arithmetic stays on the device

A float64 or complex128 tensor on the device raises, whatever operation would make it; so does an operation between a
tensor of the device and one of the CPU, a number or an index apart, and pinned memory. Every operation computes on the
CPU, so the numbers are those of the CPU. A torch without such a device knows the tensors as those of 'meta', which it
can always serve; whoever asks in Python is told 'mps'.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from core.common import precision, runtime

MPS, SERVED = torch.device('mps', 0), torch.device('meta')
_refused = [torch.float64, torch.complex128]
_OPS = torch.ops.aten
_NAMING = (torch.device, torch.autocast)  # what takes the name of a device and makes no tensor


class Refused(RuntimeError):
    """What the device cannot do."""


class AppleTensor(torch.Tensor):
    """A tensor on the emulated device; its values are in `inner`, on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> 'AppleTensor':
        if inner.dtype in _refused:
            raise Refused(f'the device has no {inner.dtype}')
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), strides=inner.stride(), dtype=inner.dtype,
                                                   storage_offset=inner.storage_offset(), device=SERVED)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f'AppleTensor({self.inner})'

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.inner.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _computed(operation, args, kwargs or {})


def _mixes(operation: Any, args: tuple, kwargs: dict) -> bool:
    """Whether an operation has a tensor of the device and one of the CPU that it may not have."""
    if operation in (_OPS.copy_.default, _OPS._to_copy.default):
        return False
    if operation in (_OPS.index.Tensor, _OPS.index_put_.default, _OPS.index_put.default, _OPS._index_put_impl_.default):
        indices, args = args[1], (args[0], *args[2:])  # indices may be on the CPU
        if not isinstance(args[0], AppleTensor) and any(isinstance(index, AppleTensor) for index in indices):
            return True
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [isinstance(tensor, AppleTensor) for tensor in tensors]
    return any(ours) and not all(mine or tensor.dim() == 0 for mine, tensor in zip(ours, tensors))


def _computed(operation: Any, args: tuple, kwargs: dict) -> Any:
    if _mixes(operation, args, kwargs):
        raise Refused(f'{operation} of tensors on the device and on the CPU')
    if operation is _OPS._pin_memory.default:
        raise Refused('the device has no pinned memory')
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, AppleTensor)]
    ours = bool(tensors)
    if operation is _OPS.copy_.default:
        ours = isinstance(args[0], AppleTensor)
    if kwargs.get('device') is not None:
        ours = torch.device(kwargs['device']) == SERVED
        kwargs = {**kwargs, 'device': torch.device('cpu') if ours else kwargs['device']}
    found = operation(*tree_map_only(AppleTensor, lambda tensor: tensor.inner, args),
                      **tree_map_only(AppleTensor, lambda tensor: tensor.inner, kwargs))
    if not ours:
        return found
    known = {id(tensor.inner): tensor for tensor in tensors}  # operations in place give back what they were given
    return tree_map_only(
        torch.Tensor, lambda tensor: known[id(tensor)] if id(tensor) in known else AppleTensor(tensor), found)


class _Operations(TorchDispatchMode):
    """What makes tensors from nothing, on whichever device."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _computed(operation, args, kwargs or {})


def _served(value: Any) -> Any:
    """'mps' as what torch serves it as."""
    if isinstance(value, str | torch.device) and str(value).split(':')[0] == 'mps':
        return SERVED
    return value


class _Functions(TorchFunctionMode):
    """What is asked in Python before any operation."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        ours = any(isinstance(leaf, AppleTensor) for leaf in tree_leaves(args))
        if ours and getattr(function, '__self__', None) is torch.Tensor.device:
            return MPS
        if ours and getattr(function, '__self__', None) is torch.Tensor.is_meta:
            return False
        if ours and function is torch.Tensor.__deepcopy__:
            return _copied(*args)
        if ours and function is torch.Tensor.tolist:
            return args[0].cpu().tolist()
        if ours and function is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if ours and function is torch.Tensor.pin_memory:
            raise Refused('the device has no pinned memory')
        if function in _NAMING:
            return function(*args, **kwargs)
        args, kwargs = tree_map(_served, args), tree_map(_served, kwargs)
        if function in (torch.tensor, torch.as_tensor) and kwargs.get('device') == SERVED:
            return function(*args, **{**kwargs, 'device': 'cpu'}).to(SERVED)
        return function(*args, **kwargs)


def _copied(tensor: torch.Tensor, memo: dict) -> torch.Tensor:
    found = AppleTensor(tensor.detach().inner.clone())
    if isinstance(tensor, torch.nn.Parameter):
        found = torch.nn.Parameter(found, requires_grad=tensor.requires_grad)
    return memo.setdefault(id(tensor), found)


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
               dropout_p: float = 0.0, is_causal: bool = False) -> torch.Tensor:
    if attn_mask is not None:  # the operation below would add True as 1
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    return _OPS._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal)[0]


@contextmanager
def emulated_mps() -> Iterator[None]:
    """The emulated device is there."""
    with pytest.MonkeyPatch.context() as patch, _Functions(), _Operations():
        patch.setattr(torch.backends.mps, 'is_available', lambda: True)
        patch.setattr(torch.mps, 'synchronize', lambda: None)
        patch.setattr(runtime, 'measure_matrix_rate', lambda device, dtype: 1e9)  # seconds, of no meaning here
        patch.setattr(torch.__future__, 'get_swap_module_params_on_conversion', lambda: True)  # tied weights stay tied
        yield


@contextmanager
def emulated_gpu() -> Iterator[None]:
    """The emulated device is there, and it has float64."""
    with pytest.MonkeyPatch.context() as patch, emulated_mps():
        patch.setattr(precision, '_WITHOUT_FLOAT64', ())
        kept = _refused[:]
        _refused.clear()
        try:
            yield
        finally:
            _refused.extend(kept)
