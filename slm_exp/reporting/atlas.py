"""The layer atlas: every distinct similarity matrix of a sweep, and every distinct plan over them."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from slm_exp.core.types import Group, LayerSimilarity, MergePlan
from slm_exp.reporting import charts, svg
from slm_exp.reporting.rows import Row, setting


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
    """What sets it apart from the other sheets: the sweep's settings where they do, else how it was made."""
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


class Made(NamedTuple):
    """How a matrix was made."""

    kernel: str
    estimator: str
    batch: int
    first_token: str
    model: str | None
    calibration: str | None


def gather(rows: Sequence[Row]) -> Atlas:
    """Read every run's similarity.npz. Equal matrices estimated in the same way are one sheet, whoever left them."""
    shapes = _shapes(rows)
    found: dict[tuple[Made, bytes], tuple[LayerSimilarity, list[Row]]] = {}
    for row in rows:
        similarity = row.run.similarity if row.run else None
        if similarity is not None:
            made = Made(similarity.kernel, similarity.estimator, similarity.batch,
                        "left out" if similarity.skip_first_token else "included", _of(row, "model"),
                        _of(row, "calibration"))
            found.setdefault((made, svg.levels(similarity.matrix_LL).tobytes()), (similarity, []))[1].append(row)
    apart = [name for name in Made._fields[1:] if len({getattr(made, name) for made, _ in found}) > 1]
    every = [some for _, some in found.values()]
    varied = [path for path in (rows[0].settings if rows else ())
              if all(len({repr(row.settings[path]) for row in some}) == 1 for some in every)
              and len({repr(some[0].settings[path]) for some in every}) > 1]
    sheets = []
    for (made, values), (similarity, some) in found.items():
        others = {name: value for name in apart if (value := getattr(made, name)) is not None}
        name = ", ".join([f"{made.kernel} kernel", *(
            [f"{setting(path)} {some[0].settings[path]}" for path in varied if path != "kernel/name"]
            or [f"{k.replace('_', ' ')} {v}" for k, v in others.items()])])
        models = {_of(row, "model") for row in some}
        drawn = [s for s in shapes if s.plan.n_layers == len(similarity.matrix_LL)
                 and models & {_of(row, "model") for row in s.rows}]
        sheets.append(Sheet(name, similarity, tuple(some), picture(name, similarity.matrix_LL, drawn),
                            base64.b64encode(values).decode()))
    return Atlas(tuple(sorted(sheets, key=lambda sheet: sheet.name)), shapes)


def picture(name: str, matrix_LL: np.ndarray, shapes: Sequence[Shape]) -> Markup:
    """A matrix with the windows of all plans framed, the more often the stronger."""
    windows: dict[tuple[Group, bool], list[Shape]] = {}
    for shape in shapes:
        for group in shape.plan.groups:
            windows.setdefault((group, False), []).append(shape)
        for layer in shape.plan.dropped:
            windows.setdefault((Group(layer, layer + 1), True), []).append(shape)
    frames = [
        svg.Frame(group, gone, f"layers {svg.span(group)} {'removed' if gone else 'merged'} by {len(some)} of "
                               f"{len(shapes)} plans",
                  " ".join(s.key for s in some), round(0.45 + 0.55 * len(some) / len(shapes), 2))
        for (group, gone), some in sorted(windows.items(), key=lambda item: len(item[1]))]
    most = max(windows, key=lambda window: len(windows[window]), default=None)
    label = (f"{name}: similarity of every pair of {len(matrix_LL)} layers, from {float(matrix_LL.min()):.2f} to "
             f"{float(matrix_LL.max()):.2f}." + (f" Most often framed: layers {svg.span(most[0])}." if most else ""))
    return svg.heatmap(matrix_LL, frames, label, small=True)


def strip(plan: MergePlan) -> Markup:
    """The layers in a row, the first on the left: kept grey, merged windows as one bar, removed a line."""
    gone = {(part.layer, part.kind) for part in plan.sublayers}
    paths: dict[str, list[str]] = {"kept": [], "merged": [], "dropped": []}
    for slot in plan.slots:
        merged = slot.stop - slot.start > 1
        top = 5 if (slot.start, "mlp") in gone else 0
        bottom = 5 if (slot.start, "attention") in gone else 10
        width = slot.stop - slot.start - 0.16
        paths["merged" if merged else "kept"].append(
            f"M{slot.start + 0.08:g} {top}h{width:g}v{bottom - top}h{-width:g}z")
    paths["dropped"] += [f"M{layer + 0.08:g} 4.4h.84v1.2h-.84z" for layer in plan.dropped]
    drawn = [svg.tag("path", d="".join(d), class_=f"box {kind}") for kind, d in paths.items() if d]
    return svg.tag("svg", *drawn, viewBox=f"0 0 {plan.n_layers} 10", preserveAspectRatio="none", class_="strip",
                      role="img", aria_label=charts.describe(plan))


def _shapes(rows: Sequence[Row]) -> tuple[Shape, ...]:
    found: dict[str, tuple[MergePlan, list[Row]]] = {}
    for row in rows:
        if row.plan:
            effect = row.plan.effect()
            layers = [effect[name] for name in ("n_layers", "groups", "dropped", "sublayers")]
            key = json.dumps([_of(row, "model"), *layers])
            found.setdefault(key, (row.plan, []))[1].append(row)
    ordered = sorted(found.values(), key=lambda f: (f[0].n_layers, -f[0].n_layers_out, f[0].groups, f[0].dropped))
    return tuple(Shape(f"p{number}", plan, tuple(some)) for number, (plan, some) in enumerate(ordered, start=1))


def _of(row: Row, section: str) -> str | None:
    """Name and digest of a row's model or calibration."""
    about = row.record.model if section == "model" else row.record.calibration
    name = row.record.model.name if section == "model" else ""
    return f"{name} {str(about.digest)[:6]}".strip() if about else None
