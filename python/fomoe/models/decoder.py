# SPDX-License-Identifier: Apache-2.0
"""A decoder-only language model with a Mixture-of-Experts layer in every block.

B batch, S sequence, V vocabulary, D model width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe.comm import ExpertExchange
from fomoe.models.attention import Attention, Rotation, rotation
from fomoe.models.normalization import RMSNorm
from fomoe.nn import MoE, MoEConfig
from fomoe.nn.validation import (
    require_booleans,
    require_choice,
    require_integers,
    require_numbers,
)

_Value = TypeVar("_Value")


@dataclass(kw_only=True, slots=True, frozen=True)
class DecoderConfig:
    """Shape of a model; raises ValueError naming the field that does not fit.

    The FoMoE paper's model (arXiv 2606.19025) is ``norm="peri", score="sigmoid",
    activation="silu"`` with tied embeddings.
    """

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
    router: Literal["full", "partitioned"] = "full"  # this and what follows: see MoEConfig
    num_groups: int = 1
    top_k_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    capacity_factor: float | None = None
    score: Literal["softmax", "sigmoid", "unit"] = "softmax"
    score_after_top_k: bool = False
    renormalize: bool = False
    scale: float = 1.0
    shared_expert_dim: int = 0
    shared_expert_gate: bool = False
    norm: Literal["pre", "peri"] = "pre"  # peri also normalises each block's output
    residual_scale: float = 1.0  # factor on what each block adds to the residual stream
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-6
    balance_loss_coefficient: float = 1e-2
    z_loss_coefficient: float = 1e-3

    def __post_init__(self) -> None:
        counts = ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        require_integers(self, counts, at_least=1)
        require_choice(self, "norm", ("pre", "peri"))
        require_booleans(self, ("tie_embeddings",))
        require_numbers(self, ("residual_scale", "rope_theta", "norm_epsilon"), above=0)
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


class DecoderLayer(nn.Module):
    """x + s * attention(norm(x)), then x + s * moe(norm(x)); peri normalises what is added, too."""

    def __init__(
        self,
        config: DecoderConfig,
        resident_experts: Sequence[int] | None,
        exchange: ExpertExchange | None,
    ) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale
        self.attention_norm = RMSNorm(config.dim, config.norm_epsilon)
        self.attention = Attention(
            config.dim, config.num_heads, config.num_kv_heads, config.head_dim
        )
        self.attention_output_norm = _peri_norm(config)
        self.moe_norm = RMSNorm(config.dim, config.norm_epsilon)
        self.moe = MoE(config.moe(), resident_experts, exchange)
        self.moe_output_norm = _peri_norm(config)

    def forward(self, x_BSD: Tensor, positions: Rotation) -> Tensor:
        added = self.attention(self.attention_norm(x_BSD), positions)
        x_BSD = x_BSD + self.residual_scale * self.attention_output_norm(added)
        added = self.moe(self.moe_norm(x_BSD))
        x_BSD = x_BSD + self.residual_scale * self.moe_output_norm(added)
        return x_BSD


class Decoder(nn.Module):
    """Tokens to next-token logits, without biases. Peri-LN is FoMoE's (arXiv 2606.19025).

    Weights are random after construction; :func:`fomoe.nn.initialize` sets them from a seed.

    Parameters
    ----------
    config : DecoderConfig
    resident_experts : Sequence[Sequence[int]], optional
        Ascending global ids of the experts held here, for each layer; all of them by default.
    exchanges : Sequence[ExpertExchange], optional
        One for each layer, which makes the model expert-parallel, see :class:`fomoe.MoE`.

    Raises
    ------
    ValueError
        If ``resident_experts`` or ``exchanges`` has not one entry per layer, or one does not fit.
    """

    def __init__(
        self,
        config: DecoderConfig,
        resident_experts: Sequence[Sequence[int]] | None = None,
        exchanges: Sequence[ExpertExchange] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)
        self.embedding_norm = _peri_norm(config)
        self.layers = nn.ModuleList(_build_layers(config, resident_experts, exchanges))
        self.norm = RMSNorm(config.dim, config.norm_epsilon)
        if not config.tie_embeddings:
            self.unembedding = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits of the token that follows each position.

        Parameters
        ----------
        tokens_BS : Tensor, (B, S), int64
            Token ids in [0, V).

        Returns
        -------
        Tensor, (B, S, V), dtype of the weights, or the autocast dtype

        Raises
        ------
        ValueError
            If the tokens are not two-dimensional int64.
        """
        if tokens_BS.dim() != 2 or tokens_BS.dtype != torch.int64:
            raise ValueError(
                "Decoder: expected tokens of shape (B, S) and dtype torch.int64, got "
                f"{tuple(tokens_BS.shape)} and {tokens_BS.dtype}"
            )
        x_BSD: Tensor = self.embedding_norm(self.embedding(tokens_BS))
        positions = rotation(
            tokens_BS.shape[1],
            self.config.head_dim,
            self.config.rope_theta,
            dtype=torch.promote_types(x_BSD.dtype, torch.float32),
            device=x_BSD.device,
        )
        for layer in self.layers:
            x_BSD = layer(x_BSD, positions)
        unembedding = self.embedding if self.config.tie_embeddings else self.unembedding
        return F.linear(self.norm(x_BSD), unembedding.weight)


def _peri_norm(config: DecoderConfig) -> nn.Module:
    if config.norm == "peri":
        return RMSNorm(config.dim, config.norm_epsilon)
    return nn.Identity()


def _build_layers(
    config: DecoderConfig,
    resident_experts: Sequence[Sequence[int]] | None,
    exchanges: Sequence[ExpertExchange] | None,
) -> Iterator[DecoderLayer]:
    experts_by_layer = _one_per_layer("resident_experts", resident_experts, config.num_layers)
    exchange_by_layer = _one_per_layer("exchanges", exchanges, config.num_layers)
    for index, (experts, exchange) in enumerate(
        zip(experts_by_layer, exchange_by_layer, strict=True)
    ):
        try:
            yield DecoderLayer(config, experts, exchange)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error


def _one_per_layer(
    name: str, values: Sequence[_Value] | None, num_layers: int
) -> Sequence[_Value | None]:
    if values is None:
        return [None] * num_layers
    if len(values) != num_layers:
        raise ValueError(f"{name}: expected one for each of {num_layers} layers, got {len(values)}")
    return values
