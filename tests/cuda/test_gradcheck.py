# SPDX-License-Identifier: Apache-2.0
"""Gradients of every op on the device against finite differences."""

import op_calls
import pytest
import torch
from on_device import ON_BOTH, moved
from op_calls import call_of
from samples import Sample
from torch import Tensor

SMALL = Sample(name="small", tokens=5, experts=4, top_k=2, dim=4, expert_dim=3, residents=(2, 0, 1))


@pytest.mark.parametrize("name", op_calls.DIFFERENTIABLE)
@pytest.mark.parametrize("device", ON_BOTH)
def test_gradients_pass_gradcheck(device, name):
    function, tensors = call_of(name, SMALL, torch.float64)
    tensors = moved(tensors, device)
    smooth = [name for name, tensor in tensors.items() if tensor.is_floating_point()]

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        results = function(**tensors | dict(zip(smooth, values, strict=True)))
        results = [results] if isinstance(results, Tensor) else results
        return tuple(result for result in results if result.requires_grad)

    torch.autograd.gradcheck(outputs, [tensors[name].requires_grad_() for name in smooth])
