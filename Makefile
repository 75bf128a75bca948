# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3

.PHONY: demo test gpu-check gpu-wheels bench-federation bench-generation bench-wan clean

# Set up, install, and train one model over four sites with four strategies.
demo:
	tools/demo.sh

# Set up, install, and run the C++ and Python tests.
test:
	tools/test.sh

# On a machine with a GPU and a CUDA build of torch: build, test and measure the CUDA kernels.
gpu-check:
	$(PYTHON) tools/gpu_check.py

# For a machine with a GPU and no network: what `gpu-check` needs and it may lack.
gpu-wheels:
	$(PYTHON) -m pip download --quiet --dest build/wheels --python-version 3.12 \
	  --only-binary=:all: pydantic typer

# About 12 minutes with 24 GB of memory: the exchange against all-reduce, rounds of the demo's model
# and their memory, a training step against Hugging Face's layer. Nothing else should run meanwhile.
BENCH_RESULTS ?= bench/results
BENCH_ENVIRONMENT = OMP_NUM_THREADS=1
bench-federation:
	mkdir -p $(BENCH_RESULTS)
	$(BENCH_ENVIRONMENT) $(PYTHON) bench/federation/exchange.py --output $(BENCH_RESULTS)/exchange_4-sites.jsonl
	$(BENCH_ENVIRONMENT) $(PYTHON) bench/federation/round.py --output $(BENCH_RESULTS)/round_4-sites.json
	$(BENCH_ENVIRONMENT) $(PYTHON) bench/federation/training_step.py --output $(BENCH_RESULTS)/training-step_1-thread.jsonl

# FoE against an expert-parallel MoE of one shape, over ranks of one machine.
bench-generation:
	mkdir -p $(BENCH_RESULTS)
	$(BENCH_ENVIRONMENT) $(PYTHON) bench/generation/foe_latency.py --output $(BENCH_RESULTS)/foe-latency.jsonl

# As root: sites in network namespaces joined by links of 100 Mbit/s and 20 ms.
bench-wan:
	mkdir -p $(BENCH_RESULTS)
	$(BENCH_ENVIRONMENT) $(PYTHON) bench/wan/run.py --output $(BENCH_RESULTS)/wan_4-sites.json --plot $(BENCH_RESULTS)/wan_4-sites.svg
	$(BENCH_ENVIRONMENT) $(PYTHON) bench/wan/all_to_all.py --output $(BENCH_RESULTS)/all-to-all_slow-links.jsonl
	$(BENCH_ENVIRONMENT) $(PYTHON) bench/generation/foe_latency.py --slow-link --output $(BENCH_RESULTS)/foe-latency_slow-link.jsonl

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
