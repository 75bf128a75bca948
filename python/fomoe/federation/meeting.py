# SPDX-License-Identifier: Apache-2.0
"""One site's part in the meetings: what it contributes, the outer step of what it owns, the result.

Everything here is in host memory, wherever the site computes. A meeting works on scratch tensors
and returns what the site's values become; :meth:`Meetings.commit` makes it count.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fomoe.errors import UserError
from fomoe.federation.config import FederationConfig
from fomoe.federation.exchange import Attendance, Exchange, Piece, Transport, codec_for, cut
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
    "is_finite",
]

OUTER_MOMENTUM, LOST_UP, LOST_DOWN = "outer_momentum", "lost_up", "lost_down"

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, by torch's names; outer "local_adamw" averages them."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """What came of a meeting: new values by tensor name, and, by kind, new moments.

    A tensor without contributors keeps the value the round began with.
    """

    attendance: Attendance
    values: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]


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
        """Take over what :meth:`state` gave, entries of other kinds left aside."""

        def of(kind: str) -> dict[str, Tensor]:
            prefix = f"{kind}/"
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        self.outer.momentum = of(OUTER_MOMENTUM)
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
        contributions = self._contributions(values)
        finite = is_finite(contributions.values()) and all(
            is_finite(kind.values()) for kind in kinds.values()
        )
        attendance = self._attend(tokens, rejected=failed or not finite)
        means = self.exchange.reduce(contributions, attendance)
        del contributions
        if self.settings.sends_differences:
            means = {piece: self._step(piece, mean) for piece, mean in means.items()}
        arrived = self.exchange.distribute(means, attendance)
        results = {name: self._result(name, value) for name, value in arrived.items()}
        return Meeting(
            attendance,
            self.start | results,
            {kind: self._mean(contribution, attendance) for kind, contribution in kinds.items()},
        )

    def mean_gradients(
        self, gradients: Mapping[str, Tensor], tokens: int
    ) -> tuple[dict[str, Tensor], Attendance]:
        """Mean of all sites' gradients, by tensor name, flat, and whose counted.

        Raises
        ------
        UserError
            No site's gradients are finite.
        """
        attendance = self._attend(tokens, rejected=not is_finite(gradients.values()))
        return self._mean(gradients, attendance), attendance

    def commit(self) -> None:
        """The site has taken the meeting's results over."""
        self.outer.commit()
        self.exchange.commit()
        self.start = {}

    def _attend(self, tokens: int, *, rejected: bool) -> Attendance:
        attendance = self.exchange.attend(tokens, rejected=rejected)
        if len(attendance.rejected) == self.transport.sites:
            raise UserError(
                "the parameters of every site are no longer finite: lower optimizer.lr, "
                "or set optimizer.clip_norm"
            )
        return attendance

    def _mean(self, values: Mapping[str, Tensor], attendance: Attendance) -> dict[str, Tensor]:
        return self.exchange.distribute(self.exchange.reduce(values, attendance), attendance)

    def _contributions(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not self.settings.sends_differences:
            return values
        return {name: self.start[name] - value for name, value in values.items()}

    def _step(self, piece: Piece, mean: Tensor) -> Tensor:
        delta = mean if piece.factor == 1 else mean * piece.factor
        # Averaging through a lossy codec: the step is the mean difference.
        return self.outer.step(piece.key, delta) if self.settings.outer == "nesterov" else delta

    def _result(self, name: str, arrived: Tensor) -> Tensor:
        start = self.start[name]
        value = arrived.view(start.shape)
        return start - value if self.settings.sends_differences else value


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element of any of the tensors is NaN or infinite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
