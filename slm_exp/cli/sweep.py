"""`slm sweep`: how a sweep stands, finish what is missing, run cells again. Needs nothing but the sweep's folder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from slm_exp.cli.parser import Parser
from slm_exp.core.errors import ConfigError
from slm_exp.runs.sweep import FINISHED, SweepFolder, table


def status(folder: Path, as_json: bool = False) -> int:
    """Print one line per cell. Exit status 0 when all are finished, else 1."""
    cells = SweepFolder.read(folder).cells()
    print(json.dumps([c.to_json() for c in cells], indent=1) if as_json else table(cells))
    return int(any(c.state != FINISHED for c in cells))


def launch(folder: Path, select: str, extra: Sequence[str]) -> int:
    """Run the cells of the folder's definition that `select` names (missing, failed, all), as its command would.

    Args:
        extra: overrides on top of the command's, e.g. hydra.launcher.workers=4; they must not change what a cell is.

    Raises:
        ConfigError: not a sweep's folder, or an override in `extra` that belongs to the cells.
    """
    from slm_exp.cli.run import main as run
    from slm_exp.launch.plugins import override

    sweep = SweepFolder.read(folder)
    for given in extra:
        if not given.startswith(("hydra.", "hydra/")):
            raise ConfigError(
                f"{given}; expected Hydra's own settings (hydra.launcher.workers=2, hydra/launcher=basic): a sweep's "
                "cells are what they are. Other cells are another multirun, into the same folder if you like."
            )
    path, argv = folder.resolve(), sweep.argv
    if any(o.startswith("hydra/launcher=") for o in extra):  # another launcher has other settings
        argv = [o for o in argv if not o.startswith(("hydra/launcher", "hydra.launcher"))]
    if Path(sweep.cwd).is_dir():  # relative paths in overrides mean the folder the command ran in
        os.chdir(sweep.cwd)
    elif sweep.cwd:
        print(f"the command ran in {sweep.cwd}, which is gone; relative paths now mean {Path.cwd()}", file=sys.stderr)
    return run(["-m", *argv, *extra, override("hydra.sweep.dir", path), f"hydra.sweeper.select={select}"])


def parser() -> Parser:
    """The command line of `slm sweep`."""
    p = Parser(
        "sweep", __doc__,
        examples={
            "slm sweep status outputs/multirun/threshold_rule": "one line per cell",
            "slm sweep resume outputs/multirun/threshold_rule hydra.launcher.workers=2": "what is missing",
            "slm sweep rerun --failed outputs/multirun/threshold_rule": "those that failed or died",
        },
        exits={0: "every cell is finished", 1: "a cell is not; it is named", 2: "a wrong call, or a folder in use"},
    )  # fmt: skip
    commands = p.add_subparsers(dest="command", required=True, metavar="status|resume|rerun")
    asking = commands.add_parser("status", help="one line per cell; exit status 1 while one is not finished")
    asking.add_argument("--json", action="store_true", help="for programs")
    resuming = commands.add_parser("resume", help="run every cell that is not finished; recompute nothing that is")
    again = commands.add_parser("rerun", help="run every cell again; an old record stays as record.before.json")
    again.add_argument("--failed", action="store_true", help="only those that failed or died")
    for command in (asking, resuming, again):
        command.add_argument("dir", type=Path, metavar="DIR", help="the sweep's folder, outputs/multirun/NAME")
    for command in (resuming, again):
        command.add_argument("overrides", nargs="*", help="Hydra settings for now, e.g. hydra.launcher.workers=2")
    return p


def main(argv: Sequence[str]) -> int:
    """`slm sweep status|resume|rerun DIR`. Exit status 0 only when every cell is finished; 2 for a wrong call."""
    args = parser().parse_args(list(argv))
    if args.command == "status":
        return status(args.dir, args.json)
    select = "missing" if args.command == "resume" else "failed" if args.failed else "all"
    return launch(args.dir, select, args.overrides)
