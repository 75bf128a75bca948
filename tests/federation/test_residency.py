# SPDX-License-Identifier: Apache-2.0
"""A site's memory never holds a foreign expert, exchange included: every storage is searched."""

import dataclasses
import gc
import os
import pickle
from pathlib import Path

import torch
from in_process import values_of
from nano_task import NanoTask, nano, settings

from fomoe.federation.exchange import Exchange, Piece
from fomoe.federation.exchange.transport import GroupTransport
from fomoe.federation.launch import train
from fomoe.federation.meeting import MOMENTS
from fomoe.federation.parameters import federated_tensors
from fomoe.federation.placement import fixed
from fomoe.federation.site import Site

CONFIG = nano.Config(
    sites=4, overlap=2, rounds=2, local_steps=2, warmup=1, num_experts=8, top_k=2, dim=16,
    expert_dim=8,
)  # fmt: skip
PLACEMENT = fixed(CONFIG.num_layers, CONFIG.num_experts, CONFIG.sites, CONFIG.overlap)
SIGNATURE_BYTES = 16


def signatures_of(tensor) -> list[bytes]:
    """16 bytes from the start and from the middle of a tensor."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    middle = flat.numel() // 2
    return [flat[begin : begin + SIGNATURE_BYTES].numpy().tobytes() for begin in (0, middle)]


def all_storages() -> bytes:
    """The bytes of every tensor storage alive in this process."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            view = torch.empty(0, dtype=torch.uint8).set_(storage)
            storages[storage.data_ptr()] = view.numpy().tobytes()
    return b"|".join(storages.values())


class Spy:
    """Writes down a site's memory around every step of a meeting and after loading a checkpoint,
    and the values of its experts: weights, moments, outer momentum, and what it sends and gets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.memory: list[bytes] = []
        self.values: set[tuple[tuple[int, int], bytes]] = set()

    def look(self, site: Site, more=None) -> None:
        self.memory.append(all_storages())
        for tensor in site.tensors:
            if tensor.on_every_site:
                continue
            values = [tensor.value]
            state = site.optimizer.state()
            momentum = site.meetings.outer.momentum
            key = Piece.key_of(tensor.name, 0, tensor.num_elements)
            values += [state[f"{kind}/{tensor.name}"] for kind in MOMENTS if state]
            values += [momentum[key]] if key in momentum else []
            values += [more[tensor.name]] if tensor.name in (more or {}) else []
            for value in values:
                key = tensor.layer, tensor.expert
                self.values |= {(key, signature) for signature in signatures_of(value)}
        report = pickle.dumps((site.site, self.memory, self.values))
        (self.folder / f"{os.getpid()}.pickle").write_bytes(report)

    def watch(self) -> None:
        """Look before and after these calls of the site in this process."""
        sites: list[Site] = []
        pack, distribute, send = Exchange.pack, Exchange.distribute, GroupTransport.all_to_all
        end_round, begin_round = Site.end_round, Site.begin_round

        def spied_end_round(site):
            sites[:] = [site]
            self.look(site)
            end_round(site)
            self.look(site)

        def spied_begin_round(site):
            self.look(site)  # after loading a checkpoint, too
            begin_round(site)

        def spied_pack(exchange, values, start=None):
            contributions = {
                name: value if start is None else start[name] - value
                for name, value in values.items()
            }
            parcel = pack(exchange, values, start)
            self.look(sites[0], contributions)
            return parcel

        def spied_distribute(exchange, results, attendance):
            result = distribute(exchange, results, attendance)
            self.look(sites[0], values_of(result, exchange.pieces))
            return result

        def spied_send(*arguments, **options):
            send(*arguments, **options)
            self.look(sites[0])

        Site.end_round, Site.begin_round = spied_end_round, spied_begin_round
        Exchange.pack, Exchange.distribute = spied_pack, spied_distribute
        GroupTransport.all_to_all = spied_send


class SpiedTask(NanoTask):
    def __init__(self, config, folder: Path) -> None:
        super().__init__(config)
        self.folder = folder

    def build_model(self, residents):
        if residents is not None:  # in a site's process, not in the coordinator
            Spy(self.folder).watch()
        return super().build_model(residents)


def test_no_storage_of_a_site_holds_a_foreign_expert(tmp_path):
    spies = tmp_path / "spies"
    spies.mkdir()
    first = dataclasses.replace(CONFIG, rounds=1)
    train(settings(first, tmp_path / "run"), task=SpiedTask(first, spies))
    train(
        settings(CONFIG, tmp_path / "run"),
        task=SpiedTask(CONFIG, spies),
        resume=tmp_path / "run",
    )
    reports = [pickle.loads(path.read_bytes()) for path in spies.glob("*.pickle")]
    assert sorted(site for site, _, _ in reports) == sorted([*range(CONFIG.sites)] * 2)

    signatures: dict[tuple[int, int], set[bytes]] = {}
    for _, _, values in reports:
        for key, value in values:
            signatures.setdefault(key, set()).add(value)
    initial = nano.initialize(nano.Model(CONFIG), CONFIG.seed)
    for tensor in federated_tensors(initial):
        if not tensor.on_every_site:
            signatures[tensor.layer, tensor.expert].update(signatures_of(tensor.value))
    assert len(signatures) == CONFIG.num_layers * CONFIG.num_experts
    nothing = bytes(SIGNATURE_BYTES)  # an expert that saw no token has moments of zero

    for site, memory, _ in reports:
        everything = b"|".join(memory)
        for (layer, expert), values in signatures.items():
            found = sum(value in everything for value in values - {nothing})
            if site in PLACEMENT.holders(layer, expert):
                assert found > 3, "a resident expert must be found, or the search is blind"
            else:
                assert found == 0, f"site {site} holds expert {expert} of layer {layer}"
