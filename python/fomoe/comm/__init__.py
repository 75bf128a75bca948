# SPDX-License-Identifier: Apache-2.0
"""The hierarchical all-to-all between ranks and sites: expert parallelism."""

from fomoe.comm import operations  # registers its ops  # noqa: F401
from fomoe.comm.all_reduce import HierarchicalSum
from fomoe.comm.exchange import Dispatched, ExpertExchange, Trip
from fomoe.comm.loopback import LoopbackTransport, run_ranks
from fomoe.comm.topology import LinkClass, Stage, Topology
from fomoe.comm.transport import C10dTransport, Transport

__all__ = [
    "C10dTransport",
    "Dispatched",
    "ExpertExchange",
    "HierarchicalSum",
    "LinkClass",
    "LoopbackTransport",
    "Stage",
    "Topology",
    "Transport",
    "Trip",
    "run_ranks",
]
