# SPDX-License-Identifier: Apache-2.0
"""How good a conversion is: local error, usage of the experts, loss on text.

T tokens, H neurons, E experts.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe.convert.dense import DenseLayer
from fomoe.convert.methods import LayerResult, Method
from fomoe.convert.router import Choice
from fomoe.models import Decoder

DEAD = 0.001  # share of tokens below which an expert counts as dead
ALWAYS_ON = 0.999  # and above which as always on


@dataclass(kw_only=True, slots=True, frozen=True)
class LayerQuality:
    """On held-out tokens; the definitions are our choice."""

    error: float  # |dense - converted|^2 / |dense|^2, both summed over tokens
    usage: tuple[float, ...]  # (E,) share of tokens that take each expert
    usage_entropy: float  # of the load (usage / K), over log E: 1 is even

    @property
    def dead_experts(self) -> int:
        return sum(share < DEAD for share in self.usage)

    @property
    def always_on_experts(self) -> int:
        return sum(share > ALWAYS_ON for share in self.usage)


def layer_quality(
    layer: DenseLayer,
    result: LayerResult,
    method: Method,
    top_k: int,
    products_TEE: Tensor,
) -> LayerQuality:
    """Of a converted layer, with its :meth:`DenseLayer.expert_products` on held-out tokens."""
    num_experts = products_TEE.shape[1]
    own_TE = products_TEE.diagonal(dim1=1, dim2=2)
    if result.router is None:
        chosen_TE = torch.zeros_like(own_TE)
        chosen_TE[:, :top_k] = 1
    else:
        choice = Choice(top_k, method.always_on)
        chosen_TE = choice(F.linear(layer.inputs, result.router.weight, result.router.bias))
    usage_E = chosen_TE.mean(0)
    load_E = usage_E / top_k
    entropy = -torch.special.xlogy(load_E, load_E).sum() / math.log(num_experts)
    return LayerQuality(
        error=_relative_error(products_TEE, chosen_TE),
        usage=tuple(usage_E.tolist()),
        usage_entropy=float(entropy),
    )


def _relative_error(products_TEE: Tensor, chosen_TE: Tensor) -> float:
    off_TE = (1 - chosen_TE).double()
    lost_T = (off_TE * (products_TEE.double() @ off_TE[:, :, None]).squeeze(2)).sum(1)
    return float(lost_T.sum() / products_TEE.double().sum())


@torch.no_grad()
def negative_log_likelihood(model: Decoder, tokens_NS: Tensor, batch_size: int = 4) -> Tensor:
    """Mean over each sequence's predictions, nats per token, (N,) float64 on the CPU."""
    device = model.embedding.weight.device
    losses = []
    for batch_BS in torch.split(tokens_NS.to(device), batch_size):
        logits_PV = model(batch_BS[:, :-1]).float().flatten(0, 1)  # a row for each prediction
        loss_P = F.cross_entropy(logits_PV, batch_BS[:, 1:].flatten(), reduction="none")
        losses.append(loss_P.view(len(batch_BS), -1).double().mean(1).cpu())
    return torch.cat(losses)
