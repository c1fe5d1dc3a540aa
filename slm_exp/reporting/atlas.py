"""The layer atlas: every distinct similarity matrix of a sweep, and every distinct plan over them."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from slm_exp.core.types import Group, LayerSimilarity, MergePlan
from slm_exp.reporting import charts

if TYPE_CHECKING:
    import numpy as np

    from slm_exp.reporting.sweep import Row


@dataclass(frozen=True)
class Shape:
    """What a plan does to the layers, and the runs that do it. Rules that combine the same layers share a shape."""

    key: str
    plan: MergePlan
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Sheet:
    """One distinct matrix."""

    name: str
    """What sets it apart from the other sheets."""
    similarity: LayerSimilarity
    rows: tuple[Row, ...]
    picture: Markup
    values: str
    """Base64 of [L, L] uint8, row by row: 255 x similarity, below 0 as 0."""


@dataclass(frozen=True)
class Atlas:
    sheets: tuple[Sheet, ...]
    shapes: tuple[Shape, ...]
    """Fewest layers removed first."""

    def __bool__(self) -> bool:
        return bool(self.sheets or self.shapes)


def gather(rows: Sequence[Row]) -> Atlas:
    """Read every run's similarity.npz. Equal matrices estimated in the same way are one sheet, whoever left them."""
    shapes = _shapes(rows)
    found: dict[tuple[Any, ...], tuple[LayerSimilarity, dict[str, Any], list[Row]]] = {}
    for row in rows:
        alike = _load(row)
        if alike is None:
            continue
        what = {"kernel": alike.kernel, "estimator": alike.estimator, "batch": alike.batch,
                "first token": "left out" if alike.skip_first_token else "included",
                **{name: value for name in ("model", "calibration") if (value := _digest(row, name))}}
        key = (*what.values(), _bytes(alike.matrix_LL))
        found.setdefault(key, (alike, what, []))[2].append(row)
    apart = {name for name in ("estimator", "batch", "first token", "model", "calibration")
             if len({what.get(name) for _, what, _ in found.values()}) > 1}
    sheets = []
    for alike, what, some in found.values():
        name = ", ".join([f"{alike.kernel} kernel", *(f"{k} {v}" for k, v in what.items() if k in apart)])
        drawn = [s for s in shapes if s.plan.n_layers == len(alike.matrix_LL) and _same_model(s, some)]
        sheets.append(Sheet(name, alike, tuple(some), picture(name, alike.matrix_LL, drawn),
                            base64.b64encode(_bytes(alike.matrix_LL)).decode()))
    return Atlas(tuple(sorted(sheets, key=lambda sheet: sheet.name)), shapes)


def picture(name: str, matrix_LL: np.ndarray, shapes: Sequence[Shape]) -> Markup:
    """A matrix with the windows of all plans framed, the more often the stronger."""
    n = len(matrix_LL)
    size, left, top = 240.0, 26.0, 4.0
    cell = size / n
    frames: dict[tuple[Group, bool], list[Shape]] = {}
    for shape in shapes:
        for group in shape.plan.groups:
            frames.setdefault((group, False), []).append(shape)
        for layer in shape.plan.dropped:
            frames.setdefault((Group(layer, layer + 1), True), []).append(shape)
    parts = [charts.pixels(matrix_LL, x=left, y=top, size=size)]
    for (group, gone), some in sorted(frames.items(), key=lambda item: len(item[1])):
        side = (group.stop - group.start) * cell
        x, y = left + group.start * cell, top + size - group.stop * cell
        both = (charts.tag("rect", x=x, y=y, width=side, height=side, class_=c)
                for c in ("frame halo", "frame gone" if gone else "frame"))
        told = f"layers {charts.span(group)} {'removed' if gone else 'merged'} by {len(some)} of {len(shapes)} plans"
        parts.append(charts.tag("g", charts.tag("title", told), *both, class_="window",
                                data_plans=" ".join(s.key for s in some),
                                opacity=round(0.45 + 0.55 * len(some) / len(shapes), 2)))
    for layer in range(0, n, 5 if n <= 30 else 10 if n <= 60 else 20):
        at = (layer + 0.5) * cell
        parts.append(charts.tag("text", str(layer), x=left + at, y=top + size + 14, class_="mid"))
        parts.append(charts.tag("text", str(layer), x=left - 5, y=top + size - at, dy="0.35em", class_="end"))
    parts.append(charts.tag("g", class_="cross", hidden="", data_cell=f"{cell:.6g}"))
    often = max(frames.values(), key=len) if frames else []
    most = next((charts.span(g) for (g, _), some in frames.items() if some is often), "")
    label = (f"{name}: similarity of every pair of {n} layers, from {float(matrix_LL.min()):.2f} to "
             f"{float(matrix_LL.max()):.2f}." + (f" Most often framed: layers {most}." if most else ""))
    return charts.tag("svg", *parts, viewBox=f"0 0 {left + size + 4:g} {top + size + 20:g}", role="img",
                      aria_label=label, class_="heatmap sheet", data_left=left, data_top=top, data_size=size, data_n=n)


def strip(plan: MergePlan) -> Markup:
    """The layers in a row, the first on the left: kept grey, merged windows as one bar, removed a line."""
    gone = {(half.layer, half.kind) for half in plan.sublayers}
    paths: dict[str, list[str]] = {"kept": [], "merged": [], "dropped": []}
    for slot in plan.slots:
        merged = slot.stop - slot.start > 1
        top = 5 if (slot.start, "mlp") in gone else 0
        bottom = 5 if (slot.start, "attention") in gone else 10
        width = slot.stop - slot.start - 0.16
        paths["merged" if merged else "kept"].append(
            f"M{slot.start + 0.08:g} {top}h{width:g}v{bottom - top}h{-width:g}z")
    paths["dropped"] += [f"M{layer + 0.08:g} 4.4h.84v1.2h-.84z" for layer in plan.dropped]
    drawn = [charts.tag("path", d="".join(d), class_=f"box {kind}") for kind, d in paths.items() if d]
    return charts.tag("svg", *drawn, viewBox=f"0 0 {plan.n_layers} 10", preserveAspectRatio="none", class_="strip",
                      role="img", aria_label=charts.describe(plan))


def _shapes(rows: Sequence[Row]) -> tuple[Shape, ...]:
    found: dict[str, tuple[MergePlan, list[Row]]] = {}
    for row in rows:
        if row.plan:
            effect = row.plan.effect()
            layers = [effect[name] for name in ("n_layers", "groups", "dropped", "sublayers")]
            key = json.dumps([_digest(row, "model"), *layers])
            found.setdefault(key, (row.plan, []))[1].append(row)
    ordered = sorted(found.values(), key=lambda f: (f[0].n_layers, -f[0].n_layers_out, f[0].groups, f[0].dropped))
    return tuple(Shape(f"p{number}", plan, tuple(some)) for number, (plan, some) in enumerate(ordered, start=1))


def _same_model(shape: Shape, rows: Sequence[Row]) -> bool:
    return bool({_digest(row, "model") for row in shape.rows} & {_digest(row, "model") for row in rows})


def _digest(row: Row, section: str) -> str | None:
    about = row.record.get(section) or {}
    return f"{about.get('name') or ''} {str(about.get('digest'))[:6]}".strip() if about else None


def _load(row: Row) -> LayerSimilarity | None:
    try:
        return LayerSimilarity.load(row.folder)
    except (OSError, ValueError, KeyError):  # a run that stopped before has none
        return None


def _bytes(matrix_LL: np.ndarray) -> bytes:
    import numpy as np

    return bytes((np.clip(np.nan_to_num(matrix_LL), 0, 1) * 255).round().astype("uint8").tobytes())
