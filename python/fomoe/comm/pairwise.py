# SPDX-License-Identifier: Apache-2.0
"""An uneven all-to-all that fills a link both ways, over groups of torch.distributed.

gloo tells the sender when a receive is posted, on the connection that carries the payload too, and
its own all-to-all posts the send first: of two ranks, the first to arrive then says that it is
ready only behind its payload, and the link carries one direction after the other. Here every
receive is posted before any send.
"""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_to_all"]


def all_to_all(
    inbox: Tensor,
    outbox: Tensor,
    receive: list[int],
    send: list[int],
    group: dist.ProcessGroup | None,
) -> None:
    """Give every rank of the group its part of ``outbox``, and fill ``inbox`` with theirs.

    Parameters
    ----------
    inbox, outbox : Tensor, (sum(receive),) and (sum(send),), of one dtype, contiguous
        Parts by rank of the group.
    receive, send : list[int]
        Elements from and to each rank. What one rank sends to another, both have to know.
    group : ProcessGroup | None
        None: all ranks of torch.distributed.

    Raises
    ------
    RuntimeError
        From torch: another rank is gone, or gave no sign within the group's timeout.
    """
    if dist.get_backend(group) != "gloo":
        dist.all_to_all_single(inbox, outbox, receive, send, group=group)
        return
    if outbox.device.type != "cpu":  # gloo sends and receives in host memory alone
        arrived = inbox.cpu()
        all_to_all(arrived, outbox.cpu(), receive, send, group)
        inbox.copy_(arrived)
        return
    me = dist.get_rank(group)
    inboxes, outboxes = torch.split(inbox, receive), torch.split(outbox, send)
    # From the next rank on, so that not all begin with the same one.
    others = [(me + i) % len(send) for i in range(1, len(send))]
    works = [dist.irecv(inboxes[rank], group=group, group_src=rank) for rank in others]
    works += [dist.isend(outboxes[rank], group=group, group_dst=rank) for rank in others]
    inboxes[me].copy_(outboxes[me])
    for work in works:
        if work is not None:  # None is for ranks outside of the group
            work.wait()
