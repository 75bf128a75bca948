# SPDX-License-Identifier: Apache-2.0
"""Which matrix kernels a call of an op runs on, and why, without running it."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import fomoe._C as _C
from fomoe import ops

_FAMILIES = {
    "sm90": "tensor cores of Hopper: wgmma fed by TMA",
    "sm80": "tensor cores by mma.sync, on every card from compute capability 8.0 on",
    "simple": "CUDA cores",
}
_DECODE = "CUDA cores, since reading the weights takes longest with so few rows per expert"


class Dispatch(NamedTuple):
    """The answer of :func:`explain_dispatch`."""

    kernels: str  # "sm90", "sm80", "decode", "simple", "cpu", or "none": the call would raise
    reason: str  # one sentence


def explain_dispatch(
    op: Literal["grouped_gemm", "expert_mlp"],
    *arguments: Any,
    compute_capability: tuple[int, int] | None = None,
    **keywords: Any,
) -> Dispatch:
    """Say which family of matrix kernels ``fomoe.ops.<op>`` takes for these arguments.

    The choice depends on the compute capability, dtype, shapes, strides and alignment, never on
    values. The backward chooses anew, with the strides and alignment of the gradient it is given.
    The other ops have one CUDA kernel each for every card.

    Parameters
    ----------
    op : "grouped_gemm" or "expert_mlp"
    arguments, keywords
        Those of the op.
    compute_capability : (int, int), optional
        Answer for a CUDA device of this compute capability instead of the device of the tensors,
        as if this build had CUDA kernels: (9, 0) is an H100 or H200.

    Returns
    -------
    Dispatch
        ``kernels`` and the ``reason``.

    Raises
    ------
    ValueError
        For another op.
    RuntimeError
        The op's own, when dtypes or shapes do not fit.
    """
    if op not in _OPERANDS:
        raise ValueError(f"explain_dispatch: op must be {' or '.join(_OPERANDS)}, got {op!r}")
    function: Callable[..., Tensor] = getattr(ops, op)
    bound = inspect.signature(function).bind(*arguments, **keywords)
    function(*map(_on_meta, bound.args), **{k: _on_meta(v) for k, v in bound.kwargs.items()})

    bound.apply_defaults()
    operands = _OPERANDS[op](bound.arguments)
    device = operands[0].device
    if compute_capability is None:
        if device.type != "cuda":
            return Dispatch("cpu", _cpu_reason(operands[0].dtype))
        if not _C.compiled_with_cuda():
            return Dispatch("none", "this build of fomoe has no CUDA kernels")
        compute_capability = torch.cuda.get_device_capability(device)
    if compute_capability < (8, 0):
        return Dispatch("none", "the CUDA kernels need compute capability 8.0 or newer")
    answer = _explain_cuda(operands, compute_capability)
    if op == "expert_mlp" and answer.kernels != "simple" and _is_decode(bound.arguments):
        return Dispatch("decode", f"{_DECODE}; the backward takes {answer.kernels}")
    return answer


def _explain_cuda(operands: list[Tensor], compute_capability: tuple[int, int]) -> Dispatch:
    addresses: list[int] = []
    widths: list[int] = []
    for tensor in operands:
        dense = _as_the_kernel_sees(tensor)
        addresses.append(tensor.data_ptr() if dense is tensor else 0)  # torch's memory is aligned
        widths += dense.shape[1:]
        if dense.ndim == 3:  # one matrix per expert
            expert_stride, row_stride, col_stride = dense.stride()
            widths += (expert_stride, row_stride if col_stride == 1 else col_stride)
    major, minor = compute_capability
    dtype = str(operands[0].dtype).removeprefix("torch.")
    family, obstacle = _C.choose_path(10 * major + minor, dtype, addresses, widths)
    reason = f"{_FAMILIES[family]}; compute capability {major}.{minor}"
    return Dispatch(family, f"{reason}, but {obstacle}" if obstacle else reason)


def _is_decode(arguments: dict[str, Any]) -> bool:
    matrices = [_as_the_kernel_sees(arguments[name]) for name in ("w1", "w2")]
    num_rows = arguments["routing"].row_to_slot.numel()
    return all(m.stride(2) == 1 and _C.is_decode(num_rows, m.shape[0]) for m in matrices)


def _as_the_kernel_sees(tensor: Tensor) -> Tensor:
    """The tensor, or its copy where the binding makes one: a vector or matrix must be dense, the
    matrices of experts along one of their two axes."""
    if tensor.ndim == 3:
        _, rows, cols = tensor.shape
        _, row_stride, col_stride = tensor.stride()
        has_dense_rows = col_stride == 1 and row_stride >= cols
        has_dense_cols = row_stride == 1 and col_stride >= rows
        return tensor if has_dense_rows or has_dense_cols else tensor.contiguous()
    return tensor.contiguous()


def _cpu_reason(dtype: torch.dtype) -> str:
    reason = "products of at most 4 rows or terms are fomoe's own loops, larger ones torch.mm"
    if dtype == torch.bfloat16:
        return f"{reason}, or fomoe's where the processor has AVX512-BF16 and no AMX"
    return reason


def _operands_of_grouped_gemm(arguments: dict[str, Any]) -> list[Tensor]:
    return [arguments["rows"], arguments["weight"]]


def _operands_of_expert_mlp(arguments: dict[str, Any]) -> list[Tensor]:
    tensors = (arguments[name] for name in ("x", "w1", "w2", "b1", "b2"))
    return [tensor for tensor in tensors if tensor is not None]


_OPERANDS: dict[str, Callable[[dict[str, Any]], list[Tensor]]] = {
    "grouped_gemm": _operands_of_grouped_gemm,
    "expert_mlp": _operands_of_expert_mlp,
}


def _on_meta(value: Any) -> Any:
    if isinstance(value, ops.Routing):
        return ops.Routing(*(tensor.to("meta") for tensor in value))
    return value.to("meta") if isinstance(value, Tensor) else value
