# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from typing import TypedDict

commit: str
torch_version: str
compiler: str
cuda_version: str
openmp: bool

def compiled_with_cuda() -> bool: ...
def cuda_device_count() -> int: ...
def cpu_capability() -> str: ...
def is_decode(num_rows: int, num_experts: int) -> bool: ...
def choose_path(
    compute_capability: int, dtype: str, addresses: Sequence[int], widths: Sequence[int]
) -> tuple[str, str | None]: ...

class Message(TypedDict):
    destination: int
    rows: list[int]

class RankPlan(TypedDict):
    intra_node_group: list[int]
    inter_site_group: list[int]
    inter_site: list[Message]
    held: list[tuple[int, int]]
    intra_node: list[Message]
    arrived: list[tuple[int, int]]
    owners: list[list[int]]
    sites: list[list[int]]
    counts: list[int]

class LinkBytes(TypedDict):
    local: int
    intra_node: int
    inter_site: int

class Traffic(TypedDict):
    counts: LinkBytes
    dispatch: LinkBytes
    combine: LinkBytes

class AllToAllPlan(TypedDict):
    ranks: list[RankPlan]
    hierarchical: Traffic
    flat: Traffic
    deduplicated_minimum: int

def all_to_all_plan(
    ranks_per_site: Sequence[int],
    owners: Sequence[int],
    ids: Sequence[Sequence[int]],
    *,
    top_k: int,
    width: int,
    element_bytes: int,
    weight_bytes: int,
) -> AllToAllPlan: ...
