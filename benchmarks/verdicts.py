"""Outcomes that the verdict's rules are tested on: SmolLM2 by plans of known outcome, by `evaluation=smoke`.

`python benchmarks/verdicts.py FOLDER` runs what is missing in FOLDER (two at a time, about two minutes each on a quiet
core; the dense model is measured once), and writes what every document and every chunk gave to
tests/statistics/outcomes.json: the rules are tested on these, and a slow test measures some of them anew.
"""

from __future__ import annotations

import argparse
import gzip
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from slm_exp.core.files import write_text
from slm_exp.evaluation.perplexity import SAMPLES
from slm_exp.evaluation.report import metric_of
from slm_exp.launch.compose import compose_run
from slm_exp.pipeline.run import run
from slm_exp.runs.record import Run

OUT = Path(__file__).parent.parent / "tests" / "statistics" / "outcomes.json"
PLANS = {  # name -> overrides
    "dense": ["method.threshold=1.0"],
    "one layer, ShortGPT": ["method=shortgpt", "method.target_layers=29"],
    "three layers, ShortGPT": ["method=shortgpt", "method.target_layers=27"],
    "SLM at 0.9": ["method=slm", "method.threshold=0.9"],
    "SLM at -0.1": ["method=slm", "method.threshold=-0.1"],
    "SLM at 0.7": ["method=slm", "method.threshold=0.7"],
    "eight layers, ShortGPT": ["method=shortgpt", "method.target_layers=22"],
    "eight layers at random": ["method=random", "method.target_layers=22"],
    "first eight layers": ["method=first", "method.target_layers=22"],
    "eight layers, ShortGPT, refitted": ["method=shortgpt", "method.target_layers=22", "recovery=reconstruct"],
    "a twentieth of the width": ["method.threshold=1.0", "width=flap", "width.ratio=0.05"],
    "one layer, SLEB": ["method=sleb", "method.target_layers=29"],
    "random weights": ["model=tiny"],
}
ALWAYS = ["evaluation=smoke", "tracking=none", "save_model=false"]


def measure(folder: Path, name: str) -> Run:
    """The run of a plan; a finished one is not computed again."""
    where = folder / name.replace(" ", "_").replace(",", "")
    overrides = [*PLANS[name], *ALWAYS]
    run(compose_run(overrides), where, overrides)
    print(name, flush=True)
    return Run.read(where)


def documents(of: Run, which: str, name: str) -> list[dict[str, Any]]:
    with gzip.open(of.samples(which, name), "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def side(of: Run, which: str) -> dict[str, Any]:
    """Loss of every chunk (nats, six decimals), right or wrong (a digit) of every document."""
    measured = of.record.eval.of(which)
    losses = {c: [round(row["nll"], 6) for row in documents(of, which, SAMPLES + c)] for c in measured.perplexity}
    answers = {task: "".join(f"{row[metric_of(task, scores) or '']:.0f}" for row in documents(of, which, task))
               for task, scores in measured.tasks.items()}
    return {"losses": losses, "answers": answers}


def gather(runs: dict[str, Run]) -> dict[str, Any]:
    """The fixture: the two dense models once, the compressed ones by plan, options of every document."""
    out: dict[str, Any] = {"command": "python benchmarks/verdicts.py FOLDER", "options": {}, "dense": {}, "plans": {}}
    for name, of in runs.items():
        model = of.record.model.name
        out["dense"].setdefault(model, side(of, "dense"))
        out["plans"][name] = {"model": model, "random": of.record.model.random, "overrides": PLANS[name],
                              **side(of, "compressed")}
        for task in of.record.eval.dense.tasks:
            lengths = "".join(str(len(row["loglikelihoods"])) for row in documents(of, "dense", task))
            out["options"].setdefault(model, {})[task] = lengths
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    dense, *others = PLANS
    runs = {dense: measure(folder, dense)}  # first: the others take the dense model's numbers from the cache
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        runs |= zip(others, pool.map(measure, [folder] * len(others), others), strict=True)
    write_text(OUT, json.dumps(gather(runs), indent=1) + "\n")
    print(OUT)


if __name__ == "__main__":
    main()
