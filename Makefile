# SPDX-License-Identifier: Apache-2.0
.PHONY: demo test clean

# Set up, install, and train one model over four sites with three strategies.
demo:
	tools/demo.sh

# Set up, install, and run the C++ and Python tests.
test:
	tools/test.sh

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
