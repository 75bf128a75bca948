# SPDX-License-Identifier: Apache-2.0
"""What the study of conversion leaves open: smaller and evenly used experts, distillation.

    python bench/studies/dense_to_moe_open.py experts RESULTS   # errors of a few layers by size
    python bench/studies/dense_to_moe_open.py loads RESULTS     # by the load an expert may have
    python bench/studies/dense_to_moe_open.py distill RESULTS   # of the study's dot, 50%, seed 0

RESULTS is the folder of dense_to_moe.py, for distill with its assignments; each prints and appends
JSON lines to RESULTS/open.jsonl.
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from dense_to_moe import assignment_file
from dense_to_moe_texts import alignment_text, dense_model, evaluation_texts
from safetensors.torch import load_file

from fomoe.convert.activations import feed_forward_inputs
from fomoe.convert.assemble import assemble, dense_weights
from fomoe.convert.convert import layer_seed
from fomoe.convert.dense import DenseLayer
from fomoe.convert.end_to_end import distill
from fomoe.convert.evaluate import layer_quality, negative_log_likelihood
from fomoe.convert.local_alignment import Training
from fomoe.convert.methods import METHODS, LayerResult, convert_layer
from fomoe.convert.router import RouterWeights
from fomoe.convert.settings import Conversion, converted_config, expert_shape

LAYERS = (6, 12, 20, 25)
SHARES = (0.25, 0.5)
SIZES = (128, 64, 32)
LOADS = (None, 3.0, 2.0, 1.5, 1.2)


def align(arguments: argparse.Namespace, settings: Sequence[Conversion]) -> None:
    """A line for each layer and each of the settings."""
    dense, tokens = dense_model(arguments.results)
    text = alignment_text(arguments, tokens)
    sequences = torch.cat([text.training, text.held_out])
    for layer, inputs in feed_forward_inputs(dense, sequences, list(LAYERS)):
        weights = dense_weights(dense.layers[layer].feed_forward)
        sizes = [text.training.numel(), text.held_out.numel()]
        training, held_out = (DenseLayer(weights, part) for part in inputs.split(sizes))
        for each in settings:
            shape, method = expert_shape(dense.config, each), METHODS[each.method]
            how = Training(steps=64, seed=layer_seed(0, layer), max_load=each.max_load)
            result = convert_layer(method, training, shape.num_experts, shape.top_k, how)
            products = held_out.expert_products(result.expert, shape.num_experts)
            quality = layer_quality(held_out, result, method, shape.top_k, products)
            say(arguments, {
                "what": arguments.command, "layer": layer, "size": each.expert_size,
                "share": each.active_share, "method": each.method, "max_load": each.max_load,
                "error": quality.error, "usage_entropy": quality.usage_entropy,
                "dead": quality.dead_experts, "always_on": quality.always_on_experts,
                "largest_load": max(quality.usage) * shape.num_experts / shape.top_k,
            })  # fmt: skip


def experts(arguments: argparse.Namespace) -> None:
    align(arguments, [
        Conversion(method=method, active_share=share, expert_size=size)
        for size, share, method in itertools.product(SIZES, SHARES, ("dot", "tiers"))
    ])  # fmt: skip


def loads(arguments: argparse.Namespace) -> None:
    align(arguments, [
        Conversion(method=method, active_share=share, max_load=max_load)
        for share, max_load, method in itertools.product(SHARES, LOADS, ("dot", "tiers"))
    ])  # fmt: skip


def distill_dot(arguments: argparse.Namespace) -> None:
    dense, tokens = dense_model(arguments.results)
    text = alignment_text(arguments, tokens)
    settings = Conversion(method="dot", active_share=0.5, distill_steps=arguments.steps)
    shape = expert_shape(dense.config, settings)
    results = {}
    for layer in range(dense.config.num_layers):
        tensors = load_file(assignment_file(arguments.results, (layer, "dot", 0.5, 0)))
        results[layer] = LayerResult(tensors.pop("expert"), RouterWeights(**tensors))
    divergences: list[float] = []
    begin = time.perf_counter()
    trained = distill(
        dense, results, shape.top_k, METHODS["dot"], text.training, settings,
        lambda step: divergences.append(step.kl),
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    moved = sum(int((trained[i].expert != results[i].expert).sum()) for i in results)
    texts = evaluation_texts(tokens, 4)
    for what, assignment in (("before", results), ("after", trained)):
        model = assemble(dense, converted_config(dense.config, settings), assignment)
        losses = {
            name: float(negative_log_likelihood(model, ids).mean()) for name, ids in texts.items()
        }
        say(arguments, {
            "what": f"{what} distillation", "steps": arguments.steps, "losses": losses,
            "mean_loss": sum(losses.values()) / len(losses), "kl_first": divergences[0],
            "kl_last": sum(divergences[-4:]) / 4, "neurons_moved": moved,
            "seconds": round(seconds),
        })  # fmt: skip


def say(arguments: argparse.Namespace, line: dict) -> None:
    print(line, flush=True)
    with (arguments.results / "open.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["experts", "loads", "distill"])
    parser.add_argument("results", type=Path)
    parser.add_argument("--steps", type=int, default=16, help="of distillation, 1,024 tokens each")
    arguments = parser.parse_args()
    arguments.tokens, arguments.held_out_tokens = 45056, 4096
    torch.set_num_threads(1)
    {"experts": experts, "loads": loads, "distill": distill_dot}[arguments.command](arguments)


if __name__ == "__main__":
    main()
