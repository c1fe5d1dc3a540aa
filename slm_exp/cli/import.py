"""`slm import FILE`: another program's plan as a plan.json, for method=from_plan.

EvoPress's text (none, attn, mlp or attn+mlp on a line for every layer), LLM-Drop's config.json (drop_attn_list,
drop_mlp_list), mergekit's YAML (slices of one model, passed through).
"""  # noqa: N999 - the command's name

from __future__ import annotations

import json
from pathlib import Path

import click

from slm_exp.cli.command import FOLDER, command, print_or_write
from slm_exp.runs.foreign import read_foreign


@command(
    "import", __doc__,
    examples={"slm import layer_drop_config.txt --out plan.json": "EvoPress's result",
              "slm import dropped/config.json": "LLM-Drop's, to stdout",
              "slm import merge.yaml --layers 32 --out plan.json": "mergekit's; --layers where its model is not here",
              "python -m slm_exp method=from_plan method.path=plan.json": "then carry it out"},
    exits={0: "the plan is written", 2: "a wrong call, or a file that is no such plan; says what was wrong"},
    notes="A layer both of whose sublayers are gone is removed as a whole. What a plan cannot say is refused: layers "
          "that come twice, slices of several models, merges, factors other than 0 and 1.")
@click.argument("file", metavar="FILE", type=FOLDER)
@click.option("--layers", type=click.IntRange(1), metavar="N", help="of the dense model, where the file does not say")
@click.option("--out", type=FOLDER, metavar="FILE", help="where to write (default: stdout)")
def main(file: Path, layers: int | None, out: Path | None) -> int:
    text = json.dumps(read_foreign(file.expanduser(), layers).to_json(), indent=1) + "\n"
    print_or_write(text, out)
    return 0
