# SPDX-License-Identifier: Apache-2.0
"""What the demo must show, each claim checked against the measured numbers and said in words."""

from collections.abc import Mapping
from typing import Any

from fomoe.federation.ledger import EXCHANGE_CLASSES

__all__ = ["tensor_bytes_per_site", "verdicts"]

_LOSS_TOLERANCE = 0.05
_SAME_LOSS = 0.01  # rounding differs, and an optimizer makes it grow


def verdicts(runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``{"claim": sentence with the numbers, "holds": bool, "required": bool}`` for every claim.

    A required claim that does not hold is a defect; the others are results, good or bad.
    """
    ddp, diloco, fomoe = runs["ddp"], runs["diloco"], runs["fomoe"]
    apart = runs["ep"]["loss"] / ddp["loss"] - 1
    local_steps = diloco["local_steps"]
    ddp_bytes, diloco_bytes, fomoe_bytes = (_exchange_bytes(run) for run in (ddp, diloco, fomoe))
    diloco_memory, fomoe_memory = (tensor_bytes_per_site(run) for run in (diloco, fomoe))
    worst = max(runs.values(), key=lambda run: float(run["loss"]))
    change = fomoe["loss"] / diloco["loss"] - 1
    return [
        {
            "claim": f"every loss is below the bigram entropy ({worst['bigram_entropy']:.3f}); "
            f"the highest is {worst['loss']:.3f} ({worst['strategy']})",
            "holds": worst["loss"] < worst["bigram_entropy"],
            "required": True,
        },
        {
            "claim": f"diloco's bytes times local_steps ({local_steps}) equal ddp's exactly: "
            f"{diloco_bytes * local_steps:,} and {ddp_bytes:,}",
            "holds": diloco_bytes * local_steps == ddp_bytes,
            "required": True,
        },
        {
            "claim": f"ep, expert parallelism across sites, trains as ddp does: its loss differs "
            f"by {apart:+.2%}",
            "holds": abs(apart) <= _SAME_LOSS,
            "required": True,
        },
        {
            "claim": f"fomoe sends less than diloco: {1 - fomoe_bytes / diloco_bytes:.0%} less",
            "holds": fomoe_bytes < diloco_bytes,
            "required": True,
        },
        {
            "claim": f"fomoe's tensors take less memory than diloco's: "
            f"{1 - fomoe_memory / diloco_memory:.0%} less",
            "holds": fomoe_memory < diloco_memory,
            "required": True,
        },
        {
            "claim": f"fomoe's loss is within {_LOSS_TOLERANCE:.0%} of diloco's: {change:+.1%}",
            "holds": fomoe["loss"] <= diloco["loss"] * (1 + _LOSS_TOLERANCE),
            "required": False,
        },
    ]


def _exchange_bytes(run: Mapping[str, Any]) -> int:
    return sum(run["bytes_by_class"].get(name, 0) for name in EXCHANGE_CLASSES)


def tensor_bytes_per_site(run: Mapping[str, Any]) -> int:
    """Bytes of all tensor classes on the site that has most."""
    memory: list[int] = [
        sum(num_bytes for name, num_bytes in site.items() if not name.startswith("peak_"))
        for site in run["memory_per_site"]
    ]
    return max(memory)
