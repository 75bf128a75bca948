# SPDX-License-Identifier: Apache-2.0
"""Groups on several ranks: results, gradients, texts of one process; and what crosses."""

import multiprocessing
import os
import signal
from collections import Counter

import foe_ranks
import numpy as np
import pytest
import torch
import torch.distributed as dist
from foe_ranks import GENERATION, NUM_RANKS, PROMPTS, SHAPES, tokens_of

from fomoe.generate import generate
from fomoe.models import FoE
from fomoe.models.foe.communication import (
    all_reduce_of_foe,
    all_to_all_of_foe,
    all_to_all_of_moe,
)
from fomoe.nn import initialize, model_tensors

BYTES = 8  # of a float64


@pytest.fixture(scope="module")
def found():
    """By rank, what :func:`foe_ranks.work` found."""
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = context.Queue()
    processes = [
        context.Process(target=foe_ranks.work, args=(rank, store.port, results))
        for rank in range(NUM_RANKS)
    ]
    for process in processes:
        process.start()
    try:
        found = {}
        for _ in processes:
            rank, found[rank] = results.get(timeout=100)
            assert isinstance(found[rank], dict), found[rank]
        return found
    finally:
        for process in processes:
            process.join(timeout=60)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()


def members_of(config):
    return max(1, NUM_RANKS // config.num_groups)


def whole(config):
    model = FoE(config).double()
    initialize(model, seed=2)
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_one_process(shape, found):
    model = whole(SHAPES[shape])
    for rank in range(NUM_RANKS):
        got = found[rank][shape]
        with torch.no_grad():
            expected = model(tokens_of(got["member"])[:, :-1])
        np.testing.assert_allclose(got["logits"], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_one_process(shape, found):
    config = SHAPES[shape]
    model = whole(config)
    members = members_of(config)
    for member in range(members):  # the losses' mean
        (foe_ranks.loss_of(model, tokens_of(member)) / members).backward()
    right = {t.name: t.of(t.parameter.grad) for t in model_tensors(model)}
    seen = set()
    for rank in range(NUM_RANKS):
        for name, gradient in found[rank][shape]["gradients"].items():
            np.testing.assert_allclose(gradient, right[name], rtol=0, atol=1e-11, err_msg=name)
            seen.add(name)
    assert seen == set(right)


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_are_those_of_one_process(shape, found):
    texts = generate(whole(SHAPES[shape]).eval(), PROMPTS, GENERATION)
    got = {}
    for rank in range(NUM_RANKS):
        for number, text in found[rank][shape]["texts"].items():
            assert got.setdefault(number, text) == text
    assert [got[number] for number in range(len(PROMPTS))] == texts


@pytest.mark.parametrize("shape", ["2 groups a rank", "1 group a rank"])
def test_with_whole_groups_on_a_rank_nothing_but_one_all_reduce_a_layer_is_called(shape, found):
    config = SHAPES[shape]
    payload = 3 * 5 * config.dim * BYTES  # tokens, width
    for rank in range(NUM_RANKS):
        calls = found[rank][shape]["calls"]
        once = ("all_reduce", tuple(range(NUM_RANKS)), payload)
        assert calls == [once] * (config.num_layers + 1)
        assert found[rank][shape]["forward"] == (len(calls), len(calls) * payload)


def crossing(calls):
    """Ranks 0 and 1 are one node, 2 and 3 the other."""
    return [
        (name, ranks, payload)
        for name, ranks, payload in calls
        if not set(ranks) <= {0, 1} and not set(ranks) <= {2, 3}
    ]


def test_between_groups_of_several_ranks_only_the_sum_crosses(found):
    payload = 3 * 5 * 16 * BYTES
    for rank in range(NUM_RANKS):
        calls = found[rank]["2 ranks a group"]["calls"]
        pair = (rank % 2, rank % 2 + 2)
        assert crossing(calls) == [("irecv", pair, payload), ("isend", pair, payload)] * 4
        inside = Counter(name for name, ranks, _ in calls if ranks != pair)
        assert inside == {"all_gather": 3, "irecv": 6, "isend": 6}


def test_between_nodes_every_element_of_the_sum_crosses_once(found):
    """Each of a node's two ranks sends half: 128 elements of 3 x 5 x 17."""
    for rank in range(NUM_RANKS):
        calls = found[rank]["1 group a rank, two nodes"]["calls"]
        pair, half = (rank % 2, rank % 2 + 2), 128 * BYTES
        assert crossing(calls) == [("irecv", pair, half), ("isend", pair, half)] * 4
        assert Counter(name for name, _, _ in calls) == {
            "all_reduce": 4, "all_gather": 4, "irecv": 4, "isend": 4,
        }  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_planted_rows_are_those_of_the_papers_formulas(shape, found):
    config, num_tokens = SHAPES[shape], 16
    planted = [found[rank][shape]["planted"] for rank in range(NUM_RANKS)]
    members = members_of(config)
    sent = sum(each["rows"] for each in planted) / num_tokens
    top_k = members * config.num_groups  # one expert on every rank
    assert sent == all_to_all_of_foe(top_k, NUM_RANKS, config.num_groups)
    assert (sent > 0) == (members > 1)
    holders = min(NUM_RANKS, config.num_groups)
    for each in planted:
        rows = each["reduced"] / 2  # the layer's, without the mean after the last one
        assert rows == num_tokens / members
        ring = 2 * (holders - 1) / holders
        assert ring == all_reduce_of_foe(NUM_RANKS, config.num_groups)
        assert (each["beside"] > 0) == (members > 1)  # ids, weights, counts


def test_counted_as_in_the_paper_an_expert_parallel_decoder_sends_k_times_as_much(found):
    """4 ranks, 4 groups, 4 experts a token, each on another rank."""
    sent = sum(found[rank]["moe"]["rows"] for rank in range(NUM_RANKS)) / 16
    assert sent == all_to_all_of_moe(4, NUM_RANKS) == 6
    assert sent / all_reduce_of_foe(NUM_RANKS, 4) == 4
    for rank in range(NUM_RANKS):
        assert found[rank]["moe"]["beside"] > 0  # ids, weights, counts


def test_a_rank_that_is_gone_ends_the_others_with_a_sentence(found):
    for rank in range(NUM_RANKS - 1):
        assert found[rank]["lost"].startswith(f"the sum over ranks: rank {rank} lost another one (")
