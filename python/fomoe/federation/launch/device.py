# SPDX-License-Identifier: Apache-2.0
"""Which GPU of a machine a rank uses."""

import torch

from fomoe.errors import UserError

__all__ = ["check_device", "use_device"]


def check_device(device: str) -> None:
    """Raise UserError when this machine has no such device; ``device`` is a training.device."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return
    count = torch.cuda.device_count()
    if count == 0:
        raise UserError(f"training.device = {device!r}, but torch finds no GPU on this machine")
    if index and int(index) >= count:
        raise UserError(
            f"training.device = {device!r}, but the GPUs of this machine are numbered "
            f"from 0 to {count - 1}"
        )


def use_device(device: str, place: int) -> None:
    """Check the device, and make it this process's current one if it is a GPU.

    A plain "cuda" is the GPU that is due to the rank at a place, which numbers the ranks of this
    machine; they go round where there are fewer GPUs. Page-locked memory and whatever else names
    no GPU would otherwise take memory of the first one.
    """
    check_device(device)
    if device == "cuda":
        torch.cuda.set_device(place % torch.cuda.device_count())
    elif device != "cpu":
        torch.cuda.set_device(device)
