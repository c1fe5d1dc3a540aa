"""The charts of a sweep's page: quality over size, layers over threshold, differences to dense.

Inline SVG, as in charts. A mark of a run carries `data-run`, by which the page's script lights up the same run in
every chart and table.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup

from slm_exp.reporting import svg
from slm_exp.reporting.budgets import BUDGETS
from slm_exp.reporting.measures import Measure, PathPlan, Point, ThresholdPath
from slm_exp.reporting.results import Comparison
from slm_exp.reporting.rows import Row, facets
from slm_exp.reporting.staircase import exponential
from slm_exp.reporting.svg import Axis, tag

HEIGHT = 270.0
SHAPES = ('<circle r="5"/>', *(f'<path d="{d}"/>' for d in (
    "M0-6.5 6.5 0 0 6.5-6.5 0Z", "M0-6.2 6 4.6H-6Z", "M-4.8-4.8H4.8V4.8H-4.8Z", "M0 6.2 6-4.6H-6Z",
    "M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z")))
"""So many values of a setting have marks of their own, told apart by shape as well as by colour."""
FEW = 24
"""Up to so many marks show their intervals all the time; of more, only the one pointed at."""
TOUCH, WIDE = 12.0, 60.0
"""Pixels: marks nearer to each other than one are set apart, by as much, over the other at most."""
NEAR = 0.012
"""Of a chart's width: columns nearer to each other are one."""


@dataclass(frozen=True)
class Shades:
    """Which mark a run has: by the value of one setting."""

    path: str | None
    values: tuple[Any, ...]
    choices: dict[str, tuple[Any, ...]]
    """Settings by which the marks can be told apart, and their values."""

    def of(self, row: Row) -> int:
        """Number of the mark."""
        value = row.settings.get(self.path) if self.path else None
        return self.values.index(value) if value in self.values else 0


def shades(rows: Sequence[Row]) -> Shades:
    """Marks by the method or the rule where they differ, else by another component, else by any with few values."""
    choices = {path: tuple(values) for path, values in facets(list(rows)).items() if len(values) <= len(SHAPES)}
    first = ("method/name", "merge_rule/name")
    path = min(choices, key=lambda p: (p not in first, not p.endswith("/name"), not isinstance(choices[p][0], str)),
               default=None)
    return Shades(path, choices[path] if path else (), choices)


def shapes() -> Markup:
    """The marks, to be referred to as `#shape-0` and so on; put once on the page."""
    symbols = (tag("g", Markup(mark), id=f"shape-{k}") for k, mark in enumerate(SHAPES))
    return tag("svg", tag("defs", *symbols), width=0, height=0, aria_hidden="true", class_="shapes")


def shape(k: int) -> Markup:
    """A mark for the key."""
    return tag("svg", tag("use", href=f"#shape-{k}", x=8, y=8), width=16, height=16, aria_hidden="true",
               class_=f"s{k}")


def scatter(measure: Measure, shades: Shades) -> Markup:
    """A quality over a budget, one linked mark a run, the front of those that no other beats."""
    points = measure.points
    of, factor = unit_of(measure)
    across = Axis([p.cost / factor for p in points], margin=_edge([p.cost for p in points]))
    shown = [p.value for p in points] + ([] if measure.chance is None else [measure.chance])
    log = Axis(shown, log=not measure.higher_is_better).log
    if len(points) <= FEW:
        shown += [end for p in points for end in p.interval or () if end > 0 or not log]
    up = Axis(shown, log=not measure.higher_is_better)

    y = partial(up.down, height=HEIGHT)

    def x(cost: float) -> str:
        return across.across(cost / factor)

    dense = {p.cost for p in points if p.row is None and measure.of_params}
    close = across.high - across.low < 0.15 * across.high
    title = f"{of}; share removed" if len(dense) == 1 else of
    chance = "" if measure.chance is None else f"; dotted: chance, {measure.chance:.1f}"  # no room is free for sure
    upward = f"{measure.name}, {measure.unit}{', logarithmic' if up.log else ''}{chance}"
    parts = svg.axes(across, up, HEIGHT, (title, upward),
                     below=51.0 if len(dense) == 1 else 38.0)
    for k, tick in enumerate(across.ticks):
        at = across.across(tick)
        if len(dense) == 1:
            removed = 100 * (1 - tick * factor / next(iter(dense)))
            text = f"−{removed:.{int(close)}f} %" if removed > 0.05 else "" if removed < -0.05 else "0 %"
            parts.append(tag("text", text, x=at, y=HEIGHT + 33, class_=f"mid second{' odd' * (k % 2)}"))
    if measure.chance is not None:
        parts.append(tag("line", x1="0", x2="100%", y1=y(measure.chance), y2=y(measure.chance), class_="chance"))
    front = measure.front
    for here, after in itertools.pairwise(front):  # a staircase: the smaller model is the best up to there
        x1, x2, y1, y2 = x(here.cost), x(after.cost), y(here.value), y(after.value)
        parts.append(tag("line", x1=x1, x2=x2, y1=y1, y2=y1, class_="front"))
        parts.append(tag("line", x1=x2, x2=x2, y1=y1, y2=y2, class_="front"))
    ordered = sorted(points, key=lambda p: (p.row is not None, p.cost, p.value))
    few = len(points) <= FEW
    places = [(across.at(p.cost / factor), *reaching(y(p.value), *map(y, (p.interval or ()) if few else ())))
              for p in ordered]
    parts += [_aside(_mark(point, measure, shades, x(point.cost), y, few), dx)
              for point, dx in zip(ordered, apart(places), strict=True)]
    label = f"{measure.name} ({measure.unit}) over {measure.budget.name}: {sum(p.row is not None for p in points)} runs"
    label += "." if measure.criterion else (f", {len(front)} models on the front. The front stands below as a table.")
    return tag("svg", *parts, width="100%", height=HEIGHT, role="group", class_="chart points", aria_label=label)


def apart(places: Sequence[tuple[float, float, float]]) -> list[float]:
    """How far to the side each mark is drawn so that those at one place stand beside each other; pixels.

    Args:
        places: of every mark its column, 0 to 1, and the pixels from the top that it reaches from and to, with the line
            of its interval.
    """
    out = [0.0] * len(places)
    columns: list[list[int]] = []
    for k in sorted(range(len(places)), key=lambda k: places[k][0]):
        if columns and places[k][0] - places[columns[-1][-1]][0] < NEAR:
            columns[-1].append(k)
        else:
            columns.append([k])
    for column in columns:
        together: list[list[int]] = []
        lowest = -math.inf
        for k in sorted(column, key=lambda k: places[k][1]):
            if together and places[k][1] < lowest:
                together[-1].append(k)
            else:
                together.append([k])
            lowest = max(lowest, places[k][2])
        for some in together:
            step = min(TOUCH, WIDE / len(some))
            for number, k in enumerate(sorted(some, key=lambda k: (places[k][0], k))):
                out[k] = step * (number - (len(some) - 1) / 2)
    return out


def _edge(columns: Sequence[float]) -> float:
    """So far from a chart's ends, as a share of its width, the marks of these columns lie whole and off the numbers
    beside it, on a phone too."""
    return 0.01 + 0.02 * min(WIDE / TOUCH, max(Counter(columns).values(), default=1))


def reaching(at: float, *ends: float) -> tuple[float, float]:
    """From where to where a mark reaches, with the ends of its interval; pixels from the top."""
    return min((at - TOUCH / 2, *ends)), max((at + TOUCH / 2, *ends))


def _aside(mark: Markup, dx: float) -> Markup:
    return tag("g", mark, transform=f"translate({dx:g} 0)") if dx else mark


def unit_of(measure: Measure) -> tuple[str, float]:
    """What the lower axis is called, and how many make one on it: parameters by their size."""
    if not measure.of_params:
        return measure.budget.label, measure.budget.one
    most = max(p.cost for p in measure.points)
    units = ((", billions", 1e9), (", millions", 1e6), (", thousands", 1e3))
    unit, factor = next(((unit, factor) for unit, factor in units if most >= factor), ("", 1.0))
    return f"parameters{unit}", factor


def _mark(point: Point, measure: Measure, shades: Shades, x: str, y: Callable[[float], float], few: bool) -> Markup:
    spread = ""
    parts = []
    if point.interval:
        spread = f" (95 % interval {' to '.join(measure.show(v) for v in point.interval)})"
        parts.append(tag("line", x1=x, x2=x, y1=y(point.interval[0]), y2=y(point.interval[1]),
                         class_="whisker" if few else "whisker rare"))
    value, cost = f"{measure.name} {measure.show(point.value)}{spread}", measure.show_cost(point)
    if point.row is None:
        title = f"dense model: {value}; {cost}"
        mark = tag("circle", cx=x, cy=y(point.value), r=5.5, class_="dense")
        return tag("g", tag("title", title), *parts, mark, class_="point", role="img", aria_label=title)
    row = point.row
    layers = row.record.layers.after
    title = (f"{row.title}: {value}; {cost}, {100 * (row.removed or 0):.1f} % of the parameters removed"
            f"{f', {layers} layers' if layers else ''}{'; on the front' if point.front else ''}")
    k = shades.of(row)
    if point.front:
        parts.append(tag("circle", cx=x, cy=y(point.value), r=9.5, class_="ring"))
    parts.append(tag("use", href=f"#shape-{k}", x=x, y=y(point.value), class_="mark"))
    return _link(row, title, parts, k)


def _link(row: Row, title: str, marks: Sequence[Markup], k: int) -> Markup:
    return tag("a", tag("title", title), *marks, href=f"{row.address}/report.html", class_=f"point s{k}",
               data_run=row.name)


def curve(path: ThresholdPath, budget: str) -> Markup:
    """Perplexity of every size of a path over a budget, before and after the one training that recovered all; the dense
    model's is a dotted line. Needs a size."""
    assert path.recovery
    one, points = BUDGETS[budget].one, path.curve(budget)
    dense = exponential(path.recovery.dense)
    sides = [("merged", "dense", [exponential(of.before) for *_, of in points]),
             (f"after recovery={path.recovery.name}", "mark", [exponential(of.recovered) for *_, of in points])]
    across = Axis([cost / one for _, cost, _ in points], margin=0.05)
    up = Axis([value for *_, side in sides for value in (*side, dense) if math.isfinite(value)], log=True)
    parts = svg.axes(across, up, HEIGHT, (BUDGETS[budget].label,
                                          f"perplexity, held-out passages{', logarithmic' if up.log else ''}"))
    if math.isfinite(dense):
        y = up.down(dense, HEIGHT)
        parts.append(tag("line", x1="0", x2="100%", y1=y, y2=y, class_="chance"))
    for said, kind, values in sides:
        drawn = [(size.n_layers, across.across(cost / one), up.down(value, HEIGHT), value)
                 for (size, cost, _), value in zip(points, values, strict=True) if math.isfinite(value)]
        parts += [tag("line", x1=a, x2=c, y1=b, y2=d, class_="front")
                  for (_, a, b, _), (_, c, d, _) in itertools.pairwise(drawn)]
        for n, x, y, value in drawn:
            title = f"{n} layers, {said}: perplexity {value:.4g}"
            parts.append(tag("g", tag("title", title), tag("circle", cx=x, cy=y, r=5, class_=kind), class_="point s0",
                             role="img", aria_label=title))
    label = f"Perplexity over {BUDGETS[budget].name}, before and after the training: {len(points)} sizes"
    return tag("svg", *parts, width="100%", height=HEIGHT, role="group", class_="chart points", aria_label=label)


@dataclass(frozen=True)
class Step:
    """A run, and all thresholds at which its search decides the same: those between the best score it rejected and the
    worst it accepted."""

    row: Row
    threshold: float
    low: float
    high: float
    n_layers: int
    series: int


@dataclass(frozen=True)
class Staircase:
    chart: Markup
    steps: Sequence[Step]
    paths: Sequence[ThresholdPath]
    notes: Sequence[str]
    """What sets a path apart from the runs."""


def staircase(rows: Sequence[Row], paths: Sequence[ThresholdPath], shades: Shades) -> Staircase | None:
    """Layers over the threshold; None where no run was decided by one and there is no path of the runs' model."""
    steps = decided_steps(rows)
    models, drawn, notes = {row.record.model.digest for row in rows}, [], []
    tokens = {row.record.calibration.digest for row in rows}
    for path in paths:
        if path.model.digest not in models:
            notes.append(f"{path.source} is of another model and is left out.")
            continue
        drawn.append(path)
        if path.calibration.digest not in tokens:
            notes.append(f"{path.source} was made on other calibration tokens than any run.")
    if not steps and not drawn:
        return None
    ends = [s.threshold for s in steps] or [t for p in drawn for t in (p.plans[0].threshold_low,
                                                                       p.plans[-1].threshold_high)]
    across = Axis([min(ends), max(ends)], margin=_edge([s.threshold for s in steps]))
    seen = [p.n_layers for path in drawn for p in path.plans
            if p.threshold_high > across.low and p.threshold_low < across.high]
    sizes = [*(s.n_layers for s in steps), *seen, *(row.plan.n_layers for row in rows if row.plan)]
    up = Axis([min(sizes) - 1, *sizes], whole=True)  # no mark on the line with the thresholds
    pitch = HEIGHT / max(1.0, up.high - up.low)
    count = max((s.series for s in steps), default=0) + 1
    gap = min(4.0, 0.7 * pitch / max(1, count - 1))

    x = across.across

    def y(n_layers: float, series: int | None = None) -> float:
        return up.down(n_layers, HEIGHT) + (0 if series is None else gap * (series - (count - 1) / 2))

    parts = svg.axes(across, up, HEIGHT, ("threshold", "layers left"))
    for path in drawn:
        parts.append(tag("g", tag("title", f"{path.source}: {len(path.plans)} plans, {path.member('merge_rule')} by "
                                              f"{path.member('similarity')}"),
                         *_stairs(path.plans, x, y), class_="exact"))
        parts += [tag("rect", x=x(a), y=0, height=HEIGHT, class_="unknown",
                      width=f"{100 * (across.at(b) - across.at(a)):.2f}%") for a, b in path.unknown]
    aside = apart([(across.at(step.threshold), *reaching(y(step.n_layers, step.series))) for step in steps])
    for step, dx in zip(steps, aside, strict=True):
        k, at = shades.of(step.row), y(step.n_layers, step.series)
        title = (f"{step.row.title}: {step.n_layers} layers; the same for every threshold from {bound(step.low)} to "
                f"{bound(step.high)}")
        marks = (tag("line", x1=x(step.low), x2=x(step.high), y1=at, y2=at, class_="tread"),
                 _aside(tag("use", href=f"#shape-{k}", x=x(step.threshold), y=at, class_="mark"), dx))
        parts.append(_link(step.row, title, marks, k))
    label = f"Layers over threshold: {len(steps)} runs" + (f" and {len(drawn)} exact paths." if drawn else ".")
    chart = tag("svg", *parts, width="100%", height=HEIGHT, role="group", class_="chart points", aria_label=label)
    return Staircase(chart, steps, drawn, notes)


def decided_steps(rows: Sequence[Row]) -> list[Step]:
    series: dict[Any, int] = {}
    out = []
    for row in rows:
        plan, method = row.plan, row.record.member("method")
        if plan is None or plan.threshold is None or method.get("name") != "slm" or sized(method):
            continue
        low = high = plan.threshold
        if plan.trace and not method.get("screen_dtype"):  # a screen decides on scores that are not exact
            low = max((t.most for t in plan.trace if not t.accepted), default=-math.inf)
            high = min((t.most for t in plan.trace if t.accepted), default=math.inf)
        if not low <= plan.threshold <= high:
            low = high = plan.threshold
        others = tuple(repr(v) for path, v in row.settings.items() if path != "method/threshold")
        out.append(Step(row, plan.threshold, low, high, plan.n_layers_out, series.setdefault(others, len(series))))
    return sorted(out, key=lambda s: (s.series, s.threshold))


def sized(method: Mapping[str, Any]) -> bool:
    """Whether a size was requested, so that the threshold was found and nobody's choice."""
    return any(name.startswith("target_") and value is not None for name, value in method.items())


def _stairs(plans: Sequence[PathPlan], x: Callable[[float], str], y: Callable[[float], float]) -> list[Markup]:
    treads = [tag("line", x1=x(p.threshold_low), x2=x(p.threshold_high), y1=y(p.n_layers), y2=y(p.n_layers))
              for p in plans]
    return treads + [tag("line", x1=x(b.threshold_low), x2=x(b.threshold_low), y1=y(a.n_layers), y2=y(b.n_layers))
                     for a, b in itertools.pairwise(plans) if a.threshold_high == b.threshold_low]


def bound(threshold: float) -> str:
    """An end of an interval of thresholds, which may be open."""
    return "any below" if threshold == -math.inf else "any above" if threshold == math.inf else f"{threshold:.4f}"


def reach(rows: Sequence[Row]) -> float:
    """The largest distance from 0 that an interval of a difference has, 0.05 to 0.5: the scale of the small bars."""
    ends = [abs(end) for row in rows for c in (*row.tasks, row.average) if c and (d := c.difference)
            for end in (d.value, d.low, d.high) if end is not None]
    return min(0.5, max([0.05, *ends]))


def interval(row: Comparison, reach: float) -> Markup:
    """Compressed minus dense with its 95 % interval, 0 in the middle, cut at `reach`; beside it stands the number."""
    assert row.difference is not None
    value, low, high = row.difference.value, row.difference.low, row.difference.high

    def x(difference: float) -> float:
        return round(50 * (1 + min(1.0, max(-1.0, difference / reach))), 2)

    parts = [tag("path", d="M50 0V16", class_="zero")]
    kind = "unsure"
    if low is not None and high is not None and low < high:  # else every document changed alike: no word on others
        kind = "worse" if high < 0 else "better" if low > 0 else "unsure"
        parts.append(tag("path", d=f"M{x(low):g} 8H{x(high):g}", class_="spread"))
    parts.append(tag("circle", cx=x(value), cy=8, r=3.2))
    return tag("svg", *parts, viewBox="0 0 100 16", preserveAspectRatio="none", class_=f"interval {kind}",
               aria_hidden="true")
