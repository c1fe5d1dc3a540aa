"""How time, memory and bytes grow with tokens, depth and width: similarity matrix, a method of one pass, a search.

    python benchmarks/growth.py OUT           # a few minutes; OUT/growth.png and OUT/growth.json
    python benchmarks/growth.py OUT --quick   # two values an axis, smaller

Random Llamas in bfloat16 are made one after the other (`scale.py`), each measured resident and streamed in processes of
their own. An axis varies, the other two stay in the middle. Printed and drawn: processor seconds, block forwards, peak
memory (0.39 GiB of it are Python with torch), bytes read from the files, and the power by which each grows
between the last two values. Block forwards are passes of one layer over the whole calibration set: their number does
not know how many tokens that has.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scale import GIB, LLAMA, make, sizes

STAGES = ("similarity", "shortgpt", "slm")
MEASURES = {"cpu": "processor seconds", "blocks": "block forwards", "peak": "peak memory, GiB", "read": "read, GiB"}


@dataclass(frozen=True)
class Point:
    """One model and calibration set."""

    tokens: int = 512
    depth: int = 16
    width: int = 512


AXES = {"tokens": (256, 512, 1024), "depth": (8, 16, 32), "width": (256, 512, 1024)}
QUICK = {"tokens": (128, 256), "depth": (8, 12), "width": (64, 128)}
Table = dict[str, dict[str, dict[str, dict[str, list[float]]]]]
"""axis -> resident or stream -> stage -> measure -> a value for each point of the axis."""
LENGTH = 64
"""Of a sequence: tokens grow by more of them."""


def measure(point: Point, how: str, threshold: float) -> dict[str, dict[str, float]]:
    """stage -> what it took, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="slm_exp-growth-") as where:
        folder = Path(where) / "dense"
        folder.mkdir()
        heads = point.width // 32
        make(folder, {**LLAMA, **sizes(point.width, point.width * 11 // 4, point.depth, heads, heads, 1000)})
        command = [sys.executable, str(Path(__file__).with_name("scale.py")), "--child", how, "--folder", str(folder),
                   "--tokens", f"{point.tokens // LENGTH}x{LENGTH}", "--threshold", str(threshold), "--stages", *STAGES]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [json.loads(line.removeprefix("STAGE")) for line in done.stdout.splitlines() if line.startswith("STAGE")]
    return {line["stage"]: line for line in lines}


def power(xs: Sequence[float], ys: Sequence[float]) -> float:
    """By which power y grows with x between the last two points; 0 where it stays."""
    (x0, x1), (y0, y1) = xs[-2:], ys[-2:]
    return math.log(y1 / y0) / math.log(x1 / x0) if y0 > 0 and y1 > 0 else 0.0


def values(found: dict[str, dict[str, float]], stage: str) -> dict[str, float]:
    """A stage's measures, memory and bytes in GiB."""
    s = found[stage]
    return {"cpu": s["cpu"], "blocks": s.get("blocks", 0.0), "peak": s["peak"] / GIB, "read": s["read"] / GIB}


def draw(table: Table, axes: dict[str, tuple[int, ...]], to: Path) -> None:
    """A row a measure, a column an axis; resident solid, streamed dashed, scales logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(9, 9.5), layout="constrained")
    panels = figure.subplots(len(MEASURES), len(axes), squeeze=False, sharex="col", sharey="row")
    for row, (measure_name, label) in zip(panels, MEASURES.items(), strict=True):
        for panel, (axis, xs) in zip(row, axes.items(), strict=True):
            for how, style in (("resident", "-"), ("stream", "--")):
                for stage, colour in zip(STAGES, ("#3b528b", "#21918c", "#b5367a"), strict=True):
                    ys = table[axis][how][stage][measure_name]
                    if any(y > 0 for y in ys):
                        panel.loglog(xs, ys, style, marker=".", color=colour, linewidth=1.2, label=f"{stage}, {how}")
            panel.set_xticks(xs, [str(x) for x in xs])
            panel.xaxis.set_minor_locator(NullLocator())
            if measure_name == "peak":  # most of it is Python with torch: a straight scale
                panel.set_yscale("linear")
            else:
                panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.yaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            panel.tick_params(labelsize=8)
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(label)
    for panel, axis in zip(panels[-1], axes, strict=True):
        panel.set_xlabel({"tokens": "calibration tokens", "depth": "layers", "width": "hidden size"}[axis])
    panels[0, 0].legend(fontsize=7, frameon=False)
    figure.savefig(to, dpi=62)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threshold", type=float, default=0.8, help="of the search")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    axes = QUICK if args.quick else AXES
    middle = Point(*(axis[len(axis) // 2] for axis in axes.values()))
    known: dict[tuple[Point, str], dict[str, dict[str, float]]] = {}
    table: Table = {}
    print(f"the middle: {middle.tokens} tokens, {middle.depth} layers of {middle.width} channels")
    for axis, xs in axes.items():
        for how in ("resident", "stream"):
            for x in xs:
                point = Point(**{**vars(middle), axis: x})
                if (point, how) not in known:
                    known[point, how] = measure(point, how, args.threshold)
            of = [known[Point(**{**vars(middle), axis: x}), how] for x in xs]
            mine = {s: {m: [values(one, s)[m] for one in of] for m in MEASURES} for s in STAGES}
            table.setdefault(axis, {})[how] = mine
            for stage, measured in mine.items():
                for name, ys in measured.items():
                    if any(ys):
                        shown = "  ".join(f"{y:10.3f}" for y in ys)
                        print(f"{axis:<7}{how:<9}{stage:<11}{name:<7}{shown}   power {power(xs, ys):5.2f}", flush=True)
    (args.out / "growth.json").write_text(json.dumps(table, indent=1))
    draw(table, axes, args.out / "growth.png")


if __name__ == "__main__":
    main()
