# SPDX-License-Identifier: Apache-2.0
"""fomoe: train, convert and serve Mixture-of-Experts models across sites.

``fomoe.ops`` are the kernels (``torch.ops.fomoe``), ``fomoe.MoE`` the layer, ``fomoe.models``
the language models, ``fomoe.federation`` the training across sites, ``fomoe.reference`` the
specification of every op in plain torch.
"""

import torch  # first: the op library finds torch's libraries already loaded

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise ImportError(f"fomoe needs torch >= 2.11, but torch {torch.__version__} is installed")

from fomoe import (
    _C,  # noqa: F401  importing it registers torch.ops.fomoe
    ops,
    reference,
)
from fomoe._build import show_build
from fomoe._dispatch import Dispatch, explain_dispatch
from fomoe.nn import MoE, MoEConfig

__version__ = "0.1.0"
__all__ = [
    "Dispatch",
    "MoE",
    "MoEConfig",
    "__version__",
    "explain_dispatch",
    "ops",
    "reference",
    "show_build",
]
