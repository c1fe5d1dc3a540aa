"""Why no run fills a cell of a table: another model, another protocol, other sizes, or the settings that differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from slm_exp.core.errors import ConfigError
from slm_exp.core.files import JsonObject
from slm_exp.runs.statistics.runs import Measured
from slm_exp.tables.definition import Table
from slm_exp.tables.facts import overrides_of
from slm_exp.tables.records import Finder, science, science_of

SIZES = ("target_layers", "target_ratio", "target_sublayers", "target_flops", "target_latency", "threshold")


def check_any(table: Table, runs: Sequence[Measured]) -> None:
    """Refuse runs of which none, finished or not, is a cell of the table. Raises ConfigError: says why."""
    finder = Finder(runs)
    if not any(finder.find(overrides) for overrides in table.cells()):
        raise ConfigError(f"table = {table.name}: of the {len(runs)} runs there none fills a cell. {why(table, runs)} "
                          "The commands that fill it: --missing.")


def why(table: Table, runs: Sequence[Measured]) -> str:
    """What keeps the runs out of the table, in a sentence or two; the first of the usual reasons that holds for all."""
    ours = [s for overrides in table.cells() if (s := science_of(overrides))]
    theirs = [(m, s) for m in runs if (s := science(m.record.config))]
    if not theirs or not ours:
        return "Their settings are not those of this version."
    first = ours[0]
    here = [(m, s) for m, s in theirs if s["model"] == first["model"]]
    if not here:
        models = dict.fromkeys(" ".join(overrides_of(m.record.config["model"])) for m, _ in theirs)
        return f"Other model: they are of {'; '.join(models)}, the table of {' '.join(overrides_of(first['model']))}."
    alike = [(m, s) for m, s in here if s["evaluation"] == first["evaluation"]]
    if not alike:
        parts = [{"evaluation": settings["evaluation"]} for settings in (first, here[0][1])]
        return f"Other protocol: {_apart(*parts)}."
    sizes = {_size(s) for s in ours}
    if not sizes & {_size(s) for _, s in alike}:
        there = dict.fromkeys(_size(s) for _, s in alike)
        return (f"Other sizes: they have {'; '.join(there)}, the table {'; '.join(sorted(sizes))}. Parameters like "
                "sizes=[26,21] say which.")
    m, nearest, cell = min(((m, s, c) for m, s in alike for c in ours), key=lambda at: len(_differing(at[2], at[1])))
    return f"Other settings: the nearest, {m.name}, has {_apart(cell, nearest)}."


def _size(settings: JsonObject) -> str:
    method, width = settings["method"], settings["width"]
    words = [f"method.{key}={method[key]}" for key in SIZES if method.get(key) is not None]
    ratio = width.get("ratio")
    return ", ".join([*words, *([f"width.ratio={ratio}"] if ratio is not None else [])]) or "no target"


def _differing(a: JsonObject, b: JsonObject) -> dict[str, tuple[Any, Any]]:
    one, other = _flat(a), _flat(b)
    return {key: (one.get(key), other.get(key)) for key in {**one, **other} if one.get(key) != other.get(key)}


def _flat(settings: JsonObject, path: str = "") -> JsonObject:
    out: JsonObject = {}
    for key, value in settings.items():
        out |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return out


def _apart(table: JsonObject, run: JsonObject) -> str:
    return ", ".join(f"{key} = {json.dumps(there)}, in the table {json.dumps(here)}"
                     for key, (here, there) in list(_differing(table, run).items())[:4])
