# SPDX-License-Identifier: Apache-2.0
"""The sections [optimizer], [training], [evaluation] and [run]. Imports no torch."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fomoe.federation.config.section import (
    BelowOne,
    Count,
    CountOrZero,
    Fraction,
    NotNegative,
    Positive,
    Section,
    Text,
)

__all__ = ["EvaluationConfig", "OptimizerConfig", "RunConfig", "TrainingConfig"]

_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?")


def _check_devices(value: Any) -> Any:
    is_list = isinstance(value, list | tuple)
    for index, device in enumerate(value if is_list else [value]):
        if not isinstance(device, str) or _DEVICE.fullmatch(device) is None:
            raise ValueError(
                f"training.device{f'[{index}]' if is_list else ''}: "
                f"expected 'cpu', 'cuda' or 'cuda:' and a number, got {device!r}"
            )
    return value


class OptimizerConfig(Section):
    """A site's own optimizer, with linear warm-up and cosine decay to `min_lr_ratio * lr`."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 1e-3
    betas: Annotated[tuple[BelowOne, BelowOne], Field(strict=False)] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    warmup_steps: CountOrZero = 0
    min_lr_ratio: Fraction = 0.1
    clip_norm: NotNegative = 1.0
    """Largest norm of a site's gradient over its own parameters, 0 for no clipping."""


class TrainingConfig(Section):
    """What one site computes with. `batch_size` counts sequences per site and step."""

    batch_size: Annotated[int, Field(ge=1, le=10**6)] = 8
    sequence_length: Annotated[int, Field(ge=1, le=10**7)] = 256
    seed: CountOrZero = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads per rank, 0 for max(1, cores // ranks on this machine)."""
    device: Annotated[
        str | Annotated[tuple[str, ...], Field(strict=False)], BeforeValidator(_check_devices)
    ] = "cpu"
    """Where sites compute: "cpu", "cuda" or "cuda:1", for all of them or one for each."""

    def device_of(self, site: int) -> str:
        """The device of one site, as it was written."""
        return self.device if isinstance(self.device, str) else self.device[site]


class EvaluationConfig(Section):
    """Validation of the assembled model and of every site, every few rounds and at the end."""

    every: CountOrZero = 0
    """0: only at the end."""
    batch_size: Count = 16


class RunConfig(Section):
    """Where results go. Relative folders start at the current directory."""

    folder: Annotated[Text, Field(min_length=1)] = "runs/train"
    save: bool = True
    """Whether to write checkpoints."""
    checkpoint_every: CountOrZero = 0
    """Rounds between checkpoints; 0: only at the end."""
    keep_checkpoints: Count = 2
    """How many of the latest checkpoints stay."""
