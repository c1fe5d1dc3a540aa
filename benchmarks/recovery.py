"""Every recovery after the same compressions, by perplexity: the table of docs/recovery.md.

    python benchmarks/recovery.py --tokens wt2valid_10x128.npy --fit wt2valid_24x256.npy --perplexity wt2test_24x256.npy

Two multiruns in `outputs/multirun/recovery`: the refit after merging (two plans of 3 layers, one of 8) and after
ShortGPT's removals (3, 5 and 8 layers), then each training for `--steps` steps of 8 x 128 tokens with 8 layers
removed. The same command goes on where it was stopped. `--table-only` prints the table from the records there are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from slm_exp.types import MergePlan  # noqa: E402

FOLDER = ROOT / "outputs" / "multirun" / "recovery"
MERGED = {  # plans whose refit was tried first
    "3a": ((14, 16), (25, 28)), "3b": ((13, 15), (16, 19)), "8": ((13, 15), (16, 19), (22, 25), (25, 29)),
}  # fmt: skip


def grids(steps: int) -> Iterator[tuple[str, list[str]]]:
    """(name of the folder, overrides) of every multirun."""
    refits = "recovery=none,reconstruct"
    for name, groups in MERGED.items():
        folder = FOLDER / f"plan_{name}"
        MergePlan(30, groups, rule="top_layer").save(folder)
        yield f"merged_{name}", ["method=from_plan", f"method.path={folder / 'plan.json'}", refits]
    yield "shortgpt", ["method=shortgpt", "method.target_layers=27,25,22", refits]
    trained = ["recovery.data=bundled", "recovery.seq_len=128", "recovery.batch_size=8", "recovery.micro_batch_size=8",
               f"recovery.max_steps={steps}", "recovery.warmup_steps=20", "recovery.checkpoint_every=50"]  # fmt: skip
    rates = {"lora": 1e-3, "full": 1e-4, "distill": 1e-4, "feature_distill": 3e-4}
    for name, lr in rates.items():
        yield name, ["method=shortgpt", "method.target_layers=22", f"recovery={name}", f"recovery.lr={lr}", *trained]


def row(record: dict[str, Any]) -> tuple[str, ...]:
    plan, recovery = record["plan"], record["config"]["recovery"]["name"]
    gone = [*(f"{a}-{b - 1}" for a, b in plan["groups"]), *map(str, plan["dropped"])]
    seconds = next(s["seconds"] for s in record["stages"] if s["name"] == "recover")
    values = record["eval"]["compressed"]["perplexity"].values()
    return " ".join(gone), recovery, f"{next(iter(values)):.1f}", f"{seconds:.0f}"


def table() -> str:
    found = [json.loads(p.read_text()) for p in sorted(FOLDER.glob("*/*/record.json"))]
    rows = sorted({row(r) for r in found if r["status"] == "finished"}, key=lambda r: (len(r[0]), r[0], float(r[2])))
    lines = ["| layers merged (a-b) or removed | recovery | perplexity | recovery, s |", "|---|---|---:|---:|"]
    return "\n".join([*lines, *(f"| {' | '.join(r)} |" for r in rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", help="npy of token ids the plans are found with (default: the bundled text)")
    parser.add_argument("--fit", help="npy of token ids the refit is fitted on (default: the bundled text)")
    parser.add_argument("--perplexity", help="npy of token ids the perplexity is measured on")
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--table-only", action="store_true", help="print the table from the records that are there")
    parser.add_argument("overrides", nargs="*", help="of every run")
    args = parser.parse_args()
    status = 0
    if not args.table_only:
        common = ["tracking=none", "save_model=false", "evaluation=perplexity", *args.overrides]
        common += ["calibration=tokens", f"calibration.path={args.tokens}"] if args.tokens else []
        common += [f"evaluation.corpora={{tokens: {args.perplexity}}}"] if args.perplexity else []
        for name, grid in grids(args.steps):
            runs = [grid]
            if (both := "recovery=none,reconstruct") in grid:  # the path is a field of the refit alone
                rest = [o for o in grid if o != both]
                fit = [f"recovery.path={args.fit}"] if args.fit else []
                runs = [[*rest, "recovery=none"], [*rest, "recovery=reconstruct", *fit]]
            for i, run in enumerate(runs):
                command = [sys.executable, "-m", "slm_exp", "-m", *run, *common, f"hydra.sweep.dir={FOLDER / name}_{i}"]
                status |= subprocess.run(command, check=False).returncode
    print(table())
    return status


if __name__ == "__main__":
    sys.exit(main())
