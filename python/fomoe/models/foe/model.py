# SPDX-License-Identifier: Apache-2.0
"""The Federation of Experts: a language model whose experts live in groups, one per key/value head.

G groups held here of H, B batch, S sequence, D model width.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fomoe.models.attention import Rotation
from fomoe.models.cache import LayerView
from fomoe.models.foe.attention import GroupAttention
from fomoe.models.foe.config import FoEConfig
from fomoe.models.foe.group_moe import GroupMoE
from fomoe.models.foe.ranks import GroupRanks
from fomoe.models.language_model import LanguageModel, peri_norm
from fomoe.models.normalization import RMSNorm

__all__ = ["FoE", "FoELayer"]

_Mean = Callable[[Tensor], Tensor]


class FoELayer(nn.Module):
    """Every group adds attention to its stream; their mean is the input of every group's experts.

    r_h = x_h + s * attention_h(norm(x_h)); r = mean over h of r_h; x'_h = r + s * moe_h(norm(r)),
    where the norms are our choice, for the paper shows none. In the first layer all streams are the
    same, and its groups' attention is that of a single layer with all heads: r = x + s * sum over h
    of attention_h(norm(x)). peri normalises what is added, too.
    """

    def __init__(
        self,
        config: FoEConfig,
        groups: range,
        moe: GroupMoE,
        mean: _Mean,
        is_first: bool,
    ) -> None:
        super().__init__()
        self.num_groups = config.num_groups
        self.is_first = is_first
        self.mean = mean
        self.residual_scale = config.residual_scale
        self.attention_norm = RMSNorm(config.dim, config.norm_epsilon)
        self.attention = GroupAttention(
            config.dim, config.num_heads // config.num_groups, config.head_dim, groups
        )
        self.attention_output_norm = peri_norm(config)
        self.moe_norm = RMSNorm(config.dim, config.norm_epsilon)
        self.moe = moe
        self.moe_output_norm = peri_norm(config)

    def forward(
        self, x_GBSD: Tensor, positions: Rotation, cache: LayerView | None = None
    ) -> Tensor:
        """(G, B, S, D); the first layer's input is (1, B, S, D)."""
        added = self.attention(self.attention_norm(x_GBSD), positions, cache)
        if self.is_first:
            added = self.attention_output_norm(self.mean(added) * self.num_groups)
            r_BSD = torch.add(x_GBSD[0], added, alpha=self.residual_scale)
        else:
            added = self.attention_output_norm(added)
            r_BSD = self.mean(torch.add(x_GBSD, added, alpha=self.residual_scale))
        y_GBSD: Tensor = self.moe_output_norm(self.moe(self.moe_norm(r_BSD)))
        return torch.add(r_BSD, y_GBSD, alpha=self.residual_scale)


class FoE(LanguageModel):
    """Tokens to next-token logits. Source: FoE (arXiv 2605.06206, section 3 and Table 1).

    The paper's model is ``residual_scale=1``.

    Parameters
    ----------
    config : FoEConfig
    resident_experts : Sequence[Sequence[int]], optional
        Ascending global ids of the experts held here, for each layer; all of them by default. For
        a model that is not over several ranks.
    ranks : GroupRanks, optional
        Puts the groups on several ranks: those of this rank are held here. Every forward and
        backward is then a collective call of all ranks, whose tokens are the same, or for groups
        of several ranks as many. After the backward call ``ranks.finish_gradients``.

    Raises
    ------
    ValueError
        If ``resident_experts`` has not one entry per layer, does not fit, or stands beside
        ``ranks``.
    """

    config: FoEConfig

    def __init__(
        self,
        config: FoEConfig,
        resident_experts: Sequence[Sequence[int]] | None = None,
        ranks: GroupRanks | None = None,
    ) -> None:
        if ranks is not None and resident_experts is not None:
            raise ValueError("resident_experts: expected none beside ranks, which say who has what")
        groups = range(config.num_groups) if ranks is None else ranks.groups
        layers = list(_build_layers(config, resident_experts, ranks, groups))
        super().__init__(config, layers, num_kv_heads=len(groups))
        self.ranks = ranks

    def forward(self, tokens_BS: Tensor) -> Tensor:
        logits = super().forward(tokens_BS)
        return logits if self.ranks is None else self.ranks.alike(logits)

    def _enter_layers(self, x_BSD: Tensor) -> Tensor:
        return x_BSD[None]

    def _leave_layers(self, x: Tensor) -> Tensor:
        if self.ranks is None:
            return mean_of_groups(x)
        return self.ranks.last_mean(x)


def mean_of_groups(x_GBSD: Tensor) -> Tensor:
    """Of all of them, (B, S, D)."""
    return x_GBSD.sum(dim=0) / x_GBSD.shape[0]


def _build_layers(
    config: FoEConfig,
    resident_experts: Sequence[Sequence[int]] | None,
    ranks: GroupRanks | None,
    groups: range,
) -> Iterator[FoELayer]:
    if resident_experts is not None and len(resident_experts) != config.num_layers:
        raise ValueError(
            f"resident_experts: expected one for each of {config.num_layers} layers, "
            f"got {len(resident_experts)}"
        )
    for index in range(config.num_layers):
        residents = None if resident_experts is None else resident_experts[index]
        exchange = None if ranks is None else ranks.exchange()
        try:
            moe = GroupMoE(config, groups, residents, exchange)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error
        mean = mean_of_groups if ranks is None else ranks.mean
        yield FoELayer(config, groups, moe, mean, is_first=index == 0)
