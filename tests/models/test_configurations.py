# SPDX-License-Identifier: Apache-2.0
"""Named configurations: the closed form equals the built model and the paper's Table 1."""

from dataclasses import replace

import pytest
import torch

from fomoe.models import CONFIGURATIONS, Decoder, build_model, configuration, parameter_count


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_closed_form_equals_the_built_model(name):
    config = CONFIGURATIONS[name]
    with torch.device("meta"):
        model = build_model(config)
    built = {"embedding": 0, "attention": 0, "router": 0, "experts": 0, "norms": 0}
    for parameter_name, parameter in model.named_parameters():
        parts = parameter_name.split(".")
        part = next((part for part in ("attention", "router", "experts") if part in parts), None)
        if part is None:
            part = "norms" if parts[-2].endswith("norm") else "embedding"
        built[part] += parameter.numel()

    count = parameter_count(config)

    assert {part: getattr(count, part) for part in built} == built
    assert count.total == sum(built.values())


# Name, total, and the shares of embedding, attention and experts in percent, as printed.
TABLE_1 = [
    ("fomoe-54m", "54M", 94.2, 1.9, 3.9),
    ("fomoe-153m", "153M", 67.0, 11.0, 22.0),
    ("fomoe-1.8b", "1.82B", 11.3, 29.5, 59.0),
    ("fomoe-13b", "13.3B", 3.1, 32.2, 64.5),
    ("fomoe-104b", "104.2B", 0.8, 33.0, 66.0),
]
# The router counts in the total but has no column. Two printed cells do not follow from the
# shapes: 21.94 % would print as 21.9 and 64.44 % as 64.4.
TABLE_1_EXCEPTIONS = {("fomoe-153m", "experts"): 21.9, ("fomoe-13b", "experts"): 64.4}


@pytest.mark.parametrize(("name", "total", "embedding", "attention", "experts"), TABLE_1)
def test_the_papers_sizes_round_to_its_table(name, total, embedding, attention, experts):
    count = parameter_count(configuration(name))
    digits, unit = total[:-1], {"M": 1e6, "B": 1e9}[total[-1]]
    decimals = len(digits.partition(".")[2])
    assert f"{count.total / unit:.{decimals}f}" == digits

    printed = {"embedding": embedding, "attention": attention, "experts": experts}
    for part, share in printed.items():
        expected = TABLE_1_EXCEPTIONS.get((name, part), share)
        assert round(100 * getattr(count, part) / count.total, 1) == expected, part


@pytest.mark.parametrize(("name", "total"), [("foe-1b", "1.022"), ("foe-7b", "6.852")])
def test_the_two_sizes_of_foe_have_the_papers_totals(name, total):
    assert f"{parameter_count(configuration(name)).total / 1e9:.3f}" == total


def test_a_site_counts_its_own_experts_and_everything_shared():
    config = configuration("tiny")
    residents = [[0, 1, 5], [2]]
    site, full = parameter_count(config, residents), parameter_count(config)
    one_expert = 2 * 64 * 64  # two matrices, F x D
    assert site.experts == 4 * one_expert
    assert full.experts == 32 * one_expert
    assert full.total - site.total == 28 * one_expert
    model = Decoder(config, residents)
    assert site.total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("activation", ["silu", "swiglu", "swiglu_clamped"])
def test_an_activation_with_a_gate_has_a_third_matrix(activation):
    config = replace(configuration("tiny"), activation=activation)
    model = Decoder(config)
    assert parameter_count(config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("norm", ["pre", "peri"])
def test_the_closed_form_counts_biases_head_norms_and_dense_layers(norm):
    config = replace(
        configuration("tiny"), num_layers=3, dense_layers=(0, 2), dense_dim=48, qkv_bias=True,
        attention_output_bias=True, head_norm=True, router_bias=True, shared_expert_dim=8,
        norm=norm,
    )  # fmt: skip
    count, model = parameter_count(config), Decoder(config)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.dense == sum(p.numel() for n, p in model.named_parameters() if "feed_f" in n)
    assert count.router == 16 * 64 + 16


def test_the_papers_sizes_scale_residuals_by_depth():
    assert configuration("fomoe-54m").residual_scale == 1.0
    assert configuration("fomoe-104b").residual_scale == 4 / 512


def test_an_unknown_name_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(ValueError, match=r"expected one of tiny, .*foe-7b, got 'huge'"):
        configuration("huge")
