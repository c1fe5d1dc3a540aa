"""`slm tables NAME [PARAM=VALUE ...] [DIR ...]`: a table of a paper from records.

NAME is a file of conf/table, a .yaml file of your own, or `sweep`: one row per run. DIR are folders with runs (outputs
when none is given). A table's parameters are set like overrides: slm tables main model=llama2_7b outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slm_exp.cli.parser import Parser


def parser() -> Parser:
    """The command line of `slm tables`."""
    p = Parser(
        "tables", __doc__,
        examples={
            "slm tables sweep outputs/multirun/threshold_rule": "one row per run",
            "slm tables main outputs --missing": "the commands that fill what is missing",
            "slm tables main outputs --format md,tex --out tables": "two formats, into files",
        },
        exits={0: "the table is written", 2: "a wrong call, or numbers of different protocols"},
        notes=_epilog(),
    )  # fmt: skip
    p.add_argument("name", metavar="NAME", help="sweep, a table of conf/table, or a .yaml file")
    p.add_argument("words", metavar="PARAM=VALUE or DIR", nargs="*",
                   help="parameters of the table, folders of runs")
    p.add_argument("--format", default="md", metavar="md,tex,csv,html",
                   help="one goes to stdout, several need --out (default md)")
    p.add_argument("--out", type=Path, metavar="DIR", help="write DIR/NAME.FORMAT instead")
    p.add_argument("--columns", metavar="A,B", help="these columns, in this order: of the table, or any quantity")
    p.add_argument("--missing", action="store_true", help="print the commands that fill what is missing")
    p.add_argument("--reference", action="store_true",
                   help="ours beside published numbers (conf/reference), with difference and verdict")
    p.add_argument("--mixed-protocols", action="store_true", help="show numbers of different protocols too")
    p.add_argument("--verify", action="store_true", help="check the digests of large files of the runs too")
    return p


def main(argv: Sequence[str]) -> int:
    """Print a table, write it in several formats, or print what is missing. Exit status 0; 2 for a wrong call."""
    args = parser().parse_intermixed_args(list(argv))
    from slm_exp.tables.build import draw

    return draw(args.name, args.words, args.format, args.out, args.columns, args.missing, args.reference,
                args.mixed_protocols, args.verify)


def _epilog() -> str:
    from slm_exp.tables.definition import summaries

    lines = [f"  {name:<12} {title} (params: {', '.join(params)})" for name, title, params in summaries()]
    more = "Parameters of all: sizes, seeds, evaluation, calibration, extra; conf/table/_models.yaml has their values."
    return "\n".join(["tables:", *lines, "", more])
