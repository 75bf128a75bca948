# SPDX-License-Identifier: Apache-2.0
"""What a lossy codec lost, kept to be sent with the next round."""

from collections.abc import Collection, Mapping

from torch import Tensor

__all__ = ["ErrorFeedback"]


class ErrorFeedback:
    """Residuals by piece: what was meant is what was sent plus the residual, round by round.

    They are state of the round: new ones count from :meth:`commit` on, so that a meeting that fails
    leaves everything as it was. Without an entry a residual is zero.
    """

    def __init__(self) -> None:
        self.residuals: dict[str, Tensor] = {}
        self._next: dict[str, Tensor] = {}

    def corrected(self, key: str, value: Tensor) -> Tensor:
        """``value`` plus what was lost of this piece before."""
        residual = self.residuals.get(key)
        return value if residual is None else value + residual

    def lost(self, key: str, residual: Tensor) -> None:
        """Keep what was lost this time."""
        self._next[key] = residual

    def forget(self) -> None:
        """What was to be sent this time is not sent."""
        self._next = {}

    def commit(self) -> None:
        """Take over what was lost in a meeting that has succeeded."""
        self.residuals, self._next = self.residuals | self._next, {}

    def keep_only(self, keys: Collection[str]) -> None:
        """Drop all residuals but these."""
        self.residuals = {key: value for key, value in self.residuals.items() if key in keys}

    def load(self, residuals: Mapping[str, Tensor]) -> None:
        self.residuals = dict(residuals)
