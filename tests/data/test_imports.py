# SPDX-License-Identifier: Apache-2.0
"""What importing the data package brings along."""

import subprocess
import sys


def test_nothing_of_the_extra_is_imported_before_it_is_needed():
    code = "import sys, fomoe.data; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "fomoe.data.streams" in loaded.stdout.split()
    assert not {"datasets", "pyarrow", "tokenizers"} & set(loaded.stdout.split())
