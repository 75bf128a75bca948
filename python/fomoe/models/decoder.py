# SPDX-License-Identifier: Apache-2.0
"""A decoder-only language model of Mixture-of-Experts layers, dense layers, or both.

B batch, S sequence, V vocabulary, D model width.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch import Tensor, nn

from fomoe.comm import ExpertExchange
from fomoe.models.attention import Attention, Rotation
from fomoe.models.cache import LayerView
from fomoe.models.decoder_config import DecoderConfig
from fomoe.models.feed_forward import FeedForward
from fomoe.models.language_model import LanguageModel, peri_norm
from fomoe.models.normalization import RMSNorm
from fomoe.nn import MoE

_Value = TypeVar("_Value")


class DecoderLayer(nn.Module):
    """x + s * attention(norm(x)), then x + s * f(norm(x)); peri normalises what is added, too.

    f is ``moe``, or in a dense layer ``feed_forward``; the other one is None. The norms around f
    are called ``moe_norm`` and ``moe_output_norm`` in both, so that converting a layer replaces f
    alone.
    """

    def __init__(self, config: DecoderConfig, block: MoE | FeedForward) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale
        self.attention_norm = RMSNorm(config.dim, config.norm_epsilon)
        self.attention = Attention(
            config.dim,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            qkv_bias=config.qkv_bias,
            output_bias=config.attention_output_bias,
            head_norm_epsilon=config.norm_epsilon if config.head_norm else None,
            sliding_window=config.sliding_window,
        )
        self.attention_output_norm = peri_norm(config)
        self.moe_norm = RMSNorm(config.dim, config.norm_epsilon)
        self.moe = block if isinstance(block, MoE) else None
        self.feed_forward = block if isinstance(block, FeedForward) else None
        self.moe_output_norm = peri_norm(config)

    def forward(self, x_BSD: Tensor, positions: Rotation, cache: LayerView | None = None) -> Tensor:
        added = self.attention(self.attention_norm(x_BSD), positions, cache)
        x_BSD = x_BSD + self.residual_scale * self.attention_output_norm(added)
        added = self.moe_norm(x_BSD)
        if self.moe is not None:
            added = self.moe(added)
        if self.feed_forward is not None:
            added = self.feed_forward(added)
        x_BSD = x_BSD + self.residual_scale * self.moe_output_norm(added)
        return x_BSD


class Decoder(LanguageModel):
    """Tokens to next-token logits. Peri-LN is FoMoE's (arXiv 2606.19025).

    Parameters
    ----------
    config : DecoderConfig
    resident_experts : Sequence[Sequence[int]], optional
        Ascending global ids of the experts held here, for each Mixture-of-Experts layer, dense
        layers left out; all of them by default.
    exchanges : Sequence[ExpertExchange], optional
        One for each such layer, which makes the model expert-parallel, see :class:`fomoe.MoE`.

    Raises
    ------
    ValueError
        If ``resident_experts`` or ``exchanges`` has not one entry per Mixture-of-Experts
        layer, or one does not fit.
    """

    config: DecoderConfig

    def __init__(
        self,
        config: DecoderConfig,
        resident_experts: Sequence[Sequence[int]] | None = None,
        exchanges: Sequence[ExpertExchange] | None = None,
    ) -> None:
        layers = list(_build_layers(config, resident_experts, exchanges))
        super().__init__(config, layers, config.num_kv_heads)


def _build_layers(
    config: DecoderConfig,
    resident_experts: Sequence[Sequence[int]] | None,
    exchanges: Sequence[ExpertExchange] | None,
) -> Iterator[DecoderLayer]:
    num_moe = len(config.moe_layers)
    experts_by_layer = iter(_one_per_layer("resident_experts", resident_experts, num_moe))
    exchange_by_layer = iter(_one_per_layer("exchanges", exchanges, num_moe))
    for index in range(config.num_layers):
        if index in config.dense_layers:
            yield DecoderLayer(config, FeedForward(config.dim, config.dense_dim))
            continue
        try:
            moe = MoE(config.moe(), next(experts_by_layer), next(exchange_by_layer))
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error
        yield DecoderLayer(config, moe)


def _one_per_layer(
    name: str, values: Sequence[_Value] | None, num_layers: int
) -> Sequence[_Value | None]:
    if values is None:
        return [None] * num_layers
    if len(values) != num_layers:
        raise ValueError(f"{name}: expected one for each of {num_layers} layers, got {len(values)}")
    return values
