"""Published numbers (`conf/reference/*.yaml`) beside ours."""

# ruff: noqa: RUF012 (pydantic copies defaults)
from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import field_validator

from slm_exp.core.documents import Document, read_document
from slm_exp.core.errors import ConfigError
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

    @field_validator("values")
    @classmethod
    def _quantities(cls, values: dict[str, float]) -> dict[str, float]:
        for name in values:
            check_quantity(name, "values")
        return values


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
UNSET = ("recovery=none", "width=none", "method=slm", "merge_rule=top_layer")


class Published(EntryText):
    """One row of somebody's table."""

    file: str
    source: str
    protocol: str
    tolerance: Tolerance


def published() -> list[Published]:
    """Every entry of every file of conf/reference.

    Raises:
        ConfigError: a wrong key or quantity, by file and entry.
    """
    return [Published(file=file, source=one.source, protocol=one.protocol, tolerance=one.tolerance, **dict(entry))
            for file, one in _files().items() for entry in one.entries]


def claims(model: str) -> list[str]:
    """What abstracts and threads say of a model that is no cell of a table."""
    return [f"Published: {claim.text} [{one.source}]" for one in _files().values() for claim in one.claims
            if claim.model == model]


def _files() -> dict[str, ReferenceText]:
    return {path.stem: read_document(ReferenceText, path)
            for path in sorted((conf_dir() / "reference").glob("*.yaml"))}


def matches(entry: Published, table: Table, row: Row) -> bool:
    """Whether a published entry is what a row of ours repeats: same model, method, size, rule, width, recovery."""
    if entry.model != table.params.get("model") or entry.which != row.which:
        return False
    if row.which == "dense":
        return True
    decides = {o for o in (*table.runs, *row.runs) if o.partition("=")[0].partition(".")[0] in DECIDES}
    return decides - set(UNSET) == set(entry.runs) - set(UNSET)


def reference_grid(table: Table, runs: Sequence[Measured], mixed_protocols: bool = False) -> Grid:
    """One row for every number of the table that has been published: ours, theirs, difference, verdict.

    Raises:
        ConfigError: nothing published matches a cell of the table; says what there is for its model.
        ProtocolError: as in `fill`.
    """
    ours = fill(table, runs, mixed_protocols, marks=False)
    entries = published()
    grid = Grid(f"{table.name}-reference", f"{table.title}: ours beside published numbers",
                ["quantity", "ours", "published", "difference", "verdict", "published by"], row_heads=("size", "row"))
    used: dict[str, Published] = {}
    seen: set[tuple[str, str]] = set()
    for block, (label, lines) in zip(table.blocks, ours.blocks, strict=True):
        rows = []
        for row, (name, line) in zip(block.rows, lines, strict=True):
            for entry in entries:
                if not matches(entry, table, row) or (row.which == "dense" and (entry.file, entry.what) in seen):
                    continue
                seen.add((entry.file, entry.what))
                shown = [_compared(entry, column.show, mine) for column, mine in zip(table.columns, line, strict=True)
                         if column.show in entry.values]
                rows += [(name, cells) for cells in shown]
                used |= {entry.file: entry} if shown else {}
        if rows:
            grid.blocks.append((label, rows))
    if not used:
        model = str(table.params.get("model"))
        have = sorted({f"{e.what} ({e.file})" for e in entries if e.model == model}) or ["nothing"]
        raise ConfigError(f"table = {table.name}: no number of it has been published for model = {model} with a source "
                          f"known here (conf/reference). There is: {', '.join(have)}.")
    numbers = {cell.missing for _, rows in grid.blocks for _, line in rows for cell in line}
    grid.gaps = [gap for gap in ours.gaps if gap.number in numbers]
    grid.notes += [f"{e.file}: {e.source}. Protocol: {e.protocol}. Agrees: within {e.tolerance.points:g} points of "
                   f"accuracy, {100 * e.tolerance.share:g} % of other numbers." for e in used.values()]
    grid.notes += [note for note in ours.notes if note.startswith(("Protocol", "Model", "column"))]
    grid.notes += claims(str(table.params.get("model")))
    grid.notes.append("Protocols differ between harnesses, so a difference is not a failed reproduction by itself.")
    return grid


def _compared(entry: Published, show: str, ours: Entry) -> list[Entry]:
    kind, theirs = quantity(show), entry.values[show]
    mine, apart, verdict = Entry(missing=ours.missing), Entry(), "not run"
    if isinstance(ours.value, (int, float)):
        off = ours.value - theirs
        allowed = entry.tolerance.points if kind.tasks else entry.tolerance.share * abs(theirs)
        mine, apart = Entry(ours.value, ours.half, kind.digits), Entry(f"{off:+.{kind.digits}f}")
        verdict = "agrees" if abs(off) <= allowed else "differs"
    return [Entry(show), mine, Entry(theirs, digits=kind.digits), apart, Entry(verdict), Entry(entry.file)]
