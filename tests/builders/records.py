"""Folders of runs as the pipeline leaves them, without the minutes: a real config, made-up plans and answers.

What a record holds is checked against its schema: a field that this version does not write is an error here.
"""

from __future__ import annotations

import gzip
import json
import shlex
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from slm_exp import __version__
from slm_exp.core.errors import require
from slm_exp.core.files import JsonObject, digest, write_json, writing
from slm_exp.core.types import Group, MergePlan
from slm_exp.evaluation.base import SEVEN
from slm_exp.evaluation.protocol import Protocol
from slm_exp.launch.compose import compose_run
from slm_exp.models.smollm2_135m import SmolLM2
from slm_exp.pipeline.config import RunConfig
from slm_exp.runs.schema import Record

L = 30
SIZE, LAYER = 134_515_008, 3_540_096
"""Parameters of SmolLM2 and of a layer of it."""
OPTIONS = {"boolq": 2, "piqa": 2, "winogrande": 2}
"""Of a task's documents; others have four."""
CHUNKS = 32
"""Of a text."""
SECONDS = {"load": 2.13, "calibrate": 0.31, "similarity": 3.92, "evaluate_dense": 61.04, "plan": 25.6, "merge": 0.02,
           "width": 0.0, "recover": 0.0, "evaluate": 55.7, "save": 9.8}  # fmt: skip


@cache
def config(*overrides: str) -> RunConfig:
    """Composed and checked as for a run; one object for all that ask for it."""
    return compose_run(overrides)


def answers(skill: float, n: int, task: str, luck: int = 0) -> np.ndarray:
    """Zeros and ones: document i is right where its difficulty, the same for all models, is below `skill`."""
    rng = np.random.default_rng(zlib.crc32(task.encode()))
    noise = np.random.default_rng([luck, zlib.crc32(task.encode())]).normal(0, 0.02, n)
    return (rng.random(n) + noise < skill).astype(float)


def write_samples(folder: Path, name: str, rows: Sequence[JsonObject]) -> None:
    """A file of `samples/<which>`."""
    with writing(folder / f"{name}.jsonl.gz") as tmp, gzip.GzipFile(tmp, "wb", mtime=0) as f:
        f.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def chunk_losses(corpus: str, perplexity: float, n: int = CHUNKS) -> np.ndarray:
    """Of a text's chunks, hard and easy ones the same for all models, whose perplexity is exactly that."""
    hard = np.random.default_rng(zlib.crc32(corpus.encode())).normal(0, 0.5, n)
    own = np.random.default_rng(round(1e4 * perplexity)).normal(0, 0.05, n)
    return np.log(perplexity) + hard - hard.mean() + own - own.mean()


def measured(
    folder: Path, tasks: Mapping[str, Mapping[str, np.ndarray]], limit: int | None, **perplexity: float
) -> JsonObject:
    """One model's side of the record's `eval`, and its samples in `folder`.

    Args:
        tasks: {task: {metric: a value for each document}}.
    """
    scores: JsonObject = {}
    for task, columns in tasks.items():
        (n,) = {len(column) for column in columns.values()}
        write_samples(folder, task, [
            {"doc_id": i, "doc_hash": f"{task}{i}", "target": 0, "loglikelihoods": [0.0] * OPTIONS.get(task, 4),
             **{m: float(c[i]) for m, c in columns.items()}} for i in range(n)])
        scores[task] = {"n": n}
        for metric, column in columns.items():
            stderr = float(column.std(ddof=1) / np.sqrt(n))
            scores[task] |= {metric: float(column.mean()), f"{metric}_stderr": stderr}
    for corpus, value in perplexity.items():
        write_samples(folder, f"perplexity-{corpus}", [
            {"doc_id": i, "doc_hash": f"{corpus}{i}", "nll": float(loss)}
            for i, loss in enumerate(chunk_losses(corpus, value))])
    average = float(np.mean([scores[task][metric] for task, metric in SEVEN.items()]))
    protocol = Protocol.of({"limit": limit, "lm_eval": "0.4.13", "documents": n}).to_json()
    return {"tasks": scores, "average": average, "perplexity": perplexity, "protocol": protocol}


def record_of(
    cfg: RunConfig, plan: MergePlan, evaluation: JsonObject, overrides: Sequence[str] = (), **changes: Any
) -> JsonObject:
    """The record of a finished run of SmolLM2; `changes` replace sections."""
    removed = (L - plan.n_layers_out) * LAYER
    record = {
        "run_id": cfg.run_id, "status": "finished", "group": None,
        "command": shlex.join(["python", "-m", "slm_exp", *overrides]), "overrides": list(overrides),
        "config": cfg.resolved(), "versions": {"slm_exp": __version__, "torch": "2.13.0", "peft": None},
        "device": {"type": "cpu", "name": "x86_64", "threads": 2, "cpus": 2},
        "git": {"commit": "c0ffee5eed" * 4, "dirty": True}, "created": "2026-11-23T00:20:11+00:00",
        "seconds": sum(SECONDS.values()), "warnings": [], "error": None,
        "stages": [{"name": name, "seconds": s, "cached": False} for name, s in SECONDS.items()],
        "model": {"name": cfg.model.name, "note": SmolLM2.note, "digest": digest(cfg.model.identity())},
        "calibration": {"source": "bundled", "sample_ids": [f"coqa-{i}" for i in range(10)],
                        "digest": digest(cfg.calibration.identity()), "shape": [10, 128]},
        "layers": {"before": L, "after": plan.n_layers_out},
        "params": {"before": SIZE, "after": SIZE - removed, "ratio_removed": removed / SIZE, "zeroed": 0},
        "plan": plan.to_json(), "eval": evaluation, **changes,
    }  # fmt: skip
    unknown = Record.of(record).model_extra
    require(not unknown, "record", sorted(unknown or ()), "fields of runs/schema.py")
    return json.loads(json.dumps(record))


def write(folder: Path, record: JsonObject) -> Path:
    write_json(folder / "record.json", record)
    return folder


def change_record(folder: Path, **sections: Any) -> None:
    """Replace sections of a record on disk."""
    path = folder / "record.json"
    write_json(path, json.loads(path.read_text()) | sections)


def make_run(
    root: Path, overrides: Sequence[str], skill: float = 0.5, n: int = 60, luck: int = 0,
    ratio: float | None = None, **changes: Any
) -> Path:
    """`root/<run_id>` of a finished run of these overrides, without a trace, with answers at two skills.

    Args:
        ratio: of the perplexities of a text `news`, the dense model's 30; None measures no text.
        changes: replace sections of its record.
    Returns the folder.
    """
    cfg = config(*overrides)
    folder = root / cfg.run_id
    removed = L - (cfg.method.target_layers or 27)
    evaluation = {
        side: measured(folder / "samples" / side, {
            task: dict.fromkeys(dict.fromkeys(("acc", metric)), answers(of_side, n, task, of_luck))
            for task, metric in SEVEN.items()}, cfg.evaluation.limit, **({"news": 30 * times} if ratio else {}))
        for side, of_side, of_luck, times in (("dense", 0.7, 0, 1.0), ("compressed", skill, luck, ratio or 1.0))}
    low = min(14, L - 1 - removed)
    groups = (Group(low, low + removed + 1),) if removed else ()
    plan = MergePlan(L, groups, method=cfg.method.name, rule=cfg.merge_rule.name, similarity=cfg.similarity.name,
                     threshold=cfg.method.threshold, final_score=0.91, evaluations=28, block_forwards=399)  # fmt: skip
    return write(folder, record_of(cfg, plan, evaluation, overrides, **changes))
