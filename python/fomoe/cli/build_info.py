# SPDX-License-Identifier: Apache-2.0
"""`fomoe build-info`: what this installation was built with."""


def build_info() -> None:
    """Print what this installation was built with and what it finds on this machine."""
    from fomoe import show_build

    show_build()
