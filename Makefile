# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3

.PHONY: demo test gpu-check clean

# Set up, install, and train one model over four sites with three strategies.
demo:
	tools/demo.sh

# Set up, install, and run the C++ and Python tests.
test:
	tools/test.sh

# On a machine with a GPU and a CUDA build of torch: build, test and measure the CUDA kernels.
gpu-check:
	$(PYTHON) tools/gpu_check.py

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
