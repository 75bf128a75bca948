# SPDX-License-Identifier: Apache-2.0
"""Experts that change sites: who sends what to whom (FoMoE, "random" placement).

An expert's weights go from its old owner to every site that holds it now and did not before, its
outer momentum to its new owner, both as they were committed. Its AdamW state stays behind and is
lost (FoMoE section 3); that the momentum travels is our choice.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fomoe.federation.exchange import Piece, Transport
from fomoe.federation.ledger import SiteLedger
from fomoe.federation.placement import Placement
from fomoe.nn import ModelTensor

__all__ = ["Arrivals", "relocate"]


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What came to a site: weights by tensor name and momenta by the key of the piece, flat."""

    weights: dict[str, Tensor]
    momentum: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Item:
    tensor: ModelTensor
    is_weight: bool
    source: int
    destination: int

    @property
    def key(self) -> str:
        return Piece.key_of(self.tensor.name, 0, self.tensor.num_elements)


def relocate(
    before: tuple[Sequence[ModelTensor], Placement],
    after: tuple[Sequence[ModelTensor], Placement],
    values: Mapping[str, Tensor],
    momentum: Mapping[str, Tensor] | None,
    transport: Transport,
    ledger: SiteLedger,
) -> Arrivals:
    """Send what leaves this site and receive what comes.

    ``before`` and ``after`` are this site's tensors, in the order of ``federated_tensors``, and the
    placement; ``values`` are those of the former, by name. ``momentum`` is by piece, zeros where it
    has none; None when the outer optimizer keeps none.
    """
    site = transport.site
    with_momentum = momentum is not None
    leaving = [x for x in _items(before[0], before[1], after[1], with_momentum) if x.source == site]
    coming = [
        x for x in _items(after[0], before[1], after[1], with_momentum) if x.destination == site
    ]
    to = [[x for x in leaving if x.destination == s] for s in range(transport.sites)]
    come = [[x for x in coming if x.source == s] for s in range(transport.sites)]
    parts = [_content(item, values, momentum or {}) for group in to for item in group]
    outbox = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
    send, receive = [[sum(map(_num_bytes, group)) for group in groups] for groups in (to, come)]
    inbox = torch.empty(sum(receive), dtype=torch.uint8)
    transport.all_to_all(outbox, send, inbox, receive)
    ledger.sent("moved", sum(send))
    arrivals, offset = Arrivals({}, {}), 0
    for item in (item for group in come for item in group):
        content = inbox[offset : offset + _num_bytes(item)]
        offset += _num_bytes(item)
        # A copy, for its neighbours in the buffer may live shorter.
        value = content.clone().view(item.tensor.parameter.dtype)
        if item.is_weight:
            arrivals.weights[item.tensor.name] = value
        else:
            arrivals.momentum[item.key] = value
    return arrivals


def _items(
    tensors: Sequence[ModelTensor], old: Placement, new: Placement, with_momentum: bool
) -> Iterator[_Item]:
    """All that travels of these tensors, in their order."""
    for tensor in tensors:
        if tensor.layer is None or tensor.expert is None:
            continue
        place = tensor.layer, tensor.expert
        owner = old.owner(*place)
        if not tensor.on_every_site:
            for site in new.holders(*place):
                if site not in old.holders(*place):
                    yield _Item(tensor, True, owner, site)
        if with_momentum and tensor.is_trained and new.owner(*place) != owner:
            yield _Item(tensor, False, owner, new.owner(*place))


def _content(item: _Item, values: Mapping[str, Tensor], momentum: Mapping[str, Tensor]) -> Tensor:
    value = values[item.tensor.name] if item.is_weight else momentum.get(item.key)
    if value is None:  # the expert never had a contribution
        value = torch.zeros(item.tensor.num_elements, dtype=item.tensor.parameter.dtype)
    return value.detach().to("cpu").reshape(-1).view(torch.uint8)


def _num_bytes(item: _Item) -> int:
    return item.tensor.num_elements * item.tensor.parameter.element_size()
