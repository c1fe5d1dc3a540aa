"""`slm compare RUN [RUN ...]`: is the difference between runs one, or chance?"""

from __future__ import annotations

import json
from collections.abc import Sequence

from slm_exp.cli.parser import Parser

ABOUT = """Accuracies in per cent, differences on the same documents: second minus first, with standard error and 95 %
interval. p is two-sided: of the exact McNemar test for a task, of the paired bootstrap (10,000 resamples of documents
within tasks) for the average. `corrected` holds for all tests of this command together (Holm); a difference counts
where it is below 0.05. The documents are what is resampled: how far a result moves with the calibration sample is
another question (sweep=calibration_seeds)."""


def parser() -> Parser:
    """The command line of `slm compare`."""
    p = Parser(
        "compare", __doc__,
        examples={"slm compare outputs/RUN_ID": "a run with its own dense model",
                  "slm compare outputs/RUN_ID outputs/OTHER_ID": "two runs"},
        exits={0: "compared, also where nothing differs", 2: "a wrong call, or runs that cannot be compared"},
        notes=ABOUT,
    )  # fmt: skip
    p.add_argument("runs", metavar="RUN", nargs="+",
                   help="a run's folder; FOLDER:dense is its dense model. The first is what the others are compared "
                        "with; a single run is compared with its own dense model")  # fmt: skip
    p.add_argument("--json", action="store_true", help="for programs")
    p.add_argument("--verify", action="store_true", help="check the digests of large files of the runs too")
    return p


def main(argv: Sequence[str]) -> int:
    """Print one block per comparison. Exit status 0, also where nothing differs; 2 for runs that cannot be compared."""
    args = parser().parse_args(list(argv))
    from slm_exp.runs.statistics.compare import compare, open_run, shown

    names = args.runs if len(args.runs) > 1 else [f"{args.runs[0].removesuffix(':dense')}:dense", args.runs[0]]
    models = [open_run(name, args.verify) for name in names]
    rows = compare(models)
    print(json.dumps([row.to_json() for row in rows], indent=1) if args.json else shown(rows, models))
    return 0
