# SPDX-License-Identifier: Apache-2.0
"""Between the device a site computes on and host memory, where sites meet."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fomoe.federation.sharding import gather, whole
from fomoe.federation.site_ranks import SiteRanks

__all__ = ["Staging"]


class Staging:
    """Host copies of a site's tensors; what a CPU has whole needs none.

    Copies of one ``kind`` share page-locked buffers from call to call: the next call overwrites
    what the last one returned. Of the ranks of a site, only the leader keeps copies; the others
    give it their shards and their experts.
    """

    def __init__(self, device: torch.device, ranks: SiteRanks) -> None:
        self.device = device
        self.ranks = ranks
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def to_host(self, kind: str, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The values by name in host memory: themselves on the CPU, else copies.

        An empty mapping on ranks that are not the leader; all ranks of the site call it.
        """
        leader, of_others = self.ranks.leader, self.ranks.of_others(values)
        if not leader or self.device.type == "cpu":
            return gather(values, keep=leader) | of_others
        copies = {name: self._buffer(kind, name, value) for name, value in values.items()}
        for name, value in values.items():
            copies[name].copy_(whole(value), non_blocking=True)
        torch.cuda.synchronize(self.device)
        return copies | of_others

    def _buffer(self, kind: str, name: str, value: Tensor) -> Tensor:
        buffer = self._buffers.get((kind, name))
        if buffer is None or buffer.shape != value.shape:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._buffers[kind, name] = buffer
        return buffer

    def keep_only(self, names: set[str]) -> None:
        """Free the buffers of tensors that have left the site."""
        self._buffers = {key: b for key, b in self._buffers.items() if key[1] in names}
