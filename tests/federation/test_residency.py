# SPDX-License-Identifier: Apache-2.0
"""A site's memory never holds a foreign expert, exchange included: every storage is searched."""

import gc
import os
import pickle
from pathlib import Path

import torch
import torch.distributed as dist
from nano_task import NanoTask, nano, settings

from fomoe.federation.exchange import Exchange
from fomoe.federation.launch import train
from fomoe.federation.parameters import federated_tensors
from fomoe.federation.placement import Placement

CONFIG = nano.Config(
    sites=4, overlap=2, rounds=2, local_steps=2, warmup=1, num_experts=8, top_k=2, dim=16,
    expert_dim=8,
)  # fmt: skip
PLACEMENT = Placement(CONFIG.num_layers, CONFIG.num_experts, CONFIG.sites, CONFIG.overlap)
SIGNATURE_BYTES = 16


def signature(tensor) -> bytes:
    return (
        tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()[:SIGNATURE_BYTES]
    )


def all_storages() -> bytes:
    """The bytes of every tensor storage alive in this process."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            view = torch.empty(0, dtype=torch.uint8).set_(storage)
            storages[storage.data_ptr()] = view.numpy().tobytes()
    return b"|".join(storages.values())


class SpyTask(NanoTask):
    """Makes the site write down its memory around every collective, and its experts' values."""

    def __init__(self, config, folder: Path) -> None:
        super().__init__(config)
        self.folder = folder

    def build_model(self, residents):
        model = super().build_model(residents)
        if residents is not None:
            self._spy(model)
        return model

    def _spy(self, model) -> None:
        memory, values = [], []
        tensors = federated_tensors(model)
        send, reduce, distribute = dist.all_to_all_single, Exchange.reduce, Exchange.distribute

        def look(more=None) -> None:
            memory.append(all_storages())
            for tensor in tensors:
                if not tensor.is_shared:
                    key = tensor.layer, tensor.expert
                    values.append((key, signature(tensor.value)))
                    if more is not None:
                        values.append((key, signature(more[tensor.name])))
            path = self.folder / f"{os.getpid()}.pickle"
            site = dist.get_rank() if dist.is_initialized() else None
            path.write_bytes(pickle.dumps((site, memory, values)))

        def spied_send(*arguments, **options):
            look()
            result = send(*arguments, **options)
            look()
            return result

        def spied_reduce(exchange, contributions, tokens):
            look(contributions)
            result = reduce(exchange, contributions, tokens)
            look()
            return result

        def spied_distribute(exchange, pieces):
            result = distribute(exchange, pieces)
            look(result)
            return result

        look()
        dist.all_to_all_single = spied_send
        Exchange.reduce, Exchange.distribute = spied_reduce, spied_distribute


def test_no_storage_of_a_site_holds_a_foreign_expert(tmp_path):
    spies = tmp_path / "spies"
    spies.mkdir()
    train(settings(CONFIG, tmp_path / "run"), task=SpyTask(CONFIG, spies))
    reports = sorted(pickle.loads(path.read_bytes()) for path in spies.glob("*.pickle"))
    assert [site for site, _, _ in reports] == list(range(CONFIG.sites))

    signatures: dict[tuple[int, int], set[bytes]] = {}
    for _, _, values in reports:
        for key, value in values:
            signatures.setdefault(key, set()).add(value)
    initial = nano.initialize(nano.Model(CONFIG), CONFIG.seed)
    for tensor in federated_tensors(initial):
        if not tensor.is_shared:
            signatures[tensor.layer, tensor.expert].add(signature(tensor.value))
    assert len(signatures) == CONFIG.num_layers * CONFIG.num_experts
    nothing = bytes(SIGNATURE_BYTES)

    for site, memory, _ in reports:
        everything = b"|".join(memory)
        for (layer, expert), values in signatures.items():
            found = sum(value in everything for value in values - {nothing})
            if site in PLACEMENT.holders(layer, expert):
                assert found > 3, "a resident expert must be found, or the search is blind"
            else:
                assert found == 0, f"site {site} holds expert {expert} of layer {layer}"
