"""A run's folder as the pipeline leaves it, made by hand: 30 layers, two merged groups, seven tasks.

`python tests/reporting/make_run.py FOLDER [finished|failed|running|baseline|recovered|bare]` writes one to look at.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from slm_exp.core.files import write_json, write_text, writing
from slm_exp.core.types import Group, LayerSimilarity, MergePlan, Sublayer, Target, Trial
from slm_exp.core.widths import WidthDecision, pack_indices

L, N_DOCS = 30, 20
TASKS = {  # name -> (dense accuracy, compressed accuracy, has acc_norm)
    "boolq": (0.60, 0.55, False),
    "piqa": (0.70, 0.65, True),
    "hellaswag": (0.40, 0.35, True),
    "winogrande": (0.55, 0.50, False),
    "arc_easy": (0.50, 0.40, True),
    "arc_challenge": (0.30, 0.30, True),
    "openbookqa": (0.35, 0.30, True),
}
NORMED = ("hellaswag", "arc_challenge", "openbookqa")
NOTE = "SmolLM2-135M-Instruct, dequantised from Q4_1: not the published bf16 weights."
CONFIG = {
    "model": {"name": "smollm2_135m", "path": "", "revision": None, "dtype": "float32", "device": None},
    "calibration": {"name": "bundled", "n_samples": 10, "seq_len": 128, "seed": None, "add_bos": False},
    "kernel": {"name": "linear"},
    "similarity": {"name": "flat_cosine", "estimator": "unbiased", "batch": 256, "skip_first_token": True},
    "method": {"name": "slm", "threshold": 0.9, "target_layers": None, "target_ratio": None, "protect_last": 1},
    "merge_rule": {"name": "top_layer"},
    "width": {"name": "none"},
    "recovery": {"name": "none"},
    "evaluation": {"name": "custom", "tasks": list(TASKS), "limit": N_DOCS, "corpora": {"wikitext2": "wiki.txt"}},
    "tracking": {"name": "wandb", "project": "slm_exp", "mode": "offline"},
    "runtime": {"name": "auto", "device": "auto", "threads": None},
    "seed": 0,
    "save_model": True,
}


def plan(**changes: Any) -> MergePlan:
    """What the released search does at 0.9, roughly: windows grow downwards until the score falls below."""
    rng = np.random.default_rng(0)
    trace, high, low = [], 28, 27
    accepted_windows = {(27, 28): 0.871, (26, 27): 0.948, (25, 27): 0.921, (24, 27): 0.884}
    for _ in range(28):
        score = accepted_windows.get((low, high), float(0.78 + 0.1 * rng.random()))
        if (low, high) == (14, 15):
            score = 0.9053
        good = score > 0.9
        trace.append(Trial(low, high, score, good))
        if good:
            low -= 1
        else:
            high = low
            low -= 1
        if low < 0:
            break
    fields: dict[str, Any] = {
        "n_layers": L, "groups": (Group(14, 16), Group(25, 28)), "method": "slm", "rule": "top_layer",
        "similarity": "flat_cosine", "threshold": 0.9, "final_score": 0.9053, "trace": tuple(trace),
        "evaluations": len(trace), "block_forwards": 399,
    }
    return MergePlan(**{**fields, **changes})


def similarity() -> LayerSimilarity:
    """Neighbours alike, a first layer and a last layer unlike the rest."""
    at = np.arange(L)
    depth = at + 6 * (at >= 1) + 5 * (at >= 14) + 14 * (at >= 29)
    matrix = np.exp(-np.abs(depth[:, None] - depth[None, :]) / 14)
    return LayerSimilarity(matrix.astype("float32"), "linear", "unbiased", True, 256)


def evaluation(which: int, folder: Path) -> dict[str, Any]:
    """0: the dense model, 1: the compressed one, for the most part right on the same documents. Writes the samples."""
    tasks: dict[str, dict[str, Any]] = {}
    for task, (*accuracy, normed) in TASKS.items():
        answers = np.zeros(N_DOCS)
        answers[: round(accuracy[which] * N_DOCS)] = 1
        columns = {"acc": np.roll(answers, which)}
        if normed:
            columns["acc_norm"] = np.roll(answers, 2 * which)
        rows = [{"doc_id": i, "doc_hash": f"{task}{i}", "target": 0, **{k: float(v[i]) for k, v in columns.items()}}
                for i in range(N_DOCS)]
        with writing(folder / f"{task}.jsonl.gz") as tmp, gzip.open(tmp, "wt") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        tasks[task] = {"n": N_DOCS}
        for name, column in columns.items():
            stderr = column.std(ddof=1) / np.sqrt(N_DOCS)
            tasks[task] |= {name: float(column.mean()), f"{name}_stderr": float(stderr)}
    average = float(np.mean([s["acc_norm" if t in NORMED else "acc"] for t, s in tasks.items()]))
    protocol = {"hash": "5f0c1d2e3a4b5c6d", "fields": {"limit": N_DOCS, "tasks": list(TASKS), "lm_eval": "0.4.13"}}
    perplexity = {"wikitext2": (57.31, 81.94)[which]}
    return {"tasks": tasks, "average": average, "perplexity": perplexity, "protocol": protocol}


def record(the_plan: MergePlan, dense: dict[str, Any], compressed: dict[str, Any]) -> dict[str, Any]:
    """The finished record."""
    seconds = {"load": 2.13, "calibrate": 0.31, "similarity": 3.92, "evaluate_dense": 61.04, "plan": 25.6,
               "merge": 0.02, "width": 0.0, "recover": 0.0, "evaluate": 55.7, "save": 9.8}
    cached = ("similarity", "evaluate_dense")
    before, removed = 134_515_008, 3 * 3_540_096
    return {
        "run_id": "3f9c2a71d04be586",
        "status": "finished",
        "group": None,
        "command": "python -m slm_exp method.threshold=0.9 'evaluation.corpora={wikitext2: wiki.txt}'",
        "overrides": ["method.threshold=0.9", "evaluation.corpora={wikitext2: wiki.txt}"],
        "config": CONFIG,
        "versions": {"slm_exp": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0",
                     "lm_eval": "0.4.13", "datasets": "5.0.1", "peft": None, "wandb": "0.31.0"},
        "device": {"type": "cpu", "name": "x86_64", "threads": 2, "cpus": 2},
        "git": {"commit": "c0ffee5eed" * 4, "dirty": True},
        "created": "2026-11-23T00:20:11+00:00",
        "seconds": 158.52,
        "stages": [{"name": n, "seconds": s, "cached": n in cached} for n, s in seconds.items()],
        "warnings": ["plan: the window [3, 5) was still open when the search ended and is committed; "
                     "the released code would drop it (method.commit_open_window=false)."],
        "model": {"name": "smollm2_135m", "note": NOTE, "digest": "9d1b7e0c55aa4433"},
        "calibration": {"source": "bundled", "sample_ids": [f"coqa-{i}" for i in range(10)],
                        "digest": "77aa10b2c3d4e5f6", "shape": [10, 128]},
        "layers": {"before": L, "after": the_plan.n_layers_out},
        "params": {"before": before, "after": before - removed, "ratio_removed": removed / before},
        "plan": the_plan.to_json(),
        "eval": {"dense": dense, "compressed": compressed},
        "error": None,
    }


def baseline() -> MergePlan:
    """A plan that drops layers and sublayers, without a search."""
    return plan(groups=(), dropped=(20, 21, 25), trace=(), method="shortgpt", rule="", threshold=None, evaluations=0,
                sublayers=(Sublayer(7, "attention"), Sublayer(9, "mlp")),
                target=Target(27, True, 27))


def narrowed() -> MergePlan:
    """Layers of widths of their own."""
    heads, channels = [9 - 3 * (i % 2) for i in range(27)], [1536 - 8 * (i % 7) for i in range(27)]
    return plan(width=WidthDecision.from_json({
        "method": "flap", "ratio": 0.1, "reached": 0.0984, "uniform": False,
        "sizes": {"heads": heads, "kv_heads": [3] * 27, "channels": channels, "hidden": 576},
        "kept": {"query_heads": [[*range(n)] for n in heads], "kv_heads": [[0, 1, 2]] * 27,
                 "channels": [pack_indices(range(n), 1536) for n in channels]},
    }))


def recovery() -> dict[str, Any]:
    """What a training and a refit leave, in one."""
    return {"examples": {"train": 90, "held_out": 10, "dropped": 0}, "trained_parameters": 1_234_567, "steps": 40,
            "steps_planned": 40, "best_step": 30, "loss": [[10 * i, 3 - 0.4 * i**0.5] for i in range(1, 5)],
            "held_out_loss": [[20, 2.9], [40, 2.7]],
            "layers": [{"layer": 14, "original": [14, 16], "errors": [0.2, 0.11, 0.09]}]}


def make_run(folder: Path, kind: str = "finished") -> Path:
    """Write a run's folder; `kind` as in the module's docstring. Returns the folder."""
    the_plan = baseline() if kind == "baseline" else narrowed() if kind == "recovered" else plan()
    out = record(the_plan, *(evaluation(i, folder / "samples" / w) for i, w in enumerate(("dense", "compressed"))))
    if kind == "baseline":
        out["params"]["zeroed"] = 1_327_104
    if kind == "recovered":
        out["recovery"] = recovery()
    if kind in ("failed", "running", "bare"):
        out["stages"] = out["stages"][: 0 if kind == "bare" else 5]
        out["status"] = "running" if kind == "running" else "failed"
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
        the_plan.save(folder)
        similarity().save(folder)
    write_json(folder / "record.json", out)
    write_text(folder / "config.yaml", "method:\n  name: slm\n  threshold: 0.9\nseed: 0\n")
    return folder


if __name__ == "__main__":
    make_run(Path(sys.argv[1]), *sys.argv[2:3])
