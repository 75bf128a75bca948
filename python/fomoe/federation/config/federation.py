# SPDX-License-Identifier: Apache-2.0
"""The section [federation]. Imports no torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fomoe.federation.config.section import BelowOne, Count, CountOrZero, Positive, Section

__all__ = ["FederationConfig"]


class FederationConfig(Section):
    """Who trains, and how sites meet.

    A round is `local_steps` optimizer steps. `ddp` and `ep` average gradients at every step and
    take no outer step; `diloco` and `fomoe` meet at the end of a round. With `ep` every expert is
    on one site, and tokens travel to it at every step.
    """

    strategy: Literal["ddp", "ep", "diloco", "fomoe"]
    sites: Count = 4
    overlap: Count = Field(
        default_factory=lambda known: 1 if known.get("strategy") == "ep" else known.get("sites", 1)
    )
    """Sites that hold each expert. fomoe requires it; otherwise it is `sites`, for ep 1."""
    local_steps: Count = 32
    rounds: Count = 10

    outer: Literal["nesterov", "average", "local_adamw"] = "nesterov"
    """What becomes of the mean. local_adamw averages both AdamW moments, too."""
    outer_lr: Positive = 0.7
    outer_momentum: BelowOne = 0.9
    codec: Literal["fp32", "bf16", "int8", "int4"] = "fp32"
    """How pseudo-gradients and outer steps travel; all but fp32 with error feedback."""
    router_mean: Literal["all", "holders", "rescaled"] = Field(
        default_factory=lambda known: "all" if known.get("strategy") == "ep" else "holders"
    )
    """Whose rows of a full router count for an expert: every site's, or its holders'."""
    scale_expert_steps: bool = Field(
        default_factory=lambda known: (
            known.get("strategy") != "ep"
            and (known.get("outer") == "nesterov" or known.get("codec", "fp32") != "fp32")
        )
    )
    """Multiply an expert's mean difference by sqrt(overlap / sites); true where there is one."""

    placement: Literal["fixed", "random"] = "fixed"
    shuffle_every: CountOrZero = Field(
        default_factory=lambda known: 1 if known.get("placement") == "random" else 0
    )
    """Rounds between two draws of a random placement; 0 with a fixed one."""
    full_replica_rounds: CountOrZero = 0
    """First rounds in which every site holds every expert."""
    moved_warmup_steps: CountOrZero = 0
    """Linear warm-up of the learning rate of an expert that came to a site."""

    ranks_per_site: Annotated[int, Field(ge=1, le=4096)] = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How the ranks of a site keep the shared parameters: each all of them, or a shard."""
    spread_experts: bool = False
    """Spread a site's experts over its ranks, and send tokens to them; else each rank has all."""
    timeout: Positive = 600.0
    """Seconds without a sign of life after which a site counts as lost."""

    @property
    def sends_differences(self) -> bool:
        """Whether sites send pseudo-gradients, rather than the values themselves to be averaged."""
        return not self.meets_every_step and (self.outer == "nesterov" or self.codec != "fp32")

    @property
    def meets_every_step(self) -> bool:
        """Whether sites average gradients, so that there is no outer step."""
        return self.strategy in ("ddp", "ep")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_overlap()
        self._check_experts_move()
        self._check_outer()
        self._check_expert_parallel()
        return self

    def _check_overlap(self) -> None:
        if self.strategy == "fomoe" and "overlap" not in self.model_fields_set:
            raise ValueError(
                "federation.overlap is missing: federation.strategy = 'fomoe' needs the number "
                f"of sites that hold each expert, from 1 to federation.sites = {self.sites}"
            )
        if self.overlap > self.sites:
            raise ValueError(
                f"federation.overlap = {self.overlap} is larger than "
                f"federation.sites = {self.sites}"
            )
        if self.strategy in ("ddp", "diloco") and self.overlap != self.sites:
            raise ValueError(
                f"federation.overlap = {self.overlap} must equal "
                f"federation.sites = {self.sites} with "
                f"federation.strategy = {self.strategy!r}, which holds every expert on every site"
            )

    def _check_experts_move(self) -> None:
        if self.strategy != "fomoe":
            for key in ("placement", "full_replica_rounds"):
                value, default = getattr(self, key), type(self).model_fields[key].default
                if value != default:
                    raise ValueError(
                        f"federation.{key} = {value!r} needs federation.strategy = 'fomoe'; "
                        f"with {self.strategy!r} no expert changes its sites"
                    )
        if (self.placement == "random") != (self.shuffle_every > 0):
            raise ValueError(
                f"federation.shuffle_every = {self.shuffle_every} does not fit "
                f"federation.placement = {self.placement!r}: 'random' draws one every so many "
                "rounds, at least 1; 'fixed' draws none, 0"
            )
        if self.full_replica_rounds > self.rounds:
            raise ValueError(
                f"federation.full_replica_rounds = {self.full_replica_rounds} is more than "
                f"federation.rounds = {self.rounds}"
            )
        if self.moved_warmup_steps > 0 and (
            self.placement == "fixed" or self.overlap == self.sites
        ):
            raise ValueError(
                f"federation.moved_warmup_steps = {self.moved_warmup_steps}, but no expert comes "
                "to a site during the run: that takes federation.placement = 'random' and "
                "federation.overlap < federation.sites"
            )

    def _check_outer(self) -> None:
        if self.codec != "fp32" and self.meets_every_step:
            raise ValueError(
                f"federation.codec = {self.codec!r} cannot be used with federation.strategy = "
                f"{self.strategy!r}: error feedback needs rounds"
            )
        if self.codec != "fp32" and self.outer == "local_adamw":
            raise ValueError(
                f"federation.codec = {self.codec!r} cannot be used with federation.outer = "
                "'local_adamw', whose moments are no differences: use 'fp32'"
            )
        if self.sends_differences or self.meets_every_step:
            return
        if self.router_mean == "rescaled" or self.scale_expert_steps:
            key = "scale_expert_steps" if self.scale_expert_steps else "router_mean"
            raise ValueError(
                f"federation.{key} = {getattr(self, key)!r} scales differences, but "
                f"federation.outer = {self.outer!r} averages values: use 'nesterov'"
            )

    def _check_expert_parallel(self) -> None:
        if self.spread_experts and self.ranks_per_site == 1:
            raise ValueError(
                "federation.spread_experts = True needs federation.ranks_per_site of at least 2, "
                "got 1"
            )
        if self.strategy != "ep":
            return
        needed = {
            "overlap": (1, "an expert is on one site"),
            "router_mean": ("all", "every site's tokens go to every expert"),
            "scale_expert_steps": (False, "there is no outer step"),
            "spread_experts": (False, "every expert is on one rank of one site anyway"),
        }
        for key, (value, reason) in needed.items():
            if getattr(self, key) != value:
                raise ValueError(
                    f"federation.{key} = {getattr(self, key)!r} must be {value!r} with "
                    f"federation.strategy = 'ep': {reason}"
                )
