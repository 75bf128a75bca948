# SPDX-License-Identifier: Apache-2.0
"""From assignments and routers to the weights of a Mixture-of-Experts model.

D model width, H neurons, E experts, F neurons of an expert.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fomoe.convert.dense import DenseWeights
from fomoe.convert.methods import LayerResult
from fomoe.models import Decoder, DecoderConfig, FeedForward
from fomoe.nn import MoE


def dense_weights(block: FeedForward) -> DenseWeights:
    """The block's matrices in float32, apart."""
    gate, up = block.w1.detach().float().chunk(2)
    return DenseWeights(gate, up, block.w2.detach().float())


@torch.no_grad()
def assemble(dense: Decoder, config: DecoderConfig, results: Mapping[int, LayerResult]) -> Decoder:
    """A decoder of shape ``config`` with the neurons of ``dense`` where ``results`` has them.

    Everything but the layers in ``results`` is shared with ``dense``, not copied.
    """
    dtype, device = dense.embedding.weight.dtype, dense.embedding.weight.device
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    for name, child in dense.named_children():
        if name != "layers":
            setattr(model, name, child)
    for index, target in enumerate(model.layers):
        source = dense.layers[index]
        for name, child in source.named_children():
            if name != "feed_forward":
                setattr(target, name, child)
        if index not in results:
            target.feed_forward = source.feed_forward
            continue
        feed_forward = source.feed_forward
        assert isinstance(feed_forward, FeedForward)
        if isinstance(target.moe, MoE):
            target.moe.to_empty(device=device)
            _fill(target.moe, feed_forward, results[index])
        elif isinstance(target.feed_forward, FeedForward):
            target.feed_forward.to_empty(device=device)
            _fill_pruned(target.feed_forward, feed_forward, results[index].expert)
    return model.eval()


def _fill(moe: MoE, source: FeedForward, result: LayerResult) -> None:
    num_shared = moe.config.shared_expert_dim // moe.config.expert_dim
    neurons_EF = result.expert.argsort(stable=True).view(-1, moe.config.expert_dim)
    w1_EPD, w2_EDF = _experts(source, neurons_EF)
    moe.experts.w1.copy_(w1_EPD[num_shared:])
    moe.experts.w2.copy_(w2_EDF[num_shared:])
    if moe.shared_expert is not None:
        moe.shared_expert.w1.copy_(w1_EPD[0])
        moe.shared_expert.w2.copy_(w2_EDF[0])
    assert result.router is not None
    moe.router.weight.copy_(result.router.weight[num_shared:])
    moe.router.bias.copy_(result.router.bias[num_shared:])


def _fill_pruned(target: FeedForward, source: FeedForward, expert_H: Tensor) -> None:
    """The neurons of the first experts, as many as there is room for."""
    width = target.w2.shape[1]
    kept = expert_H.argsort(stable=True)[:width].sort().values
    w1_EPD, w2_EDF = _experts(source, kept[None])
    target.w1.copy_(w1_EPD[0])
    target.w2.copy_(w2_EDF[0])


def _experts(source: FeedForward, neurons_EF: Tensor) -> tuple[Tensor, Tensor]:
    """w1 (E, 2F, D) and w2 (E, D, F) of experts made of these neurons."""
    gate_HD, up_HD = source.w1.chunk(2)
    w1_EPD = torch.cat([gate_HD[neurons_EF], up_HD[neurons_EF]], dim=1)
    return w1_EPD, source.w2.T[neurons_EF].transpose(1, 2)
