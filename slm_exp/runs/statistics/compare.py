"""Whether differences between runs are more than chance: what `slm compare` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from slm_exp.core.errors import ConfigError, SlmError
from slm_exp.core.format import places, printable, rounded, with_error
from slm_exp.evaluation.base import SEVEN
from slm_exp.evaluation.protocol import require_same
from slm_exp.evaluation.report import metric_of
from slm_exp.runs.record import Run, say_unverified
from slm_exp.runs.statistics.paired import LEVEL, holm
from slm_exp.runs.statistics.runs import Measured, difference, ratio_of, text_difference, text_scores
from slm_exp.runs.statistics.scores import main_score

TIMES = "times"


@dataclass(frozen=True)
class Compared:
    """One test: a task, the average, or a text's perplexity, of a second model against a first one."""

    first: str
    second: str
    task: str
    metric: str
    n: int
    first_score: float | None
    second_score: float | None
    difference: float
    """Second minus first; of perplexities (metric `times`) second over first."""
    stderr: float | None
    interval: tuple[float | None, float | None]
    test: str
    p: float
    corrected: float = 1.0
    """For all tests of the command, by Holm's method."""

    def to_json(self) -> dict[str, object]:
        """As `slm compare --json` prints it."""
        return {**asdict(self), "counts": self.counts}

    @property
    def counts(self) -> bool:
        return self.corrected < LEVEL


def open_run(name: str, verify: bool = False) -> Measured:
    """A model that a run measured, from `FOLDER` or `FOLDER:dense`. Raises ConfigError: no record there, damaged, or
    nothing measured."""
    path, _, which = name.rpartition(":") if name.endswith((":dense", ":compressed")) else (name, "", "")
    try:
        run = Run.read(Path(path), verify)
    except SlmError as error:
        folder, colon, word = path.rpartition(":")
        if colon and Path(folder).is_dir():
            raise ConfigError(f"RUN = {path}: a run has no model {printable(word)}; expected {folder}:dense or "
                              f"{folder}:compressed.") from None
        raise ConfigError(f"RUN = {path}: {error}") from None
    if run.problems:
        raise ConfigError(f"RUN = {name}; expected a run as it was written, and {run.damage}")
    model = Measured(run, which or "compressed", name)
    if not (model.evaluation.tasks or model.evaluation.perplexity):
        raise ConfigError(f"RUN = {name}; expected a run that has measured tasks or texts on its {model.which} model, "
                          f"and this one (status {run.record.status or None}) has none.")
    return model


def compare(models: Sequence[Measured]) -> list[Compared]:
    """Every model against the first: texts whose chunks both runs kept, then tasks and their average.

    Raises:
        ProtocolError: measured by different protocols; names two and the fields.
        ConfigError: a task's documents are not the same, or samples/ is not there.
    """
    require_same({m.name: m.evaluation.protocol for m in models}, "Run both with the same evaluation group.")
    first, *others = models
    rows: list[Compared] = []
    for other in others:
        for corpus in first.evaluation.perplexity:
            if text := text_difference([first], [other], [corpus]):
                ratio = ratio_of(text)
                a, b = (m.evaluation.perplexity[corpus] for m in (first, other))
                rows.append(Compared(first.name, other.name, f"perplexity {corpus}", TIMES, _chunks(first, corpus), a,
                                     b, ratio.value, ratio.stderr, (ratio.low, ratio.high), text.test, text.p))
        tests = [(task, [task]) for task in first.evaluation.tasks if task in other.evaluation.tasks]
        if all(m.evaluation.average is not None for m in (first, other)):
            tests.append(("average", list(SEVEN)))
        for name, parts in tests:
            found = difference([first], [other], parts)
            if found is None:
                raise ConfigError(f"{first.name} and {other.name}: no document-by-document results of {name} for the "
                                  "same documents; expected them in samples/ of both runs, as evaluation leaves them.")
            a, b = (m.evaluation.average if name == "average" else main_score(name, m.scores(name))
                    for m in (first, other))
            n = sum(int(first.scores(task)["n"] or 0) for task in parts)
            metric = metric_of(name, first.scores(name)) or "mean of seven"
            rows.append(Compared(first.name, other.name, name, metric, n, a, b, found.value, found.stderr,
                                 (found.low, found.high), found.test, found.p))
    return [replace(row, corrected=corrected)
            for row, corrected in zip(rows, holm([row.p for row in rows]), strict=True)]


def _chunks(m: Measured, corpus: str) -> int:
    found = text_scores(m, corpus)
    return 0 if found is None else len(found[1])


def shown(rows: Sequence[Compared], models: Sequence[Measured] = ()) -> str:
    """Aligned text, one block per pair of runs."""
    lines = []
    for first, second in dict.fromkeys((row.first, row.second) for row in rows):
        lines += [f"first   {first}", f"second  {second}",
                  f"{'task':<24} {'metric':<13} {'n':>6} {'first':>8} {'second':>8} {'difference':>16} "
                  f"{'95 % interval':>17} {'p':>8} {'corrected':>9}"]
        lines += [*(_line(row) for row in rows if (row.first, row.second) == (first, second)), ""]
    names = {"mcnemar": "exact McNemar", "bootstrap": "paired bootstrap"}
    used = dict.fromkeys(names[row.test] for row in rows)
    lines.append(f"Holm's correction over {len(rows)} tests; * counts at 0.05. Tests: {', '.join(used)}; see slm "
                 "compare --help.")
    if unverified := say_unverified({m.run.folder: m.run for m in models}.values()):
        lines.append(unverified)
    return printable("\n".join(lines))


def _line(row: Compared) -> str:
    text = row.metric == TIMES
    factor, digits = (1, 2) if text else (100, 2)
    stderr = None if row.stderr is None else factor * row.stderr
    apart = with_error(factor * row.difference, stderr, digits, sign=not text)
    decimals = places(factor * row.difference, stderr, digits)
    low, high = row.interval
    interval = "" if low is None or high is None else f"[{_end(low * factor, decimals, not text)}, " \
                                                      f"{_end(high * factor, decimals, not text)}]"
    return (f"{row.task:<24} {row.metric:<13} {row.n:>6} {factor * (row.first_score or 0):>8.2f} "
            f"{factor * (row.second_score or 0):>8.2f} {apart:>16} {interval:>17} {row.p:>8.2g} "
            f"{row.corrected:>9.2g}{' *' if row.counts else ''}")


def _end(value: float, digits: int, sign: bool) -> str:
    text = rounded(value, digits)
    return f"+{text}" if sign and float(text) > 0 else text
