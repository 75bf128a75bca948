# SPDX-License-Identifier: Apache-2.0
"""Tiny models of every kind, with weights from a seed."""

import torch

from fomoe.models import build_model, config_from_dict
from fomoe.nn import initialize

SHAPE = {"vocab_size": 61, "dim": 24, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
         "head_dim": 6, "expert_dim": 20, "num_experts": 6, "top_k": 2}  # fmt: skip
MODELS = {
    "moe": {},
    "fomoe": {"norm": "peri", "score": "sigmoid", "activation": "silu", "num_kv_heads": 4},
    "converted": {
        "score": "unit",
        "router_bias": True,
        "qkv_bias": True,
        "shared_expert_dim": 12,
        "dense_layers": (1,),
        "dense_dim": 40,
    },
    "dense": {
        "dense_layers": (0, 1, 2),
        "dense_dim": 40,
        "head_norm": True,
        "rope_scaling": {"kind": "linear", "factor": 2.0},
    },
    "windowed": {"sliding_window": 5},
    "foe": {"family": "foe", "top_k": 4},
}


def tiny_model(kind="moe", dtype=torch.float64, **settings):
    model = build_model(config_from_dict({"family": "decoder"} | SHAPE | MODELS[kind] | settings))
    initialize(model, seed=7)
    return model.to(dtype).eval()
