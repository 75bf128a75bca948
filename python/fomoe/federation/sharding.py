# SPDX-License-Identifier: Apache-2.0
"""Shared parameters in shards, one per rank of a site, by torch's FSDP2.

Parameters whose rows belong to experts stay whole on every rank: they come and go by row. A sharded
parameter, its gradient, and what is shaped like it, are DTensors of the whole shape; everything
here takes plain tensors as well, which are whole already.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

__all__ = [
    "clip_gradients",
    "copy_part",
    "gather",
    "is_sharded",
    "local",
    "shard",
    "sharded_like",
    "whole",
]


def shard(model: nn.Module, group: dist.ProcessGroup, device: torch.device) -> None:
    """Deal the shared parameters out to the ranks of ``group``, and move the model to ``device``.

    Every module that is called as an entry of a ModuleList, as the blocks of a decoder are, gathers
    its parameters when it runs; the model itself gathers the rest.
    """
    stacked = [
        module
        for module in model.modules()
        if hasattr(module, "expert_ids") or hasattr(module, "group_ids")
    ]
    whole_ones = set()
    for module in stacked:
        module.to(device)
        whole_ones |= set(module.parameters(recurse=False))
    mesh = DeviceMesh.from_group(group, device.type)
    # The model itself, too, puts its parameters away after a forward. Else it would keep them after
    # an evaluation, and who clears the gradients then would not find those of the shards.
    for module in [*_blocks(model), model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole_ones)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The entries of the outermost ModuleLists, but those that are containers themselves."""
    found = []
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            found += [entry for entry in child if _is_callable(entry)]
        else:
            found += _blocks(child)
    return found


def _is_callable(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; of a sharded one a copy, which takes all ranks to make."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(values: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """The whole tensors in host memory, for ranks that ``keep`` them; all ranks call it."""
    kept = {}
    for name, value in values.items():
        if keep:
            kept[name] = whole(value).cpu()
        elif is_sharded(value):
            whole(value)
    return kept


def sharded_like(part: Tensor, tensor: Tensor) -> Tensor:
    """What is to be seen as the part of something shaped like ``tensor``; shares memory."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(
        part,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def copy_part(target: Tensor, value: Tensor) -> None:
    """Overwrite this rank's part of ``target`` with that of ``value``, whole or sharded alike."""
    part = local(value)
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        mesh = target.device_mesh
        # FSDP2 cuts dimension 0 as torch.chunk does; the last ranks may get nothing.
        parts = value.chunk(mesh.size())
        rank = mesh.get_local_rank()
        part = parts[rank] if rank < len(parts) else value[:0]
    with torch.no_grad():
        local(target).copy_(part.reshape(local(target).shape))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale the gradients of a model so that the norm of all of it is at most ``max_norm``."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    sharded = [p.grad for p in with_gradient if isinstance(p.grad, DTensor)]
    if not sharded:
        nn.utils.clip_grad_norm_(with_gradient, max_norm)
        return
    plain = [
        p.grad for p in with_gradient if not isinstance(p.grad, DTensor) and p.grad is not None
    ]
    norms = [whole(nn.utils.get_total_norm(group)) for group in (sharded, plain)]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as torch's clip_grad_norm_
    for gradient in [*sharded, *plain]:
        local(gradient).mul_(factor)
