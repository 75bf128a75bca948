# SPDX-License-Identifier: Apache-2.0
"""How many bytes of tensors a site needs, from the shapes and the settings alone.

Of the model parts are shared (S elements, on every site), expert tensors (X elements per expert)
and router rows (D elements per expert, D + 1 with a router bias). A site holds h and owns o of the
experts; P is what it holds, S + h X + its router rows, and O what it owns, about
S / sites + o (X + D). fp32 throughout: 4 bytes per element, of which mixed precision makes copies
only while a layer computes.

==================  ============================================================================
parameters          4 P; a router has memory for all E rows, also for those that are nobody's here
gradients           as many
optimizer           AdamW: 8 P for both moments, and 4 for the step count of every tensor
round_start         4 P, to form start - now; none with ddp
outer_momentum      nesterov: 4 O; the momentum is with the owner
codec_residuals     lossy codecs: 4 P of what was lost on the way up, 4 O on the way down
exchange_buffers    kept from meeting to meeting. What is held, encoded (local_adamw: three times),
                    first the contributions, then the results; for the other holders of what is
                    owned, encoded, first theirs, then what they get; and as much as the momentum
                    and the residuals for their next values
==================  ============================================================================

With "int8" and "int4", P and O count whole blocks of 128 elements in the last three.

Left out are activations, what relocating experts takes for a moment, the process itself, and in a
meeting the temporaries of one chunk (at most 2**17 elements).

The FoMoE paper counts 18 bytes per parameter held (Appendix, memory model: 2 for a 16-bit weight, 4
for its master, 8 for the moments, 4 for the gradient), and neither the start of the round nor the
outer momentum nor buffers: :func:`paper_bytes`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fomoe.federation.config import FederationConfig
from fomoe.federation.placement import Placement
from fomoe.models import DecoderConfig, FoEConfig, LanguageModelConfig, parameter_count

__all__ = ["paper_bytes", "site_memory"]

_PAPER_BYTES_PER_PARAMETER = 18
_BLOCK = 128
_BLOCK_BYTES = {"int8": 4 + 128, "int4": 4 + 64}


def site_memory(
    model: LanguageModelConfig,
    federation: FederationConfig,
    placement: Placement,
    site: int,
    optimizer: str = "adamw",
) -> dict[str, int]:
    """Bytes by class on one site, the classes of a run's ``memory_per_site`` but ``peak_rss``.

    From the second round on; in the first there is no outer momentum and nothing lost yet.
    ``optimizer`` is the setting ``optimizer.name``.
    """
    groups = list(_groups(model, federation, placement, site))
    held = sum(group.elements for group in groups)
    rows_of_nobody = _ghosts(model, placement, site) if model.moe().router == "partitioned" else 0
    allocated = held + rows_of_nobody * sum(_router_sizes(model))
    room, owned = sum(group.room for group in groups), sum(group.owned for group in groups)
    keeps_state = not federation.meets_every_step
    momentum = 4 * owned if keeps_state and federation.outer == "nesterov" else 0
    residuals = 4 * (room + owned) if federation.codec != "fp32" else 0
    kinds = 3 if keeps_state and federation.outer == "local_adamw" else 1
    buffers = sum(kinds * group.payload + group.copies for group in groups)
    return {
        "parameters": 4 * allocated,
        "gradients": 4 * allocated,
        "optimizer": 8 * held + 4 * sum(g.tensors for g in groups) if optimizer == "adamw" else 0,
        "round_start": 4 * held if keeps_state else 0,
        "outer_momentum": momentum,
        "codec_residuals": residuals,
        "exchange_buffers": buffers + momentum + residuals,
    }


def paper_bytes(model: LanguageModelConfig, placement: Placement, site: int) -> int:
    """What the FoMoE paper's model says of the same parameters."""
    held = parameter_count(model, placement.residents(site)).total
    if model.moe().router == "partitioned":
        held -= _ghosts(model, placement, site) * sum(_router_sizes(model))
    return _PAPER_BYTES_PER_PARAMETER * held


def _ghosts(model: LanguageModelConfig, placement: Placement, site: int) -> int:
    """Experts that are not on a site, over all layers."""
    held = sum(len(experts) for experts in placement.residents(site))
    return len(model.moe_layers) * model.num_experts - held


@dataclass(frozen=True, slots=True)
class _Group:
    """``elements`` in ``tensors`` tensors of a site that have the same receivers and owner.

    ``room`` counts elements as the exchange lays them out, ``owned`` those of them that the site
    owns; ``payload`` are the bytes of all, encoded, and ``copies`` those of what is owned for
    everyone else who holds it.
    """

    elements: int
    tensors: int
    room: int
    owned: int
    payload: int
    copies: int


def _groups(
    model: LanguageModelConfig, federation: FederationConfig, placement: Placement, site: int
) -> Iterator[_Group]:
    codec, sites = federation.codec, placement.sites
    sizes = _shared_sizes(model)
    room, payload = sum(_room(codec, n) for n in sizes), sum(_encoded(codec, n) for n in sizes)
    copies = payload // sites * (sites - 1)
    yield _Group(sum(sizes), len(sizes), room, room // sites, payload, copies)
    full = model.moe().router == "full"
    for layer, experts in enumerate(placement.table):
        for expert, holders in enumerate(experts):
            owns = placement.owner(layer, expert) == site
            if site in holders:
                sizes = _expert_sizes(model) + ([] if full else _router_sizes(model))
                yield _expert_group(codec, sizes, len(holders), owns)
            if full:
                yield _expert_group(codec, _router_sizes(model), sites, owns)


def _expert_group(codec: str, sizes: Sequence[int], receivers: int, owns: bool) -> _Group:
    room, payload = sum(_room(codec, n) for n in sizes), sum(_encoded(codec, n) for n in sizes)
    owned, copies = (room, payload * (receivers - 1)) if owns else (0, 0)
    return _Group(sum(sizes), len(sizes), room, owned, payload, copies)


def _room(codec: str, num_elements: int) -> int:
    """Elements a tensor takes up in the layout of the exchange."""
    return num_elements + (-num_elements % _BLOCK if codec in _BLOCK_BYTES else 0)


def _encoded(codec: str, num_elements: int) -> int:
    """Payload of a tensor in bytes."""
    if codec in _BLOCK_BYTES:
        return -(-num_elements // _BLOCK) * _BLOCK_BYTES[codec]
    return num_elements * (2 if codec == "bf16" else 4)


def _shared_sizes(model: LanguageModelConfig) -> list[int]:
    """Elements of every tensor that is no expert's."""
    sizes = [model.vocab_size * model.dim] * (1 if model.tie_embeddings else 2)
    sizes += [model.dim] * (2 if model.norm == "peri" else 1)
    sizes += [model.dim] * (4 if model.norm == "peri" else 2) * model.num_layers
    if isinstance(model, FoEConfig):
        return sizes + _sizes_of_foe(model)
    assert isinstance(model, DecoderConfig)  # the other family
    return sizes + _sizes_of_decoder(model)


def _sizes_of_foe(model: FoEConfig) -> list[int]:
    """Attention, of which every group has tensors of its own."""
    heads = [each // model.num_groups for each in [*_input_heads(model), model.num_heads]]
    group = [each * model.head_dim * model.dim for each in heads]
    return group * model.num_groups * model.num_layers


def _sizes_of_decoder(model: DecoderConfig) -> list[int]:
    """Attention, dense layers and shared experts."""
    inputs = [heads * model.head_dim for heads in _input_heads(model)]
    layer = [size * model.dim for size in inputs] + [inputs[0] * model.dim]
    layer += inputs if model.qkv_bias else []
    layer += [model.dim] if model.attention_output_bias else []
    layer += [model.head_dim] * 2 if model.head_norm else []
    sizes = layer * model.num_layers
    dense = model.dense_dim * model.dim
    sizes += [2 * dense, dense] * len(model.dense_layers)
    if model.shared_expert_dim > 0:
        width = model.shared_expert_dim * model.dim
        shared = [_matrices(model) * width, width]
        shared += [model.dim] if model.shared_expert_gate else []
        sizes += shared * len(model.moe_layers)
    return sizes


def _input_heads(model: LanguageModelConfig) -> list[int]:
    """Heads of the projections to queries, keys and values."""
    return [model.num_heads, model.num_kv_heads, model.num_kv_heads]


def _expert_sizes(model: LanguageModelConfig) -> list[int]:
    """Elements of the first matrix, with a gate's rows, and of the second."""
    size = model.expert_dim * model.dim
    return [_matrices(model) * size, size]


def _router_sizes(model: LanguageModelConfig) -> list[int]:
    """Elements of an expert's row of the router, and of its bias."""
    return [model.dim, 1] if model.moe().router_bias else [model.dim]


def _matrices(model: LanguageModelConfig) -> int:
    """Rows of the first matrix over the expert's width."""
    return 1 if model.activation == "silu" else 2
