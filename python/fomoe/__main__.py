# SPDX-License-Identifier: Apache-2.0
"""``python -m fomoe`` is the command ``fomoe``."""

import sys

from fomoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
