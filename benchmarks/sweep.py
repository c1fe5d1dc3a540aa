"""A sweep over thresholds against the same runs made one by one, and what a job costs whose results are all cached.

    python benchmarks/sweep.py                       # 20 thresholds, evaluation=smoke, the embedded SmolLM2-135M
    python benchmarks/sweep.py --cells 6 --separate 2

The thresholds are those of `--cells` plans of the threshold path, all different: the worst case of sharing, for no
two cells share what comes after the plan. The path is followed first, with a cache of its own. The separate runs
start with empty caches (the converted weights are there already, for both sides) and take long, so `--separate` of
them are made, spread over the cells, and stand for all. Then every cell runs once more in an empty folder with the
sweep's cache. Everything happens in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

SETTINGS = [
    "calibration.n_samples=4", "calibration.seq_len=32", "tracking=none", "evaluation=smoke", "save_model=false",
]  # fmt: skip
RANGE = (0.7, 0.95)


def call(*words: str) -> float:
    """Seconds that a command takes; its output is shown only if it fails."""
    started = time.perf_counter()
    ran = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{' '.join(words)}\n{ran.stdout}\n{ran.stderr}")
    return time.perf_counter() - started


def thresholds(where: Path, cells: int) -> list[float]:
    """One threshold for each of `cells` different plans, spread over the path."""
    low, high = RANGE
    seconds = call("-m", "slm_exp.cli", "path", *SETTINGS, f"method.threshold_range=[{low},{high}]",
                   f"hydra.run.dir={where}", f"cache.dir={where / 'cache'}")  # fmt: skip
    path = json.loads((where / "path.json").read_text())
    plans = {json.dumps(p["groups"]): (p["threshold_low"] + p["threshold_high"]) / 2 for p in path["plans"]}
    released = 832 * len(path["plans"])
    print(f"path [{low}, {high}): {len(path['plans'])} plans, {path['evaluations']} candidates, "
          f"{path['block_forwards']} block forwards ({path['block_forwards'] / released:.2f} of "
          f"{len(path['plans'])} released searches), {seconds:.0f} s", flush=True)  # fmt: skip
    every = sorted(plans.values())
    if len(every) < cells:
        raise SystemExit(f"only {len(every)} plans")
    return [every[i * len(every) // cells] for i in range(cells)]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted(folder.glob("*/record.json"))]


def computed(folder: Path) -> Counter[str]:
    """How often each stage was computed, not taken from the cache, over the runs of a folder."""
    return Counter(s["name"] for r in records(folder) for s in r["stages"] if not s["cached"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=20)
    parser.add_argument("--separate", type=int, default=4, help="separate runs that are made; they stand for all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        where = Path(temporary)
        asked = thresholds(where / "path", args.cells)
        weights = where / "weights"  # a cache that holds the converted weights and nothing else
        weights.mkdir()
        shutil.copytree(where / "path" / "cache" / "model", weights / "model")

        separate = []
        for i in range(args.separate):
            cell = asked[i * args.cells // args.separate]
            cache = where / f"cache{i}"
            shutil.copytree(weights, cache)
            separate.append(call("-m", "slm_exp", *SETTINGS, f"method.threshold={cell!r}", f"cache.dir={cache}",
                                 f"hydra.run.dir={where / f'separate{i}'}"))  # fmt: skip
            print(f"separate run at {cell:.4f}: {separate[-1]:.0f} s", flush=True)

        grid = [*SETTINGS, f"method.threshold={','.join(map(repr, asked))}", f"cache.dir={weights}"]
        swept = call("-m", "slm_exp", "-m", *grid, f"hydra.sweep.dir={where / 'sweep'}")
        again = call("-m", "slm_exp", "-m", *grid, f"hydra.sweep.dir={where / 'again'}")
        single = call("-m", "slm_exp", *SETTINGS, f"method.threshold={asked[0]!r}", f"cache.dir={weights}",
                      f"hydra.run.dir={where / 'cached'}")  # fmt: skip
        imports = call("-c", "import torch, transformers, matplotlib.figure, slm_exp.launch.compose")
        done = computed(where / "sweep")
        plans = {json.dumps(r["plan"]["groups"]) for r in records(where / "sweep")}
        alone = statistics.mean(separate) * args.cells
        print(f"""
{args.cells} thresholds, {len(plans)} different plans
| separate runs, seconds (mean of {args.separate}, times {args.cells}) | {alone:.0f} |
| sweep, seconds | {swept:.0f} |
| sweep / separate | {swept / alone:.2f} |
| computed in the sweep | {done["evaluate_dense"]} dense evaluations, {done["evaluate"]} of compressed models |
| the sweep again in an empty folder, seconds a cell | {again / args.cells:.1f} |
| one cached run, seconds, of which imports | {single:.1f}, {imports:.1f} |
| computed in the cached cells | {dict(computed(where / "again") & Counter(dict.fromkeys(
    ("calibrate", "similarity", "evaluate_dense", "plan", "evaluate"), 10**6))) or "no stage"} |""")


if __name__ == "__main__":
    main()
