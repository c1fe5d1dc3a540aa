"""`slm tables sweep DIR`: one row per run, whatever the runs are."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from slm_exp.core.errors import ProtocolError
from slm_exp.evaluation.base import SEVEN
from slm_exp.evaluation.protocol import mixed
from slm_exp.runs.state import DAMAGED, FINISHED
from slm_exp.runs.statistics.runs import Measured
from slm_exp.runs.statistics.scores import on_front
from slm_exp.runs.statistics.spread import by_seed, differing, is_seed
from slm_exp.runs.tracking.base import flat
from slm_exp.tables.grid import Entry, Grid, dense_of, entry_of, provenance
from slm_exp.tables.quantities import Quantity, check_quantity, perplexity_ratio, quantity

SETTINGS = {"target": "target", "threshold": "threshold", "rule": "config.merge_rule.name",
            "similarity": "config.similarity.name", "kernel": "config.kernel.name"}
NEVER = ("method.threshold", "method.target_")
"""Settings that get no column of their own."""


def sweep_grid(runs: Sequence[Measured], mixed_protocols: bool = False, only: str | None = None) -> Grid:
    """Threshold, rule, similarity, kernel, what else differs, layers, parameters, perplexity, average, verdict, tasks.

    Runs that differ in their seeds alone are one row.
    `only`: columns, separated by commas: of these, or any quantity.
    Raises:
        ProtocolError: runs were measured by different protocols, and `mixed_protocols` is not set.
        ConfigError: a column in `only` that does not exist.
    """
    often = Counter(m.name for m in runs)
    names = [m.name if often[m.name] == 1 else str(m.run.folder) for m in runs]
    reason = mixed((f"run {name}", m.evaluation.protocol) for name, m in zip(names, runs, strict=True))
    if reason and not mixed_protocols:
        raise ProtocolError(f"{reason}. Their numbers do not belong in one table: give folders of one protocol, or say "
                            "--mixed-protocols to see them side by side.")
    settings = {**SETTINGS, **_others(runs)}
    if not any(quantity("target").value(m) for m in runs):
        del settings["target"]
    tasks = list(dict.fromkeys(task for m in runs for task in m.evaluation.tasks))
    tasks = [t for t in SEVEN if t in tasks] + sorted(t for t in tasks if t not in SEVEN)
    corpora = sorted({corpus for m in runs for corpus in m.evaluation.perplexity})
    columns = {**settings, "layers": "layers", "params": "params", "removed": "removed",
               **{f"ppl {c}": f"perplexity.{c}" for c in corpora}, **({"ppl ratio": "ppl_ratio"} if corpora else {}),
               "average": "average", "kept": "kept", "verdict": "verdict",
               **{t: t if t in SEVEN else f"task.{t}" for t in tasks}}
    if only is not None:
        wanted = [n for name in only.split(",") for n in (tasks if name == "tasks" else [name])]
        for name in wanted:
            if name not in columns:
                check_quantity(name, "--columns", columns)
        columns = {name: columns.get(name, name) for name in wanted}
    kinds = {label: quantity(show) for label, show in columns.items()}
    rows, damaged = [], []
    one_model = len({m.record.model.digest for m in runs}) == 1
    if dense := dense_of(runs) if one_model and not reason else None:
        rows.append(("dense", [Entry() if label in settings else _entry(kind, dense) for label, kind in kinds.items()]))
    called = dict(zip(map(id, runs), names, strict=True))
    groups = _groups(runs)
    for group in sorted(groups, key=lambda g: [_order(quantity(show).value(g[0])) for show in settings.values()]):
        m, name = group[0], called[id(group[0])]
        line = [_entry(kind, m) if len(group) == 1 or label in settings else
                entry_of(group, kind, kind.digits, len(group)) for label, kind in kinds.items()]
        if len(group) > 1:
            line = [Entry(f"{len(group)} seeds") if is_seed(settings.get(label, "").replace(".", "/")) else entry
                    for label, entry in zip(kinds, line, strict=True)]
        if "threshold" in kinds and isinstance(value := line[at := list(kinds).index("threshold")].value, (int, float)):
            line[at] = replace(line[at], value=f"{value:g}")
        if m.run.state == DAMAGED:
            line[-1] = replace(line[-1], note=f"{DAMAGED}: {'; '.join(map(str, m.run.problems))}")
            damaged.append(f"{name} is damaged: {m.run.damage}")
        elif m.run.state != FINISHED:
            error = m.record.error
            why = f": {error.type} in stage {error.stage}" if error else ""
            line[-1] = replace(line[-1], note=f"{m.run.state}{why}")
        rows.append((name if len(group) == 1 else f"{name} and {len(group) - 1} more", line))
    differ = [label for label, show in settings.items() if len({str(quantity(show).value(m)) for m in runs}) > 1]
    front = _front([g[0] for g in groups], called)
    together = ["Runs that differ in seeds alone are one row: the mean, ± its 95 % interval over the seeds."]
    return Grid("sweep", f"Runs that differ in {', '.join(differ)}" if differ else "Runs", list(columns), [("", rows)],
                [*([reason] if reason else []), *provenance(runs, len(runs)), *damaged], row_heads=("", "run"),
                legend=["params in millions, removed in per cent of them, tasks in per cent, ± the standard error over "
                        "documents.", *front, *(together if len(groups) < len(runs) else []),
                        "Runs differ in size, so none is marked as best: slm compare RUN RUN tests a difference."])


def _front(runs: Sequence[Measured], called: Mapping[int, str]) -> list[str]:
    """What the table says of the runs that no other is smaller than and as good as, by the ratio of perplexities."""
    found = {called[id(m)]: (params, ratio.value) for m in runs if m.run.state == FINISHED
             and (params := m.record.params.after) is not None and (ratio := perplexity_ratio(m))}
    best = list(itertools.compress(found, on_front([*found.values()])))
    if len(best) == len(found):
        return []
    return [f"No run beats {', '.join(best)} in both parameters and ppl ratio: the Pareto front."]


def _groups(runs: Sequence[Measured]) -> list[list[Measured]]:
    """Finished runs that differ in seeds alone together, every other run by itself."""
    done = [m for m in runs if m.run.state == FINISHED]
    together = by_seed([flat(m.record.config) for m in done])
    out = [[m] for m in runs if m.run.state != FINISHED]
    for group in ([done[n] for n in numbers] for numbers in together):
        apart = len({m.record.run_id for m in group}) == len(group)  # one run in two folders is no second seed
        out += [group] if apart else [[m] for m in group]
    return out


def _entry(kind: Quantity, m: Measured) -> Entry:
    return Entry(kind.value(m), kind.stderr(m), kind.digits)


def _others(runs: Sequence[Measured]) -> dict[str, str]:
    """heading -> quantity of every setting in which the runs differ and that has no column yet."""
    paths = [path.replace("/", ".") for path in differing([flat(m.record.config) for m in runs])]
    return {path.removesuffix(".name"): f"config.{path}" for path in paths
            if not path.startswith(NEVER) and f"config.{path}" not in SETTINGS.values()}


def _order(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, highest first (a threshold of 1 merges least); then words."""
    try:
        return False, -float(value), ""
    except (TypeError, ValueError, OverflowError):
        return True, 0.0, str(value or "")
