# SPDX-License-Identifier: Apache-2.0
"""The exchange between processes: torch.distributed against threads, DDP, FSDP2, and lost ranks."""

import multiprocessing
import os
import signal

import exchange_ranks
import numpy as np
import pytest
import torch
import torch.distributed as dist

from fomoe.comm import Topology, run_ranks
from fomoe.models import Decoder
from fomoe.nn import initialize


@pytest.fixture(scope="module")
def found():
    """By rank, what :func:`exchange_ranks.work` found."""
    return dict(_results_of(exchange_ranks.work, 4, (), 4))


def _results_of(program, size, arguments, expected):
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = context.Queue()
    processes = [
        context.Process(target=program, args=(rank, store.port, results, *arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        return [results.get(timeout=300) for _ in range(expected)]
    finally:
        for process in processes[:expected]:
            process.join(timeout=300)
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_distributed_and_threads_agree_to_the_bit(found, dtype):
    threads = run_ranks(
        Topology(exchange_ranks.SITES), lambda transport: exchange_ranks.routed(transport, dtype)
    )
    for rank, right in enumerate(threads):
        for ours, expected in zip(found[rank][str(dtype)], right, strict=True):
            np.testing.assert_array_equal(ours, expected.float().numpy())


@pytest.mark.parametrize("how", ["ddp", "fsdp", "uneven ddp"])
def test_gradients_are_those_of_one_process_after_clipping(found, how):
    right = _gradients_of_one_process()
    seen = set()
    for rank in range(4):
        for name, gradient in found[rank][how].items():
            np.testing.assert_allclose(gradient, right[name], rtol=2e-4, atol=2e-6, err_msg=name)
            seen.add(name)
    assert seen == set(right)


def _gradients_of_one_process():
    model = Decoder(exchange_ranks.CONFIG)
    initialize(model, 0)
    tokens = torch.cat([exchange_ranks.tokens_of(rank) for rank in range(4)])
    exchange_ranks.loss_of(model, tokens).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), exchange_ranks.MAX_NORM)
    assert norm > exchange_ranks.MAX_NORM
    gradients = {"norm": norm.numpy()}
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            gradients |= {f"{name}.{e}": g.numpy() for e, g in enumerate(parameter.grad)}
        else:
            gradients[name] = parameter.grad.numpy()
    return gradients


def test_parts_arrive_as_by_torch_and_receives_are_posted_first():
    """gloo's link carries one direction after the other if a send is posted before a receive."""
    for inbox, right, posted in dict(_results_of(exchange_ranks.receive_first, 3, (), 3)).values():
        assert inbox == right
        assert posted == ["receive"] * 2 + ["send"] * 2


@pytest.mark.parametrize(
    ("before", "what"),
    [("gather_counts", "the counts"), ("all_to_all", "the inter_site stage")],
)
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_lost_rank_ends_the_others_and_is_named(how, before, what):
    sentences = dict(_results_of(exchange_ranks.lose_rank_2, 3, (how, before), 2))
    assert sorted(sentences) == [0, 1]
    for sentence in sentences.values():
        assert sentence.startswith("CommunicationError: all-to-all: rank ")
        assert f"lost rank 2 in {what}" in sentence
