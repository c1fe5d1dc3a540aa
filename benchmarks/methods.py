"""Every method at the same sizes, on the same tokens, through the same evaluation: the table of docs/methods.md.

    python benchmarks/methods.py --tokens wt2valid_10x128.npy --perplexity wt2test_24x256.npy

Multiruns (depth methods, sublayer methods, merging instead of removing, compensation, width pruners) in
`outputs/multirun/methods`; the same command goes on where it was stopped. The table is written between the two
markers of docs/methods.md, from records. `--table-only` writes it from what is there.
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

from slm_exp.core.registry import available  # noqa: E402
from slm_exp.reporting.results import average, compare  # noqa: E402
from slm_exp.runs.record import Run  # noqa: E402

FOLDER = ROOT / "outputs" / "multirun" / "methods"
PAGE = ROOT / "docs" / "methods.md"
START, END = "<!-- table: python benchmarks/methods.py -->", "<!-- end of table -->"
LAYERS_LEFT = "27,22"
HALVES = "6,16"  # as many sublayers as 3 and 8 layers have
SHARES = "0.079,0.2105"  # of the parameters: 3 and 8 of 30 layers
WIDTH = "0.2"
INSIDE = "width.layers=[4,28]"  # all but the first four and the last two, as LLM-Pruner's published runs


def grids() -> Iterator[tuple[str, list[str]]]:
    """(folder, overrides) of every multirun. The smaller sizes come first: greedy methods go on from them."""
    methods = {name: cls for name, cls in available("method").items() if name != "from_plan"}
    whole = [name for name, cls in methods.items() if "target_layers" in getattr(cls, "targets", ("target_layers",))]
    halves = [name for name in methods if name not in whole]
    pruners = [name for name in available("width") if name != "none"]
    yield "layers", [f"method.target_layers={LAYERS_LEFT}", f"method={','.join(whole)}"]
    yield "sublayers", [f"method.target_sublayers={HALVES}", f"method={','.join(halves)}"]
    yield "joint", ["method=llm_drop", "method.unit=joint", f"method.target_ratio={SHARES}"]
    yield "merged", ["method=angular,shortgpt", f"method.target_layers={LAYERS_LEFT}", "method.merge=true",
                     "merge_rule=top_layer,sum_of_deltas,mean"]  # fmt: skip
    yield "compensated", ["method=shortgpt", f"method.target_layers={LAYERS_LEFT}", "method.compensate=magnitude"]
    wide = ["method=slm", "method.threshold=1.0", f"width.ratio={WIDTH}"]
    yield "width", [*wide, f"width={','.join(pruners)}"]
    yield "width_inside", [*wide, "width=llm_pruner,magnitude,minitron", "width.uniform=false", INSIDE,
                           "width.allocation=equal"]  # fmt: skip


def label(record: dict[str, Any]) -> str:
    config = record["config"]
    method, width = config["method"], config["width"]
    if width["name"] != "none":
        inside = f", layers {width['layers'][0]}..{width['layers'][1] - 1}" if width.get("layers") else ""
        return f"width: {width['name']}{inside}"
    words = [method["name"]]
    words += [method["unit"]] if method.get("unit") else []
    words += [f"merged by {record['plan']['rule']}"] if method.get("merge") else []
    words += [f"{method['compensate']} compensation"] if method.get("compensate") else []
    return ", ".join(words)


def removed(params: dict[str, Any]) -> str:
    """The share that is gone, and beside it what the checkpoint keeps at zero."""
    zeroed = params.get("zeroed", 0) / params["before"]
    return f"{params['ratio_removed']:.1%}" + (f" + {zeroed:.1%} zeroed" if zeroed else "")


def size(record: dict[str, Any]) -> tuple[bool, int]:
    """Depth before width, the smaller size asked for before the larger one."""
    config = record["config"]
    for field, sizes in (("target_layers", LAYERS_LEFT), ("target_sublayers", HALVES), ("target_ratio", SHARES)):
        if (asked := config["method"].get(field)) is not None:
            return False, sizes.split(",").index(str(asked))
    return True, 0


def row(record: dict[str, Any], folder: Path) -> tuple[str, ...]:
    plan, evaluation = record["plan"], record["eval"]
    run = Run.read(folder)
    mean = average(run.record.eval, compare(run))
    assert mean is not None
    assert mean.compressed is not None
    assert mean.difference is not None
    perplexity = next(iter(evaluation["compressed"]["perplexity"].values()))
    gone = [*(f"{a}-{b - 1}" for a, b in plan["groups"]), *map(str, plan["dropped"])]
    gone += [f"{s['kind'][0].upper()}{s['layer']}" for s in plan["sublayers"]]
    seconds = next(s["seconds"] for s in record["stages"] if s["name"] == "plan")
    stage = next(s["seconds"] for s in record["stages"] if s["name"] == "width")
    narrow = record["config"]["width"]["name"] != "none"
    return (
        label(record), " ".join(gone), removed(record["params"]),
        f"{perplexity:,.1f}" if perplexity < 1e5 else f"{perplexity:.1e}",
        f"{100 * mean.compressed.value:.1f}",
        f"{100 * mean.difference.value:+.1f} ± {100 * (mean.difference.stderr or 0):.1f}",
        f"{stage if narrow else seconds:.0f}", "" if narrow else str(plan["block_forwards"]),
    )  # fmt: skip


def table() -> str:
    found = [(json.loads(p.read_text()), p.parent) for p in sorted(FOLDER.glob("*/*/record.json"))]
    found = [(r, folder) for r, folder in found if r["status"] == "finished"]
    if not found:
        raise SystemExit(f"no finished records under {FOLDER}")
    dense = found[0][0]["eval"]["dense"]
    lines = [
        "| method | layers merged (a-b) or removed; A attention, M mlp | parameters removed | perplexity | average "
        "| against dense | planning, s | block forwards |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        f"| dense |  | 0.0% | {next(iter(dense['perplexity'].values())):.1f} | {100 * dense['average']:.1f} |  |  |  |",
    ]
    perplexity = lambda r: next(iter(r["eval"]["compressed"]["perplexity"].values()))  # noqa: E731
    lines += [f"| {' | '.join(row(*f))} |" for f in sorted(found, key=lambda f: (size(f[0]), perplexity(f[0])))]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", help="npy of token ids: the calibration (default: the bundled text)")
    parser.add_argument("--perplexity", help="npy of token ids the perplexity is measured on")
    parser.add_argument("--limit", type=int, default=40, help="documents of each task")
    parser.add_argument("--table-only", action="store_true", help="write the table from the records that are there")
    parser.add_argument("overrides", nargs="*", help="of every run, e.g. model=hf model.path=FOLDER")
    args = parser.parse_args()
    status = 0
    if not args.table_only:
        common = ["tracking=none", "save_model=false", f"evaluation.limit={args.limit}", *args.overrides]
        common += ["calibration=tokens", f"calibration.path={args.tokens}"] if args.tokens else []
        common += [f"evaluation.corpora.tokens={args.perplexity}"] if args.perplexity else []
        for name, grid in grids():
            command = [sys.executable, "-m", "slm_exp", "-m", *grid, *common, f"hydra.sweep.dir={FOLDER / name}"]
            status |= subprocess.run(command, check=False).returncode
    before, rest = PAGE.read_text().split(START)
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}")
    print(table())
    return status


if __name__ == "__main__":
    sys.exit(main())
