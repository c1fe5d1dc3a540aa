"""Runs and sweeps for the pages: plans with traces, fixed accuracies, and every way for a run to end.

`PYTHONPATH=tests python -m builders.pages FOLDER 100` writes a sweep of 100 cells to look at; a kind of KINDS in place
of the number writes one run.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from builders.models import keeps_first
from builders.records import L, change_record, config, measured, record_of, write
from slm_exp.core.files import JsonObject, digest, write_text
from slm_exp.core.registry import available
from slm_exp.core.types import Group, LayerSimilarity, MergePlan, Sublayer, Target, Trial
from slm_exp.reporting.page import write_report
from slm_exp.reporting.sweep import write_sweep_report
from slm_exp.runs.sweep import Job, SweepFolder

KINDS = ("finished", "failed", "running", "baseline", "recovered", "bare")
N_DOCS = 20
TASKS = {  # name -> (dense accuracy, compressed accuracy, has acc_norm)
    "boolq": (0.60, 0.55, False),
    "piqa": (0.70, 0.65, True),
    "hellaswag": (0.40, 0.35, True),
    "winogrande": (0.55, 0.50, False),
    "arc_easy": (0.50, 0.40, True),
    "arc_challenge": (0.30, 0.30, True),
    "openbookqa": (0.35, 0.30, True),
}
OVERRIDES = ("method.threshold=0.9", "evaluation.corpora={wikitext2: wikitext2}")
OPEN_WINDOW = ("plan: the window [3, 5) was still open when the search ended and is committed; the released code would "
               "drop it (method.commit_open_window=false).")  # fmt: skip


# ---------------------------------------------------------------------------------------------------- one run


def plan(**changes: Any) -> MergePlan:
    """What the released search does at 0.9, roughly: windows grow downwards until the score falls below."""
    rng = np.random.default_rng(0)
    known = {(27, 28): 0.871, (26, 27): 0.948, (25, 27): 0.921, (24, 27): 0.884}
    trace, high, low = [], 28, 27
    while low >= 0:
        chance = float(0.78 + 0.1 * rng.random())
        score = 0.9053 if (low, high) == (14, 15) else known.get((low, high), chance)
        trace.append(Trial(low, high, score, score > 0.9))
        high, low = (high if score > 0.9 else low), low - 1
    fields: JsonObject = {
        "n_layers": L, "groups": (Group(14, 16), Group(25, 28)), "method": "slm", "rule": "top_layer",
        "similarity": "flat_cosine", "threshold": 0.9, "final_score": 0.9053, "trace": tuple(trace),
        "evaluations": len(trace), "block_forwards": 399,
    }  # fmt: skip
    return MergePlan(**{**fields, **changes})


def plan_of(kind: str) -> MergePlan:
    if kind == "baseline":  # drops layers and sublayers, without a search
        return plan(groups=(), dropped=(20, 21, 25), trace=(), method="shortgpt", rule="", threshold=None,
                    evaluations=0, sublayers=(Sublayer(7, "attention"), Sublayer(9, "mlp")),
                    target=Target(27, True, 27))  # fmt: skip
    if kind == "recovered":  # layers of widths of their own
        heads, channels = [9 - 3 * (i % 2) for i in range(27)], [1536 - 8 * (i % 7) for i in range(27)]
        return plan(width=keeps_first(heads, [3] * 27, channels, hidden=576, method="flap", ratio=0.1, reached=0.0984,
                                      uniform=False))  # fmt: skip
    return plan()


def similarity(kernel: str = "linear", power: float = 1) -> LayerSimilarity:
    """Neighbours are similar; a first layer and a last layer are unlike the rest."""
    at = np.arange(L)
    depth = at + 6 * (at >= 1) + 5 * (at >= 14) + 14 * (at >= 29)
    matrix = np.exp(-np.abs(depth[:, None] - depth[None, :]) / 14).astype("float32")
    return LayerSimilarity(matrix**power, kernel, "unbiased", True, 256)


def page_run(folder: Path, kind: str = "finished") -> Path:
    """A run's folder; `kind` is one of KINDS. Returns the folder."""

    def side(which: int) -> JsonObject:
        """0: the dense model, 1: the compressed one, for the most part right on the same documents."""
        tasks = {}
        for task, (*accuracy, normed) in TASKS.items():
            right = np.zeros(N_DOCS)
            right[: round(accuracy[which] * N_DOCS)] = 1
            tasks[task] = {"acc": np.roll(right, which), **({"acc_norm": np.roll(right, 2 * which)} if normed else {})}
        of_side = folder / "samples" / ("dense", "compressed")[which]
        return measured(of_side, tasks, N_DOCS, wikitext2=(57.31, 81.94)[which])

    merged = plan_of(kind)
    out = record_of(config(*OVERRIDES), merged, {"dense": side(0), "compressed": side(1)}, OVERRIDES,
                    warnings=[OPEN_WINDOW])  # fmt: skip
    for stage in out["stages"]:
        stage["cached"] = stage["name"] in ("similarity", "evaluate_dense")
    if kind == "baseline":
        out["params"]["zeroed"] = 1_327_104
    if kind == "recovered":  # what a training and a refit leave, in one
        out["recovery"] = {
            "examples": {"train": 90, "held_out": 10, "dropped": 0}, "trained_parameters": 1_234_567, "steps": 40,
            "steps_planned": 40, "best_step": 30, "loss": [[10 * i, 3 - 0.4 * i**0.5] for i in range(1, 5)],
            "held_out_loss": [[20, 2.9], [40, 2.7]],
            "layers": [{"layer": 14, "original": [14, 16], "errors": [0.2, 0.11, 0.09]}]}  # fmt: skip
    if kind == "chain":
        out["recovery"] = {"steps": [
            {"name": "reconstruct", "gain": {"before": 4.5, "after": 4.1},
             "layers": [{"layer": 14, "original": [14, 16], "errors": [0.2, 0.09]}]},
            {"name": "lora", "gain": {"before": 4.1, "after": None}, "steps": 40, "loss": [[10, 3.0], [20, 2.9]]}]}
    if kind in ("failed", "running", "bare"):
        out |= {"stages": out["stages"][: 0 if kind == "bare" else 5],
                "status": "running" if kind == "running" else "failed"}  # fmt: skip
        out["eval"]["compressed"] = None
        del out["layers"], out["params"]
        shutil.rmtree(folder / "samples" / "compressed")
    if kind == "failed":
        out["error"] = {"type": "OutOfMemoryError", "stage": "evaluate", "message":
                        "CUDA out of memory. Tried to allocate 2.31 GiB. GPU 0 has a total capacity of 15.77 GiB."}
    if kind == "bare":
        out["error"] = {"type": "ConfigError", "stage": "load", "message":
                        "model.path = /models/llama; expected a folder with config.json. Check the path."}
        out |= {"eval": {"dense": None, "compressed": None}, "device": None, "git": None, "warnings": []}
        del out["plan"], out["model"], out["calibration"]
        shutil.rmtree(folder / "samples")
    else:
        merged.save(folder)
        similarity().save(folder)
    write_text(folder / "config.yaml", "method:\n  name: slm\n  threshold: 0.9\nseed: 0\n")
    return write(folder, out)


# ---------------------------------------------------------------------------------------------------- a sweep

RULES = {"top_layer": 0.0, "sum_of_deltas": -0.02, "mean": 0.015, "keep_low": 0.03, "keep_top": 0.02}
KERNELS = ("linear", "rbf", "laplacian", "angular")
THRESHOLDS = (0.95, 0.9, 0.85, 0.8, 0.75)
STEPS = (0.965, 0.951, 0.932, 0.911, 0.887, 0.871, 0.842, 0.801, 0.775, 0.741, 0.702)
"""Scores of the merges that lower and lower thresholds allow."""


def grown(threshold: float, rule: str) -> MergePlan:
    """Two windows that grow by turns while scores, moved by the rule, pass."""
    scores = [score + RULES[rule] for score in STEPS]
    taken = sum(score > threshold for score in scores)
    sizes = (taken + 1) // 2, taken // 2
    groups = [Group(28 - size, 29) for size in sizes[:1] if size] + [Group(15 - size, 16) for size in sizes[1:] if size]
    return plan(groups=tuple(groups), rule=rule, threshold=threshold, block_forwards=0, evaluations=len(scores),
                trace=tuple(Trial(27 - i, 28, score, score > threshold) for i, score in enumerate(scores)),
                final_score=min((s for s in scores if s > threshold), default=1.0))  # fmt: skip


def make_cell(
    folder: Path, threshold: float, rule: str, kernel: str, n_docs: int = 12, cached: bool = False
) -> Path:
    """One finished run of a sweep, in `folder/<run_id>`; its accuracies fall with every layer that is gone."""
    run_id = digest([threshold, rule, kernel])
    run, merged = folder / run_id, grown(threshold, rule)
    removed = L - merged.n_layers_out

    def side(which: str, gone: int) -> JsonObject:
        rng, tasks = np.random.default_rng(int(run_id[:6], 16) if gone else 0), {}
        for number, (task, (dense, _, normed)) in enumerate(TASKS.items()):
            difficulty = np.random.default_rng(1000 + number).random(n_docs)
            luck = 0.1 * rng.standard_normal(n_docs) * bool(gone)
            right = (difficulty + luck < dense - 0.02 * gone).astype(float)
            tasks[task] = dict.fromkeys(("acc", "acc_norm") if normed else ("acc",), right)
        return measured(run / "samples" / which, tasks, n_docs, wikitext2=57.31 * 1.14**gone)

    base = config(*OVERRIDES)
    parts: Any = {group: available(group)[name]() for group, name in (("merge_rule", rule), ("kernel", kernel))}
    cfg = replace(base, method=replace(base.method, threshold=threshold),
                  evaluation=replace(base.evaluation, limit=n_docs), **parts)  # type: ignore[type-var]  # fmt: skip
    out = record_of(cfg, merged, {"dense": side("dense", 0), "compressed": side("compressed", removed)}, OVERRIDES,
                    run_id=run_id, seconds=40.0 + 3 * removed)  # fmt: skip
    for stage in out["stages"]:
        stage["cached"] = stage["name"] in ("calibrate", "similarity", "evaluate_dense") and cached
    merged.save(run)
    similarity(kernel, 1 + KERNELS.index(kernel) / 2).save(run)
    write_text(run / "run.log", "load done\nplan done\nevaluate done\n")
    return write(run, out)


def make_sweep(folder: Path, runs: int = 100) -> Path:
    """`runs` cells, up to 100, and their definition; of 7 or more the last four failed (twice), died, wait."""
    grid = list(itertools.product(THRESHOLDS, RULES, KERNELS))
    cells = [grid[37 * number % len(grid)] for number in range(runs)]  # of a few, some of each
    jobs = []
    for number, (threshold, rule, kernel) in enumerate(cells):
        overrides = (f"method.threshold={threshold}", f"merge_rule={rule}", f"kernel={kernel}")
        left = runs - number if runs >= 7 else 9
        run = folder / digest([threshold, rule, kernel])
        if left > 1:
            make_cell(folder, threshold, rule, kernel, cached=number > 0)
        if 2 <= left <= 4:
            record = json.loads((run / "record.json").read_text())
            del record["layers"], record["params"]
            failed = {"type": "OutOfMemoryError", "stage": "evaluate", "message": "CUDA out of memory."}
            write(run, record)
            change_record(run, stages=record["stages"][:5], eval=record["eval"] | {"compressed": None},
                          status="running" if left == 2 else "failed", stage="evaluate",
                          error=failed if left > 2 else None)  # fmt: skip
            write_text(run / "run.log", "plan done\nevaluate ...\n<b>CUDA</b> out of memory.\n")
        jobs.append(Job(run.name, overrides, run, " ".join(overrides)))
    SweepFolder(folder, ["method.threshold=" + ",".join(map(str, THRESHOLDS)), "merge_rule=" + ",".join(RULES),
                         "kernel=" + ",".join(KERNELS)], str(folder.resolve().parent), jobs).write()  # fmt: skip
    return folder


if __name__ == "__main__":
    where, what = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "100"
    print(write_report(page_run(where, what)) if what in KINDS else write_sweep_report(make_sweep(where, int(what))))
