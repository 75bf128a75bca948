# SPDX-License-Identifier: Apache-2.0
"""The model of examples/nano_fomoe.py as a task of the trainer, and runs of both."""

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe.federation.checkpoint import Checkpoint, find_checkpoint
from fomoe.federation.config import Config
from fomoe.federation.launch import train
from fomoe.federation.parameters import federated_tensors
from fomoe.federation.task import Loss

_NAME = "nano_oracle"  # not nano_fomoe: other tests load that file for themselves
BATCH_SIZES, SEQUENCE_LENGTH = (3, 1, 2, 5), 15
"""Sites see different numbers of tokens, so that the weights of the mean matter."""


def load_nano() -> ModuleType:
    if _NAME not in sys.modules:
        path = Path(__file__).parents[2] / "examples" / "nano_fomoe.py"
        spec = importlib.util.spec_from_file_location(_NAME, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[_NAME] = module
        spec.loader.exec_module(module)
    return sys.modules[_NAME]


nano = load_nano()


def batch(site: int, step: int) -> Tensor:
    """Learnable tokens: a noisy walk over the alphabet, different at every site and step."""
    generator = torch.Generator().manual_seed(1000 * site + step)
    shape = BATCH_SIZES[site % len(BATCH_SIZES)], SEQUENCE_LENGTH + 1
    steps = torch.randint(0, 3, shape, generator=generator)
    return steps.cumsum(dim=1) % 256


class NanoTask:
    def __init__(self, config: Any) -> None:
        self.config = config
        self.num_layers, self.num_experts = config.num_layers, config.num_experts
        self.model_settings: dict[str, Any] = {"nano": True}

    def check(self) -> None:
        pass  # there is no text that could be missing

    def build_model(self, residents: Sequence[Sequence[int]] | None) -> nn.Module:
        resident = None if residents is None else tuple(map(tuple, residents))
        model = nano.Model(self.config, resident).to(self.config.dtype)
        return nano.initialize(model, self.config.seed)

    def batch(self, site: int, step: int) -> Tensor:
        return batch(site, step)

    def data_state(self, site: int) -> dict[str, Any]:
        return {}  # a batch follows from site and step

    def load_data_state(self, states: Sequence[dict[str, Any]]) -> None:
        assert all(state == {} for state in states)

    def loss(self, model: nn.Module, tokens: Tensor) -> Loss:
        logits = model(tokens[:, :-1]).flatten(0, 1)
        language_model = F.cross_entropy(logits, tokens[:, 1:].flatten())
        moes = [m for m in model.modules() if hasattr(m, "auxiliary_loss")]
        return Loss(language_model + sum(m.auxiliary_loss for m in moes), language_model)

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> float:
        return self.loss(model, batch(99, 0)).language_model.item()

    def routing(self, model: nn.Module) -> list[dict[str, Any]]:
        return []


def settings(nano_config: Any, folder: Path, **federation: Any) -> Config:
    """The trainer's settings that mean the same as nano's."""
    strategy = nano_config.strategy
    overlap = nano_config.overlap if strategy == "fomoe" else nano_config.sites
    return Config.from_dict(
        {
            "model": {
                "num_experts": nano_config.num_experts,
                "top_k": 1,
                "router": nano_config.router,
            },
            "federation": {
                "strategy": strategy,
                "sites": nano_config.sites,
                "overlap": overlap,
                "local_steps": nano_config.local_steps,
                "rounds": nano_config.rounds,
                "outer": nano_config.outer,
                "outer_lr": nano_config.outer_lr,
                "outer_momentum": nano_config.outer_momentum,
                "codec": nano_config.codec,
                "router_mean": nano_config.router_mean,
                "scale_expert_steps": nano_config.scale_expert_steps,
                "placement": nano_config.placement,
                "shuffle_every": nano_config.shuffle_every * (nano_config.placement == "random"),
                "full_replica_rounds": nano_config.full_replica_rounds,
                "moved_warmup_steps": nano_config.moved_warmup_steps,
                **federation,
            },
            "optimizer": {
                "name": nano_config.inner,
                "lr": nano_config.lr,
                "warmup_steps": nano_config.warmup,
                "min_lr_ratio": nano_config.min_ratio,
                "clip_norm": nano_config.clip,
            },
            "training": {"threads": 1, "seed": nano_config.seed},
            "run": {"folder": str(folder)},
        }
    )


def train_nano(nano_config: Any) -> Any:
    return nano.train(nano_config, batch)


def train_sites(nano_config: Any, folder: Path, **options: Any) -> Checkpoint:
    train(settings(nano_config, folder), task=NanoTask(nano_config), **options)
    return Checkpoint(find_checkpoint(folder))


def momenta(checkpoint: Checkpoint, nano_config: Any) -> dict[str, Tensor]:
    """The outer momenta by tensor name."""
    prefix, saved = "outer_momentum/", {}
    for site in range(checkpoint.sites):
        state = checkpoint.state(site)
        saved |= {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    return joined_pieces(saved, nano_config)


def joined_pieces(pieces: dict[str, Tensor], nano_config: Any) -> dict[str, Tensor]:
    """By tensor name, put together from all owners' pieces, which together are all or none."""
    result = {}
    for tensor in federated_tensors(nano.Model(nano_config)) if pieces else ():
        parts: list[Tensor] = []
        while sum(part.numel() for part in parts) < tensor.num_elements:
            start = f"{tensor.name}[{sum(part.numel() for part in parts)}:"
            parts.append(next(value for key, value in pieces.items() if key.startswith(start)))
        result[tensor.name] = torch.cat(parts).view(tensor.value.shape)
    return result


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
