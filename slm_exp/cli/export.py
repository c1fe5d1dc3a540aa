"""`slm export RUN_OR_PLAN`: a plan as another tool's file, for models that are made there.

mergekit: slices of the dense model, passed through where layers are kept or removed; where layers are merged, models of
one member of every group each, and their weighted mean.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from slm_exp.cli.parser import Parser
from slm_exp.core.errors import PlanError
from slm_exp.core.files import write_text
from slm_exp.runs.mergekit import FORMATS, mergekit, read_plan


def parser() -> Parser:
    """The command line of `slm export`."""
    p = Parser(
        "export", __doc__,
        examples={
            "slm export outputs/RUN_ID --out merge.yaml": "a run's plan, for the model it was made of",
            "slm export plan.json --model FOLDER_OR_REPO": "a plan file, to stdout",
            "mergekit-yaml merge.yaml FOLDER": "then mergekit, as the file says in its first line",
            "mergekit-multi merge.yaml -I SCRATCH --out-path FOLDER --no-write-model-card": "or this",
        },
        exits={0: "the file is written", 1: "the plan cannot be expressed; says why", 2: "a wrong call"},
        notes="Removed layers, removed sublayers, compensation and every merge rule can be expressed. Width pruning, "
              "recovery and models whose layers differ in attention cannot: take the checkpoint in model/ instead.",
    )  # fmt: skip
    p.add_argument("source", metavar="RUN_OR_PLAN", help="a run's folder, or a plan.json")
    p.add_argument("--format", choices=FORMATS, default="mergekit", help="the tool that reads it (default: mergekit)")
    p.add_argument("--model", metavar="FOLDER_OR_REPO", help="the dense model; a run's own by default")
    p.add_argument("--out", type=Path, metavar="FILE", help="where to write (default: stdout)")
    return p


def main(argv: Sequence[str]) -> int:
    """See `slm export --help`."""
    args = parser().parse_args(list(argv))
    try:
        plan, model, dtype = read_plan(Path(args.source).expanduser(), args.model)
        text = mergekit(plan, model, dtype, args.source)
    except PlanError as error:
        print(f"slm export: {error}", file=sys.stderr)
        return 1
    if args.out is None:
        print(text, end="")
    else:
        write_text(args.out, text)
        print(args.out)
    return 0
