# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import pytest
import torch

# Site processes unpickle the tasks of these tests, so they must find their modules by name.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def one_thread():
    """As the sites have: the split of a sum over threads changes its bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
