"""`slm sync DIR...`: send offline W&B runs to the server, each once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from slm_exp.cli.parser import Parser


def parser() -> Parser:
    """The command line of `slm sync`."""
    p = Parser(
        "sync", __doc__,
        examples={"slm sync outputs": "everything below it", "slm sync --dry-run outputs/multirun/threshold_rule":
                  "what would be sent"},
        exits={0: "everything below the folders is sent", 1: "a run was not sent; says why", 2: "a wrong call"},
        notes="Needs a login: `wandb login`, or WANDB_API_KEY. WANDB_BASE_URL names a server of your own.",
    )  # fmt: skip
    p.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="a run's folder, a sweep's, or any above")
    p.add_argument("--dry-run", action="store_true", help="list what would be sent, send nothing")
    p.add_argument("--verify", action="store_true", help="check the digests of large files of the runs too")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0: everything below the folders is on the server."""
    args = parser().parse_args(argv)
    from slm_exp.runs.offline import sync

    missing = [str(folder) for folder in args.folders if not folder.is_dir()]
    if missing:
        print(f"slm sync: no such folder: {', '.join(missing)}.", file=sys.stderr)
        return 2
    return sync(args.folders, args.dry_run, args.verify)
