# SPDX-License-Identifier: Apache-2.0
"""Which token comes next: the most likely one, or one drawn at a temperature from the nucleus.

B sequences, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fomoe.nn.validation import require_integers, require_numbers

__all__ = ["Sampler", "Sampling"]


_MOST_SEED = 2**62  # with the number of a sequence added, within int64


@dataclass(kw_only=True, slots=True, frozen=True)
class Sampling:
    """How tokens are chosen; raises ValueError naming the field that does not fit.

    ``temperature`` divides the logits; 0 takes the most likely token, the lowest of equal ones.
    ``top_p`` keeps the fewest tokens, most likely first, that together have at least this
    probability (nucleus sampling, arXiv 1904.09751). Sequence b draws from a generator of its own,
    seeded with ``seed + b``: what it gets depends on no other sequence.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_numbers(self, ("temperature",))
        require_numbers(self, ("top_p",), above=0)
        require_integers(self, ("seed",), at_least=0)
        if self.seed >= _MOST_SEED:
            raise ValueError(f"seed: expected less than 2**62, got {self.seed}")
        if self.top_p > 1:
            raise ValueError(f"top_p: expected at most 1, got {self.top_p}")


class Sampler:
    """Draws one token per sequence and call.

    Parameters
    ----------
    sampling : Sampling
    batch_size : int
    first : int
        The number of the first sequence, where others are elsewhere.
    """

    def __init__(self, sampling: Sampling, batch_size: int, first: int = 0) -> None:
        self.sampling = sampling
        self._generators = [
            torch.Generator().manual_seed(sampling.seed + first + b) for b in range(batch_size)
        ]

    def __call__(self, logits_BV: Tensor) -> list[int]:
        """A token for every sequence.

        Raises
        ------
        ValueError
            If a sequence's logits hold a NaN, or nothing but minus infinity.
        """
        logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
        best_B = logits_BV.amax(-1)
        if not bool(best_B.isfinite().all()):
            raise ValueError("logits: expected finite ones, got NaN or an infinity")
        if self.sampling.temperature == 0:
            chosen: list[int] = logits_BV.argmax(-1).tolist()
            return chosen
        # On the CPU, and by the inverse of the distribution function: a seed means the same
        # tokens on every device.
        logits_BV = (logits_BV - best_B[:, None]).cpu().double()
        p_BV = (logits_BV / self.sampling.temperature).softmax(-1)
        p_BV, token_BV = p_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = p_BV.cumsum(-1) - p_BV
        p_BV[before_BV >= self.sampling.top_p] = 0
        sums_BV = p_BV.cumsum(-1)
        draws_B1 = torch.stack(
            [torch.rand(1, generator=g, dtype=torch.float64) for g in self._generators]
        )
        ranks_B1 = torch.searchsorted(sums_BV, draws_B1 * sums_BV[:, -1:], right=True)
        kept_B1 = (p_BV > 0).sum(-1, keepdim=True)
        chosen = token_BV.gather(1, torch.minimum(ranks_B1, kept_B1 - 1))[:, 0].tolist()
        return chosen
