"""`slm sync DIR...`: send offline W&B runs to the server, each once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from slm_exp.cli.command import FOLDER, command
from slm_exp.runs.offline import sync


@command(
    "sync", __doc__,
    examples={"slm sync outputs": "everything below it",
              "slm sync --dry-run outputs/multirun/threshold_rule": "what would be sent"},
    exits={0: "everything below the folders is sent", 1: "a run was not sent; says why", 2: "a wrong call"},
    notes="DIR is a run's folder, a sweep's, or any above. Needs a login: `wandb login`, or WANDB_API_KEY. "
          "WANDB_BASE_URL names a server of your own.")
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=FOLDER)
@click.option("--dry-run", is_flag=True, help="list what would be sent, send nothing")
@click.option("--verify", is_flag=True, help="check the digests of large files of the runs too")
def main(folders: Sequence[Path], dry_run: bool, verify: bool) -> int:
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        print(f"slm sync: no such folder: {', '.join(missing)}.", file=sys.stderr)
        return 2
    return sync(folders, dry_run, verify)
