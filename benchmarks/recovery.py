"""Every recovery after the same compressions, by perplexity: the table of docs/recovery.md.

    python benchmarks/recovery.py --tokens wt2valid_10x128.npy --fit wt2valid_24x256.npy --perplexity wt2test_24x256.npy

Multiruns in `outputs/multirun/recovery`: the refit after merging (two plans of 3 layers, one of 8) and after ShortGPT's
removals (3, 5 and 8 layers), each training for `--steps` steps of 8 x 128 tokens with ShortGPT's 8 layers removed, then
plans chosen by a score before the refit and after it (`similarity.after`), 3 and 8 layers, both refitted.
The same command goes on where it was stopped, a training at its last checkpoint. The table is written between the two
markers of docs/recovery.md, from records. `--only lora,full` runs some; `--table-only` writes the table from what is
there.
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

from slm_exp.core.types import MergePlan  # noqa: E402

FOLDER = ROOT / "outputs" / "multirun" / "recovery"
PAGE = ROOT / "docs" / "recovery.md"
START, END = "<!-- table: python benchmarks/recovery.py -->", "<!-- end of table -->"
MERGED = {  # plans whose refit was tried first
    "3a": ((14, 16), (25, 28)), "3b": ((13, 15), (16, 19)), "8": ((13, 15), (16, 19), (22, 25), (25, 29)),
}  # fmt: skip
TRAINED = {
    "lora": ["recovery.lr=1e-3", "recovery.dropout=0"],  # 200 steps overfit nothing, and dropout takes a third of each
    "full": ["recovery.lr=2e-4"],
    "distill": ["recovery.lr=2e-4"],
    "feature_distill": ["recovery.lr=5e-4"],
}


CHOSEN = ["method=sleb", "method.target_layers=27,22",  # greedily, by the loss
          "similarity=token_cosine"]  # of the final score: flat_cosine saturates after a refit  # fmt: skip


def grids(steps: int, fit: str | None) -> Iterator[tuple[str, list[str]]]:
    """(name of the folder, overrides) of every multirun."""
    refit = ["recovery=reconstruct", *([f"recovery.path={fit}"] if fit else [])]
    for name, groups in MERGED.items():
        folder = FOLDER / f"plan_{name}"
        MergePlan(30, groups, rule="top_layer").save(folder)
        plan = ["method=from_plan", f"method.path={folder / 'plan.json'}"]
        yield f"merged_{name}", [*plan, "recovery=none"]
        yield f"merged_{name}_reconstruct", [*plan, *refit]
    removed = ["method=shortgpt", "method.target_layers=27,25,22"]
    yield "shortgpt", [*removed, "recovery=none"]
    yield "shortgpt_reconstruct", [*removed, *refit]
    training = ["recovery.data=bundled", "recovery.seq_len=128", "recovery.batch_size=8", "recovery.micro_batch_size=8",
                f"recovery.max_steps={steps}", f"recovery.warmup_steps={min(20, steps // 5)}", "recovery.held_out=40",
                "recovery.checkpoint_every=50"]  # fmt: skip
    for name, own in TRAINED.items():
        yield name, ["method=shortgpt", "method.target_layers=22", f"recovery={name}", *own, *training]
    after = ["similarity.after=reconstruct", *([f"similarity.fit_path={fit}"] if fit else [])]
    yield "sleb_before", [*CHOSEN, *refit]
    yield "sleb_after", [*CHOSEN, *after, *refit]


def row(record: dict[str, Any]) -> tuple[str, ...]:
    plan, recovery, told = record["plan"], record["config"]["recovery"], record["recovery"] or {}
    gone = [*(f"{a}-{b - 1}" for a, b in plan["groups"]), *map(str, plan["dropped"])]
    held = [loss for _, loss in told.get("held_out_loss", [])]
    seconds = told.get("seconds", next(s["seconds"] for s in record["stages"] if s["name"] == "recover"))
    values = record["eval"]["compressed"]["perplexity"].values()
    method, after = record["config"]["method"]["name"], record["config"]["similarity"]["after"]
    by = "" if method == "from_plan" else method + (" by the score after the refit" if after else "")
    what = recovery["name"] + (f", {told['steps']} steps, lr {recovery['lr']:g}" if "steps" in told else "")
    return (
        " ".join(gone), by, what, f"{next(iter(values)):.1f}",
        f"{told['loss'][0][1]:.3g}, {held[0]:.3g}, {min(held):.3g}" if held else "", f"{seconds:.0f}",
    )  # fmt: skip


def table() -> str:
    found = [json.loads(p.read_text()) for p in sorted(FOLDER.glob("*/*/record.json"))]
    found = [r for r in found if r["status"] == "finished"]
    if not found:
        raise SystemExit(f"no finished records under {FOLDER}")
    dense = next(iter(found[0]["eval"]["dense"]["perplexity"].values()))
    rows = sorted(
        ((-r["layers"]["after"], row(r)) for r in found), key=lambda r: (r[0], r[1][1], r[1][0], -float(r[1][3]))
    )
    lines = [
        "| layers merged (a-b) or removed | chosen by | recovery | perplexity "
        "| loss: first step; held out, first look and best | recovery, s |",
        "|---|---|---|---:|---:|---:|",
        f"| none (dense) |  |  | {dense:.1f} |  |  |",
    ]
    return "\n".join([*lines, *dict.fromkeys(f"| {' | '.join(r)} |" for _, r in rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", help="npy of token ids the plans are found with (default: the bundled text)")
    parser.add_argument("--fit", help="npy of token ids the refit is fitted on (default: the bundled text)")
    parser.add_argument("--perplexity", help="npy of token ids the perplexity is measured on")
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--only", help="names of multiruns, by commas (default: all)")
    parser.add_argument("--table-only", action="store_true", help="write the table from the records that are there")
    parser.add_argument("overrides", nargs="*", help="of every run")
    args = parser.parse_args()
    status = 0
    if not args.table_only:
        measured = ["evaluation=none", f"evaluation.corpora={{tokens: {args.perplexity}}}"]  # perplexity has a corpus
        common = ["tracking=none", "save_model=false", *(measured if args.perplexity else ["evaluation=perplexity"])]
        common += ["calibration=tokens", f"calibration.path={args.tokens}"] if args.tokens else []
        common += args.overrides
        for name, grid in grids(args.steps, args.fit):
            if args.only and name not in args.only.split(","):
                continue
            command = [sys.executable, "-m", "slm_exp", "-m", *grid, *common, f"hydra.sweep.dir={FOLDER / name}"]
            status |= subprocess.run(command, check=False).returncode
    before, rest = PAGE.read_text().split(START)
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}")
    print(table())
    return status


if __name__ == "__main__":
    sys.exit(main())
