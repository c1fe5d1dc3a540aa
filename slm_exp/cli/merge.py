"""`slm merge MODEL PLAN OUT [OVERRIDE...]`: the checkpoint that a plan makes of a model, and nothing else.

No calibration, no search, no evaluation. Reloaded by plain transformers in a fresh process before it appears at OUT.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from slm_exp.cli.command import FOLDER, command
from slm_exp.core.errors import CheckpointError, ConfigError, require
from slm_exp.core.format import override, printable
from slm_exp.launch.compose import compose_run, model_words
from slm_exp.models.files import no_checkpoint
from slm_exp.runs.record import check_writable, record_beside


@command(
    "merge", __doc__,
    examples={"slm merge smollm2_135m outputs/RUN_ID merged": "a run's plan, carried out once more",
              "slm merge FOLDER_OR_REPO plan.json merged model.dtype=bfloat16": "your model; a plan by hand will do",
              "slm merge FOLDER_OR_REPO plan.json merged merge_rule=mean": "where the plan names no rule"},
    exits={0: "the checkpoint is at OUT", 1: "it could not be written, or does not reload as it was",
           2: "a wrong call, or a plan that does not fit the model; nothing was loaded"},
    notes="MODEL is a member of the model group (slm-exp --help lists them), a folder or a repo id; PLAN a plan.json, "
          "of which groups, dropped and rule suffice, or the folder of a run. Overrides are those of a run; model.*, "
          "merge_rule and runtime play a part. What a recovery did is not in a plan: take the run's own model/ then.")
@click.argument("model", metavar="MODEL")
@click.argument("plan", metavar="PLAN")
@click.argument("out", metavar="OUT", type=FOLDER)
@click.argument("overrides", nargs=-1, metavar="[OVERRIDE]...")
def main(model: str, plan: str, out: Path, overrides: Sequence[str]) -> int:
    words = ["method=from_plan", override("method.path", plan), "evaluation=none", "tracking=none", *model_words(model),
             *overrides]
    require(plan.startswith("published:") or Path(plan).expanduser().exists(), "PLAN", plan,
            "a plan.json, or the folder of a run", f"There is no {plan}.")
    compose_run(words)
    whole = out.is_dir() and not out.is_symlink()
    why = "it is no folder" if not whole else no_checkpoint(out) if any(out.iterdir()) else None
    if os.path.lexists(out) and why:
        raise ConfigError(f"OUT = {out}; expected a new folder, or a checkpoint of slm_exp, which is replaced: "
                          f"{printable(why)}.")
    check_writable(out.absolute().parent, "OUT", "Give another folder.")
    if (recovery := record_beside(Path(plan).expanduser()).member("recovery").get("name", "none")) != "none":
        print(f"{plan}: what recovery={recovery} did is not in the plan.", file=sys.stderr)
    from slm_exp.launch import api  # torch: a wrong call is refused without
    from slm_exp.runs.checkpoint import save_checkpoint

    study = api.load(*words)
    made = study.plan(plan)
    try:
        save_checkpoint(api.apply(study, made), out, made)
    except CheckpointError as error:
        print(f"slm merge: {error}", file=sys.stderr)
        return 1
    print(f"{out}: {made.n_layers_out} of {made.n_layers} layers")
    return 0
