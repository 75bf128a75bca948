# SPDX-License-Identifier: Apache-2.0
"""The shape of a decoder, as numbers that a file can hold."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Self

from fomoe.models.language_model_config import LanguageModelConfig
from fomoe.nn.validation import (
    require_booleans,
    require_integers,
)


@dataclass(kw_only=True, slots=True, frozen=True)
class DecoderConfig(LanguageModelConfig):
    """Shape of a model; raises ValueError naming the field that does not fit.

    The FoMoE paper's model (arXiv 2606.19025) is ``norm="peri", score="sigmoid",
    activation="silu"`` with tied embeddings. ``docs/models.md`` has the settings of Llama, Qwen2,
    Qwen3 and Mistral. Without a Mixture-of-Experts layer, if every layer is in ``dense_layers``,
    the settings of experts and routers have no meaning; put 1 where there is no default.
    """

    family: ClassVar[str] = "decoder"

    router: Literal["full", "partitioned"] = "full"  # this and what follows: see MoEConfig
    router_bias: bool = False
    num_groups: int = 1
    top_k_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    capacity_factor: float | None = None
    score_after_top_k: bool = False
    shared_expert_dim: int = 0
    shared_expert_gate: bool = False
    dense_layers: tuple[int, ...] = ()  # these have a SwiGLU feed-forward in place of experts
    dense_dim: int = 0  # its width
    qkv_bias: bool = False  # of the projections to queries, keys and values (Qwen2)
    attention_output_bias: bool = False
    head_norm: bool = False  # RMSNorm of every query and key head before its rotation (Qwen3)
    sliding_window: int = 0  # a position sees that many, itself included (Mistral); 0: all before

    def __post_init__(self) -> None:
        require_integers(self, ("sliding_window", "dense_dim"), at_least=0)
        flags = ("qkv_bias", "attention_output_bias", "head_norm")
        require_booleans(self, flags)
        LanguageModelConfig.__post_init__(self)  # super() finds no class with slots
        self._require_dense_layers()

    def _require_dense_layers(self) -> None:
        layers = self.dense_layers
        if not isinstance(layers, tuple) or list(layers) != [
            layer for layer in range(self.num_layers) if layer in layers
        ]:
            raise ValueError(
                f"dense_layers: expected a tuple of ascending layers in [0, {self.num_layers}), "
                f"got {layers!r}"
            )
        if (self.dense_dim > 0) != (len(layers) > 0):
            expected = "at least 1" if layers else "0, as there are no dense_layers"
            raise ValueError(f"dense_dim: expected {expected}, got {self.dense_dim}")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that have experts, ascending."""
        return tuple(i for i in range(self.num_layers) if i not in self.dense_layers)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"dense_layers": list(self.dense_layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        if "dense_layers" in values:
            values = {**values, "dense_layers": tuple(values["dense_layers"])}
        return super(DecoderConfig, cls).from_dict(values)
