# SPDX-License-Identifier: Apache-2.0
"""What the fake kernels check, in the words of the C++ bindings.

torch also calls a fake kernel when any argument is on the meta device: without the checks a wrong
or mixed call would pass in silence.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fomoe.ops._names import alternatives

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INT32 = (torch.int32,)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The accumulation dtype of values of this dtype."""
    return torch.promote_types(dtype, torch.float32)


def check(condition: bool, message: Callable[[], str]) -> None:
    """Raise a RuntimeError with the message unless the condition on (symbolic) sizes holds."""
    torch._check(condition, message)  # type: ignore[no-untyped-call]


def check_tensor(
    op: str,
    argument: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | None],
    legend: str,
) -> None:
    """Raise a RuntimeError unless dtype and shape fit; None in ``shape`` stands for any size."""
    names = alternatives(str(dtype).removeprefix("torch.") for dtype in dtypes)
    check(
        tensor.dtype in dtypes,
        lambda: (
            f"fomoe::{op}: {argument} must be {names}, "
            f"got {str(tensor.dtype).removeprefix('torch.')}"
        ),
    )

    def message() -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        got = tuple(tensor.shape)
        return f"fomoe::{op}: {argument} must have shape {legend} = ({sizes}), got {got}"

    check(tensor.ndim == len(shape), message)
    for actual, size in zip(tensor.shape, shape, strict=True):
        if size is not None:
            check(actual == size, message)


def check_devices(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raise a RuntimeError unless all tensors are on the device of the first that is not None."""
    present = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first, device = next(iter(present.items()))
    for argument, other in present.items():
        if other != device:
            raise RuntimeError(
                f"fomoe::{op}: {argument} must be on the device of {first}, {device}, got {other}"
            )


def check_routing(
    op: str, slot_to_row: Tensor, row_to_slot: Tensor, offsets: Tensor
) -> tuple[int, int, int]:
    """Check dtypes and shapes of a routing; returns T, K and E_local."""
    check_tensor(op, "slot_to_row", slot_to_row, INT32, (None, None), "(T, K)")
    num_tokens, top_k = slot_to_row.shape
    check_tensor(op, "row_to_slot", row_to_slot, INT32, (num_tokens * top_k,), "(T*K,)")
    num_local_experts = check_offsets(op, offsets)
    return num_tokens, top_k, num_local_experts


def check_code(op: str, argument: str, code: int, codes: Mapping[str, int]) -> None:
    """Raise a RuntimeError unless ``code`` is one of ``codes``."""
    expected = alternatives(f"{value} ({name})" for name, value in codes.items())
    check(
        code in codes.values(),
        lambda: f"fomoe::{op}: {argument} must be {expected}, got {code}",
    )


def check_offsets(op: str, offsets: Tensor) -> int:
    """Check dtype and shape of offsets; returns E_local."""
    check_tensor(op, "offsets", offsets, INT32, (None,), "(E_local + 1,)")
    check(
        offsets.shape[0] >= 1,
        lambda: f"fomoe::{op}: offsets must have shape (E_local + 1,), got (0,)",
    )
    return offsets.shape[0] - 1
