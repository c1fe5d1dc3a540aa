"""What a run says on one screen when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from slm_exp.core.files import JsonObject, plain
from slm_exp.core.format import rounded, with_error
from slm_exp.evaluation.report import SpeedCase
from slm_exp.reporting import results
from slm_exp.reporting.results import Comparison
from slm_exp.runs.record import Run
from slm_exp.runs.schema import BudgetMet, Record, SizeTarget
from slm_exp.runs.statistics.paired import Difference
from slm_exp.runs.statistics.scores import Estimate
from slm_exp.runs.statistics.verdict import DESTROYED, RANDOM, times, verdict_of

SCREEN = (24, 100)
"""Lines and columns."""


def summary(finished: JsonObject, folder: Path) -> str:
    """What came of it, first of all: perplexity, average, verdict; then sizes, tasks, time, and where things lie."""
    record = Record.of(plain(finished))
    run = Run(folder, record, on_disk=False)
    plan, layers, params, (dense, small) = record.plan, record.layers, record.params, record.eval.both
    verdict, rows = verdict_of(run), results.compare(run)
    removed = f"; removed {plan.removed}" if plan.removed else ""
    note = f" ({record.model.note})" if record.model.note else ""
    first = verdict.sentence if verdict.outcome in (DESTROYED, RANDOM) else ""
    lines = [*([first] if first else []),
             f"run {record.run_id} finished in {record.seconds or 0:.0f} s"]
    for corpus, value in small.perplexity.items():
        before, ratio = dense.perplexity.get(corpus), verdict.texts.get(corpus)
        lines.append(f"  perplexity {corpus}: {_perplexity(before)} -> {_perplexity(value)}"
                     f"{f' ({times(ratio)})' if ratio else ''}")
    if verdict.perplexity_ratio and len(verdict.texts) > 1:
        lines.append(f"  perplexity of all: {times(verdict.perplexity_ratio)} the dense model's")
    if average := results.average(run, rows):
        lines.append(f"  average    {_percent(average.dense)} -> {_percent(average.compressed)}: "
                     f"{points(average.difference)} points, n = {average.n} in seven tasks")
    if verdict:
        lines.append(f"  verdict    {verdict.sentence}")
    lines += [
        f"  model      {record.model.name}{note}",
        f"  layers     {layers.before} -> {layers.after}, merged {plan.merged or 'none'}{removed}",
        f"  parameters {(params.before or 0) / 1e6:.1f} M -> {(params.after or 0) / 1e6:.1f} M"
        f" ({params.ratio_removed or 0:.1%} removed)",
    ]
    if plan.final_score is not None:
        tried = f"{plan.evaluations} candidate{'s' * (plan.evaluations != 1)}"
        lines.append(f"  score      {plan.final_score:.4f} by {plan.similarity} ({tried})")
    if (met := plan.target.budget) and met.dense:
        lines.append(f"  budget     {_cost(met, met.reached)} of at most {_cost(met, met.limit)}, dense "
                     f"{_cost(met, met.dense)}: {met.what}")
    lines += _sizes(plan.target)
    if rows:
        lines.append(f"  {'task':<16} {'metric':<9} {'n':>6} {'chance':>7} {'dense':>12} {'compressed':>12} "
                     f"{'difference':>12}")
        lines += [f"  {row.task:<16} {row.metric:<9} {row.n or '':>6} {_chance(row):>7} {_percent(row.dense):>12} "
                  f"{_percent(row.compressed):>12} {points(row.difference):>12}{'  mute' if row.mute else ''}"
                  for row in rows]
        if any(row.mute for row in rows):
            lines.append("  (mute: dense is not above chance by two standard errors; counts in no verdict)")
    if small.text:
        ended, distinct = ([getattr(side.text, name, None) for side in (dense, small)]
                           for name in ("ended", "distinct_3"))
        lines.append(f"  free text  ends by itself {_share(ended[0])} -> {_share(ended[1])}, distinct runs of three "
                     f"{_share(distinct[0])} -> {_share(distinct[1])}")
    lines += [_speed(cell) for cell in record.speed.cells]
    slow = sorted(record.stages, key=lambda s: -s.seconds)[:3]
    lines.append("  time       " + ", ".join(f"{s.name} {s.seconds:.0f} s" for s in slow))
    return "\n".join([*fitted(lines, [f"  warning    {w}" for w in record.warnings]),
                      f"  report     {folder / 'report.html'}"])


def fitted(lines: Sequence[str], warnings: Sequence[str]) -> list[str]:
    """What fits on a screen with the report's line: long lines go on below, warnings are cut; what is too much is left
    out from the end, with a word on how much."""
    room = SCREEN[0] - 1
    whole = [part for line in lines for part in (
        [line] if len(line) <= SCREEN[1] else wrap(line, SCREEN[1], subsequent_indent=" " * 13, drop_whitespace=True))]
    every = [*whole, *(w if len(w) <= SCREEN[1] else f"{w[: SCREEN[1] - 1]}…" for w in warnings)]
    return every if len(every) <= room else [
        *every[: room - 1], f"  ({len(every) - room + 1} more lines on the page)"]


def _cost(met: BudgetMet, value: float | None) -> str:
    """Operations in GFLOP a token, a latency in ms."""
    return f"{1e3 * (value or 0):.3g} ms" if met.measure == "latency" else f"{(value or 0) / 1e9:.4g} GFLOP"


def _speed(cell: SpeedCase) -> str:
    """One shape of generation: seconds, dense and compressed, and how many times faster, with quartiles."""
    case = f"  speed      batch {cell.batch}, {cell.prompt} tokens in, {cell.new} out: "
    before, after, times = cell.dense.latency_s, cell.compressed.latency_s, cell.speedup
    if cell.error or not (before and after and times):
        return case + cell.error
    return case + (f"{before.median:.3g} s -> {after.median:.3g} s, {times.median:.2f} times faster ({times.q1:.2f} to "
                   f"{times.q3:.2f})")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _sizes(target: SizeTarget) -> list[str]:
    """What the search for a size found: the size requested and those beside it, with what they cost to run."""
    ends = target.threshold if isinstance(target.threshold, list) else []
    if not target.sizes or target.layers is None or len(ends) != 2:
        return []
    low, high = ends
    budget = "" if target.complete else "; the budget ended the search (method.max_evaluations)"
    lines = [f"  size       {target.layers} layers for thresholds from {low:.5f} to below {high:.5f}{budget}"]
    near = [size for size in target.sizes if abs(size.n_layers - target.layers) <= 2]
    return [*lines, *(
        f"  {'->' if s.n_layers == target.layers else '  '} {s.n_layers:>4} layers: "
        f"score {s.best_final_score or 0:.4f}, {(s.flops_per_token or 0) / 1e9:.3g} GFLOP a token, "
        f"{1e3 * (s.latency_s or 0):.0f} ms a prefill" for s in sorted(near, key=lambda size: -size.n_layers))]


def _percent(found: Estimate | None) -> str:
    """Per cent with its standard error; what is no share as it is."""
    if found is None:
        return "-"
    shown = found.times(100 if 0 <= found.value <= 1 else 1)
    return with_error(shown.value, shown.stderr)


def points(found: Difference | None) -> str:
    """A difference of shares in percentage points, with its sign and standard error."""
    if found is None:
        return "-"
    return with_error(100 * found.value, None if found.stderr is None else 100 * found.stderr, sign=True)


def _chance(row: Comparison) -> str:
    return "-" if row.chance is None else rounded(100 * row.chance, 1)


def _perplexity(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 1e5 else f"{value:.3g}"
