# SPDX-License-Identifier: Apache-2.0
"""Names of a model's tensors, independent of which experts are resident.

A module with an ``expert_ids`` attribute stacks what belongs to single experts: row i of dim 0 of
each of its own parameters belongs to expert ``expert_ids[i]``, or to nobody here if that is None.
Every other parameter is shared; one of a module with ``group_ids``, the heads of groups stacked in
the same way, row by row. A router that scores all experts says ``on_every_site = True``, for
its rows are there whether or not the expert is resident.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ModelTensor:
    """A whole shared parameter, or the row of one expert or group in a stacked one.

    ``name`` is unique over all sites: the row of expert 17 in the parameter
    ``layers.3.moe.experts.w1`` is ``layers.3.moe.experts.17.w1``. ``layer`` counts the modules from
    0 that have experts within; it and ``expert`` are None for a shared tensor, and ``row`` is for a
    whole parameter.
    """

    name: str
    parameter: nn.Parameter
    row: int | None = None
    layer: int | None = None
    expert: int | None = None
    on_every_site: bool = True

    def of(self, stacked: Tensor) -> Tensor:
        """A view of the part of ``stacked``, shaped like the parameter, that is this tensor's."""
        return stacked if self.row is None else stacked[self.row]

    @property
    def value(self) -> Tensor:
        """The tensor itself, detached: a view of the parameter."""
        return self.of(self.parameter.detach())

    @property
    def is_trained(self) -> bool:
        return self.parameter.requires_grad

    @property
    def num_elements(self) -> int:
        total = self.parameter.numel()
        return total if self.row is None else total // self.parameter.shape[0]


def expert_tensor_name(parameter_name: str, expert_id: int) -> str:
    """Name of one expert's or group's row: its global id goes before the last component.

    ``layers.3.moe.experts.w1`` and expert 17 give ``layers.3.moe.experts.17.w1``.
    """
    module_name, _, tensor_name = parameter_name.rpartition(".")
    prefix = f"{module_name}." if module_name else ""
    return f"{prefix}{expert_id}.{tensor_name}"


def model_tensors(model: nn.Module) -> Iterator[ModelTensor]:
    """Every shared parameter, every expert's and every group's row, in registration order.

    A parameter that two modules share comes once.

    Raises
    ------
    ValueError
        If a stacked parameter does not have one row per entry of ``expert_ids`` or ``group_ids``.
    """
    layers: dict[str, int] = {}
    stacks: dict[int, tuple[int | None, nn.Module]] = {}
    layer: int | None
    for name, module in model.named_modules():
        if hasattr(module, "expert_ids"):
            layer = layers.setdefault(name.rpartition(".")[0], len(layers))
            stacks |= {id(p): (layer, module) for p in module.parameters(recurse=False)}
        elif hasattr(module, "group_ids"):
            stacks |= {id(p): (None, module) for p in module.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in stacks:
            yield ModelTensor(name, parameter)
            continue
        layer, module = stacks[id(parameter)]
        kind = "group_ids" if layer is None else "expert_ids"
        ids = cast(Sequence[int | None], getattr(module, kind))
        if len(ids) != parameter.shape[0]:
            raise ValueError(
                f"{name}: expected one row per entry of {kind}, {len(ids)}, "
                f"got {parameter.shape[0]}"
            )
        everywhere = layer is None or bool(getattr(module, "on_every_site", False))
        for row, each in enumerate(ids):
            if each is not None:
                row_name = expert_tensor_name(name, each)
                expert = None if layer is None else each
                yield ModelTensor(row_name, parameter, row, layer, expert, everywhere)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of :func:`model_tensors`; writing to a value writes to the model."""
    for tensor in model_tensors(model):
        yield tensor.name, tensor.value
