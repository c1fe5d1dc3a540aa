"""`slm report --figures`: every plot of a page as a vector figure, `figures/NAME.pdf` and `.svg`, set for a paper.

Widths, type sizes and lines are those of a two-column page (3.3 inches, 8 points); text stays text in both formats. The
numbers are the page's own: nothing is computed here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from matplotlib.ticker import MaxNLocator

from slm_exp.core.files import writing
from slm_exp.core.types import LayerSimilarity, MergePlan
from slm_exp.reporting import atlas, charts, heatmap, measures, results, svg, sweep_charts
from slm_exp.reporting.measures import Measure
from slm_exp.reporting.results import Comparison
from slm_exp.reporting.rows import Row, setting
from slm_exp.reporting.svg import FIGURES
from slm_exp.runs.record import Run
from slm_exp.runs.schema import OneRecovery

WIDTH = 3.3
"""Inches: a column of a two-column paper."""
PLOT = (200, 130)
"""Points within the axes, roughly: by them marks at one place are set apart."""
CHARACTER = 3.7
"""Points: the width of a character of a legend, about."""
STYLE: Any = {
         "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
         "legend.fontsize": 7, "axes.linewidth": 0.6, "lines.linewidth": 1.0, "lines.markersize": 4,
         "grid.linewidth": 0.4,
         "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "legend.frameon": False,
         "font.family": "sans-serif", "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "slm_exp"}
BLUE, RUST, GREY = "#0a6a93", "#ad4715", "0.55"
SHADES = (BLUE, RUST, "#1d6b3c", "#7a3e9d", "#8a6d00", "#a3195b")
MARKS = "oD^svP"
Draw = Callable[[Axes], None]


def run_figures(run: Run) -> list[Path]:
    """The plots of a run's page, in its folder. Returns the files."""
    plan, recovery = run.plan, run.record.recovery
    rows = results.compare(run)
    average = results.average(run, rows)
    out: dict[str, tuple[float, Draw]] = {}
    if plan:
        out["plan"] = (3.6, partial(_stack, plan=plan))
        if plan.trace:
            out["candidates"] = (2.3, partial(_candidates, plan=plan))
        if near := charts.near_threshold(plan):
            out["candidates-near"] = (2.3, partial(_candidates, plan=plan, near=near))
    if similarity := run.similarity:
        out["similarity"] = (2.9, partial(_matrix, similarity=similarity, plans=[plan] if plan else []))
    if rows:
        shown = [*rows, *([average] if average else [])]
        out["accuracy"] = (0.6 + 0.24 * len(shown), partial(_accuracies, rows=shown))
    trained = [step for step in (recovery, *recovery.chain) if step.loss]
    for number, step in enumerate(trained):
        out["loss" + (f"-{number}" if number else "")] = (2.1, partial(_losses, recovery=step))
    return _write(run.folder, out)


def sweep_figures(folder: Path, rows: Sequence[Row], paths: Sequence[measures.ThresholdPath]) -> list[Path]:
    """The plots of a sweep's page, in its folder. Returns the files."""
    shades = sweep_charts.shades(rows)
    out: dict[str, tuple[float, Draw]] = {}
    for budget, found in measures.over_budgets(rows).items():
        for measure in found:
            name = measure.key if budget == "params" else f"{measure.key}-over-{budget}"
            out[name] = (2.5, partial(_scatter, measure=measure, shades=shades))
    stairs = sweep_charts.staircase(rows, paths, shades)
    if stairs:
        out["staircase"] = (2.3, partial(_staircase, stairs=stairs, shades=shades))
    gathered = atlas.gather(rows)
    for sheet in gathered.sheets:
        plans = [s.plan for s in gathered.shapes if s.plan.n_layers == len(sheet.similarity.matrix_LL)]
        out[f"similarity-{sheet.name}"] = (
            2.9, partial(_matrix, similarity=sheet.similarity, plans=plans, title=sheet.name))
    return _write(folder, out)


def _write(folder: Path, figures: dict[str, tuple[float, Draw]]) -> list[Path]:
    """Draw each `WIDTH` wide and so high, as PDF and SVG. The same numbers give the same bytes."""
    made = []
    for name, (height, draw) in figures.items():
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(WIDTH, height), layout="constrained")
            draw(figure.subplots())
            for kind, date in (("pdf", "CreationDate"), ("svg", "Date")):
                path = folder / FIGURES / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.{kind}"
                with writing(path) as tmp:
                    figure.savefig(tmp, format=kind, metadata={date: None})
                made.append(path)
    return made


def _stack(axes: Axes, plan: MergePlan) -> None:
    gone = {(s.layer, s.kind) for s in plan.sublayers}
    for slot, group in enumerate(plan.slots):
        colour = BLUE if group.stop - group.start > 1 else "0.8"
        axes.add_patch(Polygon([(1, group.start - 0.4), (1, group.stop - 0.6), (2, slot + 0.4), (2, slot - 0.4)],
                               closed=True, color=colour, alpha=0.25, linewidth=0))
        axes.add_patch(Rectangle((2, slot - 0.4), 1, 0.8, color=colour, linewidth=0))
        for layer in range(group.start, group.stop):
            axes.add_patch(Rectangle((0, layer - 0.4), 1, 0.8, color=colour, linewidth=0))
            for half, kind in enumerate(("attention", "mlp")):
                if (layer, kind) in gone:
                    axes.add_patch(Rectangle((half / 2, layer - 0.4), 0.5, 0.8, facecolor="white", edgecolor=RUST,
                                             hatch="////", linewidth=0.5))
    for layer in plan.dropped:
        axes.add_patch(Rectangle((0, layer - 0.4), 1, 0.8, facecolor="white", edgecolor=RUST, hatch="////",
                                 linewidth=0.5))
    axes.set(xlim=(-0.05, 3.05), ylim=(-0.7, plan.n_layers - 0.3), ylabel="layer")
    axes.set_xticks([0.5, 2.5], [f"dense, {plan.n_layers}", f"compressed, {plan.n_layers_out}"])
    axes.spines[:].set_visible(False)
    axes.tick_params(axis="x", length=0)


def _candidates(axes: Axes, plan: MergePlan, near: tuple[float, float] | None = None) -> None:
    for trial in plan.trace:
        colour = BLUE if trial.accepted else RUST
        axes.plot([trial.low, trial.high], [trial.most] * 2, color=colour, linewidth=0.8, alpha=0.6)
        axes.plot(trial.low, trial.most, "o" if trial.accepted else "x", color=colour, markersize=3.5)
    for label, mark, colour in (("accepted", "o", BLUE), ("rejected", "x", RUST)):
        axes.plot([], [], mark, color=colour, label=label, markersize=3.5)
    if plan.threshold is not None:
        axes.axhline(plan.threshold, color=BLUE, linestyle="--", linewidth=0.8, label=f"threshold {plan.threshold:g}")
    if near:
        axes.set_ylim(*near)
    axes.set(xlabel="layers of the candidate, the mark at the lowest",
             ylabel=f"score, {plan.similarity}" if plan.threshold is not None else "score, the method's own")
    _legend(axes)


def _matrix(axes: Axes, similarity: LayerSimilarity, plans: Sequence[MergePlan], title: str = "") -> None:
    heatmap.matrix(axes, similarity, plans, line=0.9)
    axes.set_title(title)


def _accuracies(axes: Axes, rows: Sequence[Comparison]) -> None:
    for y, row in enumerate(rows):
        for side, name, shift, mark, colour in ((row.dense, "dense", -0.17, "o", GREY),
                                                (row.compressed, "compressed", 0.17, "D", BLUE)):
            if side:
                axes.errorbar(100 * side.value, y + shift, xerr=None if side.stderr is None else 100 * side.stderr,
                              fmt=mark, color=colour, markersize=3, elinewidth=0.8, label=None if y else name)
        if row.chance is not None:
            axes.plot([100 * row.chance] * 2, [y - 0.4, y + 0.4], ":", color=RUST, label=None if y else "chance")
    axes.set_yticks(range(len(rows)), [row.task for row in rows])
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="accuracy, % (bars: one standard error)")
    axes.grid(axis="x", alpha=0.4)
    _legend(axes)


def _losses(axes: Axes, recovery: OneRecovery) -> None:
    for series, name, style in ((recovery.loss, "training", "-"), (recovery.held_out_loss, "held out", "-o")):
        if series:
            axes.plot(*zip(*series, strict=True), style, color=BLUE if name == "training" else RUST, label=name)
    axes.set(xlabel="optimiser steps", ylabel="loss, nats a token")
    axes.grid(alpha=0.4)
    _legend(axes)


def _scatter(axes: Axes, measure: Measure, shades: sweep_charts.Shades) -> None:
    of, factor = sweep_charts.unit_of(measure)
    up = svg.Axis([p.value for p in measure.points], log=not measure.higher_is_better)
    across = svg.Axis([p.cost for p in measure.points])
    aside = sweep_charts.apart([(across.at(p.cost), *sweep_charts.reaching(*(
        up.down(value, PLOT[1]) for value in (p.value, *(p.interval or ()))))) for p in measure.points])
    for point, dx in zip(measure.points, aside, strict=True):
        k = shades.of(point.row) if point.row else None
        half = None if point.interval is None else point.interval[1] - point.value
        x = point.cost + dx / 2 * (across.high - across.low) / PLOT[0]
        axes.errorbar(x / factor, point.value, yerr=half, elinewidth=0.7, markersize=4,
                      fmt="o" if k is None else MARKS[k], color=GREY if k is None else SHADES[k],
                      markerfacecolor="white" if k is None else SHADES[k])
    if front := measure.front:
        axes.step([p.cost / factor for p in front], [p.value for p in front], where="post", color=GREY, linewidth=0.7)
    if measure.chance is not None:
        axes.axhline(measure.chance, color=RUST, linestyle=":", label="chance")
    if up.log:
        axes.set_yscale("log")
    axes.plot([], [], "o", color=GREY, markerfacecolor="white", label="dense")
    _key(axes, shades)
    axes.set(xlabel=of, ylabel=f"{measure.name}\n({measure.unit})")
    axes.grid(alpha=0.4)
    _legend(axes)


def _staircase(axes: Axes, stairs: sweep_charts.Staircase, shades: sweep_charts.Shades) -> None:
    steps = stairs.steps
    for path in stairs.paths:
        axes.plot([x for p in path.plans for x in (p.threshold_low, p.threshold_high)],
                  [p.n_layers for p in path.plans for _ in "ab"], color="black", linewidth=0.7, label=path.source)
    limits = axes.get_xlim() if stairs.paths else (min(s.threshold for s in steps), max(s.threshold for s in steps))
    across, up = svg.Axis([*limits]), svg.Axis([s.n_layers for s in steps] or [0, 1])
    aside = sweep_charts.apart([(across.at(s.threshold), *sweep_charts.reaching(up.down(
        s.n_layers + 0.12 * s.series, PLOT[1]))) for s in steps])
    for step, dx in zip(steps, aside, strict=True):
        k = shades.of(step.row)
        ends = max(step.low, limits[0]), min(step.high, limits[1])
        y = step.n_layers + 0.12 * step.series  # runs of other settings a little apart, as on the page
        axes.plot(ends, [y] * 2, color=SHADES[k], alpha=0.6)
        axes.plot(step.threshold + dx / 2 * (across.high - across.low) / PLOT[0], y, MARKS[k], color=SHADES[k])
    _key(axes, shades)
    axes.set(xlabel="threshold", ylabel="layers left")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.4)
    _legend(axes)


def _key(axes: Axes, shades: sweep_charts.Shades) -> None:
    """What the marks mean: a word says of which setting it is, a number does not."""
    for k, value in enumerate(shades.values):
        name = "" if isinstance(value, str) else f"{setting(shades.path or '')} "
        axes.plot([], [], MARKS[k], color=SHADES[k], label=f"{name}{value}")


def _legend(axes: Axes) -> None:
    """Above the plot, where it covers no mark, in as many columns as the figure's width has room for."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        column = max(map(len, labels)) * CHARACTER + 26  # with the mark and the blanks
        axes.get_figure().legend(handles, labels, loc="outside upper left", ncols=max(1, int(72 * WIDTH / column)),  # type: ignore[union-attr]
                                 borderaxespad=0.2, handlelength=1.4, columnspacing=1)
