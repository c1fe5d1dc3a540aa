"""The tables of the real models, made and written: docs/results.

    python benchmarks/results.py                 # all, hours on a CPU
    python benchmarks/results.py --only rules    # some

Runs what a table lacks (the commands of `slm tables NAME --missing`; finished runs are kept, killed ones go on), then
writes its four formats, and for all that are there docs/results/README.md: the commands, the commit, the time.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "results"


class Made(NamedTuple):
    """A table and how it is filled."""

    what: str
    table: str
    words: tuple[str, ...] = ()
    """Parameters of a declared table."""
    sweep: str = ""
    """The preset whose runs fill it, where no table declares them."""
    model: str = ""
    """Another than SmolLM2."""
    shown: str = ""
    """Columns, where the table's own say nothing of what was measured."""

    @property
    def name(self) -> str:
        return self.sweep or "-".join(filter(None, (self.table, self.model)))

    @property
    def folder(self) -> str:
        return f"outputs/multirun/{self.name}"

    @property
    def parameters(self) -> tuple[str, ...]:
        return (*((f"model={self.model}",) if self.model else ()), *self.words)


HALF = "extra=[model.dtype=bfloat16]"  # the searches take a third of the time where the CPU has bfloat16
TIMED = ('"evaluation.speed_batches=[1]"', '"evaluation.speed_prompts=[12]"', "evaluation.speed_runs=12",
         "evaluation.speed_discard=4")  # float32: one token at a time, bfloat16 is slower on a CPU  # fmt: skip
NEWS = ("evaluation=custom", "extra=[model.dtype=bfloat16,evaluation.corpora.news=heldout:news]", "perplexities=[news]")
"""Perplexity of one bundled text: the tasks of these runs would take hours."""
OTHERS = ("gemma3_270m", "qwen2_5_coder_0_5b")
TABLES = (
    Made("six thresholds, three rules", "sweep", sweep="threshold_rule"),
    Made("three thresholds, three kernels of CKA", "sweep", sweep="kernel_threshold"),
    Made("what a threshold leaves", "thresholds"),
    Made("every method at two sizes", "main", (HALF,)),
    Made("the arithmetic of a merge", "rules", (HALF,)),
    Made("what a candidate is scored by", "similarity", (HALF,)),
    Made("how far the calibration sample moves a result", "calibration", (HALF,)),
    Made("depth, width, half and half", "depth_width", (HALF,)),
    Made("every recovery of two cuts", "recovery", ("sizes=[22]", "methods=[slm,shortgpt]")),
    Made("latency and throughput", "speed", (f"extra=[{', '.join(TIMED)}]",)),
    *(Made("what a threshold leaves", "thresholds", (*NEWS, "thresholds=[0.95,0.9,0.85,0.8]"), model=model,
           shown="layers,removed,score,perplexity.news") for model in OTHERS),
    Made("five methods at three sizes", "methods", (*NEWS, "sizes=[27,25,22]"), shown="removed,perplexity.news"),
    *(Made("five methods at three sizes", "methods", NEWS, model=model, shown="removed,perplexity.news")
      for model in OTHERS),
)


def slm_tables(*words: str) -> list[str]:
    return [sys.executable, "-m", "slm_exp.cli", "tables", *words]


def fill(made: Made) -> int:
    """Run what is missing; 0 when every run finished."""
    if made.sweep:
        commands = [f"python -m slm_exp sweep={made.sweep}"]
    else:
        told = subprocess.run(slm_tables(made.table, *made.parameters, "outputs", "--missing"), cwd=ROOT, check=True,
                              capture_output=True, text=True).stdout  # fmt: skip
        commands = [line for line in told.splitlines() if line.startswith("python ")]
    status = 0
    for command in commands:
        alone = ["hydra.launcher.workers=1"] if made.table == "speed" else []  # timings want the machine to themselves
        command = command.replace(f"outputs/multirun/{made.table} ", f"{made.folder} ")
        words = [sys.executable, *shlex.split(command)[1:], *alone]
        print("$", command, flush=True)
        status |= subprocess.run(words, cwd=ROOT, check=False).returncode
    return status


def forecast(made: Made) -> int:
    """Say what the missing runs would cost."""
    words = [f"sweep={made.sweep}"] if made.sweep else [f"table={made.table}", *made.parameters]
    print("$", shlex.join(["slm", "plan", *words]), flush=True)
    return subprocess.run([sys.executable, "-m", "slm_exp.cli", "plan", *words], cwd=ROOT, check=False).returncode


def draw(made: Made) -> None:
    where = made.folder if made.sweep else "outputs"
    shown = ["--columns", made.shown] if made.shown else []
    words = [made.table, *made.parameters, where, *shown, "--format", "md,tex,csv,html"]
    with tempfile.TemporaryDirectory() as new:
        subprocess.run(slm_tables(*words, "--out", new), cwd=ROOT, check=True)
        for drawn in Path(new).iterdir():
            shutil.copy(drawn, OUT / f"{made.name}{drawn.suffix}")


def page(before: str) -> str:
    """What made each table. A run that two tables share counts in the time of the first; a table made elsewhere keeps
    the line that it had in the page `before`.
    """
    rows = []
    for made in TABLES:
        if not (OUT / f"{made.name}.md").is_file():
            continue
        records = [json.loads(p.read_text()) for p in sorted((ROOT / made.folder).rglob("record.json"))]
        if not records:
            rows += [line for line in before.splitlines() if line.startswith(f"| [{made.name}]")]
            continue
        minutes = sum(r["seconds"] for r in records if r["status"] == "finished") / 60
        [(runs, by)] = re.findall(r"(\d+) runs, by (.+?)\.\n", (OUT / f"{made.name}.md").read_text())
        others = ", ".join(f"[{f}]({made.name}.{f})" for f in ("tex", "csv", "html"))
        rows.append(
            f"| [{made.name}]({made.name}.md) ({others}) | {made.what} | {runs} | {minutes:.0f} | {by} "
            f"| `python benchmarks/results.py --only {made.name}` |"
        )
    return "\n".join(["| table | asks | runs | minutes, of all jobs together | made by | command |",
                      "|---|---|---:|---:|---|---|", *rows])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of tables, by commas (default: all)")
    parser.add_argument("--forecast", action="store_true", help="say what the missing runs would cost, and end")
    parser.add_argument("--draw", action="store_true", help="only write the tables from the records that are there")
    args = parser.parse_args()
    wanted = [made for made in TABLES if not args.only or made.name in args.only.split(",")]
    status = 0
    if args.forecast:
        return max(forecast(made) for made in wanted)
    for made in () if args.draw else wanted:
        status |= fill(made)
    for made in wanted:  # afterwards: what is written here is a change of the tree, which records tell
        draw(made)
    readme = OUT / "README.md"
    before = readme.read_text()
    readme.write_text(before.split("| table |")[0] + page(before) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
