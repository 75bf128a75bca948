# SPDX-License-Identifier: Apache-2.0
"""What the ops' autograd registrations have in common."""

from typing import Any, NoReturn

import torch
from torch import Tensor


def refuse_double_backward(op: str) -> None:
    """Make differentiating the backward op ``fomoe::<op>`` an error.

    An op without an autograd registration would let the second backward pass through silently and
    leave the gradients out.
    """

    def refuse(ctx: Any, *gradients: Tensor | None) -> NoReturn:
        raise RuntimeError(
            f"fomoe::{op}: double backward is not supported; "
            f"the first backward must run without create_graph=True"
        )

    torch.library.register_autograd(f"fomoe::{op}", refuse)
