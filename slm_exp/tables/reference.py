"""Published numbers (`conf/reference/*.yaml`) beside ours."""

# ruff: noqa: RUF012 (pydantic copies defaults)
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from slm_exp.core.documents import Document, read_document
from slm_exp.core.errors import ConfigError
from slm_exp.evaluation.base import SEVEN
from slm_exp.launch.compose import conf_dir
from slm_exp.runs.statistics.runs import Measured
from slm_exp.tables.definition import Row, Table
from slm_exp.tables.grid import Entry, Grid, fill
from slm_exp.tables.quantities import check_quantity, quantity


class Tolerance(Document):
    """How far apart numbers may be that agree."""

    points: float
    """Of accuracy, absolute."""
    share: float
    """Of any other number."""


class EntryText(Document):
    """An entry as the file has it."""

    model: str
    """A member of the model group, or another name where there is none."""
    what: str
    values: dict[str, float]
    """Quantity -> number, accuracies in per cent."""
    which: Literal["compressed", "dense"] = "compressed"
    runs: list[str] = []
    """The overrides that repeat it, of the groups that decide; `which: dense` has none."""
    block: str = ""
    """The part of their table that it stands in; marks hold among its compressed rows."""
    marks: dict[str, Literal["best", "second"]] = {}
    """Quantity -> what their table says of the number: printed bold, or underlined."""

    @field_validator("values", mode="before")
    @classmethod
    def _quantities(cls, values: Any) -> Any:
        """Null is what the source does not say."""
        if isinstance(values, dict):
            try:
                for name in values:
                    check_quantity(str(name), "values")
            except ConfigError as error:
                raise ValueError(str(error)) from None  # the reader says in which file and entry
            return {name: value for name, value in values.items() if value is not None}
        return values

    def problems(self, others: Sequence[EntryText]) -> list[str]:
        """What its numbers contradict: their range, their mean, the marks. `others`: compressed rows of its block."""
        out = []
        for name, value in self.values.items():
            if quantity(name).tasks and not 1 <= value <= 100:
                out.append(f"{name} = {value:g}; expected an accuracy in per cent, 1 to 100")
            elif name.startswith("perplexity.") and value <= 1:
                out.append(f"{name} = {value:g}; expected a perplexity > 1")
        tasks = [self.values[task] for task in SEVEN if task in self.values]
        average = self.values.get("average")
        if average is not None and len(tasks) == len(SEVEN) and abs(sum(tasks) / len(tasks) - average) > ROUNDING:
            out.append(f"average = {average:g}; the mean of the row's seven is {sum(tasks) / len(tasks):.3f}")
        for name, mark in self.marks.items():
            lower = name.startswith("perplexity.")
            there = sorted({e.values[name] for e in others if name in e.values}, reverse=not lower)
            place = ("best", "second").index(mark)
            if name not in self.values or there[place : place + 1] != [self.values[name]]:
                out.append(f"marks.{name} = {mark}; the {mark} there is "
                           f"{there[place] if place < len(there) else 'none'}, this row has {self.values.get(name)}")
        return out


class Claim(Document):
    """What an abstract or a thread says that is no cell of a table."""

    model: str
    text: str


class ReferenceText(Document):
    """A file of published numbers. One without source, protocol and tolerance cannot be compared."""

    source: str
    protocol: str
    tolerance: Tolerance
    entries: list[EntryText] = []
    claims: list[Claim] = []


DECIDES = ("method", "merge_rule", "width", "recovery")
"""Groups in which a row and a published entry must agree to be the same thing."""
ROUNDING = 0.011
"""How far a printed mean may be from that of its row: some sources cut where others round."""
UNSET = ("recovery=none", "width=none", "method=slm", "merge_rule=top_layer")


class Published(EntryText):
    """One row of somebody's table."""

    file: str
    source: str
    protocol: str
    tolerance: Tolerance


def published() -> list[Published]:
    """Every entry of every file of conf/reference. Raises ConfigError: a wrong key or quantity, by file and entry."""
    return [Published(file=file, source=one.source, protocol=one.protocol, tolerance=one.tolerance, **dict(entry))
            for file, one in _files().items() for entry in one.entries]


def claims(model: str) -> list[str]:
    """What abstracts and threads say of a model that is no cell of a table."""
    return [f"Published: {claim.text} [{one.source}]" for one in _files().values() for claim in one.claims
            if claim.model == model]


def read_file(path: Path) -> list[Published]:
    """A filled form. Raises ConfigError: it cannot be read, no number is filled in, or numbers contradict each other;
    names every entry."""
    one = read_document(ReferenceText, path)
    entries = [e for e in one.entries if e.values]
    if not entries:
        raise ConfigError(f"{path}: no number is filled in; expected some in `values`, null where the source has none.")
    groups: dict[tuple[str, str], list[EntryText]] = {}
    for e in entries:
        groups.setdefault((e.model, e.block), []).extend([e] if e.which == "compressed" else [])
    wrong = [f"{e.block + ', ' if e.block else ''}{e.what}: {problem}" for e in entries
             for problem in e.problems(groups[e.model, e.block])]
    if wrong:
        raise ConfigError(f"{path}: {'. '.join(wrong)}. Look at the source again.")
    return [Published(file=path.stem, source=one.source, protocol=one.protocol, tolerance=one.tolerance, **dict(entry))
            for entry in entries]


def form(table: Table) -> str:
    """An empty reference with every row and column of a table: what `read_file` reads when it is filled in."""
    shown = [column.show for column in table.columns if quantity(column.show).tasks or "." in column.show]
    values = f"{{{', '.join(f'{name}: null' for name in dict.fromkeys(shown))}}}"
    model = str(table.params.get("model"))
    lines = [f"# {table.title}: published numbers. null is what the source does not say; accuracies in per cent.",
             "# marks, if you like, what their table prints bold and underlined: {boolq: best, piqa: second}.",
             f"# Checked and put beside ours by: slm tables {table.name} model={model} --reference-file THIS DIR",
             "source: null # paper with number and table, or repository at a commit",
             "protocol: null # harness, shots, data",
             "tolerance: {points: 1.0, share: 0.02} # what counts as agreement: accuracy, other numbers", "entries:"]
    dense = False
    for block in table.blocks:
        for row in block.rows:
            if row.which == "dense" and dense:
                continue  # one for the whole file
            dense |= row.which == "dense"
            lines += [f"  - model: {model}", f"    what: {json.dumps(row.label, ensure_ascii=False)}"]
            lines += [f"    values: {values}"]
            lines += ["    which: dense"] if row.which == "dense" else [
                "    marks: {}", f"    block: {json.dumps(block.label, ensure_ascii=False)}",
                f"    runs: {json.dumps(_decides(table, row))}"]
    return "\n".join(lines) + "\n"


def _decides(table: Table, row: Row) -> list[str]:
    """Overrides of a row, of the groups that decide, without those that say nothing."""
    found = (o for o in (*table.runs, *row.runs) if o.partition("=")[0].partition(".")[0] in DECIDES)
    return [o for o in dict.fromkeys(found) if o not in UNSET]


def _files() -> dict[str, ReferenceText]:
    return {path.stem: read_document(ReferenceText, path)
            for path in sorted((conf_dir() / "reference").glob("*.yaml"))}


def matches(entry: Published, table: Table, row: Row) -> bool:
    """Whether a published entry is what a row of ours repeats: same model, method, size, rule, width, recovery."""
    if entry.model != table.params.get("model") or entry.which != row.which:
        return False
    if row.which == "dense":
        return True
    return set(_decides(table, row)) == set(entry.runs) - set(UNSET)


def reference_grid(table: Table, runs: Sequence[Measured], mixed_protocols: bool = False,
                   file: Path | None = None) -> Grid:
    """One row for every number of the table that has been published: ours, theirs, difference, verdict.

    Every difference stands there twice: absolute, and of what each side loses against its own dense model (points of
    accuracy; a ratio for other numbers), since harnesses differ.
    `file`: a filled form, in place of conf/reference.
    Raises:
        ConfigError: nothing published matches a cell of the table; says what there is for its model.
        ProtocolError: as in `fill`.
    """
    ours = fill(table, runs, mixed_protocols, marks=False)
    entries = read_file(file) if file else published()
    dense_of = {(e.file, e.model): e for e in entries if e.which == "dense"}
    grid = Grid(f"{table.name}-reference", f"{table.title}: ours beside published numbers",
                ["quantity", "ours", "published", "difference", "against dense", "verdict", "published by"],
                row_heads=("size", "row"))
    used: dict[str, Published] = {}
    seen: set[tuple[str, str]] = set()
    for block, (label, lines) in zip(table.blocks, ours.blocks, strict=True):
        rows = []
        at = next((j for j, row in enumerate(block.rows) if row.which == "dense"), None)
        ours_dense = None if at is None else lines[at][1]
        for row, (name, line) in zip(block.rows, lines, strict=True):
            for entry in entries:
                if not matches(entry, table, row) or (row.which == "dense" and (entry.file, entry.what) in seen):
                    continue
                seen.add((entry.file, entry.what))
                theirs_dense = dense_of.get((entry.file, entry.model)) if row.which != "dense" else None
                shown = [_compared(entry, column.show, line[k], ours_dense[k] if ours_dense else None, theirs_dense)
                         for k, column in enumerate(table.columns) if column.show in entry.values]
                rows += [(name, cells) for cells in shown]
                used |= {entry.file: entry} if shown else {}
        if rows:
            grid.blocks.append((label, rows))
    if not used:
        model = str(table.params.get("model"))
        have = sorted({f"{e.what} ({e.file})" for e in entries if e.model == model}) or ["nothing"]
        raise ConfigError(f"table = {table.name}: no number of it has been published for model = {model} with a source "
                          f"known here ({file or 'conf/reference'}). There is: {', '.join(have)}.")
    numbers = {cell.missing for _, rows in grid.blocks for _, line in rows for cell in line}
    grid.gaps = [gap for gap in ours.gaps if gap.number in numbers]
    grid.notes += [f"{e.file}: {e.source}. Protocol: {e.protocol}. Agrees: within {e.tolerance.points:g} points of "
                   f"accuracy, {100 * e.tolerance.share:g} % of other numbers." for e in used.values()]
    grid.notes += [note for note in ours.notes if note.startswith(("Protocol", "Model", "column"))]
    grid.notes += [] if file else claims(str(table.params.get("model")))
    grid.legend = ["Against dense: what ours loses against our dense model, less what theirs loses against theirs.",
                   "Protocols differ between harnesses, so a difference is not a failed reproduction by itself."]
    return grid


def _compared(entry: Published, show: str, ours: Entry, ours_dense: Entry | None, theirs_dense: Published | None
              ) -> list[Entry]:
    kind, theirs = quantity(show), entry.values[show]
    mine, apart, lost, verdict = Entry(missing=ours.missing), Entry(), Entry(), "not run"
    if isinstance(ours.value, (int, float)):
        off = ours.value - theirs
        allowed = entry.tolerance.points if kind.tasks else entry.tolerance.share * abs(theirs)
        mine, apart = Entry(ours.value, ours.half, kind.digits), Entry(f"{off:+.{kind.digits}f}")
        verdict = "agrees" if abs(off) <= allowed else "differs"
        whole, base = theirs_dense.values.get(show) if theirs_dense else None, ours_dense.value if ours_dense else None
        if whole and isinstance(base, (int, float)) and base:
            points = (ours.value - base) - (theirs - whole)
            ratio = (ours.value / base) / (theirs / whole) - 1
            lost = Entry(f"{points:+.{kind.digits}f}" if kind.tasks else f"{100 * ratio:+.1f} %")
            near = abs(points) <= allowed if kind.tasks else abs(ratio) <= entry.tolerance.share
            verdict = "agrees against dense" if near and verdict == "differs" else verdict
    return [Entry(show), mine, Entry(theirs, digits=kind.digits), apart, lost, Entry(verdict), Entry(entry.file)]
