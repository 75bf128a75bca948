# SPDX-License-Identifier: Apache-2.0
"""A layer whose output can be read."""

import torch

from fomoe.nn import MoE, MoEConfig

NUM_EXPERTS = 4


def telling_layer(resident=None, **changes) -> MoE:
    """The logits are the input, and expert e answers with the e-th unit vector.

    So the output of a token lists the weights of the experts that it passed through.
    """
    shape = {"dim": NUM_EXPERTS, "expert_dim": 1, "num_experts": NUM_EXPERTS, "top_k": 1}
    moe = MoE(MoEConfig(**shape | {"has_bias": True} | changes), resident)
    with torch.no_grad():
        moe.router.weight.copy_(torch.eye(NUM_EXPERTS))
        moe.router.bias.zero_()
        moe.experts.w2.zero_()
        moe.experts.b2.copy_(torch.eye(NUM_EXPERTS)[list(moe.experts.expert_ids)])
    return moe


def choosing(*experts: int) -> torch.Tensor:
    """Tokens that prefer these experts, one each."""
    return 20 * torch.eye(NUM_EXPERTS)[list(experts)]
