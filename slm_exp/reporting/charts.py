"""The pictures of a run's page as inline SVG: layer stack, heat map, candidates, accuracies, losses. See svg."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from slm_exp.core.format import rounded, with_error
from slm_exp.core.types import Group, MergePlan
from slm_exp.reporting import svg
from slm_exp.reporting.results import Comparison
from slm_exp.reporting.svg import Axis, span, tag


def describe(plan: MergePlan) -> str:
    """What the plan does, in one sentence."""
    done = []
    if plan.groups:
        each = " each" if len(plan.groups) > 1 else ""
        done.append("layers " + ", ".join(span(g) for g in plan.groups) + f" merged into one{each}")
    gone = {"": plan.dropped, **{f"{kind} of ": [s.layer for s in plan.sublayers if s.kind == kind]
                                 for kind in ("attention", "mlp")}}
    done += [f"{what}layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))} removed"
             for what, layers in gone.items() if layers]
    if plan.width:
        share = plan.width.ratio if plan.width.reached is None else plan.width.reached
        of = f" by {100 * share:.1f} % of their parameters" if share is not None else ""
        done.append(f"layers narrowed{of} ({plan.width.method})")
    sentence = "; ".join(done) or "nothing merged or removed"
    return sentence[0].upper() + sentence[1:] + "."


def removed_sublayers(plan: MergePlan) -> str:
    """How many sublayers are removed: `3 attention and 1 mlp`; empty where none is."""
    kinds = [part.kind for part in plan.sublayers]
    return " and ".join(f"{kinds.count(kind)} {kind}" for kind in ("attention", "mlp") if kind in kinds)


def stack(plan: MergePlan) -> Markup:
    """Dense layers on the left, what became of them on the right, the last layer on top."""
    pitch = max(7.0, min(28.0, 480 / plan.n_layers))
    top, width, left, right = 30.0, 96.0, 36.0, 268.0
    bar = pitch - 2

    def y(layer: int) -> float:
        """Upper edge of a row, counted from the bottom."""
        return top + (plan.n_layers - 1 - layer) * pitch

    removed = {(s.layer, s.kind) for s in plan.sublayers}
    dense: list[Label] = []
    compressed: list[Label] = []
    drawn = []
    for slot, group in enumerate(plan.slots):
        merged = group.stop - group.start > 1
        kind = "merged" if merged else "kept"
        title = f"layers {span(group)} merged by {plan.rule}" if merged else f"layer {group.start} kept"
        title += "".join(f" without its {part.kind}" for part in plan.sublayers if part.layer == group.start)
        ribbon = _ribbon(left + width + 2, y(group.stop - 1), y(group.start) + bar, right - 2, y(slot), y(slot) + bar)
        box = tag("rect", x=right + (width / 2 if (group.start, "attention") in removed else 0), y=y(slot),
                  width=width / 2 if any(layer == group.start for layer, _ in removed) else width, height=bar, rx=2,
                  class_=f"box {kind}")
        drawn.append(tag("g", tag("title", f"compressed layer {slot}: {title}"),
                         tag("path", class_=f"ribbon {kind}", d=ribbon), box))
        compressed.append(Label(0 if merged else 1 + slot % 5, y(slot) + bar / 2, span(group), merged))
    ends = {end for g in plan.groups for end in (g.start, g.stop - 1)}
    in_group = {i for g in plan.groups for i in range(g.start, g.stop)}
    for layer in range(plan.n_layers):
        kind = "dropped" if layer in plan.dropped else "merged" if layer in in_group else "kept"
        title = "removed" if kind == "dropped" else kind
        middle = y(layer) + bar / 2
        parts = [tag("rect", x=left, y=y(layer), width=width, height=bar, rx=2, class_=f"box {kind}")]
        for number, sublayer in enumerate(("attention", "mlp")):
            if (layer, sublayer) in removed:
                title += f", {sublayer} removed"
                parts.append(tag("rect", x=left + number * width / 2, y=y(layer), width=width / 2, height=bar,
                                 class_="box dropped"))
        if kind == "dropped":
            parts.append(tag("text", "removed", x=left + width + 8, y=middle, dy="0.35em", class_="gone"))
        dense.append(Label(0 if kind == "dropped" or layer in ends else 1 + layer % 5, middle, str(layer)))
        drawn.append(tag("g", tag("title", f"layer {layer}: {title}"), *parts))
    heads = [tag("text", f"dense, {plan.n_layers}", x=left, y=16, class_="head"),
             tag("text", f"compressed, {plan.n_layers_out}", x=right, y=16, class_="head")]
    hatch = tag("defs", tag("pattern", tag("path", d="M-1 1 l2 -2 M0 6 l6 -6 M5 7 l2 -2", class_="hatch"),
                            id="hatch", width=6, height=6, patternUnits="userSpaceOnUse"))
    return tag("svg", hatch, *heads, *drawn, *_placed(dense, left - 8, "end"),
               *_placed(compressed, right + width + 8, ""), role="img", class_="stack",
               viewBox=f"0 0 420 {top + plan.n_layers * pitch + 6:g}",
               aria_label=f"{plan.n_layers} layers on the left, {plan.n_layers_out} on the right. {describe(plan)}")


class Label(NamedTuple):
    """In a column."""

    rank: int
    y: float
    text: str
    strong: bool = False


def _placed(column: Sequence[Label], x: float, class_: str, room: float = 12.0) -> list[Markup]:
    """The labels of a column that do not touch; where they would, the lower rank wins."""
    taken: list[Label] = []
    for label in sorted(column):
        if all(abs(label.y - other.y) >= room for other in taken):
            taken.append(label)
    return [tag("text", label.text, x=x, y=label.y, dy="0.35em", class_=f"{class_} strong" if label.strong else class_)
            for label in taken]


def _ribbon(x0: float, top0: float, bottom0: float, x1: float, top1: float, bottom1: float) -> str:
    """An area from one upright edge to another, as a path."""
    middle = (x0 + x1) / 2
    return (f"M{x0:g} {top0:g} C{middle:g} {top0:g} {middle:g} {top1:g} {x1:g} {top1:g} "
            f"V{bottom1:g} C{middle:g} {bottom1:g} {middle:g} {bottom0:g} {x0:g} {bottom0:g} Z")


def heatmap(matrix_LL: np.ndarray, plan: MergePlan | None) -> Markup:
    """A run's layer similarity matrix with what its plan does."""
    groups, dropped = (plan.groups, plan.dropped) if plan else ((), ())
    frames = [*(svg.Frame(g, False, f"layers {span(g)} are merged") for g in groups),
              *(svg.Frame(Group(i, i + 1), True, f"layer {i} is removed") for i in dropped)]
    framed = f" Framed: merged layers {', '.join(map(span, groups))}." if groups else ""
    return svg.heatmap(matrix_LL, frames, f"Similarity of every pair of {len(matrix_LL)} layers, from "
                                          f"{float(matrix_LL.min()):.2f} to {float(matrix_LL.max()):.2f}.{framed}")


def candidates(plan: MergePlan, near: tuple[float, float] | None = None) -> Markup:
    """Score of every candidate over the layers that it spans, accepted and rejected by shape and colour. `near`: only
    those whose scores lie between; see `near_threshold`."""
    low, high = near or (-math.inf, math.inf)
    shown = [(number, t) for number, t in enumerate(plan.trace, start=1) if low <= t.most <= high]
    scores, taken = [t.most for _, t in shown], sum(t.accepted for _, t in shown)
    marks = [*(near or scores), *([] if plan.threshold is None else [plan.threshold])]
    across = Axis([0, max(plan.n_layers - 1, *(t.high for t in plan.trace))], whole=True, margin=0.02)
    up, height = Axis(marks), 260.0
    x, y = across.across, partial(up.down, height=height)
    of = plan.similarity if plan.threshold is not None else "the method's own"
    parts = svg.axes(across, up, height, ("layers of the candidate, the mark at the lowest", f"score, {of}"))
    if plan.threshold is not None:
        parts.append(tag("line", x1="0", x2="100%", y1=y(plan.threshold), y2=y(plan.threshold), class_="threshold"))
    for number, trial in shown:
        verdict = "accepted" if trial.accepted else "rejected"
        score = f"score {trial.most:.4f}" if trial.score is not None else f"score at most {trial.most:.4f}"
        title = f"{number}: layers {trial.low}–{trial.high}, {score}, {verdict}"
        at = y(trial.most)
        parts.append(tag("g", tag("title", title),
                         tag("line", x1=x(trial.low), x2=x(trial.high), y1=at, y2=at, class_=f"reach {verdict}"),
                         tag("use", href=f"#mark-{verdict}", x=x(trial.low), y=at, class_=verdict)))
    r = 5.0 if len(shown) <= 60 else 4.0 if len(shown) <= 150 else 3.0
    cross = f"M{-0.8 * r:g} {-0.8 * r:g} L{0.8 * r:g} {0.8 * r:g} M{-0.8 * r:g} {0.8 * r:g} L{0.8 * r:g} {-0.8 * r:g}"
    both = (tag("circle", r=r, id="mark-accepted"), tag("path", d=cross, id="mark-rejected"))
    shapes = "" if near else tag("defs", *both)  # once on the page
    label = f"Scores of {len(shown)} candidates, from {min(scores):.3f} to {max(scores):.3f}; {taken} accepted."
    if early := sum(t.score is None for _, t in shown):
        label += f" {early} ended early, at what they cannot exceed."
    return tag("svg", shapes, *parts, width="100%", height=height, role="img", aria_label=label, class_="chart")


def near_threshold(plan: MergePlan) -> tuple[float, float] | None:
    """The scores around the threshold that the closest decisions have, at least six of them; None where that is not
    much less than all scores, so that a second picture would show nothing more."""
    if plan.threshold is None or len(plan.trace) < 8:
        return None
    closest = sorted(abs(t.most - plan.threshold) for t in plan.trace)
    reach = closest[max(5, len(closest) // 5)] * 1.05
    return (plan.threshold - reach, plan.threshold + reach) if 0 < reach < closest[-1] / 3 else None


def intervals(rows: Sequence[Comparison]) -> Markup:
    """One line per task: dense and compressed with one standard error to each side, on one scale."""
    both = [e for row in rows for e in (row.dense, row.compressed) if e]
    if not both:
        return Markup("")
    least = max(0.0, min([*(e.value - (e.stderr or 0) for e in both),
                          *(row.chance for row in rows if row.chance is not None)]))
    scale = Axis([least, max(least + 0.01, *(e.value + (e.stderr or 0) for e in both))])  # all may be equal
    x = scale.across
    lines = []
    for row in rows:
        parts = [tag("line", x1=x(t), x2=x(t), y1="0", y2="100%", class_="grid") for t in scale.ticks]
        if row.chance is not None:
            parts.append(tag("g", tag("title", f"{row.task}, chance: {rounded(100 * row.chance, 1)}"),
                             tag("line", x1=x(row.chance), x2=x(row.chance), y1=4, y2=32, class_="chance")))
        for estimate, kind, y in ((row.dense, "dense", 12), (row.compressed, "compressed", 24)):
            if estimate is None:
                continue
            shown = with_error(100 * estimate.value, None if estimate.stderr is None else 100 * estimate.stderr)
            marks = [tag("title", f"{row.task}, {kind}: {shown}")]
            if estimate.stderr is not None:
                ends = x(estimate.value - estimate.stderr), x(estimate.value + estimate.stderr)
                marks.append(tag("line", x1=ends[0], x2=ends[1], y1=y, y2=y, class_="spread"))
            marks.append(tag("use", href=f"#mark-{kind}", x=x(estimate.value), y=y))
            parts.append(tag("g", *marks, class_=kind))
        name = Markup('<div class="name{}">{}</div>').format(" mute" if row.mute else "", row.task)
        lines.append(name
                     + tag("svg", *parts, width="100%", height=36, class_="chart row"))
    shapes = tag("defs", tag("circle", r=4.5, id="mark-dense"),
                 tag("path", d="M0 -5.5 L5.5 0 L0 5.5 L-5.5 0 Z", id="mark-compressed"))
    axis = [tag("text", f"{100 * t:g}", x=x(t), y=14, class_="mid") for t in scale.ticks]
    axis.append(tag("text", "accuracy, %", x="50%", y=34, class_="mid title"))
    lines.append(Markup('<div class="name"></div>')
                 + tag("svg", shapes, *axis, width="100%", height=40, class_="chart row"))
    return Markup("").join(lines)


def losses(training: Sequence[Sequence[float]], held_out: Sequence[Sequence[float]]) -> Markup:
    """Loss over steps, each a list of (step, loss): a line for training, joined marks for what is held out."""
    both = [(float(step), float(loss)) for step, loss in (*training, *held_out)]
    across = Axis([0, *(step for step, _ in both)], whole=True)
    up, height = Axis([loss for _, loss in both]), 220.0
    x, y = across.across, partial(up.down, height=height)
    parts = svg.axes(across, up, height, ("optimiser steps", "loss, nats a token"))
    for series, class_ in ((training, None), (held_out, "held")):
        lines = [tag("line", x1=x(a[0]), x2=x(b[0]), y1=y(a[1]), y2=y(b[1]), class_="curve")
                 for a, b in itertools.pairwise(series)]
        marks = [tag("g", tag("title", f"step {step:g}: {loss:.4f}"), tag("circle", cx=x(step), cy=y(loss), r=3.5))
                 for step, loss in (series if class_ or len(series) == 1 else ())]
        parts.append(tag("g", *lines, *marks, class_=class_))
    ends = f"{training[0][1]:.3f} at first, {training[-1][1]:.3f} at last" if training else "none"
    held = f"; held out {held_out[0][1]:.3f} and {held_out[-1][1]:.3f}" if held_out else ""
    return tag("svg", *parts, width="100%", height=height, role="img", class_="chart",
               aria_label=f"Training loss over steps: {ends}{held}.")
