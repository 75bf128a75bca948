# SPDX-License-Identifier: Apache-2.0
"""Which GPU a rank computes on, on a machine that has two, or none."""

import pytest
import torch

from fomoe.errors import UserError
from fomoe.federation.launch.device import use_device


@pytest.mark.parametrize(
    ("device", "place", "chosen"),
    [
        ("cpu", 1, []),
        ("cuda", 0, [0]),
        ("cuda", 3, [1]),  # the fourth rank shares the second GPU
        ("cuda:1", 0, ["cuda:1"]),
    ],
)
def test_a_rank_makes_its_gpu_the_current_one(device, place, chosen, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    use_device(device, place)
    assert current == chosen


@pytest.mark.parametrize(
    ("device", "count", "sentence"),
    [
        ("cuda", 0, "training.device = 'cuda', but torch finds no GPU on this machine"),
        ("cuda:2", 2, "training.device = 'cuda:2', but the GPUs .* numbered from 0 to 1"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(device, count, sentence, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UserError, match=sentence):
        use_device(device, 0)
