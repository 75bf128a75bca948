# SPDX-License-Identifier: Apache-2.0
"""Evaluation of the assembled model: every expert present, nothing skipped.

It runs in a process that is no site and reads the files the sites wrote; the paper leaves open how
it evaluates, this is our choice.
"""

from collections.abc import Iterable
from pathlib import Path

import torch

from fomoe.errors import UserError
from fomoe.federation.checkpoint import read_shards
from fomoe.federation.parameters import federated_tensors
from fomoe.federation.task import Task

__all__ = ["assembled_loss"]


def assembled_loss(task: Task, model_files: Iterable[Path]) -> float:
    """Validation loss (nats per token) of the model whose tensors the files hold together."""
    model = task.build_model(None)
    values = read_shards(model_files)
    with torch.no_grad():
        for tensor in federated_tensors(model):
            if tensor.name not in values:
                raise UserError(f"no site wrote the tensor {tensor.name}")
            tensor.value.copy_(values.pop(tensor.name))
    if values:
        raise UserError(f"the model has no tensor {next(iter(values))}")
    return task.validation_loss(model.eval())
