"""`slm compare RUN [RUN ...]`: is the difference between runs one, or chance?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from slm_exp.cli.command import command
from slm_exp.core.errors import ConfigError, SlmError

ABOUT = """Accuracies in per cent, differences on the same documents: second minus first, with standard error and 95 %
interval. p is two-sided: of the exact McNemar test for a task, of the paired bootstrap (10,000 resamples of documents
within tasks) for the average. `corrected` holds for all tests of this command together (Holm); a difference counts
where it is below 0.05. The documents are what is resampled: how far a result moves with the calibration sample is
another question (sweep=calibration_seeds)."""


@command(
    "compare", __doc__,
    examples={"slm compare outputs/RUN_ID": "a run with its own dense model",
              "slm compare outputs/RUN_ID outputs/OTHER_ID": "two runs"},
    exits={0: "compared, also where nothing differs", 2: "a wrong call, or runs that cannot be compared"},
    notes="RUN is a run's folder; FOLDER:dense is its dense model. The first is what the others are compared with; a "
          "single run is compared with its own dense model. " + ABOUT,
)  # fmt: skip
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="for programs")
def main(runs: Sequence[str], as_json: bool) -> int:
    """See `slm compare --help`."""
    if len(runs) == 1:
        runs = [f"{runs[0].removesuffix(':dense')}:dense", runs[0]]
    found = compare([open_run(run) for run in runs])
    print(json.dumps(found, indent=1) if as_json else shown(found))
    return 0


def open_run(told: str) -> Any:
    """A model that a finished run measured, from `FOLDER` or `FOLDER:dense`.

    Raises:
        ConfigError: no record there, not finished, or nothing measured.
    """
    from slm_exp.runs.record import load_record
    from slm_exp.runs.statistics.runs import Measured

    path, _, which = told.rpartition(":") if told.endswith((":dense", ":compressed")) else (told, "", "")
    folder = Path(path)
    try:
        record = load_record(folder)
    except SlmError as error:
        raise ConfigError(f"RUN = {told}; expected the folder of a run, with a record.json (outputs/RUN_ID): "
                          f"{error}") from None
    model = Measured(told, folder, record, which or "compressed")
    if not model.evaluation.get("tasks"):
        raise ConfigError(f"RUN = {told}; expected a run that has measured tasks on its {model.which} model, and this "
                          f"one (status {record.get('status')}) has none.")
    return model


def compare(models: Sequence[Any]) -> list[dict[str, Any]]:
    """Every model against the first: per task and on average.

    Raises:
        ProtocolError: measured by different protocols; names two and the fields.
        ConfigError: a task's documents are not the same, or samples/ is not there.
    """
    from slm_exp.evaluation.base import SEVEN
    from slm_exp.evaluation.protocol import require_same
    from slm_exp.runs.statistics.paired import LEVEL, holm
    from slm_exp.runs.statistics.runs import difference
    from slm_exp.runs.statistics.scores import metric_of

    require_same({m.name: m.protocol for m in models}, "Run both with the same evaluation group.")
    first, *others = models
    rows: list[dict[str, Any]] = []
    for other in others:
        tasks = [task for task in first.evaluation["tasks"] if task in other.evaluation["tasks"]]
        asked = [(task, [task]) for task in tasks]
        if all(m.evaluation.get("average") is not None for m in (first, other)):
            asked.append(("average", list(SEVEN)))
        for name, parts in asked:
            found = difference([first], [other], parts)
            if found is None:
                raise ConfigError(f"{first.name} and {other.name}: no document-by-document results of {name} for the "
                                  "same documents; expected them in samples/ of both runs, as evaluation leaves them.")
            metric = metric_of(name, first.scores(name)) or "mean of seven"
            a, b = (m.evaluation["average"] if name == "average" else m.scores(name)[metric] for m in (first, other))
            n = sum(first.scores(task)["n"] for task in parts)
            rows.append({"first": first.name, "second": other.name, "task": name, "metric": metric, "n": n,
                         "first_score": a, "second_score": b, "difference": found.value, "stderr": found.stderr,
                         "interval": [found.low, found.high], "test": found.test, "p": found.p})
    for row, corrected in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row |= {"corrected": corrected, "counts": corrected < LEVEL}
    return rows


def shown(rows: Sequence[dict[str, Any]]) -> str:
    """Aligned text, one block per pair of runs."""
    lines: list[str] = []
    for first, second in dict.fromkeys((row["first"], row["second"]) for row in rows):
        lines += [f"first   {first}", f"second  {second}",
                  f"{'task':<14} {'metric':<13} {'n':>6} {'first':>6} {'second':>6} {'difference':>16} "
                  f"{'95 % interval':>17} {'p':>8} {'corrected':>9}"]
        for row in rows:
            if (row["first"], row["second"]) == (first, second):
                lines.append(_line(row))
        lines.append("")
    return "\n".join([*lines, f"Holm's correction over {len(rows)} tests; * counts at 0.05. {_per_row(rows)}"])


def _line(row: dict[str, Any]) -> str:
    difference = f"{100 * row['difference']:+.2f}"
    difference += "" if row["stderr"] is None else f" ± {100 * row['stderr']:.2f}"
    low, high = row["interval"]
    interval = "" if low is None else f"[{100 * low:+.2f}, {100 * high:+.2f}]"
    return (f"{row['task']:<14} {row['metric']:<13} {row['n']:>6} {100 * row['first_score']:>6.2f} "
            f"{100 * row['second_score']:>6.2f} {difference:>16} {interval:>17} {row['p']:>8.2g} "
            f"{row['corrected']:>9.2g}{' *' if row['counts'] else ''}")


def _per_row(rows: Sequence[dict[str, Any]]) -> str:
    names = {"mcnemar": "exact McNemar", "bootstrap": "paired bootstrap"}
    used = list(dict.fromkeys(names[row["test"]] for row in rows))
    return f"Tests: {', '.join(used)}; see slm compare --help."
