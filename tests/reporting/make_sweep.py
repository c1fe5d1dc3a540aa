"""A sweep's folder as a multirun leaves it, made by hand: thresholds x rules x kernels on 30 layers.

`python tests/reporting/make_sweep.py FOLDER [RUNS]` writes one to look at, with a failed, a killed and a waiting cell.
"""

from __future__ import annotations

import copy
import gzip
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from make_run import NORMED, TASKS, L, record, similarity

from slm_exp.core.files import digest, write_json, write_text, writing
from slm_exp.core.types import Group, LayerSimilarity, MergePlan, Trial
from slm_exp.runs.sweep import Job, SweepFolder

N_DOCS = 12
RULES = {"top_layer": 0.0, "sum_of_deltas": -0.02, "mean": 0.015, "keep_low": 0.03, "keep_top": 0.02}
KERNELS = ("linear", "rbf", "laplacian", "angular")
STEPS = (0.965, 0.951, 0.932, 0.911, 0.887, 0.871, 0.842, 0.801, 0.775, 0.741, 0.702)
"""Scores of the merges that lower and lower thresholds allow."""
THRESHOLDS = (0.95, 0.9, 0.85, 0.8, 0.75)


def plan(threshold: float, rule: str) -> MergePlan:
    """Two windows that grow by turns while scores, moved by the rule, pass."""
    scores = [score + RULES[rule] for score in STEPS]
    taken = sum(score > threshold for score in scores)
    trace = [Trial(27 - i, 28, score, score > threshold) for i, score in enumerate(scores)]
    sizes = (taken + 1) // 2, taken // 2
    groups = [Group(28 - size, 29) for size in sizes[:1] if size] + [Group(15 - size, 16) for size in sizes[1:] if size]
    return MergePlan(L, tuple(groups), (), "slm", rule, "flat_cosine", threshold, None,
                     min((s for s in scores if s > threshold), default=1.0), trace=tuple(trace), evaluations=len(trace))


def evaluation(removed: int, seed: int, folder: Path, n_docs: int) -> dict[str, Any]:
    """Accuracies that fall with every layer, and their samples."""
    rng = np.random.default_rng(seed)
    tasks: dict[str, dict[str, Any]] = {}
    for number, (task, (dense, _, normed)) in enumerate(TASKS.items()):
        base = np.random.default_rng(1000 + number).random(n_docs)
        answers = (base + 0.1 * rng.standard_normal(n_docs) * bool(removed) < dense - 0.02 * removed).astype(float)
        columns = {"acc": answers} | ({"acc_norm": answers} if normed else {})
        rows = [{"doc_id": i, "doc_hash": f"{task}{i}", **{k: float(v[i]) for k, v in columns.items()}}
                for i in range(n_docs)]
        with writing(folder / f"{task}.jsonl.gz") as tmp, gzip.GzipFile(tmp, "wb", mtime=0) as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        stderr = float(answers.std(ddof=1) / np.sqrt(n_docs))
        tasks[task] = {"n": n_docs}
        for name in columns:
            tasks[task] |= {name: float(answers.mean()), f"{name}_stderr": stderr}
    average = float(np.mean([s["acc_norm" if t in NORMED else "acc"] for t, s in tasks.items()]))
    protocol = {"hash": "5f0c1d2e3a4b5c6d", "fields": {"limit": n_docs}}
    perplexity = {"wikitext2": 57.31 * 1.14**removed}
    return {"tasks": tasks, "average": average, "perplexity": perplexity, "protocol": protocol}


def matrix(kernel: str) -> LayerSimilarity:
    base = similarity().matrix_LL
    return LayerSimilarity(base ** (1 + KERNELS.index(kernel) / 2), kernel, "unbiased", True, 256)


def make_cell(
    folder: Path, threshold: float, rule: str, kernel: str, n_docs: int = N_DOCS, cached: bool = False
) -> Path:
    """One finished run, in `folder/<run_id>`."""
    run_id = digest([threshold, rule, kernel])
    run = folder / run_id
    the_plan = plan(threshold, rule)
    gone = L - the_plan.n_layers_out
    out = record(the_plan, evaluation(0, 0, run / "samples" / "dense", n_docs),
                 evaluation(gone, int(run_id[:6], 16), run / "samples" / "compressed", n_docs))
    out["config"] = copy.deepcopy(out["config"])
    out["config"]["method"]["threshold"] = threshold
    out["config"]["evaluation"]["limit"] = n_docs
    for group, name in (("merge_rule", rule), ("kernel", kernel)):
        out["config"][group] = {"name": name}
    before = out["params"]["before"]
    out["params"] = {"before": before, "after": before - gone * 3_540_096, "ratio_removed": gone * 3_540_096 / before}
    out |= {"run_id": run_id, "warnings": [], "seconds": 40.0 + 3 * gone}
    for stage in out["stages"]:
        stage["cached"] = stage["name"] in ("calibrate", "similarity", "evaluate_dense") and cached
    the_plan.save(run)
    matrix(kernel).save(run)
    write_json(run / "record.json", out)
    write_text(run / "run.log", "load done\nplan done\nevaluate done\n")
    return run


def make_sweep(folder: Path, runs: int = 100, n_docs: int = N_DOCS) -> Path:
    """`runs` cells, up to 100, and their definition; of 7 or more the last four failed (twice), died, wait."""
    grid = list(itertools.product(THRESHOLDS, RULES, KERNELS))
    cells = [grid[37 * number % len(grid)] for number in range(runs)]  # of a few, some of each
    jobs = []
    for number, (threshold, rule, kernel) in enumerate(cells):
        overrides = (f"method.threshold={threshold}", f"merge_rule={rule}", f"kernel={kernel}")
        left = len(cells) - number if len(cells) >= 7 else 9
        run = folder / digest([threshold, rule, kernel])
        if left > 1:
            make_cell(folder, threshold, rule, kernel, n_docs, cached=number > 0)
        if 2 <= left <= 4:
            told = json.loads((run / "record.json").read_text())
            told["stages"] = told["stages"][:5]
            told["eval"]["compressed"] = None
            told |= {"status": "running" if left == 2 else "failed", "stage": "evaluate"}
            del told["layers"], told["params"]
            if left > 2:
                told["error"] = {"type": "OutOfMemoryError", "stage": "evaluate", "message": "CUDA out of memory."}
            write_json(run / "record.json", told)
            write_text(run / "run.log", "plan done\nevaluate ...\n<b>CUDA</b> out of memory.\n")
        jobs.append(Job(run.name, overrides, run, " ".join(overrides)))
    SweepFolder(folder, ["method.threshold=" + ",".join(map(str, THRESHOLDS)), "merge_rule=" + ",".join(RULES),
                         "kernel=" + ",".join(KERNELS)], str(folder.resolve().parent), jobs).write()
    return folder


if __name__ == "__main__":
    make_sweep(Path(sys.argv[1]), *map(int, sys.argv[2:3]))
