# SPDX-License-Identifier: Apache-2.0
"""One site's part in the meetings: what it contributes, the outer step of what it owns, the result.

Everything here is in host memory, wherever the site computes. A meeting works on buffers of its own
and returns what the site's values become; :meth:`Meetings.commit` makes it count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fomoe.errors import UserError
from fomoe.federation.config import FederationConfig
from fomoe.federation.exchange import (
    Attendance,
    Carried,
    Chunk,
    Exchange,
    Results,
    Transport,
    codec_for,
    cut,
    is_finite,
)
from fomoe.federation.ledger import SiteLedger
from fomoe.federation.outer_optimizer import Nesterov
from fomoe.federation.placement import Placement
from fomoe.federation.relocation import Arrivals
from fomoe.nn import ModelTensor

__all__ = [
    "LOST_DOWN",
    "LOST_UP",
    "MOMENTS",
    "OUTER_MOMENTUM",
    "Meeting",
    "Meetings",
]

OUTER_MOMENTUM, LOST_UP, LOST_DOWN = "outer_momentum", "lost_up", "lost_down"

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, by torch's names; outer "local_adamw" averages them."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """What came of a meeting: for the values, and, by kind, for the moments.

    ``start`` are the values the round began with, which a tensor without contributors goes back to;
    ``has_differences`` says that the results are to be subtracted from them.
    """

    attendance: Attendance
    start: Mapping[str, Tensor]
    has_differences: bool
    values: Results
    moments: Mapping[str, Results]

    def write_value(self, name: str, target: Tensor) -> None:
        """Overwrite a tensor with what it becomes."""
        start = self.start[name]
        if name in self.values:
            self.values.write(name, target, minuend=start if self.has_differences else None)
        else:
            target.copy_(start)

    def write_moment(self, kind: str, name: str, target: Tensor) -> None:
        """Overwrite a moment with what it becomes; without contributors it stays."""
        if name in self.moments[kind]:
            self.moments[kind].write(name, target)


class Meetings:
    """The state that a site carries from meeting to meeting.

    ``start`` are the values of the round's beginning, by tensor name; ``outer`` holds the momenta
    of the pieces this site owns.
    """

    def __init__(
        self,
        settings: FederationConfig,
        transport: Transport,
        ledger: SiteLedger,
        tensors: Sequence[ModelTensor],
        placement: Placement,
    ) -> None:
        self.settings = settings
        self.transport = transport
        self.ledger = ledger
        self.start: dict[str, Tensor] = {}
        dtypes = {tensor.parameter.dtype for tensor in tensors}
        if len(dtypes) != 1:
            raise ValueError(f"all parameters must have one dtype, got {sorted(map(str, dtypes))}")
        self.codec = codec_for(settings.codec, dtypes.pop())
        self._build(tensors, placement)

    def place(
        self, tensors: Sequence[ModelTensor], placement: Placement, arrivals: Arrivals
    ) -> None:
        """Go on with these tensors and this placement.

        What a codec lost of a tensor that has just come, or of a piece whose owner has changed, is
        dropped.
        """
        before, momentum = self.exchange, self.outer.momentum | arrivals.momentum
        self._build(tensors, placement)
        self.start = {}
        self.outer.carried.load(momentum)
        sent = {p.key for p in self.exchange.pieces if p.tensor not in arrivals.weights}
        lost_up = before.lost_up.by_piece()
        self.exchange.lost_up.load({key: x for key, x in lost_up.items() if key in sent})
        self.exchange.lost_down.load(before.lost_down.by_piece())

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, flat, by ``KIND/PIECE``."""
        kinds = {
            OUTER_MOMENTUM: self.outer.momentum,
            LOST_UP: self.exchange.lost_up.by_piece(),
            LOST_DOWN: self.exchange.lost_down.by_piece(),
        }
        return {f"{kind}/{key}": v for kind, values in kinds.items() for key, v in values.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave, entries of other kinds left aside.

        What a lossy codec lost is dropped when this one loses nothing.
        """

        def of(kind: str) -> dict[str, Tensor]:
            prefix = f"{kind}/"
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        self.outer.carried.load(of(OUTER_MOMENTUM))
        if self.codec.is_lossy:
            self.exchange.lost_up.load(of(LOST_UP))
            self.exchange.lost_down.load(of(LOST_DOWN))

    def _build(self, tensors: Sequence[ModelTensor], placement: Placement) -> None:
        settings = self.settings
        pieces = cut(
            tensors,
            placement,
            router_mean=settings.router_mean,
            scale_expert_steps=settings.scale_expert_steps,
        )
        self.exchange = Exchange(pieces, self.transport, self.ledger, self.codec)
        layout, owned = self.exchange.layout, self.exchange.owned
        carried = Carried(layout, owned, layout.num_owned, self.codec.dtype)
        self.outer = Nesterov(settings.outer_lr, settings.outer_momentum, carried)

    def begin_round(self, values: Mapping[str, Tensor]) -> None:
        """Remember the values the round starts from."""
        if not self.start:
            self.start = {name: torch.empty_like(value) for name, value in values.items()}
        for name, value in values.items():
            self.start[name].copy_(value)

    def meet(
        self,
        values: Mapping[str, Tensor],
        moments: Mapping[str, Mapping[str, Tensor]],
        tokens: int,
        *,
        failed: bool,
    ) -> Meeting:
        """Exchange this site's values, and with local_adamw its moments, by kind.

        A site that has ``failed``, or whose contribution is not finite, takes part only to receive.

        Raises
        ------
        UserError
            No site has anything to contribute.
        """
        kinds = moments if self.settings.outer == "local_adamw" else {}
        start = self.start if self.settings.sends_differences else None
        parcel = self.exchange.pack(values, start)
        finite = parcel.is_finite and all(is_finite(x) for k in kinds.values() for x in k.values())
        attendance = self._attend(tokens, rejected=failed or not finite)
        step = self._step if self.settings.sends_differences else None
        parcel = self.exchange.reduce(parcel, attendance, step)
        return Meeting(
            attendance,
            self.start,
            self.settings.sends_differences,
            self.exchange.distribute(parcel, attendance),
            {kind: self._mean(kind, values, attendance) for kind, values in kinds.items()},
        )

    def mean_gradients(
        self, gradients: Mapping[str, Tensor], tokens: int, *, failed: bool
    ) -> Meeting:
        """Mean of the gradients of all sites that have not ``failed``.

        Raises
        ------
        UserError
            No site's gradients are finite.
        """
        parcel = self.exchange.pack(gradients)
        attendance = self._attend(tokens, rejected=failed or not parcel.is_finite)
        means = self.exchange.reduce(parcel, attendance)
        return Meeting(attendance, {}, False, self.exchange.distribute(means, attendance), {})

    def missed(self) -> Meeting:
        """What a rank that does not meet the other sites knows of a meeting: nothing."""
        return Meeting(Attendance(()), {}, False, Results(self.codec, [], torch.empty(0)), {})

    def commit(self) -> None:
        """The site has taken the meeting's results over."""
        self.outer.commit()
        self.exchange.commit()

    def _attend(self, tokens: int, *, rejected: bool) -> Attendance:
        attendance = self.exchange.attend(tokens, rejected=rejected)
        if len(attendance.rejected) == self.transport.sites:
            raise UserError(
                "the parameters of every site are no longer finite: lower optimizer.lr, "
                "or set optimizer.clip_norm"
            )
        return attendance

    def _mean(self, kind: str, values: Mapping[str, Tensor], attendance: Attendance) -> Results:
        means = self.exchange.reduce(self.exchange.pack(values, kind=kind), attendance)
        return self.exchange.distribute(means, attendance)

    def _step(self, chunk: Chunk, mean: Tensor, work: Tensor) -> None:
        if chunk.factor != 1:
            mean.mul_(chunk.factor)
        if self.settings.outer == "nesterov":  # else averaging through a lossy codec
            self.outer.step(chunk, mean, work)
