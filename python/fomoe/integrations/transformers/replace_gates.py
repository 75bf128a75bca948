# SPDX-License-Identifier: Apache-2.0
"""The routers of ``transformers`` with our top-k gate, and the table of the families we know.

A router keeps its parameters, buffers, hooks and outputs, and becomes an instance of a subclass of
its class whose forward is ours: what looks for routers by class, as the recorder of
``output_router_logits`` does, still finds them.

T tokens, D model width, E experts, K experts per token.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe.ops import topk_gate


def _mixtral(router: Any) -> dict[str, Any]:
    return {"renormalize": True}


def _qwen(router: Any) -> dict[str, Any]:
    return {"renormalize": router.norm_topk_prob}


def _deepseek_v2(router: Any) -> dict[str, Any]:
    if router.topk_method == "greedy":
        return {"scale": router.routed_scaling_factor}
    if router.topk_method != "group_limited_greedy":
        raise ValueError(
            f"expected topk_method 'greedy' or 'group_limited_greedy', got {router.topk_method!r}"
        )
    return {
        "num_groups": router.num_group,
        "top_k_groups": router.topk_group,
        "scale": router.routed_scaling_factor,
    }


def _deepseek_v3(router: Any) -> dict[str, Any]:
    return {
        "score": "sigmoid",
        "bias": router.e_score_correction_bias.float(),
        "num_groups": router.num_group,
        "top_k_groups": router.topk_group,
        "group_score": "top2_sum",
        "renormalize": router.norm_topk_prob,
        "scale": router.routed_scaling_factor,
    }


@dataclass(frozen=True, slots=True)
class Family:
    """How a family's router chooses.

    ``router`` and ``experts`` are names of classes; ``settings`` gives the arguments of
    :func:`fomoe.ops.topk_gate` beside the logits and K.
    """

    model: str  # the folder and file of transformers.models
    router: str
    experts: str
    settings: Callable[[Any], dict[str, Any]]
    wide_logits: bool = False  # logits in float32 whatever the dtype of the model
    weights_dtype: torch.dtype | None = None  # None: that of the logits

    def path(self, class_name: str) -> str:
        """Where that class of the family lies."""
        return f"transformers.models.{self.model}.modeling_{self.model}.{class_name}"


FAMILIES = (
    Family("mixtral", "MixtralTopKRouter", "MixtralExperts", _mixtral, weights_dtype=torch.float32),
    Family("qwen2_moe", "Qwen2MoeTopKRouter", "Qwen2MoeExperts", _qwen),
    Family("qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeExperts", _qwen),
    Family("qwen3_next", "Qwen3NextTopKRouter", "Qwen3NextExperts", _qwen),
    Family("olmoe", "OlmoeTopKRouter", "OlmoeExperts", _qwen),
    Family(
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        "DeepseekV2Experts",
        _deepseek_v2,
        wide_logits=True,
        weights_dtype=torch.float32,
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        "DeepseekV3Experts",
        _deepseek_v3,
        wide_logits=True,
    ),
    Family("glm4_moe", "Glm4MoeTopkRouter", "Glm4MoeExperts", _deepseek_v3, wide_logits=True),
)


ROUTERS = {family.path(family.router): family for family in FAMILIES}
EXPERTS = {family.path(family.experts): family for family in FAMILIES}


def path_of(kind: type) -> str:
    """The key of a class in :data:`ROUTERS` and :data:`EXPERTS`."""
    return f"{kind.__module__}.{kind.__name__}"


class FusedGate(nn.Module):
    """Forward of a router: the choice and its weights in one op.

    Of equal scores the lowest index is chosen, where ``torch.topk`` takes any.
    """

    family: ClassVar[Family]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Router logits (T, E), weights (T, K) and ids (T, K) int64, in the original's dtypes."""
        router: Any = self
        x_TD, weight = hidden_states.reshape(-1, router.hidden_dim), router.weight
        if self.family.wide_logits:
            x_TD, weight = x_TD.float(), weight.float()
        logits = F.linear(x_TD, weight)
        gate = topk_gate(logits, router.top_k, **self.family.settings(router))
        dtype = self.family.weights_dtype or logits.dtype
        return logits, gate.weights.to(dtype), gate.ids.long()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Pickle looks a class up by name, and this one was made at run time.
        return _new_router, (path_of(type(self).__bases__[1]),), self.__dict__


@functools.cache
def _fused_class(path: str) -> type[FusedGate]:
    family = ROUTERS[path]
    module, _, name = path.rpartition(".")
    original = getattr(importlib.import_module(module), name)
    return type(f"Fused{name}", (FusedGate, original), {"family": family})


def _new_router(path: str) -> FusedGate:
    return object.__new__(_fused_class(path))


def fuse(router: Any) -> None:
    """Give a router of :data:`FAMILIES` our gate, in place."""
    router.__class__ = _fused_class(path_of(type(router)))
