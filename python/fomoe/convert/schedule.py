# SPDX-License-Identifier: Apache-2.0
"""Learning rate, temperature and order of tokens, the same for every method."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

WARM_UP = 0.2  # of the steps
FIRST_TEMPERATURE = 1.0
LAST_TEMPERATURE = 0.1
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 1e-4


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Of step 0, 1, ...: linear warm-up over a fifth of the steps, then a cosine to 0."""
    warm_up = max(1, round(WARM_UP * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, num_steps - warm_up)))


def temperature(step: int, num_steps: int) -> float:
    """Of step 0, 1, ...: linear from 1 to 0.1 over the warm-up, then 0.1."""
    done = min(1.0, step / max(1, round(WARM_UP * num_steps)))
    return FIRST_TEMPERATURE + done * (LAST_TEMPERATURE - FIRST_TEMPERATURE)


def batches(num_tokens: int, batch_size: int, num_steps: int, seed: int) -> Iterator[Tensor]:
    """Indices (B,) of the tokens of each step: epochs, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, num_tokens)
    rest = torch.empty(0, dtype=torch.int64)
    for _ in range(num_steps):
        while len(rest) < batch_size:
            rest = torch.cat([rest, torch.randperm(num_tokens, generator=generator)])
        yield rest[:batch_size]
        rest = rest[batch_size:]
