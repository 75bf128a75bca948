# SPDX-License-Identifier: Apache-2.0
"""replace_moe_blocks: our gate and our experts in the MoE blocks of a ``transformers`` model."""

from typing import Any, NamedTuple

from torch import nn

from fomoe.integrations.transformers.replace_experts import IMPLEMENTATION, why_unfit
from fomoe.integrations.transformers.replace_gates import (
    EXPERTS,
    FAMILIES,
    ROUTERS,
    FusedGate,
    fuse,
    path_of,
)


class _Block(NamedTuple):
    router: nn.Module
    experts: Any

    @property
    def is_replaced(self) -> bool:
        implementation = self.experts.config._experts_implementation
        return isinstance(self.router, FusedGate) and implementation == IMPLEMENTATION


def replace_moe_blocks(model: nn.Module) -> int:
    """Let every MoE block of ``model`` run on ``fomoe``'s ops, in place.

    The experts get the experts implementation "fomoe", which is set on the configuration and so
    counts for every model made from that same configuration object; the routers get our gate. No
    weight is copied or renamed; saved, the model is what it was. An error leaves it as it was.

    Parameters
    ----------
    model : nn.Module
        A model of ``transformers``, or anything that holds one; may be on the meta device.

    Returns
    -------
    int
        How many blocks were changed: 0 for a model without MoE blocks, and for one that was
        replaced before.

    Raises
    ------
    ValueError
        If a block is of a family that is not in the table, quantised, sharded, or of another
        activation or layout; names the module.
    """
    blocks = [
        block
        for name, module in model.named_modules()
        for block in _blocks_in(name, module)
        if not block.is_replaced
    ]
    for block in blocks:
        if not isinstance(block.router, FusedGate):
            fuse(block.router)
        block.experts.config._experts_implementation = IMPLEMENTATION
    return len(blocks)


def _blocks_in(name: str, module: nn.Module) -> list[_Block]:
    """Router and experts that are children of ``module``, checked."""
    children = dict(module.named_children())
    routers = [child for child in children.values() if _is_router(child)]
    names = [child for child in children if type(children[child]).__name__.endswith("Experts")]
    if routers and not names:
        expected = " or ".join(family.experts for family in FAMILIES)
        raise ValueError(
            f"replace_moe_blocks: {name or type(module).__name__}: expected {expected} beside "
            f"{type(routers[0]).__name__}, got "
            + ", ".join(f"{child} ({type(children[child]).__name__})" for child in children)
        )
    return [_checked(f"{name}.{child}".lstrip("."), children[child], routers) for child in names]


def _checked(where: str, experts: Any, routers: list[nn.Module]) -> _Block:
    family = EXPERTS.get(path_of(type(experts)))
    if family is None:
        expected = ", ".join(family.experts for family in FAMILIES)
        raise ValueError(
            f"replace_moe_blocks: {where}: expected one of {expected} of transformers, not "
            f"quantised, got {type(experts).__name__}"
        )
    reason = why_unfit(experts)
    if reason is None and not routers:
        reason = f"expected {family.router} beside it, got none"
    if reason is None:
        try:
            family.settings(routers[0])
        except ValueError as error:
            reason = str(error)
    if reason is not None:
        raise ValueError(f"replace_moe_blocks: {where}: {reason}")
    return _Block(routers[0], experts)


def _is_router(module: nn.Module) -> bool:
    return isinstance(module, FusedGate) or path_of(type(module)) in ROUTERS
