# SPDX-License-Identifier: Apache-2.0
"""torch.set_num_threads holds for the ops on every thread."""

import os
import subprocess
import sys

import pytest

# OpenMP's default, four here, is what a thread has before anyone tells it otherwise. The second
# thread of each case calls no torch op that would do so.
SCRIPT = """
import os, threading
import torch
from fomoe import ops

torch.set_num_threads(1)
tokens, experts, top_k, dim = 2000, 16, 2, 64
logits = torch.randn(tokens, experts, requires_grad=True)
x = torch.randn(tokens, dim, requires_grad=True)
w1 = torch.randn(experts, 2 * dim, dim, requires_grad=True)
w2 = torch.randn(experts, dim, dim, requires_grad=True)
gate = ops.topk_gate(logits, top_k)
routing = ops.route(gate.ids, torch.arange(experts, dtype=torch.int32), experts)
weights = gate.weights.detach().requires_grad_()
rows = ops.permute(x, routing).detach().requires_grad_()
y = ops.combine(rows, weights, routing)
few, wide = torch.randn(2, 2048), torch.randn(1, 2048, 2048)
two_rows = torch.tensor([0, 2], dtype=torch.int32)
mlp = ops.expert_mlp(x, weights, w1, w2, routing)
cases = {
    "topk_gate": lambda: ops.topk_gate(logits, top_k),
    "topk_gate_backward": lambda: torch.autograd.grad(gate.weights, logits, weights.detach()),
    "permute": lambda: ops.permute(x, routing),
    "combine": lambda: ops.combine(rows, weights, routing),
    "combine_backward": lambda: torch.autograd.grad(y, [rows, weights], x.detach()),
    # Few rows: a product that torch has no part in.
    "grouped_gemm": lambda: ops.grouped_gemm(few, wide, two_rows),
    "grouped_gemm_wgrad": lambda: torch.ops.fomoe.grouped_gemm_wgrad(few, few, two_rows),
    "expert_mlp": lambda: ops.expert_mlp(x, weights, w1, w2, routing),
    "expert_mlp_backward": lambda: torch.autograd.grad(mlp, [x, weights, w1, w2], x.detach()),
}

def count_new_threads(name):
    before = set(os.listdir("/proc/self/task"))
    cases[name]()
    print(name, len(set(os.listdir("/proc/self/task")) - before))

for name in cases:
    thread = threading.Thread(target=count_new_threads, args=(name,))
    thread.start()
    thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_set_num_threads_holds_on_a_second_python_thread():
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"OMP_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
        check=True,
    )
    started = dict(line.split() for line in result.stdout.splitlines())
    assert started == dict.fromkeys(started, "0")
    assert len(started) == 9
