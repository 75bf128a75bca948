# SPDX-License-Identifier: Apache-2.0
"""What a site reports of itself after a round: digests of its values, and the memory they took."""

import hashlib
from typing import Any

import torch

from fomoe.federation.memory import peak_rss, tensor_bytes
from fomoe.federation.sharding import local
from fomoe.federation.site import Site

__all__ = ["digests", "memory", "memory_of_the_meeting"]


def digests(site: Site) -> dict[str, Any]:
    """SHA-256 of what the site holds in common with others, who must have the same.

    ``shared``: of the shared tensors and the rows of a full router. ``expert``: by group of
    holders, written ``"0,2"``, of the experts that exactly these sites hold. Empty on ranks
    that are not the leader.
    """
    values = site.values_on_host()
    if not site.ranks.leader:
        return {}
    shared = hashlib.sha256()
    experts: dict[str, Any] = {}
    for tensor in site.tensors_of_all_ranks:
        digest = shared
        if not tensor.on_every_site and tensor.layer is not None and tensor.expert is not None:
            holders = site.placement.holders(tensor.layer, tensor.expert)
            digest = experts.setdefault(",".join(map(str, holders)), hashlib.sha256())
        value = values[tensor.name].contiguous()
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return {
        "shared": shared.hexdigest(),
        "expert": {group: digest.hexdigest() for group, digest in experts.items()},
    }


def memory(site: Site) -> dict[str, int]:
    """Bytes of its rank's tensors by class, before a meeting, when most of them exist."""
    parameters = list(site.model.parameters())
    return {
        "parameters": tensor_bytes(map(local, parameters)),
        "gradients": tensor_bytes(local(p.grad) for p in parameters if p.grad is not None),
        "optimizer": site.optimizer.num_bytes(),
        "round_start": tensor_bytes(site.meetings.start.values()),
    }


def memory_of_the_meeting(site: Site) -> dict[str, int]:
    """What the meetings need, and the peak resident set of the process.

    ``exchange_buffers`` is what is kept for the next meeting to write to: buffers, and new
    momenta and losses of the codec; ``outer_momentum`` is that of owned tensors, and
    ``codec_residuals`` is what the codec lost.
    """
    exchange, momentum = site.meetings.exchange, site.meetings.outer.carried
    return {
        "outer_momentum": momentum.num_bytes(),
        "codec_residuals": exchange.lost_up.num_bytes() + exchange.lost_down.num_bytes(),
        "exchange_buffers": exchange.num_bytes() + momentum.spare_bytes(),
        "peak_rss": peak_rss(),
        **_peak_on_device(site),
    }


def _peak_on_device(site: Site) -> dict[str, int]:
    if site.device.type != "cuda":
        return {}
    return {"peak_device": torch.cuda.max_memory_allocated(site.device)}
