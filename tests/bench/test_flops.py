# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a decoder and the bound they set, by hand and against the FoMoE paper."""

from dataclasses import replace

import pytest

from fomoe.bench.flops import Flops, decoder_flops, ideal_speedup
from fomoe.models import CONFIGURATIONS, DecoderConfig

SMALL = DecoderConfig(
    vocab_size=11,
    dim=8,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    expert_dim=5,
    num_experts=6,
    top_k=2,
)


def test_flops_of_a_small_decoder_by_hand():
    # Projections: query and output 8x8 each, key and value 8x4 each: 192 weights, 384 FLOPs.
    # Scores: 4 heads of 2, times queries and times values, 2 FLOPs each, (1 + 2 + 3) / 3 keys: 64.
    assert decoder_flops(SMALL, sequence_length=3) == Flops(
        attention=3 * (384 + 64),
        router=3 * (2 * 8 * 6),
        experts=3 * (2 * 3 * 2 * 8 * 5),
        dense=0,
        unembedding=2 * 8 * 11,
    )


def test_a_dense_layer_has_the_flops_of_its_feed_forward_and_no_router():
    flops = decoder_flops(replace(SMALL, dense_layers=(1,), dense_dim=7), sequence_length=3)
    assert flops.dense == 2 * 3 * 8 * 7
    assert flops.router == 2 * (2 * 8 * 6)
    assert flops.experts == 2 * (2 * 3 * 2 * 8 * 5)


def test_experts_of_two_matrices_take_two_thirds():
    silu = decoder_flops(replace(SMALL, activation="silu"), sequence_length=3)
    assert 3 * silu.experts == 2 * decoder_flops(SMALL, sequence_length=3).experts


def test_the_bound_by_hand():
    assert ideal_speedup(0.5, 0.0) == 1
    assert ideal_speedup(0.5, 1.0) == 2
    assert ideal_speedup(0.8, 0.5) == pytest.approx(1 / 0.6)


def test_the_papers_150m_model_spends_14_percent_on_experts_and_gains_at_most_1_16x():
    # Fig. 8: FFN is 14% of the FLOPs. So it is when, as there, the unembedding is left out, and
    # attention at the paper's 2048 tokens is counted without the causal mask: 2048 keys on average.
    flops = decoder_flops(CONFIGURATIONS["fomoe-153m"], sequence_length=2 * 2048 - 1)
    assert flops.experts == 16 * 4 * 2 * 2 * 512 * 128
    share = flops.experts / (flops.total - flops.unembedding)
    assert round(share, 2) == 0.14
    assert round(ideal_speedup(0.14, 1.0), 2) == 1.16
    assert ideal_speedup(share, 1.0) == pytest.approx(1.16, abs=0.01)
