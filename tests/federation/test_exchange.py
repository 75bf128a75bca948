# SPDX-License-Identifier: Apache-2.0
"""Who sends what to whom, and what comes back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import ThreadTransport, meet, run_sites, values_of

from fomoe.federation.exchange import BLOCK, Carried, Exchange, Layout, Piece, codec_for, cut
from fomoe.federation.exchange.layout import CHUNK
from fomoe.federation.ledger import SiteLedger, expected_moved_bytes, expected_round_bytes
from fomoe.federation.parameters import federated_tensors
from fomoe.federation.placement import everywhere, fixed, random
from fomoe.federation.relocation import relocate
from fomoe.nn import MoE, MoEConfig

FP32 = codec_for("fp32", torch.float32)
SITES = 3


def layer(residents, router="full"):
    config = MoEConfig(
        dim=10, expert_dim=5, num_experts=6, top_k=2, shared_expert_dim=37, router=router
    )
    return MoE(config, residents)


def tensors_of(site, placement, router="full"):
    return federated_tensors(layer(placement.residents(site)[0], router))


def pieces_of(site, placement, **options):
    return cut(tensors_of(site, placement), placement, **options)


def numbered(site, placement):
    """Every element says whose it is and where it stands."""
    return {
        tensor.name: torch.arange(tensor.num_elements) + 1000.0 * (site + 1)
        for tensor in tensors_of(site, placement)
    }


def test_shared_tensors_are_cut_into_equal_shards_between_blocks():
    pieces = [p for p in pieces_of(0, fixed(1, 6, 3, 1)) if p.traffic_class == "shared"]
    # w1 (74, 10) and w2 (10, 37): 6 and 3 blocks of 128 make 3 for each of the 3 sites.
    assert [(p.tensor, p.start, p.stop, p.owner) for p in pieces] == [
        ("shared_expert.w1", 0, 3 * BLOCK, 0),
        ("shared_expert.w1", 3 * BLOCK, 740, 1),
        ("shared_expert.w2", 0, 370, 2),
    ]
    assert all(p.contributors == p.receivers == (0, 1, 2) for p in pieces)


@given(sites=st.integers(1, 6), overlap=st.integers(1, 6), draw=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_every_element_of_every_tensor_is_owned_once(sites, overlap, draw):
    placement = random(1, 6, sites, min(overlap, sites), 0, draw) if 6 % sites == 0 else None
    if placement is None:
        return
    for site in range(sites):
        tensors = tensors_of(site, placement)
        pieces = cut(tensors, placement)
        covered = {tensor.name: 0 for tensor in tensors}
        for piece in pieces:
            assert piece.start == covered[piece.tensor]
            assert piece.start % BLOCK == 0
            assert piece.owner in piece.receivers
            covered[piece.tensor] = piece.stop
        assert covered == {tensor.name: tensor.num_elements for tensor in tensors}


def test_sites_list_what_they_share_in_the_same_order():
    placement = fixed(1, 6, 3, 2)
    lists = [pieces_of(site, placement) for site in range(3)]
    for first in lists:
        for second in lists:
            assert [p for p in first if p in second] == [p for p in second if p in first]


def test_a_mean_is_over_the_holders_and_weighted_by_their_tokens():
    placement = fixed(1, 6, SITES, 2)
    results = meet(
        lambda site: pieces_of(site, placement), lambda site: numbered(site, placement), FP32,
        tokens=[1, 2, 5],
    )  # fmt: skip
    # Expert 0 is on sites 0 and 1, expert 1 on 0 and 2; a router row comes from everybody.
    assert results[0]["experts.0.w1"][0].item() == pytest.approx((1000 + 2 * 2000) / 3)
    assert results[2]["experts.1.w1"][3].item() == pytest.approx(3 + (1000 + 5 * 3000) / 6)
    assert results[1]["router.1.weight"][2].item() == pytest.approx(2 + (1000 + 4000 + 15000) / 8)
    assert "experts.0.w1" not in results[2]
    for name in ("shared_expert.w1", "router.5.weight"):
        assert torch.equal(results[0][name], results[1][name])
        assert torch.equal(results[0][name], results[2][name])


def test_the_rows_of_non_holders_can_be_left_out():
    placement = fixed(1, 6, SITES, 2)
    results = meet(
        lambda site: pieces_of(site, placement, router_mean="holders"),
        lambda site: numbered(site, placement), FP32, tokens=[1, 2, 5],
    )  # fmt: skip
    for site in range(SITES):
        assert results[site]["router.0.weight"][0].item() == pytest.approx((1000 + 2 * 2000) / 3)


def test_factors_are_of_router_rows_or_of_experts():
    placement = fixed(1, 6, SITES, 1)
    rescaled = pieces_of(0, placement, router_mean="rescaled")
    assert {p.traffic_class: p.factor for p in rescaled} == {
        "shared": 1, "router": pytest.approx(3), "expert": 1
    }  # fmt: skip
    scaled = pieces_of(0, placement, scale_expert_steps=True)
    assert {p.traffic_class: p.factor for p in scaled} == {
        "shared": 1, "router": 1, "expert": pytest.approx((1 / 3) ** 0.5)
    }  # fmt: skip


def test_a_rejected_site_counts_nowhere_and_receives_everything():
    placement = fixed(1, 6, SITES, 2)

    def values(site):
        if site == 1:
            return {name: value * float("nan") for name, value in numbered(1, placement).items()}
        return numbered(site, placement)

    results = meet(
        lambda site: pieces_of(site, placement), values, FP32, tokens=[1, 2, 5], rejected=[1]
    )
    shared = [result["shared_expert.w1"] for result in results]
    assert shared[1][0].item() == pytest.approx((1000 + 15000) / 6)
    assert torch.equal(shared[0], shared[1])
    # Expert 0 is on sites 0 and 1: only site 0 is left.
    assert results[1]["experts.0.w1"][0].item() == 1000


def test_a_tensor_that_nobody_contributes_to_is_left_out():
    placement = fixed(1, 6, SITES, 1)
    results = meet(
        lambda site: pieces_of(site, placement), lambda site: numbered(site, placement), FP32,
        tokens=[1, 1, 1], rejected=[0],
    )  # fmt: skip
    assert "experts.0.w1" not in results[0]
    assert "experts.1.w1" in results[1]
    assert "router.0.weight" in results[0]


@pytest.mark.parametrize("router_mean", ["all", "holders"])
@pytest.mark.parametrize("codec_name", ["fp32", "int4"])
def test_the_bytes_are_the_formulas(router_mean, codec_name):
    placement, codec = fixed(1, 6, SITES, 2), codec_for(codec_name, torch.float32)

    def work(transport: ThreadTransport):
        site, ledger = transport.site, SiteLedger()
        pieces = pieces_of(site, placement, router_mean=router_mean)
        exchange = Exchange(pieces, transport, ledger, codec)
        attendance = exchange.attend(7)
        means = exchange.reduce(exchange.pack(numbered(site, placement)), attendance)
        exchange.distribute(means, attendance)
        return ledger.close_round()

    total: dict[str, int] = {}
    for counts in run_sites(SITES, work):
        for name, num_bytes in counts.items():
            total[name] = total.get(name, 0) + num_bytes
    assert total == expected_round_bytes(
        placement,
        shared_bytes=codec.num_bytes(740) + codec.num_bytes(370),
        router_bytes=codec.num_bytes(10),
        expert_bytes=codec.num_bytes(100) + codec.num_bytes(50),
        router_mean=router_mean,
    )


def test_error_feedback_sends_later_what_was_lost_and_counts_from_the_commit():
    placement, codec = everywhere(1, 6, 2), codec_for("int4", torch.float32)

    def work(transport: ThreadTransport):
        exchange = Exchange(pieces_of(transport.site, placement), transport, SiteLedger(), codec)
        generator = torch.Generator().manual_seed(transport.site)
        values = {
            tensor.name: torch.randn(tensor.num_elements, generator=generator)
            for tensor in tensors_of(transport.site, placement)
        }
        received = []
        for attempt in range(6):
            attendance = exchange.attend(1)
            means = exchange.reduce(exchange.pack(values), attendance)
            results = exchange.distribute(means, attendance)
            arrived = values_of(results, exchange.pieces)
            if attempt != 1:  # this meeting fails, and must leave nothing behind
                exchange.commit()
                received.append(arrived["experts.3.w1"])
        return values["experts.3.w1"], received

    (first, received), (second, _) = run_sites(2, work)
    mean = (first + second) / 2
    once = (received[0] - mean).abs().max()
    average = (sum(received) / len(received) - mean).abs().max()
    assert average < once / 2.5, "the errors of five rounds must cancel"


def test_moving_experts_take_their_weights_and_momentum_to_their_new_places():
    old, new = fixed(1, 6, SITES, 2), random(1, 6, SITES, 2, seed=3, draw=1)
    assert old != new

    def work(transport: ThreadTransport):
        site, ledger = transport.site, SiteLedger()
        before = tensors_of(site, old)
        for tensor in before:
            if not tensor.on_every_site:
                tensor.value.fill_(float(tensor.expert))
        momentum = {
            piece.key: torch.full((piece.num_elements,), 100.0 + len(piece.tensor))
            for piece in cut(before, old)
            if piece.owner == site and piece.traffic_class != "shared"
        }
        values = {tensor.name: tensor.value for tensor in before}
        after = tensors_of(site, new), new
        arrivals = relocate((before, old), after, values, momentum, transport, ledger)
        return arrivals, ledger.close_round()["moved"]

    results = run_sites(SITES, work)
    for site, (arrivals, _) in enumerate(results):
        came = set(new.residents(site)[0]) - set(old.residents(site)[0])
        assert {name.split(".")[1] for name in arrivals.weights} == {str(e) for e in came}
        for name, value in arrivals.weights.items():
            assert (value == float(name.split(".")[1])).all()
        for key, value in arrivals.momentum.items():
            expert = int(key.split(".")[1])
            assert new.owner(0, expert) == site != old.owner(0, expert)
            assert (value == 100.0 + len(key.partition("[")[0])).all()
    assert any(arrivals.momentum for arrivals, _ in results)
    expected = expected_moved_bytes(old, new, expert_bytes=600, momentum_bytes=640)
    assert sum(num_bytes for _, num_bytes in results) == expected > 0


def test_pieces_that_go_the_same_way_lie_end_to_end_each_from_a_whole_block_on():
    pieces = [
        Piece("a", 0, 100, 1, (0, 1), (0, 1), "shared"),
        Piece("b", 0, CHUNK, 0, (0, 1), (0, 1), "shared"),
        Piece("c", 0, 5, 1, (0, 1), (0, 1), "expert"),
        Piece("d", 0, 3, 0, (0, 1), (0, 1), "shared"),
        Piece("e", 0, 200, 1, (0, 1), (0, 1), "shared"),
    ]
    layout = Layout(pieces, site=0, alignment=BLOCK)
    # What site 0 owns comes first, then of site 1 a and e, and the expert's by itself.
    ends = CHUNK + BLOCK
    assert layout.starts == {
        "b[0:131072]": 0, "d[0:3]": CHUNK, "a[0:100]": ends, "e[0:200]": ends + BLOCK,
        "c[0:5]": ends + 3 * BLOCK,
    }  # fmt: skip
    sizes = [(chunk.owner, chunk.start, chunk.num_elements) for chunk in layout.chunks]
    assert sizes == [
        (0, 0, CHUNK), (0, CHUNK, BLOCK), (1, ends, 3 * BLOCK), (1, ends + 3 * BLOCK, BLOCK)
    ]  # fmt: skip
    assert (layout.num_owned, layout.num_elements) == (ends, ends + 4 * BLOCK)


def test_a_piece_larger_than_a_chunk_is_cut():
    piece = Piece("a", BLOCK, 2 * CHUNK, 0, (0,), (0,), "shared")
    layout = Layout([piece], site=0, alignment=BLOCK)
    parts = [part for chunk in layout.chunks for part in chunk.parts]
    assert [(p.start, p.stop, p.offset) for p in parts] == [
        (BLOCK, BLOCK + CHUNK, 0), (BLOCK + CHUNK, 2 * CHUNK, 0)
    ]  # fmt: skip
    assert layout.chunks_of[piece.key] == layout.chunks


def test_what_is_carried_counts_from_the_commit_on_and_stays_where_nothing_new_is_written():
    pieces = [
        Piece(name, 0, 2, owner, (0, 1), (0, 1), "shared") for name, owner in (("a", 0), ("b", 1))
    ]
    layout = Layout(pieces, site=0, alignment=1)
    first, second = layout.chunks
    carried = Carried(layout, pieces, layout.num_elements, torch.float32)
    carried.load({"b[0:2]": torch.tensor([5.0, 6.0])})
    assert carried.before(first) is None
    carried.after(first).copy_(torch.tensor([1.0, 2.0]))
    assert carried.before(first) is None
    carried.commit()
    assert carried.before(first).tolist() == [1.0, 2.0]
    assert carried.before(second).tolist() == [5.0, 6.0]
    carried.after(second).zero_()
    carried.forget()
    carried.commit()
    assert {key: x.tolist() for key, x in carried.by_piece().items()} == {
        "a[0:2]": [1.0, 2.0], "b[0:2]": [5.0, 6.0]
    }  # fmt: skip


def test_a_piece_says_where_it_is():
    piece = Piece("a.w", 128, 130, 0, (0,), (0,), "shared")
    assert (piece.key, piece.num_elements) == ("a.w[128:130]", 2)
