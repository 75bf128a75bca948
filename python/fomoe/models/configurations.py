# SPDX-License-Identifier: Apache-2.0
"""Named model shapes: the FoMoE paper's five sizes (arXiv 2606.19025, Table 1) and our own."""

from fomoe.models.decoder_config import DecoderConfig

GPT_OSS_VOCAB_SIZE = 200_019
COMPLETE_P_BASE_DEPTH = 4  # our choice: the depth of the paper's smallest model


def _fomoe(dim: int, num_layers: int) -> DecoderConfig:
    """A row of Table 1; everything follows from width and depth.

    The paper scales each block's output by CompleteP's depth multiplier without giving its base
    depth.
    """
    num_experts = 4 * dim // 128
    return DecoderConfig(
        vocab_size=GPT_OSS_VOCAB_SIZE,
        dim=dim,
        num_layers=num_layers,
        num_heads=dim // 64,
        num_kv_heads=dim // 64,
        head_dim=64,
        expert_dim=128,
        num_experts=num_experts,
        top_k=num_experts // 4,
        activation="silu",
        score="sigmoid",
        norm="peri",
        residual_scale=COMPLETE_P_BASE_DEPTH / num_layers,
    )


CONFIGURATIONS: dict[str, DecoderConfig] = {
    # For tests and demonstrations: byte tokens, experts are most of it.
    "tiny": DecoderConfig(
        vocab_size=256,
        dim=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        expert_dim=64,
        num_experts=16,
        top_k=4,
        activation="silu",
        score="sigmoid",
        norm="peri",
    ),
    # The shape most models of today share: byte tokens, pre-norm, grouped heads, gated experts.
    "small-swiglu": DecoderConfig(
        vocab_size=256,
        dim=256,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        expert_dim=128,
        num_experts=32,
        top_k=4,
        renormalize=True,
        tie_embeddings=False,
    ),
    "fomoe-54m": _fomoe(dim=256, num_layers=4),
    "fomoe-153m": _fomoe(dim=512, num_layers=16),
    "fomoe-1.8b": _fomoe(dim=1024, num_layers=128),
    "fomoe-13b": _fomoe(dim=2048, num_layers=256),
    "fomoe-104b": _fomoe(dim=4096, num_layers=512),
}


def configuration(name: str) -> DecoderConfig:
    """The configuration of that name.

    Raises
    ------
    ValueError
        If there is none; the message lists the names.
    """
    if name not in CONFIGURATIONS:
        names = ", ".join(CONFIGURATIONS)
        raise ValueError(f"configuration: expected one of {names}, got {name!r}")
    return CONFIGURATIONS[name]
