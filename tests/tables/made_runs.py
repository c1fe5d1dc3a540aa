"""Folders of finished runs as the pipeline leaves them, without the minutes: composed config, made-up answers."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slm_exp import __version__
from slm_exp.core.files import write_json, writing
from slm_exp.evaluation.base import SEVEN
from slm_exp.evaluation.protocol import Protocol
from slm_exp.launch.compose import compose_run

SIZE = (134_515_008, 3_540_096)
"""Parameters of SmolLM2 and of a layer of it."""


def answers(skill: float, n: int, task: str, luck: int = 0) -> np.ndarray:
    """Zeros and ones: document i is right where its difficulty, the same for all models, is below `skill`."""
    rng = np.random.default_rng(zlib.crc32(task.encode()))
    noise = np.random.default_rng([luck, zlib.crc32(task.encode())]).normal(0, 0.02, n)
    return (rng.random(n) + noise < skill).astype(float)


def side(folder: Path, skill: float, n: int, limit: int | None, luck: int = 0) -> dict[str, Any]:
    """The seven tasks of one model: writes the samples, returns the record's side."""
    tasks: dict[str, Any] = {}
    for task, metric in SEVEN.items():
        right = answers(skill, n, task, luck)
        rows = [{"doc_id": i, "doc_hash": f"{task}{i}", "target": 0, "acc": float(r)} for i, r in enumerate(right)]
        if metric == "acc_norm":
            rows = [row | {"acc_norm": row["acc"]} for row in rows]
        with writing(folder / f"{task}.jsonl.gz") as tmp, gzip.open(tmp, "wt") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        stderr = float(right.std(ddof=1) / np.sqrt(n))
        tasks[task] = {m: float(right.mean()) for m in {"acc", metric}} | {f"{m}_stderr": stderr
                                                                        for m in {"acc", metric}} | {"n": n}
    mean = sum(tasks[task][metric] for task, metric in SEVEN.items()) / 7
    return {"tasks": tasks, "average": mean, "perplexity": {},
            "protocol": Protocol.of({"limit": limit, "lm_eval": "0.4.13", "documents": n}).to_json()}


def make_run(root: Path, overrides: Sequence[str], skill: float = 0.5, n: int = 60, luck: int = 0,
             **changes: Any) -> Path:
    """Write `root/<run_id>/` of a finished run; `changes` replace sections of its record. Returns the folder."""
    cfg = compose_run(overrides)
    folder = root / cfg.run_id
    before, layer = SIZE
    left = cfg.method.target_layers or 27
    limit = cfg.evaluation.limit
    evaluation: Mapping[str, Any] = {
        "dense": side(folder / "samples" / "dense", 0.7, n, limit),
        "compressed": side(folder / "samples" / "compressed", skill, n, limit, luck),
    }
    write_json(folder / "record.json", {
        "run_id": cfg.run_id, "status": "finished", "overrides": list(overrides), "config": cfg.resolved(),
        "versions": {"slm_exp": __version__}, "created": "2026-11-25T18:00:00+00:00", "seconds": 100.0 + left,
        "layers": {"before": 30, "after": left},
        "params": {"before": before, "after": before - (30 - left) * layer,
                   "ratio_removed": (30 - left) * layer / before},
        "plan": {"n_layers": 30, "groups": [[14, 16]], "dropped": [], "method": cfg.method.name,
                 "rule": cfg.merge_rule.name, "threshold": cfg.method.threshold, "final_score": 0.91,
                 "evaluations": 28, "block_forwards": 399},
        "model": {"name": cfg.model.name, "note": ""}, "eval": evaluation, "error": None, **changes,
    })
    return folder
