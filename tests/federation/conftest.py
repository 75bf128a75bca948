# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

# Site processes unpickle the tasks of these tests, so they must find their modules by name.
sys.path.insert(0, str(Path(__file__).parent))
