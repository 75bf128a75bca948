# SPDX-License-Identifier: Apache-2.0
"""The bytes of a site: the closed form, what a run reports, and what it really allocates."""

import dataclasses
import weakref

import pytest
import torch
from in_process import ThreadTransport, run_sites
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fomoe.federation.config import Config, FederationConfig
from fomoe.federation.memory_model import paper_bytes, site_memory
from fomoe.federation.placement import everywhere, fixed, placement_of_round
from fomoe.federation.site import Site
from fomoe.federation.site_report import memory, memory_of_the_meeting
from fomoe.federation.task import LanguageModelTask
from fomoe.models import DecoderConfig, configuration

SITES = 4


class NoiseTask(LanguageModelTask):
    """Random tokens instead of a text."""

    def batch(self, site, step):
        return torch.randint(0, 256, (1, 9), generator=torch.Generator().manual_seed(step))


def config(strategy="fomoe", router="full", shared_expert_dim=0, family="decoder", **federation):
    if strategy == "fomoe":
        federation["overlap"] = 2
    model = {
        "dim": 32, "num_layers": 2, "expert_dim": 48, "norm": "peri", "router": router,
        "shared_expert_dim": shared_expert_dim,
    }  # fmt: skip
    if family == "foe":
        model = {"family": "foe", "dim": 32, "num_layers": 2, "expert_dim": 48, "top_k": 4}
    federation |= {"strategy": strategy, "sites": SITES, "local_steps": 1, "rounds": 2}
    return Config.from_dict({"model": model, "federation": federation})


class Allocations(TorchDispatchMode):
    """Bytes of every tensor that any operation of this thread has made, while it is alive."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {
            id(x.untyped_storage())
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        result = func(*args, **kwargs or {})
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and id(x.untyped_storage()) not in before:
                self.count(x)
        return result

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if id(storage) not in self.alive:
            self.alive[id(storage)] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.freed, id(storage)).atexit = False

    def freed(self, key):
        self.now -= self.alive.pop(key)


class WatchedTransport(ThreadTransport):
    """What the test's own transport allocates does not count."""

    def all_to_all(self, outbox, send, inbox, receive):
        with _disable_current_modes():
            super().all_to_all(outbox, send, inbox, receive)

    def gather(self, values):
        with _disable_current_modes():
            return super().gather(values)


def measure(settings):
    """By site, memory in the second round: as reported, and the allocations of both meetings."""

    def work(transport):
        transport = WatchedTransport(transport.network, transport.site)
        site = Site(settings, NoiseTask(settings), transport)
        allocations = Allocations()
        for _ in range(2):
            site.begin_round()
            site.local_step()  # of ddp: with the meeting
            before = memory(site)
            with allocations:
                site.end_round()
        return before | memory_of_the_meeting(site), allocations, site.meetings

    return run_sites(SITES, work)


def test_one_site_owns_everything_and_sends_nothing():
    model = DecoderConfig(
        vocab_size=256, dim=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, expert_dim=4,
        num_experts=2, top_k=1, activation="silu",
    )  # fmt: skip
    # Embedding 256*8; attention 4*8*8; 3 norms of 8; router 2*8; 2 experts of 2*4*8.
    held = 2048 + 256 + 24 + 16 + 128
    federation = FederationConfig(strategy="diloco", sites=1)
    assert site_memory(model, federation, everywhere(1, 2, 1), 0) == {
        "parameters": 4 * held,
        "gradients": 4 * held,
        "optimizer": 8 * held + 4 * (1 + 4 + 3 + 2 + 4),
        "round_start": 4 * held,
        "outer_momentum": 4 * held,
        "codec_residuals": 0,
        "exchange_buffers": 2 * 4 * held,  # what comes back, and what the momentum becomes
    }
    assert paper_bytes(model, everywhere(1, 2, 1), 0) == 18 * held


@pytest.mark.parametrize(
    ("name", "sites", "overlap", "gigabytes"),
    [("fomoe-1.8b", 8, 8, 32.8), ("fomoe-1.8b", 8, 4, 23.1), ("fomoe-13b", 8, 2, 124)],
)
def test_the_papers_model_gives_its_numbers(name, sites, overlap, gigabytes):
    model = dataclasses.replace(configuration(name), router="partitioned")
    placement = fixed(model.num_layers, model.num_experts, sites, overlap)
    assert paper_bytes(model, placement, 0) / 1e9 == pytest.approx(gigabytes, rel=0.005)


EVERY_KIND = [
    config(),
    config("diloco"),
    config("ddp"),
    config(router="partitioned"),
    config(shared_expert_dim=24, outer="average"),
    config(outer="local_adamw"),
    config(codec="bf16"),
    config(codec="int8"),
    config("diloco", codec="int4"),
    config(codec="int8", outer="average", router_mean="holders"),
    config(family="foe"),
    config(family="foe", codec="int8"),
]


@pytest.mark.parametrize("settings", EVERY_KIND, ids=lambda c: "-".join(
    [c.model.family, c.federation.strategy, c.federation.outer, c.federation.codec,
     c.model.router]
))  # fmt: skip
def test_the_closed_form_is_what_a_run_measures(settings):
    task = NoiseTask(settings)
    placement = placement_of_round(settings, task.num_layers, task.num_experts, 1)
    for site, (measured, allocations, _) in enumerate(measure(settings)):
        expected = site_memory(task.model_config, settings.federation, placement, site)
        assert measured.keys() - {"peak_rss"} == expected.keys()
        for name, num_bytes in expected.items():
            assert measured[name] == pytest.approx(num_bytes, rel=0.05), name
        if settings.federation.strategy != "ddp":  # whose round ends without a meeting
            lasting = ("outer_momentum", "codec_residuals", "exchange_buffers")
            assert allocations.now == sum(measured[name] for name in lasting)
            assert allocations.peak < 1.1 * allocations.now, "a few temporaries beside"
