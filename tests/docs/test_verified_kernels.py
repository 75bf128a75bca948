# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel has a row in the table "verified on hardware"."""

import re

from pages import DOCS, ROOT, section

KERNELS = ROOT / "csrc/kernels"


def kernels_in_sources() -> set[tuple[str, str]]:
    """File and name of every __global__ function."""
    found = set()
    for path in sorted(KERNELS.rglob("*.cu*")):
        text = path.read_text()
        names = re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", text)
        assert len(names) == len(re.findall(r"\b__global__\b", text)), f"{path}: unnamed kernel"
        found |= {(str(path.relative_to(KERNELS)), name) for name in names}
    return found


def rows() -> list[list[str]]:
    text = section(DOCS / "benchmarks.md", "Verified on hardware")
    lines = [line for line in text.splitlines() if re.match(r"\| `[^`]+\.cuh?` \|", line)]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def test_every_kernel_has_one_row_and_no_row_is_of_a_kernel_that_is_gone():
    listed = [(row[0], row[1]) for row in rows()]
    assert len(listed) == len(set(listed))
    assert set(listed) == kernels_in_sources()


def test_a_row_that_claims_a_run_names_date_card_and_commit():
    for _, kernel, date, card, commit, correctness, speed in rows():
        if (correctness, speed) == ("not yet run", "not yet run"):
            assert (date, card, commit) == ("-", "-", "-"), kernel
        else:
            assert re.fullmatch(r"\d{4}-\d\d-\d\d", date), kernel
            assert card not in ("", "-"), kernel
            assert re.fullmatch(r"[0-9a-f]{7,40}", commit), kernel
