# SPDX-License-Identifier: Apache-2.0
"""The all-to-all ops as torch sees them: schemas, fake kernels, gradients, torch.compile."""

import torch
from layers import DIM, NUM_EXPERTS, TOP_K, generator, random_ids

from fomoe import MoE, MoEConfig
from fomoe.comm import ExpertExchange, LoopbackTransport, Topology

OPS = torch.ops.fomoe


def alone(num_experts=NUM_EXPERTS):
    (transport,) = LoopbackTransport.of_all_ranks(Topology([1]))
    return ExpertExchange(transport, [0] * (num_experts - 1) + [-1])


def test_the_ops_are_registered_as_torch_demands():
    exchange = alone()
    x = torch.randn(6, DIM, generator=generator(0), dtype=torch.float64, requires_grad=True)
    weights = torch.rand(6, TOP_K, generator=generator(1), dtype=torch.float64, requires_grad=True)
    ids = random_ids(6, 0)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        OPS.all_to_all_dispatch, (x, ids, weights, exchange.handle), test_utils=checks
    )
    rows, _, row_weights, *tables, counts = OPS.all_to_all_dispatch(
        x, ids, weights, exchange.handle
    )
    parts = [rows.detach().requires_grad_(), row_weights.detach().requires_grad_()]
    back = (parts, tables, counts, exchange.handle)
    torch.library.opcheck(OPS.all_to_all_combine, back, test_utils=checks)
    torch.library.opcheck(OPS.all_to_all_repeat, ([x, weights], *back[1:]), test_utils=checks)


def test_an_expert_parallel_layer_compiles_whole():
    moe = MoE(MoEConfig(dim=8, expert_dim=8, num_experts=NUM_EXPERTS, top_k=2), exchange=alone())
    torch._dynamo.reset()
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    for num_tokens in (5, 9):
        x = torch.randn(num_tokens, 8, generator=generator(num_tokens))
        results = []
        for function in (moe, compiled):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            y.square().sum().backward()
            results.append([y.detach(), leaf.grad])
        torch.testing.assert_close(results[1], results[0])
