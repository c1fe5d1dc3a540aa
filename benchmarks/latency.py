"""Latency asked for and latency measured: the models of runs with `method.target_latency` against the dense one.

    python benchmarks/latency.py RUN... [--rounds 16]

Every run's plan is applied to the real weights; in each round all models have one pass at the run's batch, length and
phase, in changing order, by the same clock as the run's table. Prints for each the target, the table's prediction, the
median that was measured and its quartiles, and the median of the ratios to dense within a round.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slm_exp import apply, load, read_run
from slm_exp.engine.latency import Clock, Model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=16)
    args = parser.parse_args()
    runs = [read_run(folder) for folder in args.runs]
    method: dict[str, Any] = runs[0].record.config["method"]
    budget = runs[0].record.plan.target.budget
    decode = "decode" in budget.what
    study = load(f"model={runs[0].record.config['model']['name']}", "tracking=none", "evaluation=none")
    shape = (method["batch"], method["length"], decode)
    handles = {"dense": study.dense, **{str(run.folder): apply(study, run) for run in runs}}
    clock = Clock(study.dense.device)
    models = {name: Model(handle, handle.model, clock, *shape) for name, handle in handles.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(args.rounds + 2):
            order = list(models.items())
            for name, model in order if turn % 2 else reversed(order):
                model.run()
                if turn >= 2:
                    seconds[name].append(model.whole)
    print(f"{budget.what}, {clock.kind}, {args.rounds} rounds")
    print("| asked | layers | predicted, ms | measured, ms | quartiles | of dense | predicted of dense | error |")
    print("|---|---:|---:|---:|---|---:|---:|---:|")
    dense = np.array(seconds["dense"])
    print(f"| dense | {study.dense.n_layers} | {1e3 * (budget.dense or 0):.1f} | {_row(dense)} | 1 | 1 | "
          f"{(budget.dense or 0) / np.median(dense) - 1:+.1%} |")
    for run in runs:
        met, took = run.record.plan.target.budget, np.array(seconds[str(run.folder)])
        predicted, asked = met.reached or 0.0, run.record.config["method"]["target_latency"]
        print(f"| {asked} | {run.record.layers.after} | {1e3 * predicted:.1f} | {_row(took)} | "
              f"{np.median(took / dense):.3f} | {predicted / (met.dense or 1):.3f} | "
              f"{predicted / np.median(took) - 1:+.1%} |")


def _row(seconds: Any) -> str:
    q1, median, q3 = 1e3 * np.quantile(seconds, (0.25, 0.5, 0.75))
    return f"{median:.1f} | {q1:.1f} to {q3:.1f}"


if __name__ == "__main__":
    main()
