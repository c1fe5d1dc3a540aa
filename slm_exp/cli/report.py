"""`slm report DIR...`: write DIR/report.html, one self-contained page, for a run or a whole sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slm_exp.cli.parser import Parser


def parser() -> Parser:
    """The command line of `slm report`."""
    p = Parser(
        "report", __doc__,
        examples={"slm report outputs/RUN_ID": "a run", "slm report outputs/multirun/threshold_rule": "a whole sweep"},
        exits={0: "every folder has its page; paths are on stdout", 1: "one has not; says why", 2: "a wrong call"},
    )
    p.add_argument("folders", metavar="DIR", nargs="+", type=Path,
                   help="a run's folder (outputs/<run_id>) or a sweep's (outputs/multirun/<name>)")
    p.add_argument("--mixed-protocols", action="store_true",
                   help="on a sweep's page, show averages measured by different protocols side by side")
    p.add_argument("--path", metavar="PATH.JSON", action="append", default=[], type=Path,
                   help="on a sweep's page, draw this result of `slm path` beside the runs (one that lies in the "
                        "folder is found); may be given several times")
    p.add_argument("--verify", action="store_true", help="check the digests of large files of the runs too")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0: every folder has its page, and their paths are on stdout."""
    args = parser().parse_args(argv)
    from slm_exp.reporting.sweep import write_reports

    return write_reports(args.folders, args.mixed_protocols, args.path, args.verify)
