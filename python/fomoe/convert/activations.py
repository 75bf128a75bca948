# SPDX-License-Identifier: Apache-2.0
"""What each feed-forward of a dense model sees, without holding all layers' inputs at once.

N sequences, S tokens each, D model width.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from fomoe.models import Decoder
from fomoe.models.attention import rotation

_SEQUENCES = 8


@torch.no_grad()
def feed_forward_inputs(
    model: Decoder, tokens_NS: Tensor, layers: Collection[int]
) -> Iterator[tuple[int, Tensor]]:
    """Layer by layer, what its feed-forward is given: (layer, (N * S, D) in float32).

    All sequences pass one layer before any passes the next, so only the residual stream is kept,
    N * S * D values in the model's dtype, and each layer runs once. Yields the ``layers`` in
    ascending order and stops after the last.
    """
    device = model.embedding.weight.device
    stream_NSD: Tensor = model.embedding_norm(model.embedding(tokens_NS.to(device)))
    positions = rotation(
        tokens_NS.shape[1],
        model.config.head_dim,
        model.config.rope_theta,
        scaling=model.config.rope_scaling,
        dtype=torch.promote_types(stream_NSD.dtype, torch.float32),
        device=device,
    )
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].flatten(0, 1).float())

    for index in range(max(layers) + 1):
        layer: nn.Module = model.layers[index]
        hook = None
        if index in layers:
            hook = layer.get_submodule("feed_forward").register_forward_pre_hook(keep)
        for begin in range(0, len(tokens_NS), _SEQUENCES):
            part = slice(begin, begin + _SEQUENCES)
            stream_NSD[part] = layer(stream_NSD[part], positions)
        if hook is not None:
            hook.remove()
            inputs = torch.cat(seen)
            seen.clear()
            yield index, inputs
