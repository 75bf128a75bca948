# SPDX-License-Identifier: Apache-2.0
"""The processes that generate together: one alone, or those that torchrun started.

Over several ranks the experts of a decoder are shared out, and prompts, too: tokens travel to the
ranks of their experts. A Federation of Experts has its groups on the ranks, see
:class:`fomoe.models.foe.GroupRanks`, and all ranks go on with the same prompts as long as a group
is on one rank.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.distributed as dist

from fomoe.comm import C10dTransport, ExpertExchange, Topology
from fomoe.errors import UserError
from fomoe.models import Decoder, DecoderConfig, FoE, FoEConfig, LanguageModel, build_model
from fomoe.models.foe import GroupRanks
from fomoe.models.language_model_config import LanguageModelConfig

__all__ = ["Ranks", "is_one_of_many", "ranks_of_this_run"]


class Ranks(Protocol):
    """This process among those that generate together."""

    writes: bool
    """Whether this one shows the texts."""

    def share_out(self, config: LanguageModelConfig) -> None:
        """Decide who has what of a model of this shape; a collective call, the first one.

        Raises
        ------
        UserError
            The model cannot be on so many ranks.
        """
        ...

    def build(self, config: LanguageModelConfig) -> LanguageModel:
        """This rank's part of the model, with random weights."""
        ...

    def prompts(self, number: int) -> range:
        """Which of the prompts are this rank's."""
        ...

    def any_rank(self, here: bool) -> bool:
        """Whether one of the ranks says so."""
        ...

    def all_texts(self, texts: Sequence[str]) -> list[str]:
        """Those of all prompts, from every rank's own."""
        ...


@contextmanager
def ranks_of_this_run(device: torch.device) -> Iterator[Ranks]:
    """Those that torchrun started, else this process alone."""
    if not is_one_of_many():
        yield _Alone()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield _Torchrun(device)
    finally:
        dist.destroy_process_group()


def is_one_of_many() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


class _Alone:
    writes = True

    def share_out(self, config: LanguageModelConfig) -> None:
        pass

    def build(self, config: LanguageModelConfig) -> LanguageModel:
        return build_model(config)

    def prompts(self, number: int) -> range:
        return range(number)

    def any_rank(self, here: bool) -> bool:
        return here

    def all_texts(self, texts: Sequence[str]) -> list[str]:
        return list(texts)


def _ranks_of_machines() -> list[int]:
    """How many ranks each machine has: torchrun numbers them machine by machine."""
    machines: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(machines, int(os.environ.get("GROUP_RANK", "0")))
    return [len(list(ranks)) for _, ranks in groupby(machines)]


class _Torchrun:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.writes = self.rank == 0
        self.member, self.members = self.rank, self.size
        """Which part of the prompts is here, of how many."""
        self._transport: C10dTransport | None = None
        self._groups: GroupRanks | None = None

    def share_out(self, config: LanguageModelConfig) -> None:
        backend: Any = "nccl" if self.device.type == "cuda" else "gloo"
        machines = _ranks_of_machines()
        if isinstance(config, FoEConfig):
            try:
                self._groups = GroupRanks(config, machines, backend)
            except ValueError as error:
                raise UserError(f"torchrun: {error}") from None
            self.member, self.members = self._groups.member, self._groups.members
            return
        if not config.moe_layers:
            raise UserError(
                f"torchrun: expected a model with experts to share out among {self.size} ranks, "
                "got one whose layers are all dense"
            )
        if self.size > config.num_experts:
            raise UserError(
                f"torchrun: expected at most {config.num_experts} ranks, one for each expert, "
                f"got {self.size}"
            )
        self._transport = C10dTransport(Topology(machines), backend)

    def build(self, config: LanguageModelConfig) -> LanguageModel:
        if isinstance(config, FoEConfig):
            return FoE(config, ranks=self._groups)
        assert isinstance(config, DecoderConfig)
        assert self._transport is not None
        owners = [expert * self.size // config.num_experts for expert in range(config.num_experts)]
        exchanges = [ExpertExchange(self._transport, owners) for _ in config.moe_layers]
        return Decoder(config, exchanges=exchanges)

    def prompts(self, number: int) -> range:
        # Rounded up: a single prompt is the first rank's, which writes.
        begin, end = (-(-m * number // self.members) for m in (self.member, self.member + 1))
        return range(begin, end)

    def any_rank(self, here: bool) -> bool:
        said = torch.tensor(int(here), device=self.device)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said)

    def all_texts(self, texts: Sequence[str]) -> list[str]:
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, list(texts))
        # The first ranks have the first group, and among them all prompts.
        return [text for theirs in everyones[: self.members] for text in theirs]
