# SPDX-License-Identifier: Apache-2.0
"""Shapes as text and what they cost."""

import pytest

from fomoe.bench.shapes import CUDA_SHAPES, SHAPES, Shape, parse_shape, parse_shapes
from fomoe.errors import UserError


def test_a_shape_is_read_from_its_text_and_printed_as_it_was():
    assert parse_shape("16,512,192,128,8") == Shape(
        tokens=16, dim=512, expert_dim=192, num_experts=128, top_k=8
    )
    assert str(parse_shape("16,512,192,128,8")) == "16,512,192,128,8"


def test_without_shapes_the_five_standard_ones_are_measured():
    assert parse_shapes([]) == SHAPES
    assert parse_shapes([], "cuda") == CUDA_SHAPES
    assert parse_shapes(["1,8,16,4,2", "1,8,16,4,2"]) == (Shape(1, 8, 16, 4, 2),)


@pytest.mark.parametrize("text", ["", "1,2,3,4", "1,2,3,4,2,6", "1,2,x,4,2", "0,2,3,4,2"])
def test_what_is_no_shape_is_named(text: str):
    with pytest.raises(UserError, match="expected five positive integers") as error:
        parse_shape(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["1,2,3,4,5", "1,2,3,5000,5"])
def test_more_choices_than_experts_or_too_many_experts_are_refused(text: str):
    with pytest.raises(UserError, match="expected K <= E <= 4096, got"):
        parse_shape(text)


@pytest.mark.parametrize("text", ["4,3,8,7,2", "4,8,5,7,2"])
def test_widths_that_not_all_contenders_take_are_refused(text: str):
    with pytest.raises(UserError, match="expected D and F in multiples of 8"):
        parse_shape(text)


def test_flops_are_three_products_forward_and_six_more_backward():
    # 2 tokens x 3 experts = 6 rows; per row 2*D*2F for gate and up and 2*F*D for down.
    shape = Shape(tokens=2, dim=5, expert_dim=7, num_experts=11, top_k=3)
    forward = 6 * (2 * 5 * 14 + 2 * 7 * 5)
    assert shape.expert_flops(backward=False) == forward
    assert shape.expert_flops(backward=True) == 3 * forward
