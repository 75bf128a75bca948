# SPDX-License-Identifier: Apache-2.0
"""The Federation of Experts (arXiv 2605.06206), on one device or with its groups on several ranks.

``config`` has its shape, ``model`` the layers, ``group_moe`` and ``attention`` their parts,
``ranks`` which rank has which groups and what they say to each other.
"""

from fomoe.models.foe.config import FoEConfig
from fomoe.models.foe.model import FoE
from fomoe.models.foe.ranks import GroupRanks

__all__ = ["FoE", "FoEConfig", "GroupRanks"]
