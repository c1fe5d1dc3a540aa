"""`slm report DIR...`: write DIR/report.html, one self-contained page, for a run or a whole sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from slm_exp.cli.command import FOLDER, command
from slm_exp.reporting.sweep import write_reports


@command("report", __doc__, examples={"slm report outputs/RUN_ID": "a run",
                                      "slm report outputs/multirun/threshold_rule": "a whole sweep"},
         exits={0: "every folder has its page; paths are on stdout", 1: "they have, and a run is damaged; says how",
                2: "a wrong call, or a folder that holds no run; the others have their pages"},
         notes="DIR is a run's folder (outputs/<run_id>) or a sweep's (outputs/multirun/<name>).")
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=FOLDER)
@click.option("--mixed-protocols", is_flag=True,
              help="on a sweep's page, show averages measured by different protocols side by side")
@click.option("--path", "paths", metavar="PATH.JSON", multiple=True, type=FOLDER,
              help="on a sweep's page, draw this result of `slm path` beside the runs (one that lies in the folder is "
                   "found); may be given several times")
@click.option("--figures", is_flag=True,
              help="also every plot as figures/NAME.pdf and .svg beside the page, set for a column of a paper")
@click.option("--verify", is_flag=True, help="check the digests of large files of the runs too")
def main(folders: Sequence[Path], mixed_protocols: bool, paths: Sequence[Path], figures: bool, verify: bool) -> int:
    return write_reports(folders, mixed_protocols, list(paths), verify, figures)
