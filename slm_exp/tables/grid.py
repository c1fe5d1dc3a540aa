"""A table filled in: every entry with its spread, its mark, or the command that would fill it. Formats draw this."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from slm_exp.core.errors import ConfigError, ProtocolError
from slm_exp.core.format import places, rounded
from slm_exp.evaluation.protocol import mixed
from slm_exp.runs.record import say_unverified
from slm_exp.runs.schema import Record
from slm_exp.runs.state import DAMAGED, FINISHED
from slm_exp.runs.statistics.paired import LEVEL, holm
from slm_exp.runs.statistics.runs import Measured, difference
from slm_exp.runs.statistics.spread import spread
from slm_exp.tables.commands import commands
from slm_exp.tables.definition import Column, Row, Table
from slm_exp.tables.quantities import Quantity, Value, quantity
from slm_exp.tables.records import Finder

Placed = dict[tuple[int, int, int], list[Measured]]
"""(block, row, column) -> the finished runs of that place."""
Jobs = tuple[tuple[str, ...], ...]
BEST, SECOND, TIED = "best", "second", "tied"
MARKS = {
    BEST: "better than every other row of its block that is there",
    SECOND: "better than all but the best",
    TIED: "not to be told from the highest",
}


@dataclass(frozen=True)
class Entry:
    """What stands at one place."""

    value: Value = None
    half: float | None = None
    """What stands behind the plus-minus sign."""
    digits: int = 0
    mark: str = ""
    missing: int | None = None
    """Number of the gap, when runs are missing."""
    note: str = ""
    """In words, e.g. how many of the seeds there are."""

    @property
    def text(self) -> str:
        """The value as shown, as precise as its plus-minus; where that is missing, whole from 1,000 up. Empty where
        there is none."""
        whole = isinstance(self.value, float) and abs(self.value) >= 1000
        return "" if self.value is None else shown(self.value, 0 if whole else self.digits, self.half)

    @property
    def half_text(self) -> str:
        return "" if self.half is None else shown(self.half, self.digits, self.half)


@dataclass(frozen=True)
class Gap:
    """Runs that are missing, of one or more places."""

    number: int
    jobs: Jobs
    label: str
    why: str
    """`not run`, or how it failed."""


@dataclass
class Grid:
    """A filled table."""

    name: str
    title: str
    columns: list[str]
    blocks: list[tuple[str, list[tuple[str, list[Entry]]]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Below the table: what was measured, by what."""
    gaps: list[Gap] = field(default_factory=list)
    row_heads: tuple[str, str] = ("block", "row")
    tested: bool = False
    """Whether marks were looked for."""
    legend: list[str] = field(default_factory=list)
    """What a reader has to know to read the numbers: of a paper's table, the caption after its title."""

    def entries(self) -> Iterable[Entry]:
        return (entry for _, rows in self.blocks for _, row in rows for entry in row)


def shown(value: float | str, digits: int, half: float | None = None) -> str:
    """A number with fixed decimals, or with those its plus-minus is worth; text as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return rounded(value, places(value, half, digits))


def fill(table: Table, runs: Sequence[Measured], mixed_protocols: bool = False, marks: bool = True) -> Grid:
    """Fill a table from runs. Reads records and, for the marks, `samples/`; computes nothing anew. `marks`: whether to
    test rows against each other. Raises ProtocolError: one column's numbers were measured by different protocols, and
    `mixed_protocols` is not set; names two rows and the fields."""
    finder = Finder(runs)
    kinds = [quantity(column.show) for column in table.columns]
    found = {(i, j, k): [finder.find(overrides) for overrides in table.cell(row, column)]
             for i, block in enumerate(table.blocks) for j, row in enumerate(block.rows)
             for k, column in enumerate(table.columns)}
    grid = Grid(table.name, table.title, [column.heading for column in table.columns], notes=list(table.notes))
    gaps: dict[Jobs, Gap] = {}
    placed: Placed = {}
    for i, block in enumerate(table.blocks):
        rows = []
        for j, row in enumerate(block.rows):
            line = []
            for k, column in enumerate(table.columns):
                here = found[i, j, k] if row.which != "dense" else [
                    _dense(found, i, k, f"{block.label} {column.heading}".strip())]
                models = [m for m in here if m and _finished(m)]
                gap = None if row.which == "dense" else _gap(table, row, column, here, gaps, block.label)
                digits = kinds[k].digits if column.digits is None else column.digits
                entry = entry_of(models, kinds[k], digits, len(table.over))
                line.append(replace(entry, missing=gap.number if gap else None))
                placed[i, j, k] = models
            rows.append((row.label, line))
        grid.blocks.append((block.label, rows))
    grid.gaps = list(gaps.values())
    other = _one_protocol(table, kinds, placed, mixed_protocols)
    grid.notes += other.values()
    if marks:
        _mark(table, grid, kinds, placed, other)
    grid.legend = _explanations(table, grid, kinds)
    grid.notes += provenance([m for found in placed.values() for m in found])
    return grid


def _finished(m: Measured | None) -> bool:
    """Whether it counts: finished by any version, its files as recorded."""
    return m is not None and m.run.state == FINISHED


def _dense(found: Mapping[tuple[int, int, int], Sequence[Measured | None]], block: int, column: int,
           where: str) -> Measured | None:
    """The dense model of a block's column, as its own runs measured it: other columns may have other protocols. Raises
    ConfigError: they began with different models."""
    there = [(at[0], m) for at, models in found.items() if at[2] == column for m in models if m and _finished(m)]
    here = [m for at, m in there if at == block]
    models = here or [m for _, m in there]
    digests = {m.record.model.digest: m.name for m in models}
    if len(digests) < 2:
        return dense_of(models)
    if not here:
        return None
    a, b, *_ = digests.values()
    raise ConfigError(f"{where}: runs {a} and {b} began with different models, so there is no one dense row. Give "
                      "every model a block of its own (each: {model: [...]}).")


def dense_of(models: Iterable[Measured]) -> Measured | None:
    """The dense model as a run of the table measured it: of the first by run_id, so always the same."""
    first = min(filter(_finished, models), key=lambda m: m.record.run_id, default=None)
    return replace(first, which="dense") if first else None


def _gap(table: Table, row: Row, column: Column, models: Sequence[Measured | None], gaps: dict[Jobs, Gap],
         block: str) -> Gap | None:
    """The missing runs of a cell; those of several columns are one gap."""
    left = [(tuple(job), m) for job, m in zip(table.cell(row, column), models, strict=True) if not _finished(m)]
    if not left:
        return None
    jobs = tuple(job for job, _ in left)
    if jobs not in gaps:
        why = next((_reason(m) for _, m in left if m is not None), "not run")
        gaps[jobs] = Gap(len(gaps) + 1, jobs, ", ".join(filter(None, (block, row.label))), why)
    return gaps[jobs]


def _reason(m: Measured) -> str:
    """Why a run that is there does not count."""
    error, state = m.record.error, m.run.state
    if state == DAMAGED:
        return f"damaged: {m.run.folder}: {'; '.join(map(str, m.run.problems))}"
    if error.message:
        return f"failed in stage {error.stage}: {error.message.splitlines()[0][:200]}"
    return f"{state}, not finished"


def entry_of(models: Sequence[Measured], kind: Quantity, digits: int, wanted: int) -> Entry:
    """One run: its value and its own error. Several: the mean and its 95 % interval; text by majority."""
    values = [value for m in models if (value := kind.value(m)) is not None]
    if not values:
        return Entry(digits=digits)
    note = f"{len(values)} of {wanted}" if 1 < wanted != len(values) and models[0].which != "dense" else ""
    numbers = [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) < len(values):
        [(most, times)] = Counter(map(str, values)).most_common(1)
        return Entry(f"{most} ({times} of {len(values)})" if wanted > 1 else most, digits=digits, note=note)
    if len(numbers) == 1:
        return Entry(numbers[0], kind.stderr(models[0]) if wanted == 1 or models[0].which == "dense" else None,
                     digits, note=note)
    found = spread(numbers)
    return Entry(found.mean, found.half, max(digits, 1), note=note)


def _one_protocol(table: Table, kinds: Sequence[Quantity], placed: Placed, allowed: bool) -> dict[int, str]:
    """Columns whose numbers were measured by different protocols, with what differs; refused unless `allowed`."""
    out: dict[int, str] = {}
    for k, column in enumerate(table.columns):
        measured = [(f"{_label(table, i, j)} (run {m.name})", kinds[k].protocol(m))
                    for (i, j, at), models in placed.items() if at == k for m in models]
        if (reason := mixed(measured)) and not allowed:
            raise ProtocolError(f"column {column.heading}: {reason}. Their numbers do not belong in one table: run "
                                "them with the same evaluation, or say --mixed-protocols to see them side by side.")
        if reason:
            out[k] = f"column {column.heading}: {reason}"
    return out


def _label(table: Table, i: int, j: int) -> str:
    return ", ".join(filter(None, (table.blocks[i].label, table.blocks[i].rows[j].label)))


def _mark(table: Table, grid: Grid, kinds: Sequence[Quantity], placed: Placed, other_protocols: dict[int, str]) -> None:
    """Best, second and tied of every column of every block, where the paired test says so."""
    for i, k in itertools.product(range(len(table.blocks)), range(len(table.columns))):
        if not kinds[k].tasks or k in other_protocols:
            continue
        head, lines = f"column {table.columns[k].heading}: no marks", [line for _, line in grid.blocks[i][1]]
        there = {j: placed[i, j, k] for j, row in enumerate(table.blocks[i].rows) if row.which != "dense"}
        some = [table.blocks[i].rows[j].label for j, models in there.items() if 0 < len(models) < len(table.over)]
        if some:
            grid.notes.append(f"{head}, for {', '.join(some)} has only some of its runs.")
            continue
        rows = {j: models for j, models in there.items()
                if len(models) == len(table.over) and lines[j][k].value is not None}
        values = {j: float(lines[j][k].value or 0) for j in rows}
        marks = marked(values, partial(_p_value, rows, kinds[k].tasks))
        if marks is None and len(rows) > 1:
            grid.notes.append(f"{head}, for want of results on the same documents in samples/.")
        grid.tested |= bool(marks is not None and len(rows) > 1)
        for j, mark in (marks or {}).items():
            lines[j][k] = replace(lines[j][k], mark=mark)


def _p_value(rows: Mapping[int, Sequence[Measured]], tasks: Sequence[str], a: int, b: int) -> float | None:
    found = difference(rows[a], rows[b], tasks, interval=False)
    return found.p if found else None


def marked(values: dict[int, float], p_value: Callable[[int, int], float | None]) -> dict[int, str] | None:
    """Which rows earn a mark.

    Every pair of rows is tested, and all tests together are corrected (Holm). `best` beats all others; `second` beats
    all others but the best; where there is no best, every row that the highest does not beat is `tied` with it.
    Returns:
        None where a pair cannot be tested.
    """
    order = sorted(values, key=lambda j: (-values[j], j))
    pairs = list(itertools.combinations(order, 2))
    p_values = [p_value(a, b) for a, b in pairs]
    known = [p for p in p_values if p is not None]
    if len(known) < len(pairs):
        return None
    beats = {pair: p < LEVEL for pair, p in zip(pairs, holm(known), strict=True)}

    def first_of(rows: Sequence[int]) -> bool:
        return len(rows) > 1 and all(beats[rows[0], other] for other in rows[1:])

    if not first_of(order):
        return {j: TIED for j in order if j == order[0] or not beats[order[0], j]} if len(order) > 1 else {}
    return {order[0]: BEST} | ({order[1]: SECOND} if first_of(order[1:]) else {})


def _explanations(table: Table, grid: Grid, kinds: Sequence[Quantity]) -> list[str]:
    """What a reader has to know to read the numbers."""
    out = ["Accuracies in per cent."] if any(kind.tasks for kind in kinds) else []
    spreads = {kinds[k].spread for _, rows in grid.blocks for _, line in rows for k, e in enumerate(line)
              if e.half is not None}
    dense = any(row.which == "dense" for block in table.blocks for row in block.rows)
    if len(table.over) > 1:
        out.append(f"± is the 95 % interval of the mean over {len(table.over)} runs a cell "
                   f"({table.over[0][0].partition('=')[0]})"
                   f"{'; for the dense model the standard error over documents' if dense else ''}.")
    elif "error" in spreads:
        out.append("± is the standard error over documents.")
    if "quartiles" in spreads:
        out.append("Speeds are medians; ± is half the distance of the quartiles.")
    used = {e.mark for e in grid.entries()} - {""}
    if grid.tested:
        test = ("paired bootstrap over documents and Student's paired test over seeds, the larger p" if
                len(table.over) > 1 else "exact McNemar test per task, paired bootstrap for the average")
        marks = "; ".join(f"{mark}: {MARKS[mark]}" for mark in MARKS if mark in used) or "no row is marked"
        out.append(f"Marks: {marks}. {test[0].upper()}{test[1:]}, Holm's correction over all pairs of a block and "
                   f"column, level {LEVEL:g}.{' The dense model takes no part.' if dense else ''}")
    return out


def provenance(runs: Sequence[Measured], n: int | None = None) -> list[str]:
    """How many runs, by which commit, of which model, by which protocol; and whether they could be checked. `n`: runs,
    where one that lies in two folders counts twice."""
    out = []
    records = {m.record.run_id: m.record for m in runs}.values()
    if versions := sorted({f"slm_exp {r.versions.get('slm_exp')}{_commit(r)}" for r in records}):
        out.append(f"{n or len(records)} runs, by {', '.join(versions)}.")
    out += [f"Model: {note}." for note in sorted({m.record.model.note for m in runs} - {""})]
    protocols = {p.get("hash"): p.get("fields") or {} for m in runs if (p := m.evaluation.protocol)}
    if len(protocols) == 1:
        [(name, fields)] = protocols.items()
        limit = "every document" if fields.get("limit") is None else f"the first {fields['limit']} documents a task"
        dtype = f", {fields['dtype']}" if fields.get("dtype") else ""
        if fields.get("tasks"):
            out.append(f"Protocol {name}: lm-eval {fields.get('lm_eval')}, {limit}{dtype}.")
        elif fields.get("perplexity"):
            out.append(f"Protocol {name}: perplexity of {', '.join(map(str, fields['perplexity']))}{dtype}.")
    timed = [r.speed.protocol for r in records if r.speed.protocol]
    if timed and all(p == timed[0] for p in timed):
        speed = timed[0]
        threads = f"{speed['threads']} threads" if speed.get("threads") else ""
        where = ", ".join(map(str, filter(None, (speed.get("dtype"), speed.get("device"), threads))))
        out.append(f"Speed: {speed.get('runs')} runs in turn with the dense model, "
                   f"the first {speed.get('discard')} left out; {where}.")
    unverified = say_unverified({m.run.folder: m.run for m in runs}.values())
    return [*out, *([unverified] if unverified else [])]


def _commit(record: Record) -> str:
    dirty = " with changes" if record.git.dirty else ""
    return f" at {record.git.commit[:10]}{dirty}" if record.git.commit else ""


def missing_commands(grid: Grid) -> list[str]:
    """What fills every gap, as few multirun commands."""
    return commands(list(dict.fromkeys(job for gap in grid.gaps for job in gap.jobs)), grid.name)
