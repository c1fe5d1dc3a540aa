"""Latency asked for and latency measured: the models of runs with `method.target_latency` against the dense one.

    python benchmarks/latency.py RUN... [--rounds 16]
    python benchmarks/latency.py --units [--model smollm2_135m] [--phase decode] [--length 128]

Every run's plan is applied to the real weights; in each round all models have one pass at the run's batch, length and
phase, in changing order, by the same clock as the run's table. Prints for each the target, the table's prediction, the
median that was measured and its quartiles, and the median of the ratios to dense within a round.

With --units no run is needed: a table is measured, and its sums are compared in the same way with whole models (random
weights) that lack attentions, MLPs or channels. Removed sublayers are skipped, with their norms, as an engine would;
widths lie between those of the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slm_exp import apply, load, read_run
from slm_exp.engine.latency import Clock, Model, measure, random_model
from slm_exp.models.base import dtype_name
from slm_exp.search.budget import PHASES, latency_costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--units", action="store_true")
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--phase", default="decode", choices=PHASES)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    (units if args.units else asked)(args)


def asked(args: argparse.Namespace) -> None:
    """Targets of runs against their models."""
    runs = [read_run(folder) for folder in args.runs]
    method: dict[str, Any] = runs[0].record.config["method"]
    budget = runs[0].record.plan.target.budget
    decode = "decode" in budget.what
    study = load(f"model={runs[0].record.config['model']['name']}", "tracking=none", "evaluation=none")
    shape = (method["batch"], method["length"], decode)
    handles = {"dense": study.dense, **{str(run.folder): apply(study, run) for run in runs}}
    clock = Clock(study.dense.device)
    models = {name: Model(handle, handle.model, clock, *shape) for name, handle in handles.items()}
    seconds = in_turns(models, args.rounds)
    print(f"{budget.what}, {clock.kind}, {args.rounds} rounds")
    print("| asked | layers | predicted, ms | measured, ms | quartiles | of dense | predicted of dense | error |")
    print("|---|---:|---:|---:|---|---:|---:|---:|")
    dense = np.array(seconds["dense"])
    print(f"| dense | {study.dense.n_layers} | {1e3 * (budget.dense or 0):.1f} | {_row(dense)} | 1 | 1 | "
          f"{(budget.dense or 0) / np.median(dense) - 1:+.1%} |")
    for run in runs:
        met, took = run.record.plan.target.budget, np.array(seconds[str(run.folder)])
        predicted, wanted = met.reached or 0.0, run.record.config["method"]["target_latency"]
        print(f"| {wanted} | {run.record.layers.after} | {1e3 * predicted:.1f} | {_row(took)} | "
              f"{np.median(took / dense):.3f} | {predicted / (met.dense or 1):.3f} | "
              f"{predicted / np.median(took) - 1:+.1%} |")


def in_turns(models: dict[str, Model], rounds: int) -> dict[str, list[float]]:
    """Seconds of every model in every round, after two that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(rounds + 2):
            order = list(models.items())
            for name, model in order if turn % 2 else reversed(order):
                model.run()
                if turn >= 2:
                    seconds[name].append(model.whole)
    return seconds


def units(args: argparse.Namespace) -> None:
    """Sums of units against whole models that lack some."""
    handle = load(f"model={args.model}", "tracking=none", "evaluation=none").dense
    n, dtype = handle.n_layers, dtype_name(handle.config, "auto")
    table = measure(handle, dtype, 1, args.length, args.phase)
    costs, wide = latency_costs(table), handle.sizes.mlp
    few, some = [*range(2, n, 5)], [*range(1, n, 3)]
    cases = {f"{len(some)} attentions and {len(few)} MLPs skipped": (some, few, 1.0), "MLPs at 0.6": ([], [], 0.6),
             f"MLPs at 0.35, {len(few)} attentions skipped": (few, [], 0.35), "dense": ([], [], 1.0)}
    models, predicted, clock = {}, {}, Clock(handle.device)
    for name, (attentions, mlps, share) in cases.items():
        channels = int(share * wide) // 8 * 8
        model = random_model(handle, range(n), channels, getattr(torch, dtype))
        _skip(handle, model, attentions, mlps)
        models[name] = Model(handle, model, clock, 1, args.length, args.phase == "decode")
        predicted[name] = costs.rest + sum(costs.attention[i] for i in range(n) if i not in attentions) + sum(
            costs.narrow(i, channels / wide) for i in range(n) if i not in mlps)
    seconds = {name: np.array(took) for name, took in in_turns(models, args.rounds).items()}
    print(f"{table.describe()}; {args.phase} at batch 1, length {args.length}, {clock.kind}, {args.rounds} rounds")
    print("| model | predicted, ms | measured, ms | quartiles | of dense | predicted of dense | error of the share |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, took in seconds.items():
        share, foretold = float(np.median(took / seconds["dense"])), predicted[name] / predicted["dense"]
        print(f"| {name} | {1e3 * predicted[name]:.1f} | {_row(took)} | {share:.3f} | {foretold:.3f} | "
              f"{foretold / share - 1:+.1%} |")


def _skip(handle: Any, model: Any, attentions: list[int], mlps: list[int]) -> None:
    """Have a model of the Llama kind pass by some sublayers."""
    for i, layer in enumerate(handle.layout.layers(model)):
        if i in attentions:
            layer.input_layernorm, layer.self_attn.forward = torch.nn.Identity(), lambda *_, **__: (0, None)
        if i in mlps:
            layer.post_attention_layernorm, layer.mlp.forward = torch.nn.Identity(), lambda *_, **__: 0


def _row(seconds: Any) -> str:
    q1, median, q3 = 1e3 * np.quantile(seconds, (0.25, 0.5, 0.75))
    return f"{median:.1f} | {q1:.1f} to {q3:.1f}"


if __name__ == "__main__":
    main()
