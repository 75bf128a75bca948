# SPDX-License-Identifier: Apache-2.0
"""The device that a command was asked for."""

import os

import torch

from fomoe.errors import UserError

__all__ = ["usable_device"]


def usable_device(name: str) -> torch.device:
    """The device, if there is one of that name; under torchrun, ``cuda`` is the rank's own GPU.

    A GPU becomes the current one.

    Raises
    ------
    UserError
        Naming ``--device``: of another kind, or not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: expected cpu, cuda or cuda:NUMBER, got {name!r}") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"--device: expected cpu, cuda or cuda:NUMBER, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise UserError(f"--device {name}: this torch finds no GPU")
    if device.index is None:
        device = torch.device(
            "cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
        )
    elif int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise UserError(f"--device: expected cuda, as every rank takes its own GPU, got {name}")
    if device.index >= count:
        raise UserError(f"--device {name}: expected a GPU below {count}, got number {device.index}")
    torch.cuda.set_device(device)
    return device
