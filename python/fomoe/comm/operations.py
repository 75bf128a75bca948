# SPDX-License-Identifier: Apache-2.0
"""torch.ops.fomoe.all_to_all_dispatch, _combine and _repeat: the exchange as differentiable ops.

``exchange`` is the handle of an :class:`fomoe.comm.ExpertExchange`, ``tables`` its trip's routings,
``counts`` the trip's counts. Every op is a collective call: all ranks make the same ones.

- ``all_to_all_dispatch(x, ids, weights, exchange)``: rows, ids and weights that arrive here, the
  six tables, and the counts.
- ``all_to_all_combine(parts, tables, counts, exchange)``: parts (N, width) of the rows back at
  their tokens and summed, (T, width) each. The gradient of dispatch and of repeat.
- ``all_to_all_repeat(parts, tables, counts, exchange)``: parts (T, width) of the tokens the same
  way, (N, width) each. The gradient of combine.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fomoe.comm.exchange import Trip, exchange_of
from fomoe.ops import Routing

__all__: list[str] = []

_BACK_AND_FORTH = "(Tensor[] parts, Tensor[] tables, Tensor counts, int exchange) -> Tensor[]"


@torch.library.custom_op(
    "fomoe::all_to_all_dispatch",
    mutates_args=(),
    schema="(Tensor x, Tensor ids, Tensor weights, int exchange) -> (Tensor rows, Tensor row_ids, "
    "Tensor row_weights, Tensor site_slot_to_row, Tensor site_row_to_slot, Tensor site_offsets, "
    "Tensor rank_slot_to_row, Tensor rank_row_to_slot, Tensor rank_offsets, Tensor counts)",
)
def _dispatch(
    x: Tensor, ids: Tensor, weights: Tensor, exchange: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (rows, row_ids, row_weights), trip = exchange_of(exchange).send(x, ids, weights)
    return rows, row_ids, row_weights, *trip.to_sites, *trip.to_ranks, trip.counts


@torch.library.custom_op("fomoe::all_to_all_combine", mutates_args=(), schema=_BACK_AND_FORTH)
def _combine(
    parts: Sequence[Tensor], tables: Sequence[Tensor], counts: Tensor, exchange: int
) -> list[Tensor]:
    return exchange_of(exchange).send_back(parts, _trip(tables, counts))


@torch.library.custom_op("fomoe::all_to_all_repeat", mutates_args=(), schema=_BACK_AND_FORTH)
def _repeat(
    parts: Sequence[Tensor], tables: Sequence[Tensor], counts: Tensor, exchange: int
) -> list[Tensor]:
    return exchange_of(exchange).send_again(parts, _trip(tables, counts))


def _trip(tables: Sequence[Tensor], counts: Tensor) -> Trip:
    return Trip(Routing(*tables[:3]), Routing(*tables[3:]), counts)


@_dispatch.register_fake
def _fake_dispatch(x: Tensor, ids: Tensor, weights: Tensor, exchange: int) -> tuple[Tensor, ...]:
    topology, rank = exchange_of(exchange).topology, exchange_of(exchange).rank
    context = torch.library.get_ctx()
    num_rows, num_held = context.new_dynamic_size(), context.new_dynamic_size()
    num_tokens, top_k = ids.shape
    tables = []
    num_ranks = len(topology.group(rank, "intra_node"))
    for slots, num_groups in ((num_tokens, topology.num_sites), (num_held, num_ranks)):
        width = min(top_k, num_groups)
        sizes = ((slots, width), (slots * width,), (num_groups + 1,))
        tables += [ids.new_empty(size) for size in sizes]
    counts = torch.empty(
        topology.num_ranks, topology.num_sites + topology.num_ranks, dtype=torch.int64
    )
    rows = [part.new_empty(num_rows, part.shape[1]) for part in (x, ids, weights)]
    return (*rows, *tables, counts)


@_combine.register_fake
def _fake_combine(
    parts: Sequence[Tensor], tables: Sequence[Tensor], counts: Tensor, exchange: int
) -> list[Tensor]:
    return [part.new_empty(tables[0].shape[0], part.shape[1]) for part in parts]


@_repeat.register_fake
def _fake_repeat(
    parts: Sequence[Tensor], tables: Sequence[Tensor], counts: Tensor, exchange: int
) -> list[Tensor]:
    num_rows = torch.library.get_ctx().new_dynamic_size()
    return [part.new_empty(num_rows, part.shape[1]) for part in parts]


def _keep_trip(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, tables, counts, ctx.exchange = inputs
    ctx.kept = exchange_of(ctx.exchange)  # for as long as there is a graph
    ctx.save_for_backward(*tables, counts)


def _keep_new_trip(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    ctx.exchange = inputs[-1]
    ctx.kept = exchange_of(ctx.exchange)
    ctx.save_for_backward(*output[3:])


def _backward_of_dispatch(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    *tables, counts = ctx.saved_tensors
    parts = [gradients[0], gradients[2]]
    d_x, d_weights = torch.ops.fomoe.all_to_all_combine(parts, tables, counts, ctx.exchange)
    return d_x, None, d_weights, None


def _backward_of_combine(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Any, ...]:
    *tables, counts = ctx.saved_tensors
    repeat = torch.ops.fomoe.all_to_all_repeat
    return repeat(list(gradients), tables, counts, ctx.exchange), [None] * 6, None, None


def _backward_of_repeat(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Any, ...]:
    *tables, counts = ctx.saved_tensors
    combine = torch.ops.fomoe.all_to_all_combine
    return combine(list(gradients), tables, counts, ctx.exchange), [None] * 6, None, None


_dispatch.register_autograd(_backward_of_dispatch, setup_context=_keep_new_trip)
_combine.register_autograd(_backward_of_combine, setup_context=_keep_trip)
_repeat.register_autograd(_backward_of_repeat, setup_context=_keep_trip)
