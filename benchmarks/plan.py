"""How far the estimates of `slm plan` are off: time and memory, for SmolLM2 and two random models of other sizes.

    python benchmarks/plan.py                  every model, on one thread
    python benchmarks/plan.py --records DIR    against the stages that finished records below DIR had to compute
    python benchmarks/plan.py --documents      the tokens that documents of the seven tasks cost (evaluation/cost.py)

Without --records both sides are processor seconds of one thread, children included, so that others at work on the
machine do not count; records have seconds of the clock. Peak memory is the largest process's. Exit status 1 when a
factor is above 2.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

COMMON = ["runtime.threads=1", "runtime.device=cpu", "tracking=none", "save_model=true", "evaluation.limit=5"]
MODELS = {
    "SmolLM2-135M": [],
    "random, 10 M": ["model=tiny", "model.layers=12", "model.hidden=256", "model.vocab=8192"],
    "random, 93 M": ["model=tiny", "model.layers=10", "model.hidden=1024", "model.heads=16", "model.kv_heads=4"],
}  # fmt: skip
CASES = {"the main job": [], "no evaluation": ["evaluation=none", "save_model=false"]}
SHORT = 0.2
"""Stages of a record that took fewer seconds are left out."""


def measured(overrides: list[str], folder: Path) -> tuple[float, float]:
    """Processor seconds and peak bytes of a run, children included."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder.with_suffix(".log"), "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "slm_exp", *overrides, f"hydra.run.dir={folder}"],
                                   stdout=log, stderr=log, env=environment)  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(overrides)}: the run failed; see {folder.with_suffix('.log')}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def estimated(overrides: list[str]) -> tuple[float, float]:
    """Seconds and bytes by `slm plan`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-m", "slm_exp.cli", "plan", "--json", *overrides], capture_output=True,
                         text=True, env=environment, check=True)  # fmt: skip
    totals = json.loads(ran.stdout)["totals"]
    return totals["seconds"], totals["memory_bytes"]


def documents() -> None:
    """Tokens of a document of each task: read by the fast backend, predicting, and read by lm-eval's own class."""
    import torch

    from slm_exp.core.cache.store import default_cache_dir
    from slm_exp.evaluation.backends.harness import load_tasks
    from slm_exp.evaluation.backends.trees import Request, grow
    from slm_exp.evaluation.base import SEVEN
    from slm_exp.evaluation.documents import SPLIT
    from slm_exp.evaluation.question_sets import SPLIT as QUESTIONS
    from slm_exp.evaluation.task_index import quiet
    from slm_exp.models.smollm2_135m import SmolLM2

    tokenizer = SmolLM2().open(torch.device("cpu"), Path(default_cache_dir())).tokenizer
    assert tokenizer is not None
    cases: list[tuple[str, int | None, dict[str, int]]] = [(n, limit, {}) for limit in (20, None) for n in SEVEN]
    cases += [(name, 100, {}) for name in SPLIT if name in QUESTIONS or name in ("nq_open", "rte", "copa")]
    cases += [("mmlu", limit, {"mmlu": n}) for n in (0, 5) for limit in (20, 100)]
    for name, limit, fewshot in cases:
        with quiet():
            tasks = load_tasks([name], limit, fewshot=fewshot).objects["tasks"].values()
            for task in tasks:
                task.build_all_requests(limit=limit)
        instances = [r for task in tasks for r in task.instances]
        n = len({(r.task_name, r.doc_id) for r in instances})
        answers = [r.args[1] if r.request_type == "loglikelihood" else "" for r in instances]
        contexts = tokenizer([r.args[0] for r in instances], add_special_tokens=False)["input_ids"]
        wholes = tokenizer([r.args[0] + a for r, a in zip(instances, answers, strict=True)],
                           add_special_tokens=False)["input_ids"]  # fmt: skip
        asked = [Request(i, tuple(w[:-1]), tuple(w[len(c) :])) if answers[i] else Request(i, tuple(w), (0,))
                 for i, (c, w) in enumerate(zip(contexts, wholes, strict=True))
                 if not answers[i] or len(w) > max(1, len(c))]  # fmt: skip
        trees = grow(asked)
        nodes = (sum(map(len, trees)) + sum(map(len, {t.trunk for t in trees}))) / n
        predicting = sum(len({int(i) for _, at, _ in t.predictions() for i in at}) for t in trees) / n
        read = {r.tokens for r in asked} if name == "mmlu" else [r.tokens for r in asked]  # four letters in one pass
        plain = sum(map(len, read)) / n
        print(f"{'all' if limit is None else limit:>4} {name:<34} {fewshot or ''!s:<12} {n:>6} documents: "
              f"{nodes:6.1f} nodes, {predicting:6.1f} predicting, {plain:6.1f} plain", flush=True)


def against_records(folder: Path) -> float:
    """Print a line for every finished record below a folder; returns the worst factor."""
    from slm_exp.cli.plan import make_plan

    worst = 1.0
    for path in sorted(folder.rglob("record.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["status"] != "finished":
            continue
        threads = record["device"]["threads"]
        overrides = [o for o in record["overrides"] if not o.startswith(("cache.", "runtime.", "hydra."))]
        (job,) = make_plan([*overrides, f"runtime.threads={threads}", "cache.enabled=false",
                            "hydra.run.dir=not/there"]).jobs  # fmt: skip
        took = {s["name"]: s["seconds"] for s in record["stages"] if not s["cached"] and s["seconds"] > SHORT}
        told = {name: job.seconds[name] for name in took if name in job.seconds}
        if not told:
            continue
        seconds, measured_s = sum(told.values()), sum(took[name] for name in told)
        factor = max(seconds / measured_s, measured_s / seconds)
        worst = max(worst, factor)
        parts = ", ".join(f"{n} {told[n]:.0f}/{took[n]:.0f}" for n in told if took[n] > 2)
        what = " ".join(o for o in overrides if o.startswith("method"))
        print(f"{what:<50} {seconds:6.0f} s {measured_s:6.0f} s {factor:5.2f}   {parts}", flush=True)
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", action="store_true", help="measure the tokens of documents instead")
    parser.add_argument("--records", type=Path, metavar="DIR", help="compare with finished records instead")
    parser.add_argument("--only", help="models whose name contains this")
    args = parser.parse_args()
    if args.documents:
        documents()
        return 0
    if args.records:
        worst = against_records(args.records)
        print(f"worst factor: {worst:.2f}")
        return int(worst > 2)
    worst = 1.0
    print(f"{'model':<14} {'what':<14} {'estimate':>9} {'measured':>9} {'factor':>7}   "
          f"{'memory':>8} {'measured':>9} {'factor':>7}")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="slm_exp-plan-") as where:
        cache = Path(where) / "cache"
        for model, choice in MODELS.items():
            if args.only and args.only not in model:
                continue
            for case, more in CASES.items():
                _keep_conversion(cache)
                overrides = [*COMMON, *choice, *more, f"cache.dir={cache}"]
                seconds, size = estimated(overrides)
                took, peak = measured(overrides, Path(where) / f"{len(model)}{case.replace(' ', '-')}")
                factors = max(seconds / took, took / seconds), max(size / peak, peak / size)
                worst = max(worst, *factors)
                print(f"{model:<14} {case:<14} {seconds:7.0f} s {took:7.0f} s {factors[0]:7.2f}   "
                      f"{size / 1e9:5.2f} GB {peak / 1e9:6.2f} GB {factors[1]:7.2f}", flush=True)  # fmt: skip
    print(f"worst factor: {worst:.2f}")
    return int(worst > 2)


def _keep_conversion(cache: Path) -> None:
    """An empty stage cache but for the converted weights (copied from the default cache, once) and the speeds."""
    from slm_exp.core.cache.store import default_cache_dir

    own = Path(default_cache_dir()) / "model"
    if own.is_dir() and not (cache / "model").exists():
        shutil.copytree(own, cache / "model")
    for path in cache.glob("*"):
        if path.name not in ("model", "speed"):
            shutil.rmtree(path)


if __name__ == "__main__":
    sys.exit(main())
