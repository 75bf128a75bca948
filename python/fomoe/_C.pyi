# SPDX-License-Identifier: Apache-2.0
commit: str
torch_version: str
compiler: str
cuda_version: str
openmp: bool

def compiled_with_cuda() -> bool: ...
def cuda_device_count() -> int: ...
def cpu_capability() -> str: ...
