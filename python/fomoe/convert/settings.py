# SPDX-License-Identifier: Apache-2.0
"""What a conversion is asked for, checked against the dense model's shape."""

from dataclasses import dataclass, replace

from fomoe.convert.methods import METHODS
from fomoe.errors import UserError
from fomoe.models import DecoderConfig
from fomoe.nn.validation import require_integers
from fomoe.ops.topk_gate import MAX_EXPERTS

__all__ = ["Conversion", "ExpertShape", "converted_config", "expert_shape"]


_MOST_SEED = 2**32  # every layer has its own, a product that int64 holds


@dataclass(kw_only=True, slots=True, frozen=True)
class Conversion:
    """Settings of a conversion; those that change the result."""

    method: str = "dot"
    expert_size: int = 128
    active_share: float = 0.25
    steps: int = 64
    tokens: int = 45056  # of calibration text
    held_out_tokens: int = 4096
    sequence_length: int = 512
    batch_size: int = 1024  # tokens of a step of one layer
    layers: tuple[int, ...] | None = None  # None: all
    seed: int = 0
    max_load: float | None = None  # even shares of the tokens that an expert may serve; None: all
    distill_steps: int = 0
    fine_tune_steps: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            known = ", ".join(METHODS)
            raise UserError(f"--method: expected one of {known}, got {self.method!r}")
        if not 0 < self.active_share <= 1:
            raise UserError(
                f"--active-share: expected above 0 and at most 1, got {self.active_share:g}"
            )
        if self.max_load is not None and not self.max_load >= 1:
            raise UserError(f"--max-load: expected at least 1, got {self.max_load:g}")
        if self.max_load is not None and not METHODS[self.method].routed:
            raise UserError(f"--max-load: method {self.method} has no router, so expected none")
        try:
            counts = ("expert_size", "steps", "tokens", "held_out_tokens", "batch_size")
            require_integers(self, counts, at_least=1)
            require_integers(self, ("sequence_length",), at_least=2)
            require_integers(self, ("seed", "distill_steps", "fine_tune_steps"), at_least=0)
        except ValueError as error:
            raise UserError(f"--{str(error).replace('_', '-')}") from None
        if self.seed > _MOST_SEED:
            raise UserError(f"--seed: expected at most {_MOST_SEED}, got {self.seed}")


@dataclass(frozen=True)
class ExpertShape:
    """The experts of one layer: ``num_experts`` of ``size`` neurons, ``top_k`` for a token."""

    num_experts: int
    top_k: int
    size: int


def expert_shape(config: DecoderConfig, conversion: Conversion) -> ExpertShape:
    """The experts that the settings and the model's feed-forward width give.

    Raises
    ------
    UserError
        If the expert size does not divide the width (the nearest ones that do are named), or the
        method cannot make that few experts.
    """
    width, size = config.dense_dim, conversion.expert_size
    if width % size != 0 or not 2 <= width // size <= MAX_EXPERTS:
        raise UserError(
            f"--expert-size: expected a divisor of the feed-forward width {width}, got {size}; "
            f"the nearest that fit: {_nearest(width, size)}"
        )
    num_experts = width // size
    top_k = min(num_experts, max(1, round(conversion.active_share * num_experts)))
    always_on = METHODS[conversion.method].always_on
    if top_k <= always_on:
        raise UserError(
            f"--active-share: method {conversion.method} needs at least {always_on + 1} of "
            f"{num_experts} experts, a share of {(always_on + 1) / num_experts:g}, "
            f"got {conversion.active_share:g}"
        )
    return ExpertShape(num_experts, top_k, size)


def converted_config(config: DecoderConfig, conversion: Conversion) -> DecoderConfig:
    """The shape of the converted model, whose training leaves the routers as they are.

    Raises
    ------
    UserError
        If layers or expert size do not fit the model, or it is not dense to begin with.
    """
    every = tuple(range(config.num_layers))
    if config.dense_layers != every:
        raise UserError("expected a model whose layers are all dense, got one with experts")
    layers = every if conversion.layers is None else tuple(sorted(set(conversion.layers)))
    if not layers or not set(layers) <= set(every):
        raise UserError(f"--layers: expected some of 0 to {every[-1]}, got {list(layers)}")
    shape = expert_shape(config, conversion)
    if conversion.method == "prune":
        if layers != every:
            raise UserError("--layers: method prune makes every layer narrower, so expected all")
        return replace(config, dense_dim=shape.top_k * shape.size)
    always_on = METHODS[conversion.method].always_on
    rest = tuple(layer for layer in every if layer not in layers)
    return replace(
        config,
        expert_dim=shape.size,
        num_experts=shape.num_experts - always_on,
        top_k=shape.top_k - always_on,
        shared_expert_dim=always_on * shape.size,
        activation="swiglu",
        score="unit",
        router_bias=True,
        # With unit weights they are all that would train the router, away from its choice.
        balance_loss_coefficient=0.0,
        z_loss_coefficient=0.0,
        dense_layers=rest,
        dense_dim=config.dense_dim if rest else 0,
    )


def _nearest(width: int, size: int) -> str:
    """Up to two divisors on either side, with the experts that follow."""
    fitting = [n for n in range(1, width // 2 + 1) if width % n == 0 and width // n <= MAX_EXPERTS]
    below = [n for n in fitting if n < size][-2:]
    above = [n for n in fitting if n > size][:2]
    return ", ".join(f"{n} ({width // n} experts)" for n in below + above) or "none"
