"""Weights, gradients, moments and averages cut over the ranks, for models that are too large for one rank.

FSDP2 (Zhao et al. 2023, arXiv 2304.11277; `torch.distributed.fsdp.fully_shard`): every tensor is cut along its first
dimension. A layer's weights are gathered when the layer runs. Each rank keeps the average of its part of the gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from core.common.runtime import Runtime
from model import GPT


def shard(objective: nn.Module, averaged: GPT, runtime: Runtime) -> DeviceMesh:
    """Cut `objective` (which holds the model) and the averaged model over all ranks, in place; returns these ranks.

    Each layer is gathered by itself. All else is gathered for a whole pass, since heads and loss read it directly.
    """
    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
    for model in (objective.model, averaged):
        for block in model.transformer['h']:
            fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    fully_shard(averaged, mesh=mesh)
    register_fsdp_forward_method(averaged, 'encode')
    averaged.set_reshard_after_forward(False)
    return mesh


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside the block every rank holds the whole `model` and may call it any number of times. All ranks must enter.
    Does nothing for a model that is not cut."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


def whole(value: object, keep: bool = True) -> object:
    """`value` (a tensor, or lists and dicts of tensors) with every cut tensor joined in the host's memory. All ranks
    must call this. A rank without `keep` gets None for these tensors."""
    if isinstance(value, dict):
        return {key: whole(one, keep) for key, one in value.items()}
    if isinstance(value, list):
        return [whole(one, keep) for one in value]
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if keep else None


def whole_weights(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The state dict of `model` as `whole` gives it; a tied matrix is one tensor under both names."""
    found = {id(parameter): whole(parameter.detach(), keep) for parameter in model.parameters()}
    return {name: found[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


def cut(value: object, mesh: DeviceMesh) -> object:
    """The reverse of `whole`: each tensor with a dimension becomes this rank's part of it; everything else stays."""
    if isinstance(value, dict):
        return {key: cut(one, mesh) for key, one in value.items()}
    if isinstance(value, list):
        return [cut(one, mesh) for one in value]
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    return distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)  # each rank has read the same file
