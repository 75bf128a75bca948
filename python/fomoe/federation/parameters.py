# SPDX-License-Identifier: Apache-2.0
"""How the federation sees a model: named tensors, each shared or belonging to one expert.

A module with an ``expert_ids`` attribute owns stacked expert parameters: row ``i`` of dimension 0
belongs to expert ``expert_ids[i]``. Every other parameter is shared. Nothing else about the model
is known here, so any ``nn.Module`` that follows this rule can be trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fomoe.nn import expert_tensor_name

__all__ = ["FederatedTensor", "federated_tensors"]


@dataclass(frozen=True, slots=True)
class FederatedTensor:
    """One tensor of a site's model, as the unit of averaging, placement and checkpointing.

    ``name`` is unique over the whole federation: the row of expert 17 in the parameter
    ``layers.3.moe.experts.w1`` is ``layers.3.moe.experts.17.w1``. ``layer`` counts the modules
    with experts from 0; ``layer`` and ``expert`` are None for a shared tensor.
    """

    name: str
    parameter: nn.Parameter
    row: int | None = None
    layer: int | None = None
    expert: int | None = None

    @property
    def is_shared(self) -> bool:
        return self.expert is None

    def of(self, stacked: Tensor) -> Tensor:
        """A view of the part of ``stacked``, shaped like the parameter, that is this tensor's."""
        return stacked if self.row is None else stacked[self.row]

    @property
    def value(self) -> Tensor:
        """The tensor itself, detached: a view of the parameter."""
        return self.of(self.parameter.detach())

    @property
    def num_elements(self) -> int:
        total = self.parameter.numel()
        return total if self.row is None else total // self.parameter.shape[0]


def federated_tensors(model: nn.Module) -> list[FederatedTensor]:
    """Every tensor of the model: shared ones in registration order, then experts.

    Experts come by layer, then by expert id, then by parameter, so that two sites list the tensors
    they have in common in the same order.
    """
    owners: dict[str, tuple[int, Sequence[int]]] = {}
    for module_name, module in model.named_modules():
        expert_ids = getattr(module, "expert_ids", None)
        if expert_ids is not None:
            owners[module_name] = (len(owners), expert_ids)
    shared: list[FederatedTensor] = []
    experts: list[FederatedTensor] = []
    for name, parameter in model.named_parameters():
        owner = owners.get(name.rpartition(".")[0])
        if owner is None:
            shared.append(FederatedTensor(name, parameter))
            continue
        layer, expert_ids = owner
        if parameter.shape[0] != len(expert_ids):
            raise ValueError(
                f"{name}: dimension 0 must have one row per resident expert "
                f"({len(expert_ids)}), got {parameter.shape[0]}"
            )
        experts += [
            FederatedTensor(expert_tensor_name(name, expert), parameter, row, layer, expert)
            for row, expert in enumerate(expert_ids)
        ]
    experts.sort(key=lambda tensor: (tensor.layer, tensor.expert))  # stable: parameter order stays
    return shared + experts
