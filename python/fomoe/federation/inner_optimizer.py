# SPDX-License-Identifier: Apache-2.0
"""A site's own optimizer: one state per expert, so that experts can come and go.

torch's AdamW counts steps per parameter, and experts share stacked parameters. Here it is given
every expert's rows as tensors of their own: an expert that comes to a site starts with moments and
steps at zero and its own warm-up of the learning rate, and the others go on (FoMoE, "random"
placement; the length of the warm-up is our choice).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fomoe.federation.config import OptimizerConfig
from fomoe.federation.exchange import is_finite
from fomoe.federation.meeting import MOMENTS
from fomoe.federation.memory import tensor_bytes
from fomoe.federation.sharding import copy_part, local, sharded_like
from fomoe.nn import ModelTensor

__all__ = ["InnerOptimizer", "learning_rate_factor"]

_STEP = "step"  # torch's name
_AGE = "age"


class InnerOptimizer:
    """AdamW or SGD over the tensors of a site's model.

    Of tensors that the ranks of the site have in shards, this one steps its own; moments are
    handed out and taken as the tensors are.

    Parameters
    ----------
    tensors : Sequence[ModelTensor]
    settings : OptimizerConfig
    warmup_steps : int
        Of tensors that come to the site (``federation.moved_warmup_steps``).
    """

    def __init__(
        self, tensors: Sequence[ModelTensor], settings: OptimizerConfig, warmup_steps: int = 0
    ) -> None:
        self.settings = settings
        self.warmup_steps = warmup_steps
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.age: dict[str, int] = {}
        """Optimizer steps, by name, of tensors that came to the site and still warm up."""
        self.values = {tensor.name: local(tensor.value) for tensor in tensors}
        self._torch = _torch_optimizer(list(self.values.values()), settings)

    @property
    def learning_rate(self) -> float:
        """Of the last step, without the factor of tensors that warm up."""
        return float(self._torch.param_groups[0]["lr"])

    def step(self, learning_rate: float) -> None:
        """One step with the gradients of the model's parameters."""
        for name, tensor in self.tensors.items():
            gradient = tensor.parameter.grad
            self.values[name].grad = None if gradient is None else local(tensor.of(gradient))
        self._set_learning_rates(learning_rate)
        self._torch.step()
        for value in self.values.values():
            value.grad = None  # or it would keep the model's gradient alive
        self._grow_older()

    def _set_learning_rates(self, learning_rate: float) -> None:
        """Tensors that warm up are in parameter groups of their own, by age."""
        by_age: dict[int, list[Tensor]] = {}
        for name, age in self.age.items():
            by_age.setdefault(age, []).append(self.values[name])
        settled = [value for name, value in self.values.items() if name not in self.age]
        groups = self._torch.param_groups
        settings = {key: value for key, value in groups[0].items() if key not in ("params", "lr")}
        groups[:] = [{**settings, "params": settled, "lr": learning_rate}]
        for age, values in by_age.items():
            factor = min(1.0, (age + 1) / self.warmup_steps)
            groups.append({**settings, "params": values, "lr": learning_rate * factor})

    def _grow_older(self) -> None:
        aged = {name: age + 1 for name, age in self.age.items()}
        self.age = {name: age for name, age in aged.items() if age < self.warmup_steps}

    # ---- state by tensor name ----------------------------------------------------------------

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's moments of what is trained, by kind and tensor name, themselves.

        Zeros where there are none yet.
        """
        names = [name for name, tensor in self.tensors.items() if tensor.is_trained]
        states = {name: self._state_of(name) for name in names}
        return {
            kind: {name: self._seen_as(name, state[kind]) for name, state in states.items()}
            for kind in MOMENTS
        }

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by ``KIND/NAME``: moments, steps, and ages in the warm-up."""
        saved = {f"{_AGE}/{name}": torch.tensor(age) for name, age in self.age.items()}
        for name, value in self.values.items():
            state = self._torch.state.get(value, {})
            if _STEP in state:
                saved[f"{_STEP}/{name}"] = state[_STEP]
            saved |= {f"{k}/{name}": self._seen_as(name, state[k]) for k in MOMENTS if k in state}
        return saved

    def load(self, saved: Iterable[tuple[str, Tensor]]) -> None:
        """Take over entries of a :meth:`state`; tensors without any begin anew.

        Entries of tensors that are not here are passed over.
        """
        for key, value in saved:
            kind, _, name = key.partition("/")
            if name not in self.values:
                continue
            if kind != _AGE:
                part = self._state_of(name)[kind]
                copy_part(part if kind == _STEP else self._seen_as(name, part), value)
            elif value < self.warmup_steps:  # which may have become shorter
                self.age[name] = int(value)

    def warm_up(self, names: Iterable[str]) -> None:
        """These tensors have just come to the site: their learning rate starts low."""
        if self.warmup_steps > 0:
            self.age |= dict.fromkeys(names, 0)

    def not_finite(self) -> list[str]:
        """Names of the tensors whose moments hold a NaN or an infinity."""
        return [
            name
            for name, value in self.values.items()
            if not all(is_finite(tensor) for tensor in self._state_tensors(value))
        ]

    def forget(self, names: Iterable[str]) -> None:
        """Begin anew with the state of those of these tensors that are here."""
        for name in names:
            if name in self.values:
                self._torch.state.pop(self.values[name], None)

    def num_bytes(self) -> int:
        """Of all state."""
        return tensor_bytes(
            tensor for value in self.values.values() for tensor in self._state_tensors(value)
        )

    def _state_tensors(self, value: Tensor) -> list[Tensor]:
        return [x for x in self._torch.state.get(value, {}).values() if isinstance(x, Tensor)]

    def _seen_as(self, name: str, moment: Tensor) -> Tensor:
        return sharded_like(moment, self.tensors[name].value)

    def _state_of(self, name: str) -> dict[str, Any]:
        """AdamW's state of a tensor, made if there is none."""
        value = self.values[name]
        state: dict[str, Any] = self._torch.state[value]
        if _STEP not in state:
            state[_STEP] = torch.tensor(0.0)
            state |= {kind: torch.zeros_like(value) for kind in MOMENTS}
        return state


def learning_rate_factor(step: int, total_steps: int, settings: OptimizerConfig) -> float:
    """Linear warm-up over ``warmup_steps``, then a cosine from 1 down to ``min_lr_ratio``."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * cosine


def _torch_optimizer(values: list[Tensor], settings: OptimizerConfig) -> torch.optim.Optimizer:
    # On the CPU one tensor at a time: the arithmetic of the oracle in examples/nano_fomoe.py, to
    # the bit. On a GPU, where the kernel launches would take longest, many at a time.
    foreach = any(value.is_cuda for value in values)
    if settings.name == "sgd":
        return torch.optim.SGD(
            values, lr=settings.lr, weight_decay=settings.weight_decay, foreach=foreach
        )
    return torch.optim.AdamW(
        values,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        foreach=foreach,
        fused=False,
    )
