# SPDX-License-Identifier: Apache-2.0
"""The shape of a Federation of Experts, as numbers that a file can hold."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from fomoe.models.language_model_config import LanguageModelConfig
from fomoe.nn.validation import require_choice

__all__ = ["FoEConfig"]


@dataclass(kw_only=True, slots=True, frozen=True)
class FoEConfig(LanguageModelConfig):
    """Shape of a :class:`fomoe.models.FoE`; raises ValueError naming the field that does not fit.

    There is a group of experts for every key/value head: ``num_kv_heads`` groups of
    ``num_experts / num_kv_heads`` experts, and a token has ``top_k / num_kv_heads`` of each. A
    chosen expert weighs its score, which ``renormalize`` divides by the sum over all ``top_k``.
    """

    family: ClassVar[str] = "foe"

    softmax_over: Literal["group", "all"] = "group"
    """Experts that a softmax score is over: the paper does not say which, see docs/foe.md."""

    def __post_init__(self) -> None:
        LanguageModelConfig.__post_init__(self)  # super() finds no class with slots
        require_choice(self, "softmax_over", ("group", "all"))
        if self.softmax_over != "group" and self.score != "softmax":
            raise ValueError(
                f"softmax_over: expected 'group', as score = {self.score!r}, "
                f"got {self.softmax_over!r}"
            )
        if self.score == "unit":
            raise ValueError("score: expected softmax or sigmoid, got 'unit'")
        for name in ("num_experts", "top_k"):
            value = getattr(self, name)
            if value % self.num_kv_heads != 0:
                raise ValueError(
                    f"{name}: expected a multiple of the num_kv_heads = {self.num_kv_heads} "
                    f"groups, got {value}"
                )

    @property
    def num_groups(self) -> int:
        """H, one for each key/value head."""
        return self.num_kv_heads

    @property
    def experts_per_group(self) -> int:
        return self.num_experts // self.num_kv_heads
