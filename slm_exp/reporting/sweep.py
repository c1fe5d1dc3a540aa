"""`report.html` of a sweep: its runs side by side, what differs between them and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_exp.evaluation.protocol import mixed
from slm_exp.files import write_text
from slm_exp.reporting import charts
from slm_exp.reporting.page import environment, read_record, write_report
from slm_exp.tracking.base import flat

UNINTERESTING = ("tracking/", "runtime/", "cache/", "save_model")
"""Settings that change no result: never a column."""


@dataclass(frozen=True)
class Row:
    """One run of the sweep, as the page shows it."""

    run: str
    """Its folder's name."""
    status: str
    settings: dict[str, Any]
    """What differs between the sweep's runs, by config path."""
    record: dict[str, Any]

    @property
    def removed(self) -> float | None:
        return (self.record.get("params") or {}).get("ratio_removed")

    @property
    def score(self) -> float | None:
        return (self.record.get("plan") or {}).get("final_score")

    def average(self, which: str = "compressed") -> float | None:
        return ((self.record.get("eval") or {}).get(which) or {}).get("average")

    @property
    def told(self) -> str:
        """The settings in a phrase."""
        return ", ".join(f"{_setting(path)} {value}" for path, value in self.settings.items()) or self.run


def is_sweep(folder: Path) -> bool:
    """Whether runs lie in this folder's subfolders and none in itself."""
    return not (folder / "record.json").exists() and any(folder.glob("*/record.json"))


def write_sweep_report(folder: Path, mixed_protocols: bool = False) -> Path:
    """Write `folder/report.html` from the runs in its subfolders, and a page of every run that has none.

    Args:
        mixed_protocols: show averages side by side although they were measured by different protocols; else the page
            shows none and says in what they differ.

    Raises:
        SlmError: a record cannot be read.
    """
    runs = sorted(path.parent for path in folder.glob("*/record.json"))
    for run in runs:
        if not (run / "report.html").exists():
            write_report(run)
    records = {run.name: read_record(run) for run in runs}
    refused = None if mixed_protocols else mixed(
        {f"{name} ({which})": (side or {}).get("protocol")
         for name, record in records.items() for which, side in (record.get("eval") or {}).items()})
    if refused:
        records = {name: record | {"eval": {}} for name, record in records.items()}
    rows = _rows(records)
    env = environment()
    env.filters["setting"] = _setting
    page = env.get_template("sweep.html.j2").render(
        name=folder.resolve().name, rows=rows, columns=list(rows[0].settings), charts=charts, refused=refused,
        **_tradeoff(rows))
    path = folder / "report.html"
    write_text(path, page)
    return path


def _setting(path: str) -> str:
    """A config path as an override writes it: `method.threshold`, `merge_rule`."""
    return path.removesuffix("/name").replace("/", ".")


def _rows(records: dict[str, dict[str, Any]]) -> list[Row]:
    """Ordered by what differs, numbers by size."""
    configs = {run: flat(record.get("config") or {}) for run, record in records.items()}
    paths = [path for path in dict.fromkeys(p for config in configs.values() for p in config)
             if not path.startswith(UNINTERESTING) and len({repr(c.get(path)) for c in configs.values()}) > 1]
    rows = [Row(run, str(record.get("status")), {path: configs[run].get(path) for path in paths}, record)
            for run, record in records.items()]

    def order(value: Any) -> tuple[bool, float, str]:
        number = isinstance(value, (int, float))
        return not number, float(value) if number else 0.0, str(value)

    return sorted(rows, key=lambda row: [order(value) for value in row.settings.values()])


def _tradeoff(rows: list[Row]) -> dict[str, Any]:
    """Points of the chart: the seven-task mean where every finished run has one, else the similarity to dense."""
    done = [row for row in rows if row.status == "finished" and row.removed is not None]
    by_average = bool(done) and all(row.average() is not None for row in done)
    points: list[tuple[float, float, str, str]] = []
    for row in done:
        quality = row.average() if by_average else row.score
        if quality is not None and row.removed is not None:
            shown = 100 * quality if by_average else quality
            points.append((row.removed, shown, f"{row.told}: {shown:.4g}, {100 * row.removed:.1f} % removed",
                           f"{row.run}/report.html"))
    dense = {row.average("dense") for row in done} if by_average else {1.0}
    if points and len(dense) == 1 and (only := dense.pop()) is not None:
        shown = 100 * only if by_average else only
        points.insert(0, (0.0, shown, f"dense: {shown:.4g}", ""))
    return {"points": points, "unit": "Seven-task average in per cent" if by_average else "Similarity to dense"}

