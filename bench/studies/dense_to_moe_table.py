# SPDX-License-Identifier: Apache-2.0
"""Tables and pass criteria of dense_to_moe.py, from the lines of its result files."""

import math
import statistics

BASELINES = ("random", "weight-cluster", "activation-cluster", "core", "tiers", "prune")
MAX_ERROR_RATIO = 0.95
MIN_WON_SHARE = 0.8  # 24 of 30 layers
MIN_LOSS_GAIN = 0.1  # nats below prune, at half of the neurons


def print_all(layers: list[dict], models: list[dict], speeds: list[dict]) -> int:
    """Print everything; 1 if a criterion does not hold or there is none to judge, else 0."""
    print_layers(layers)
    print_models(models)
    print_speeds(speeds)
    verdicts = [*error_verdicts(layers), *loss_verdicts(models)]
    print("\n| criterion | measured | holds |\n|---|---|---|")
    for name, measured, holds in verdicts:
        print(f"| {name} | {measured} | {'yes' if holds else 'no'} |")
    return 0 if verdicts and all(holds for *_, holds in verdicts) else 1


def print_layers(lines: list[dict]) -> None:
    print("| share | method | local error by seed | usage entropy | dead | always on | CPU s |")
    print("|---|---|---|---|---|---|---|")
    for share, method in ordered(lines):
        chosen = [x for x in lines if (x["share"], x["method"]) == (share, method)]
        errors = ", ".join(f"{e:.4f}" for e in mean_errors(chosen).values())
        entropy, dead, always_on, seconds = (
            statistics.fmean(line[key] for line in chosen)
            for key in ("usage_entropy", "dead", "always_on", "cpu_seconds")
        )
        print(
            f"| {share:g} | {method} | {errors} | {entropy:.2f} | {dead:.1f} | {always_on:.1f} "
            f"| {seconds:.1f} |"
        )


def print_models(lines: list[dict]) -> None:
    texts = list(lines[0]["losses"]) if lines else []
    print(f"\n| share | method | tuned | active | {' | '.join(texts)} | mean loss by seed |")
    print("|" + "---|" * (5 + len(texts)))
    rows = sorted({(x["share"], x["tuned"], x["method"]) for x in lines}, reverse=True)
    for share, tuned, method in rows:
        chosen = [
            x for x in lines if (x["share"], x["tuned"], x["method"]) == (share, tuned, method)
        ]
        perplexities = [
            f"{math.exp(statistics.fmean(x['losses'][text] for x in chosen)):.1f}" for text in texts
        ]
        losses = ", ".join(f"{x['mean_loss']:.3f}" for x in sorted(chosen, key=lambda x: x["seed"]))
        active = chosen[0]["active_parameters"] / 1e6
        print(
            f"| {share:g} | {method} | {tuned} | {active:.1f} M | {' | '.join(perplexities)} "
            f"| {losses} |"
        )


def print_speeds(lines: list[dict]) -> None:
    print("\n| what | share | tokens | dense tokens/s | converted tokens/s | times faster |")
    print("|---|---|---|---|---|---|")
    for line in lines:
        rates = line["tokens_per_second"]
        low, high = line["speedup_quartiles"]
        print(
            f"| {line['what']} | {line['share']:g} | {line['tokens']} | {rates['dense']} "
            f"| {rates['converted']} | {line['speedup']:.2f} ({low:.2f} to {high:.2f}) |"
        )


def error_verdicts(lines: list[dict]) -> list[tuple[str, str, bool]]:
    """dot against the baseline with the lowest mean error, for each share and seed."""
    verdicts = []
    for share in sorted({line["share"] for line in lines}):
        for seed in sorted({line["seed"] for line in lines if line["method"] == "dot"}):
            errors = {
                method: by_layer(lines, share, method, seed) for method in ("dot", *BASELINES)
            }
            errors = {method: found for method, found in errors.items() if found}
            if "dot" not in errors or len(errors) < 2:
                continue
            common = set.intersection(*map(set, errors.values()))  # of a run that is not done
            errors = {m: {layer: found[layer] for layer in common} for m, found in errors.items()}
            means = {method: statistics.fmean(found.values()) for method, found in errors.items()}
            best = min((m for m in means if m != "dot"), key=means.__getitem__)
            ratio = means["dot"] / means[best]
            won = sum(errors["dot"][layer] < error for layer, error in errors[best].items())
            num_layers = len(errors["dot"])
            of_each = sum(
                error < min(errors[m][layer] for m in errors if m != "dot")
                for layer, error in errors["dot"].items()
            )
            name = f"local error at {share:g}, seed {seed}, against {best}"
            verdicts.append((
                f"{name}: at most {MAX_ERROR_RATIO}x", f"{ratio:.3f}x", ratio <= MAX_ERROR_RATIO
            ))  # fmt: skip
            verdicts.append((
                f"{name}: lower in {MIN_WON_SHARE:.0%} of layers",
                f"{won} of {num_layers} ({of_each} against the best of each layer)",
                won >= MIN_WON_SHARE * num_layers,
            ))  # fmt: skip
    return verdicts


def loss_verdicts(lines: list[dict]) -> list[tuple[str, str, bool]]:
    """dot against prune at half of the neurons, before tuning, over the seeds."""
    losses = {
        method: [
            line["mean_loss"]
            for line in lines
            if (line["method"], line["share"], line["tuned"]) == (method, 0.5, 0)
        ]
        for method in ("dot", "prune")
    }
    if not losses["prune"] or len(losses["dot"]) < 2:
        return []
    gain = losses["prune"][0] - statistics.fmean(losses["dot"])
    error = statistics.stdev(losses["dot"]) / math.sqrt(len(losses["dot"]))
    return [(
        f"mean loss at 0.5 at least {MIN_LOSS_GAIN} below prune, by 2 standard errors",
        f"{gain:.3f} +- {error:.3f}",
        gain >= MIN_LOSS_GAIN and gain > 2 * error,
    )]  # fmt: skip


def by_layer(lines: list[dict], share: float, method: str, seed: int) -> dict[int, float]:
    """Errors of one run by layer; prune has one seed for all."""
    return {
        line["layer"]: line["error"]
        for line in lines
        if (line["share"], line["method"]) == (share, method)
        and (line["seed"] == seed or method == "prune")
    }


def mean_errors(lines: list[dict]) -> dict[int, float]:
    """Mean over the layers, by seed."""
    return {
        seed: statistics.fmean(line["error"] for line in lines if line["seed"] == seed)
        for seed in sorted({line["seed"] for line in lines})
    }


def ordered(lines: list[dict]) -> list[tuple[float, str]]:
    """Shares from the largest, and methods from the smallest error."""
    keys = {(line["share"], line["method"]) for line in lines}

    def rank(key: tuple[float, str]) -> tuple[float, float]:
        chosen = [line for line in lines if (line["share"], line["method"]) == key]
        return -key[0], statistics.fmean(mean_errors(chosen).values())

    return sorted(keys, key=rank)
