# SPDX-License-Identifier: Apache-2.0
"""Names of a model's tensors, independent of which experts are resident.

A module with an ``expert_ids`` attribute stacks its experts: dim 0 of each of its own parameters
has one row per resident expert. Every other parameter is shared.
"""

from collections.abc import Iterator, Sequence
from typing import cast

from torch import Tensor, nn


def expert_tensor_name(parameter_name: str, expert_id: int) -> str:
    """Name of one expert's row: the global id goes before the last component.

    ``layers.3.moe.experts.w1`` and expert 17 give ``layers.3.moe.experts.17.w1``.
    """
    module_name, _, tensor_name = parameter_name.rpartition(".")
    prefix = f"{module_name}." if module_name else ""
    return f"{prefix}{expert_id}.{tensor_name}"


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every shared parameter and every resident expert's row, by name, in registration order.

    The tensors are detached views: writing to one writes to the model. A parameter that two
    modules share comes once.

    Raises
    ------
    ValueError
        If a stacked parameter does not have one row per resident expert.
    """
    expert_ids_of: dict[int, tuple[int, ...]] = {}
    for module in model.modules():
        if hasattr(module, "expert_ids"):
            expert_ids = tuple(cast(Sequence[int], module.expert_ids))
            expert_ids_of |= {
                id(parameter): expert_ids for parameter in module.parameters(recurse=False)
            }
    for name, parameter in model.named_parameters():
        if id(parameter) not in expert_ids_of:
            yield name, parameter.detach()
            continue
        expert_ids = expert_ids_of[id(parameter)]
        if len(expert_ids) != parameter.shape[0]:
            raise ValueError(
                f"{name}: expected one row per resident expert, {len(expert_ids)}, "
                f"got {parameter.shape[0]}"
            )
        for row, expert_id in enumerate(expert_ids):
            yield expert_tensor_name(name, expert_id), parameter.detach()[row]
