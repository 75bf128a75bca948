# SPDX-License-Identifier: Apache-2.0
"""How many bytes of tensors a site needs, from the shapes and the settings alone.

Of the model parts are shared (S elements, on every site), expert tensors (X elements per expert)
and router rows (D elements per expert). A site holds h and owns o of the experts; P is what it
holds, S + h X + its router rows, and O what it owns, about S / sites + o (X + D). fp32 throughout:
4 bytes per element, of which mixed precision makes copies only while a layer computes.

==================  ============================================================================
parameters          4 P; a router has memory for all E rows, also for those that are nobody's here
gradients           as many
optimizer           AdamW: 8 P for both moments, and 4 for the step count of every tensor
round_start         4 P, to form start - now; none with ddp
outer_momentum      nesterov: 4 O; the momentum is with the owner
codec_residuals     lossy codecs: 4 P of what was lost on the way up, 4 O on the way down
exchange_buffers    the most that a meeting allocates, see :class:`_Meeting`
==================  ============================================================================

Left out are activations, what relocating experts takes for a moment, the process itself, and in a
meeting the temporaries of one piece (a shared piece has at most 2**20 elements; an expert's tensor
is one).

The FoMoE paper counts 18 bytes per parameter held (Appendix, memory model: 2 for a 16-bit weight, 4
for its master, 8 for the moments, 4 for the gradient), and neither the start of the round nor the
outer momentum nor buffers: :func:`paper_bytes`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fomoe.federation.config import FederationConfig
from fomoe.federation.placement import Placement
from fomoe.models import DecoderConfig, parameter_count

__all__ = ["paper_bytes", "site_memory"]

_PAPER_BYTES_PER_PARAMETER = 18
_BLOCK = 128
_BLOCK_BYTES = {"int8": 4 + 128, "int4": 4 + 64}


def site_memory(
    model: DecoderConfig,
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
    rows_of_nobody = _ghosts(model, placement, site) if model.router == "partitioned" else 0
    allocated = held + rows_of_nobody * model.dim
    owned = sum(group.owned for group in groups)
    keeps_state = not federation.meets_every_step
    is_lossy = federation.codec != "fp32"
    return {
        "parameters": 4 * allocated,
        "gradients": 4 * allocated,
        "optimizer": 8 * held + 4 * sum(g.tensors for g in groups) if optimizer == "adamw" else 0,
        "round_start": 4 * held if keeps_state else 0,
        "outer_momentum": 4 * owned if keeps_state and federation.outer == "nesterov" else 0,
        "codec_residuals": 4 * (sum(g.sent for g in groups) + owned) if is_lossy else 0,
        "exchange_buffers": _Meeting(federation, groups).peak(),
    }


def paper_bytes(model: DecoderConfig, placement: Placement, site: int) -> int:
    """What the FoMoE paper's model says of the same parameters."""
    held = parameter_count(model, placement.residents(site)).total
    if model.router == "partitioned":
        held -= _ghosts(model, placement, site) * model.dim
    return _PAPER_BYTES_PER_PARAMETER * held


def _ghosts(model: DecoderConfig, placement: Placement, site: int) -> int:
    """Experts that are not on a site, over all layers."""
    held = sum(len(experts) for experts in placement.residents(site))
    return model.num_layers * model.num_experts - held


@dataclass(frozen=True, slots=True)
class _Group:
    """Tensors of a site that have the same contributors, receivers and owner.

    ``elements`` of all of them, in ``tensors`` tensors; those the site owns, and those it
    contributes to; the payloads' bytes, as encoded, in both directions.
    """

    elements: int
    tensors: int
    owned: int
    sent: int
    bytes_up: tuple[int, int]
    """Sent and received."""
    bytes_down: tuple[int, int]
    own_bytes: int
    """Of the payloads that stay."""


def _groups(
    model: DecoderConfig, federation: FederationConfig, placement: Placement, site: int
) -> Iterator[_Group]:
    codec, others = federation.codec, placement.sites - 1
    sizes = _shared_sizes(model)
    payload, elements = sum(_encoded(codec, size) for size in sizes), sum(sizes)
    mine = payload // placement.sites
    yield _Group(
        elements, len(sizes), elements // placement.sites, elements,
        (payload - mine, others * mine), (others * mine, payload - mine), mine,
    )  # fmt: skip
    everyone = tuple(range(placement.sites))
    full = model.router == "full"
    for layer, experts in enumerate(placement.table):
        for expert, holders in enumerate(experts):
            owns = placement.owner(layer, expert) == site
            if site in holders:
                tensors = _expert_sizes(model) + ([] if full else [model.dim])
                yield _expert_group(codec, tensors, holders, holders, site, owns)
            if full:
                contributors = holders if federation.router_mean == "holders" else everyone
                yield _expert_group(codec, [model.dim], contributors, everyone, site, owns)


def _expert_group(
    codec: str,
    sizes: Sequence[int],
    contributors: Sequence[int],
    receivers: Sequence[int],
    site: int,
    owns: bool,
) -> _Group:
    payload, elements = sum(_encoded(codec, size) for size in sizes), sum(sizes)
    contributes = site in contributors
    sent = elements if contributes else 0
    if owns:
        up, down = (0, (len(contributors) - 1) * payload), ((len(receivers) - 1) * payload, 0)
        return _Group(elements, len(sizes), elements, sent, up, down, payload)
    up = (payload if contributes else 0, 0)
    return _Group(elements, len(sizes), 0, sent, up, (0, payload), 0)


class _Meeting:
    """What a meeting allocates, step by step.

    Up: the outbox, the inbox, what stays, and what the codec loses; then, without the outbox, the
    means of what is owned. Down: means or steps, until they are encoded, what momentum becomes, the
    outbox, the inbox, what stays, and the codec's losses of both ways. With local_adamw three such
    exchanges follow each other, the results of which wait for the last.
    """

    def __init__(self, federation: FederationConfig, groups: Sequence[_Group]) -> None:
        self.federation = federation
        self.groups = groups

    def peak(self) -> int:
        settings, groups = self.federation, self.groups
        is_lossy = settings.codec != "fp32"
        owned = 4 * sum(group.owned for group in groups)
        up = [sum(group.bytes_up[way] for group in groups) for way in (0, 1)]
        down = [sum(group.bytes_down[way] for group in groups) for way in (0, 1)]
        stays = sum(group.own_bytes for group in groups)
        lost_up = 4 * sum(group.sent for group in groups) if is_lossy else 0
        # As it is, a value stays where it is: only a difference is a new tensor.
        stays_up = stays if settings.sends_differences else 0
        keeps_momentum = not settings.meets_every_step and settings.outer == "nesterov"
        momentum = owned if keeps_momentum else 0
        on_the_way_up = lost_up + stays_up + up[0] + up[1]
        averaging = lost_up + up[1] + owned
        stepping = lost_up + owned + momentum
        # A step that is lost in part leaves the loss behind, any other is itself what stays.
        on_the_way_down = stepping + (stays if is_lossy else 0) + down[0] + down[1]
        averages_moments = not settings.meets_every_step and settings.outer == "local_adamw"
        waiting = 2 * (owned + down[1]) if averages_moments else 0
        return waiting + max(on_the_way_up, averaging, stepping, on_the_way_down)


def _encoded(codec: str, num_elements: int) -> int:
    """Payload of a tensor in bytes."""
    if codec in _BLOCK_BYTES:
        return -(-num_elements // _BLOCK) * _BLOCK_BYTES[codec]
    return num_elements * (2 if codec == "bf16" else 4)


def _shared_sizes(model: DecoderConfig) -> list[int]:
    """Elements of every tensor that is no expert's."""
    attention = [model.num_heads, model.num_kv_heads, model.num_kv_heads, model.num_heads]
    sizes = [model.vocab_size * model.dim] * (1 if model.tie_embeddings else 2)
    sizes += [heads * model.head_dim * model.dim for heads in attention] * model.num_layers
    peri = model.norm == "peri"
    norms = 4 * model.num_layers + 2 if peri else 2 * model.num_layers + 1
    sizes += [model.dim] * norms
    if model.shared_expert_dim > 0:
        width = model.shared_expert_dim * model.dim
        sizes += [_matrices(model) * width, width] * model.num_layers
        sizes += [model.dim] * model.num_layers if model.shared_expert_gate else []
    return sizes


def _expert_sizes(model: DecoderConfig) -> list[int]:
    """Elements of the first matrix, with a gate's rows, and of the second."""
    size = model.expert_dim * model.dim
    return [_matrices(model) * size, size]


def _matrices(model: DecoderConfig) -> int:
    """Rows of the first matrix over the expert's width."""
    return 1 if model.activation == "silu" else 2
