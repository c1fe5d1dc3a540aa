"""`slm export RUN_OR_PLAN`: a plan as another tool's file, for models that are made there.

mergekit: slices of the dense model, passed through where layers are kept or removed; where layers are merged, models of
one member of every group each, and their weighted mean.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from slm_exp.cli.command import FOLDER, OneOf, command, print_or_write
from slm_exp.core.errors import PlanError
from slm_exp.runs.mergekit import FORMATS, mergekit, read_plan


@command(
    "export", __doc__,
    examples={"slm export outputs/RUN_ID --out merge.yaml": "a run's plan, for the model it was made of",
              "slm export plan.json --model FOLDER_OR_REPO": "a plan file, to stdout",
              "mergekit-yaml merge.yaml FOLDER": "then mergekit, as the file says in its first line",
              "mergekit-multi merge.yaml -I SCRATCH --out-path FOLDER --no-write-model-card": "or this"},
    exits={0: "the file is written", 1: "the plan cannot be expressed; says why", 2: "a wrong call"},
    notes="RUN_OR_PLAN is a run's folder, or a plan.json. Removed layers and sublayers, compensation and every merge "
          "rule can be expressed. Width pruning, recovery and models whose layers differ in attention cannot: take the "
          "checkpoint in model/ instead.")
@click.argument("source", metavar="RUN_OR_PLAN")
@click.option("--format", type=OneOf(FORMATS), default="mergekit", help="the tool that reads it (default: mergekit)")
@click.option("--model", metavar="FOLDER_OR_REPO", help="the dense model; a run's own by default")
@click.option("--out", type=FOLDER, metavar="FILE", help="where to write (default: stdout)")
def main(source: str, format: str, model: str | None, out: Path | None) -> int:
    try:
        plan, place, dtype = read_plan(Path(source).expanduser(), model)
        text = mergekit(plan, place, dtype, source)
    except PlanError as error:
        print(f"slm export: {error}", file=sys.stderr)
        return 1
    print_or_write(text, out)
    return 0
