# SPDX-License-Identifier: Apache-2.0
"""What the shapes of all model families have in common, as numbers that a file can hold."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self

from fomoe.nn import MoEConfig
from fomoe.nn.validation import (
    require_booleans,
    require_choice,
    require_integers,
    require_numbers,
)

__all__ = ["LanguageModelConfig", "RopeScaling"]


@dataclass(kw_only=True, slots=True, frozen=True)
class RopeScaling:
    """How the rotary frequencies of a model trained on short sequences serve longer ones.

    ``linear`` divides them all by ``factor`` (arXiv 2306.15595). ``llama3`` does so to the slow
    ones, those with fewer than ``low_frequency_factor`` turns in ``original_context`` positions,
    leaves those with more than ``high_frequency_factor`` turns as they are, and goes linearly in
    the number of turns from one to the other in between (Llama 3.1's rule).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_frequency_factor: float = 0.0  # this and what follows: llama3 only
    high_frequency_factor: float = 0.0
    original_context: int = 0

    def __post_init__(self) -> None:
        require_choice(self, "kind", ("linear", "llama3"))
        require_numbers(self, ("factor",), above=0)
        if self.kind == "llama3":
            require_numbers(self, ("low_frequency_factor",), above=0)
            require_numbers(self, ("high_frequency_factor",), above=self.low_frequency_factor)
            require_integers(self, ("original_context",), at_least=1)
        elif self.low_frequency_factor or self.high_frequency_factor or self.original_context:
            raise ValueError("rope_scaling: expected kind and factor alone for kind = 'linear'")


@dataclass(kw_only=True, slots=True, frozen=True)
class LanguageModelConfig:
    """Fields of every family; raises ValueError naming the field that does not fit."""

    family: ClassVar[str]
    """What files call it."""

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # divides num_heads
    head_dim: int  # even
    expert_dim: int
    num_experts: int
    top_k: int
    activation: Literal["swiglu", "silu", "swiglu_clamped"] = "swiglu"
    score: Literal["softmax", "sigmoid", "unit"] = "softmax"  # of an expert, see MoEConfig
    renormalize: bool = False
    scale: float = 1.0
    norm: Literal["pre", "peri"] = "pre"  # peri also normalises each block's output
    residual_scale: float = 1.0  # factor on what each block adds to the residual stream
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    context_length: int = 0  # longest sequence the weights are made for; 0: unknown; not enforced
    norm_epsilon: float = 1e-6
    balance_loss_coefficient: float = 1e-2
    z_loss_coefficient: float = 1e-3

    def __post_init__(self) -> None:
        counts = ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        require_integers(self, counts, at_least=1)
        require_integers(self, ("context_length",), at_least=0)
        require_choice(self, "norm", ("pre", "peri"))
        require_booleans(self, ("tie_embeddings",))
        require_numbers(self, ("residual_scale", "rope_theta", "norm_epsilon"), above=0)
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise ValueError(f"rope_scaling: expected a RopeScaling, got {self.rope_scaling!r}")
        if self.num_heads % self.num_kv_heads != 0:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads = {self.num_heads}, "
                f"got {self.num_kv_heads}"
            )
        if self.head_dim % 2 != 0:
            raise ValueError(f"head_dim: expected an even number, got {self.head_dim}")
        self.moe()

    def moe(self) -> MoEConfig:
        """The configuration of each block's Mixture-of-Experts layer."""
        shared_names = {field.name for field in fields(self)} & {f.name for f in fields(MoEConfig)}
        return MoEConfig(**{name: getattr(self, name) for name in shared_names})

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that have experts, ascending."""
        return tuple(range(self.num_layers))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values; :meth:`from_dict` gives an equal configuration."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration with these fields, as JSON holds them.

        Raises
        ------
        ValueError, TypeError
            If a field is unknown, missing or does not fit.
        """
        changes: dict[str, Any] = {}
        if values.get("rope_scaling") is not None:
            changes["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        return cls(**{**values, **changes})
