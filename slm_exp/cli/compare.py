"""`slm compare RUN [RUN ...]`: is the difference between runs one, or chance?"""

from __future__ import annotations

import json
from collections.abc import Sequence

import click

from slm_exp.cli.command import command
from slm_exp.runs.statistics.compare import compare, open_run, shown

ABOUT = """Perplexities by their ratio, second over first, on the same chunks of a text; accuracies in per cent, by
their difference on the same documents, second minus first. Both with standard error and 95 % interval. p is two-sided:
of the exact McNemar test for a task, of the paired bootstrap (10,000 resamples of documents within tasks, of chunks
within a text) for an average and a text. `corrected` holds for all tests of this command together (Holm); a difference
counts where it is below 0.05. Documents are what is resampled: how far a result moves with the calibration sample is
another question (sweep=calibration_seeds)."""


@command(
    "compare", __doc__,
    examples={"slm compare outputs/RUN_ID": "a run with its own dense model",
              "slm compare outputs/RUN_ID outputs/OTHER_ID": "two runs"},
    exits={0: "compared, also where nothing differs", 2: "a wrong call, or runs that cannot be compared"},
    notes="RUN is a run's folder; FOLDER:dense is its dense model, FOLDER:compressed its other. The first is what the "
          "others are compared with; a single run is compared with its own dense model. " + ABOUT)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="for programs")
@click.option("--verify", is_flag=True, help="check the digests of large files of the runs too")
def main(runs: Sequence[str], as_json: bool, verify: bool) -> int:
    if len(runs) == 1:
        alone = runs[0].removesuffix(":dense").removesuffix(":compressed")
        runs = [f"{alone}:dense", alone]
    models = [open_run(name, verify) for name in runs]
    rows = compare(models)
    print(json.dumps([row.to_json() for row in rows], indent=1) if as_json else shown(rows, models))
    return 0
