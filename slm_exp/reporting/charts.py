"""The page's pictures as inline SVG: colours come from the page's CSS, so they follow light and dark.

Pictures whose shape carries meaning (stack, heatmap) have a fixed coordinate system and scale as a whole. Charts that
stretch with the page place points in per cent of their width, so that text and dots keep their size on a phone.
"""

from __future__ import annotations

import base64
import itertools
import math
import struct
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from slm_exp.core.types import Group, MergePlan
from slm_exp.reporting.results import Comparison

if TYPE_CHECKING:
    import numpy as np

SCALE = ("#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725")
"""Similarity 0 to 1, viridis: even steps to the eye, also without red or green."""


def tag(element: str, *children: str, **attributes: Any) -> Markup:
    """One SVG element; text and attributes are escaped, `stroke_width` becomes `stroke-width`, None is left out."""
    parts = []
    for name, value in attributes.items():
        if value is not None:
            text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
            parts.append(f' {name.rstrip("_").replace("_", "-")}="{escape(text)}"')
    inner = Markup("").join(escape(child) for child in children)
    return Markup(f"<{element}{''.join(parts)}>{inner}</{element}>")


def span(group: Group) -> str:
    """Layers of a group, both ends named: `14-15`, or `7` for one."""
    return str(group.start) if group.stop - group.start == 1 else f"{group.start}–{group.stop - 1}"


def describe(plan: MergePlan) -> str:
    """What the plan does, in one sentence."""
    done = []
    if plan.groups:
        each = " each" if len(plan.groups) > 1 else ""
        done.append("layers " + ", ".join(span(g) for g in plan.groups) + f" merged into one{each}")
    if plan.dropped:
        done.append(f"{_layers(plan.dropped)} removed")
    for kind in ("attention", "mlp"):
        layers = [s["layer"] for s in plan.sublayers if s["kind"] == kind]
        if layers:
            done.append(f"{kind} of {_layers(layers)} removed")
    if plan.width:
        share = plan.width.ratio if plan.width.reached is None else plan.width.reached
        of = f" by {100 * share:.1f} % of their parameters" if share is not None else ""
        done.append(f"layers narrowed{of} ({plan.width.method})")
    sentence = "; ".join(done) or "nothing merged or removed"
    return sentence[0].upper() + sentence[1:] + "."


def halves(plan: MergePlan) -> str:
    """How many halves of layers are gone: `3 attention and 1 mlp`; empty where none is."""
    kinds = [str(half["kind"]) for half in plan.sublayers]
    return " and ".join(f"{kinds.count(kind)} {kind}" for kind in ("attention", "mlp") if kind in kinds)


def stack(plan: MergePlan) -> Markup:
    """Dense layers on the left, what became of them on the right, the last layer on top."""
    pitch = max(7.0, min(28.0, 480 / plan.n_layers))
    top, width, left, right = 30.0, 96.0, 36.0, 268.0
    bar = pitch - 2

    def y(layer: int) -> float:
        """Upper edge of a row, counted from the bottom."""
        return top + (plan.n_layers - 1 - layer) * pitch

    halves = {(s["layer"], s["kind"]) for s in plan.sublayers}
    dense = _Labels(left - 8, "end")
    compressed = _Labels(right + width + 8, "")
    drawn = []
    for slot, group in enumerate(plan.slots):
        merged = group.stop - group.start > 1
        kind = "merged" if merged else "kept"
        told = f"layers {span(group)} merged by {plan.rule}" if merged else f"layer {group.start} kept"
        told += "".join(f" without its {half['kind']}" for half in plan.sublayers if half["layer"] == group.start)
        drawn.append(tag(
            "g",
            tag("title", f"compressed layer {slot}: {told}"),
            tag("path", class_=f"ribbon {kind}", d=_ribbon(
                left + width + 2, y(group.stop - 1), y(group.start) + bar, right - 2, y(slot), y(slot) + bar)),
            tag("rect", x=right + (width / 2 if (group.start, "attention") in halves else 0), y=y(slot),
                width=width / 2 if any(layer == group.start for layer, _ in halves) else width, height=bar, rx=2,
                class_=f"box {kind}"),
        ))
        compressed.want(span(group), y(slot) + bar / 2, rank=0 if merged else 1 + slot % 5, strong=merged)
    ends = {end for g in plan.groups for end in (g.start, g.stop - 1)}
    in_group = {i for g in plan.groups for i in range(g.start, g.stop)}
    for layer in range(plan.n_layers):
        kind = "dropped" if layer in plan.dropped else "merged" if layer in in_group else "kept"
        told = "removed" if kind == "dropped" else kind
        middle = y(layer) + bar / 2
        parts = [tag("rect", x=left, y=y(layer), width=width, height=bar, rx=2, class_=f"box {kind}")]
        for number, half in enumerate(("attention", "mlp")):
            if (layer, half) in halves:
                told += f", {half} removed"
                parts.append(tag("rect", x=left + number * width / 2, y=y(layer), width=width / 2, height=bar,
                                 class_="box dropped"))
        if kind == "dropped":
            parts.append(tag("text", "removed", x=left + width + 8, y=middle, dy="0.35em", class_="gone"))
        dense.want(str(layer), middle, rank=0 if kind == "dropped" or layer in ends else 1 + layer % 5)
        drawn.append(tag("g", tag("title", f"layer {layer}: {told}"), *parts))
    heads = [tag("text", f"dense, {plan.n_layers}", x=left, y=16, class_="head"),
             tag("text", f"compressed, {plan.n_layers_out}", x=right, y=16, class_="head")]
    hatch = tag("defs", tag("pattern", tag("path", d="M-1 1 l2 -2 M0 6 l6 -6 M5 7 l2 -2", class_="hatch"),
                            id="hatch", width=6, height=6, patternUnits="userSpaceOnUse"))
    return tag("svg", hatch, *heads, *drawn, *dense.placed(), *compressed.placed(), role="img", class_="stack",
               viewBox=f"0 0 420 {top + plan.n_layers * pitch + 6:g}",
               aria_label=f"{plan.n_layers} layers on the left, {plan.n_layers_out} on the right. {describe(plan)}")


class _Labels:
    """A column of labels; where they would touch, the lower rank wins."""

    def __init__(self, x: float, class_: str) -> None:
        self._x, self._class = x, class_
        self._wanted: list[tuple[int, float, str, bool]] = []

    def want(self, text: str, y: float, rank: int, strong: bool = False) -> None:
        self._wanted.append((rank, y, text, strong))

    def placed(self, room: float = 12.0) -> list[Markup]:
        taken: list[float] = []
        out = []
        for _, y, text, strong in sorted(self._wanted):
            if all(abs(y - other) >= room for other in taken):
                taken.append(y)
                class_ = f"{self._class} strong" if strong else self._class
                out.append(tag("text", text, x=self._x, y=y, dy="0.35em", class_=class_))
        return out


def _ribbon(x0: float, top0: float, bottom0: float, x1: float, top1: float, bottom1: float) -> str:
    """An area from one upright edge to another, as a path."""
    middle = (x0 + x1) / 2
    return (f"M{x0:g} {top0:g} C{middle:g} {top0:g} {middle:g} {top1:g} {x1:g} {top1:g} "
            f"V{bottom1:g} C{middle:g} {bottom1:g} {middle:g} {bottom0:g} {x0:g} {bottom0:g} Z")


def _layers(numbers: Sequence[int]) -> str:
    return f"layer{'s' if len(numbers) > 1 else ''} " + ", ".join(map(str, numbers))


def heatmap(matrix_LL: np.ndarray, plan: MergePlan | None) -> Markup:
    """The layer similarity matrix, layer 0 in the lower left corner, merged windows framed on the diagonal.

    One pixel a layer pair, enlarged without smoothing: a few kilobytes at any depth.
    """
    n = len(matrix_LL)
    size, left, top = 380.0, 34.0, 6.0
    cell = size / n

    def frame(group: Group, told: str, class_: str) -> Markup:
        side = (group.stop - group.start) * cell
        x, y = left + group.start * cell, top + size - group.stop * cell
        both = (tag("rect", x=x, y=y, width=side, height=side, class_=c) for c in ("frame halo", class_))
        return tag("g", tag("title", told), *both)

    parts = [pixels(matrix_LL, left, top, size)]
    if plan:
        parts += [frame(g, f"layers {span(g)} are merged", "frame") for g in plan.groups]
        parts += [frame(Group(i, i + 1), f"layer {i} is removed", "frame gone") for i in plan.dropped]
    for layer in range(0, n, 5 if n <= 50 else 10):
        centre = (layer + 0.5) * cell
        parts.append(tag("text", str(layer), x=left + centre, y=top + size + 17, class_="mid"))
        parts.append(tag("text", str(layer), x=left - 7, y=top + size - centre, dy="0.35em", class_="end"))
    parts.append(tag("text", "layer", x=left + size / 2, y=top + size + 34, class_="mid"))
    low, high = float(matrix_LL.min()), float(matrix_LL.max())
    framed = f" Framed: merged layers {', '.join(span(g) for g in plan.groups)}." if plan and plan.groups else ""
    label = f"Similarity of every pair of {n} layers, from {low:.2f} to {high:.2f}.{framed}"
    return tag("svg", *parts, viewBox=f"0 0 {left + size + 6:g} {top + size + 40:g}", role="img", aria_label=label,
               class_="heatmap", data_left=left, data_top=top, data_size=size)


def rounded(matrix_LL: np.ndarray) -> list[list[float | None]]:
    """The matrix to three decimals, as the page's script reads it; null where it is not finite."""
    return [[round(float(v), 3) if math.isfinite(v) else None for v in row] for row in matrix_LL]


def colour_bar() -> Markup:
    """The heatmap's scale, 0 to 1."""
    stops = ", ".join(SCALE)
    return Markup('<div class="bar" aria-hidden="true"><span>0</span>'
                  '<i style="background:linear-gradient(90deg, {})"></i><span>1</span></div>').format(stops)


def candidates(plan: MergePlan) -> Markup:
    """Score of every candidate in the order they were tried, accepted and rejected by shape and colour."""
    scores = [t.score for t in plan.trace]
    marks = [*scores, plan.threshold] if plan.threshold is not None else scores
    ticks = _ticks(min(marks), max(marks))
    low, high = min(ticks[0], min(marks)), max(ticks[-1], max(marks))
    height, count = 260.0, len(scores)

    def x(number: int) -> str:
        return f"{100 * (number - 0.5) / count:.2f}%"

    def y(score: float) -> float:
        return height * (high - score) / ((high - low) or 1)

    parts = [_gridline(y(tick), f"{tick:.{_decimals(ticks)}f}") for tick in ticks]
    shown = [n for n in _ticks(1, count, whole=True) if 1 <= n <= count]
    parts += [tag("text", f"{n:g}", x=x(int(n)), y=height + 20, class_="mid") for n in shown]
    if plan.threshold is not None:
        parts.append(tag("line", x1="0", x2="100%", y1=y(plan.threshold), y2=y(plan.threshold), class_="threshold"))
    for number, trial in enumerate(plan.trace, start=1):
        verdict = "accepted" if trial.accepted else "rejected"
        told = f"{number}: layers {trial.low}–{trial.high}, score {trial.score:.4f}, {verdict}"
        mark = tag("use", href=f"#mark-{verdict}", x=x(number), y=y(trial.score), class_=verdict)
        parts.append(tag("g", tag("title", told), mark))
    if plan.threshold is not None:
        parts.append(tag("text", f"threshold {plan.threshold:g}", x="100%", y=y(plan.threshold) - 7,
                         class_="end strong clear"))
    r = 5.0 if count <= 60 else 4.0 if count <= 150 else 3.0
    cross = f"M{-0.8 * r:g} {-0.8 * r:g} L{0.8 * r:g} {0.8 * r:g} M{-0.8 * r:g} {0.8 * r:g} L{0.8 * r:g} {-0.8 * r:g}"
    shapes = tag("defs", tag("circle", r=r, id="mark-accepted"), tag("path", d=cross, id="mark-rejected"))
    taken = sum(t.accepted for t in plan.trace)
    label = f"Scores of {count} candidates, from {min(scores):.3f} to {max(scores):.3f}; {taken} accepted."
    return tag("svg", shapes, *parts, width="100%", height=height, role="img", aria_label=label, class_="chart")


def intervals(rows: Sequence[Comparison]) -> Markup:
    """One line per task: dense and compressed with one standard error to each side, on one scale."""
    both = [e for row in rows for e in (row.dense, row.compressed) if e]
    least = max(0.0, min(e.value - (e.stderr or 0) for e in both))
    ticks = _ticks(least, max(least + 0.01, *(e.value + (e.stderr or 0) for e in both)))  # all may be equal
    low, high = ticks[0], ticks[-1]

    def x(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    lines = []
    for row in rows:
        parts = [tag("line", x1=x(t), x2=x(t), y1="0", y2="100%", class_="grid") for t in ticks]
        for estimate, kind, y in ((row.dense, "dense", 12), (row.compressed, "compressed", 24)):
            if estimate is None:
                continue
            spread = "" if estimate.stderr is None else f" ± {100 * estimate.stderr:.1f}"
            marks = [tag("title", f"{row.task}, {kind}: {100 * estimate.value:.1f}{spread}")]
            if estimate.stderr is not None:
                ends = (x(max(low, estimate.value - estimate.stderr)), x(min(high, estimate.value + estimate.stderr)))
                marks.append(tag("line", x1=ends[0], x2=ends[1], y1=y, y2=y, class_="spread"))
            marks.append(tag("use", href=f"#mark-{kind}", x=x(estimate.value), y=y))
            parts.append(tag("g", *marks, class_=kind))
        lines.append(Markup('<div class="name">{}</div>').format(row.task)
                     + tag("svg", *parts, width="100%", height=36, class_="chart row"))
    shapes = tag("defs", tag("circle", r=4.5, id="mark-dense"),
                 tag("path", d="M0 -5.5 L5.5 0 L0 5.5 L-5.5 0 Z", id="mark-compressed"))
    axis = [tag("text", f"{100 * t:g}", x=x(t), y=14, class_="mid") for t in ticks]
    lines.append(Markup('<div class="name"></div>')
                 + tag("svg", shapes, *axis, width="100%", height=20, class_="chart row"))
    return Markup("").join(lines)


def losses(training: Sequence[Sequence[float]], held_out: Sequence[Sequence[float]]) -> Markup:
    """Loss over steps, each a list of (step, loss): a line for training, joined marks for what is held out."""
    both = [(float(step), float(loss)) for step, loss in (*training, *held_out)]
    across = _ticks(0, max(step for step, _ in both), whole=True)
    up = _ticks(min(loss for _, loss in both), max(loss for _, loss in both))
    height = 220.0

    def x(step: float) -> str:
        return f"{100 * step / across[-1]:.2f}%"

    def y(loss: float) -> float:
        return height * (up[-1] - loss) / ((up[-1] - up[0]) or 1)

    parts = [_gridline(y(tick), f"{tick:.{_decimals(up)}f}") for tick in up]
    parts += [tag("text", f"{t:g}", x=x(t), y=height + 20, class_="mid") for t in across]
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


def _gridline(y: float, text: str) -> Markup:
    line = tag("line", x1="0", x2="100%", y1=y, y2=y, class_="grid")
    return line + tag("text", text, x=-8, y=y, dy="0.35em", class_="end")


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Four to eight round numbers around [low, high]."""
    reach = (high - low) or 0.1
    step = 10 ** math.floor(math.log10(reach / 4))
    step *= next(m for m in (1, 2, 5, 10) if reach / (step * m) <= 7)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _decimals(ticks: Sequence[float]) -> int:
    return max(len(f"{t:.10f}".rstrip("0").partition(".")[2]) for t in ticks)


def pixels(matrix_LL: np.ndarray, x: float, y: float, size: float) -> Markup:
    """A matrix of scores as an embedded picture, layer 0 below left; a byte a pair before compression.

    Scores below 0 (the unbiased estimator goes there) and those that are not finite take the colour of 0.
    """
    import numpy as np

    levels = (np.clip(np.nan_to_num(matrix_LL[::-1]), 0, 1) * 255).round().astype("uint8")
    picture = base64.b64encode(_png(levels, _palette())).decode()
    return tag("image", href=f"data:image/png;base64,{picture}", x=x, y=y, width=size, height=size,
               preserveAspectRatio="none", class_="pixels")


def _palette() -> bytes:
    """256 colours from 0 to 1, RGB."""
    import numpy as np

    anchors = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in SCALE], dtype="float64")
    at, levels = np.linspace(0, 1, len(anchors)), np.linspace(0, 1, 256)
    colours = np.stack([np.interp(levels, at, anchors[:, i]) for i in range(3)], axis=-1)
    return bytes(colours.round().astype("uint8").tobytes())


def _png(levels_HW: np.ndarray, palette: bytes) -> bytes:
    """8-bit indexed colour, one scanline filter (none)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = levels_HW.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + row.tobytes() for row in levels_HW), 9)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"PLTE", palette) + chunk(b"IDAT", lines)
            + chunk(b"IEND", b""))
