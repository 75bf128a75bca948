# SPDX-License-Identifier: Apache-2.0
"""One site's part in the meetings: what it contributes, the outer step of what it owns, the result.

Everything here is in host memory, wherever the site computes. A meeting works on scratch tensors
and returns what the site's values become; :meth:`Meetings.commit` makes it count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fomoe.errors import UserError
from fomoe.federation.config import FederationConfig
from fomoe.federation.exchange import (
    Attendance,
    Exchange,
    Piece,
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
        self.outer = Nesterov(settings.outer_lr, settings.outer_momentum)
        self.start: dict[str, Tensor] = {}
        dtypes = {tensor.parameter.dtype for tensor in tensors}
        if len(dtypes) != 1:
            raise ValueError(f"all parameters must have one dtype, got {sorted(map(str, dtypes))}")
        self.codec = codec_for(settings.codec, dtypes.pop())
        self.exchange = self._exchange(tensors, placement)

    def place(
        self, tensors: Sequence[ModelTensor], placement: Placement, arrivals: Arrivals
    ) -> None:
        """Go on with these tensors and this placement.

        What a codec lost of a tensor that has just come, or of a piece whose owner has changed, is
        dropped.
        """
        before = self.exchange
        self.exchange = self._exchange(tensors, placement)
        sent = {p.key for p in self.exchange.pieces if p.tensor not in arrivals.weights}
        owned = {piece.key for piece in self.exchange.owned}
        self.exchange.lost_up, self.exchange.lost_down = before.lost_up, before.lost_down
        self.exchange.lost_up.keep_only(sent)
        self.exchange.lost_down.keep_only(owned & {piece.key for piece in before.owned})
        momentum = self.outer.momentum | arrivals.momentum
        self.outer.momentum = {key: value for key, value in momentum.items() if key in owned}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, flat, by ``KIND/PIECE``."""
        kinds = {
            OUTER_MOMENTUM: self.outer.momentum,
            LOST_UP: self.exchange.lost_up.residuals,
            LOST_DOWN: self.exchange.lost_down.residuals,
        }
        return {f"{kind}/{key}": v for kind, values in kinds.items() for key, v in values.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave, entries of other kinds left aside.

        What a lossy codec lost is dropped when this one loses nothing.
        """

        def of(kind: str) -> dict[str, Tensor]:
            prefix = f"{kind}/"
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        self.outer.momentum = of(OUTER_MOMENTUM)
        if self.codec.is_lossy:
            self.exchange.lost_up.load(of(LOST_UP))
            self.exchange.lost_down.load(of(LOST_DOWN))

    def _exchange(self, tensors: Sequence[ModelTensor], placement: Placement) -> Exchange:
        settings = self.settings
        pieces = cut(
            tensors,
            placement,
            router_mean=settings.router_mean,
            scale_expert_steps=settings.scale_expert_steps,
        )
        return Exchange(pieces, self.transport, self.ledger, self.codec)

    def begin_round(self, values: Mapping[str, Tensor]) -> None:
        """Remember the values the round starts from."""
        self.start = {name: value.clone() for name, value in values.items()}

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
        results = self.exchange.reduce(parcel, attendance)
        if self.settings.sends_differences:
            for piece in results:
                results[piece] = self._step(piece, results[piece])
        return Meeting(
            attendance,
            self.start,
            self.settings.sends_differences,
            self.exchange.distribute(results, attendance),
            {kind: self._mean(contribution, attendance) for kind, contribution in kinds.items()},
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
        return Meeting(Attendance(()), {}, False, Results(self.codec, []), {})

    def commit(self) -> None:
        """The site has taken the meeting's results over."""
        self.outer.commit()
        self.exchange.commit()
        self.exchange.scratch.settle()
        self.start = {}

    def _attend(self, tokens: int, *, rejected: bool) -> Attendance:
        attendance = self.exchange.attend(tokens, rejected=rejected)
        if len(attendance.rejected) == self.transport.sites:
            raise UserError(
                "the parameters of every site are no longer finite: lower optimizer.lr, "
                "or set optimizer.clip_norm"
            )
        return attendance

    def _mean(self, values: Mapping[str, Tensor], attendance: Attendance) -> Results:
        means = self.exchange.reduce(self.exchange.pack(values), attendance)
        return self.exchange.distribute(means, attendance)

    def _step(self, piece: Piece, mean: Tensor) -> Tensor:
        scratch = self.exchange.scratch
        delta = mean if piece.factor == 1 else mean * piece.factor
        if self.settings.outer != "nesterov":
            return scratch.track(delta)  # averaging through a lossy codec: the mean difference
        step = scratch.track(self.outer.step(piece.key, delta))
        scratch.track(self.outer.next[piece.key])
        return step
