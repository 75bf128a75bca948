# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

commit: str
torch_version: str
compiler: str
cuda_version: str
openmp: bool

def compiled_with_cuda() -> bool: ...
def cuda_device_count() -> int: ...
def cpu_capability() -> str: ...
def choose_path(
    compute_capability: int, dtype: str, addresses: Sequence[int], widths: Sequence[int]
) -> tuple[str, str | None]: ...
