"""What the charts of both pages are made of: elements, axes, and the one heat map. See charts and sweep_charts.

Colours come from the page's CSS, so they follow light and dark. Pictures whose shape carries meaning (layer stack, heat
map) have a fixed coordinate system and scale as a whole. Charts that stretch with the page place points in per cent of
their width, so that text and dots keep their size on a phone.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from slm_exp.core.types import Group

SCALE = ("#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725")
"""Viridis: even steps to the eye, also without red or green. Similarity as `shade` places it."""
KNEE = 0.8
"""Half of the colours are for similarities above it: that is where layers are merged."""
RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
FIGURES = "figures"
"""The folder of `slm report --figures`."""
SCALE_TICKS = (0.0, 0.4, 0.8, 0.9, 1.0)


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


class Axis:
    """A scale with round ticks; logarithmic where values span more than a factor of 20.

    Args:
        margin: how far from either end, as a share of the whole, a value lies at least: marks have a width.
    """

    def __init__(self, values: Iterable[float], log: bool = False, whole: bool = False, margin: float = 0) -> None:
        values = list(values)
        low, high = min(values), max(values)
        self.log = log and low > 0 and high / low > 20
        if self.log:
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            steps = (1, 3) if len(decades) <= 4 else (1,)
            self.ticks = [m * 10.0**d for d in decades for m in steps]
            first = max(i for i, t in enumerate(self.ticks) if t <= low * (1 + 1e-9))
            last = min((i for i, t in enumerate(self.ticks) if t >= high * (1 - 1e-9)), default=len(self.ticks) - 1)
            self.ticks = self.ticks[first : last + 1]
            self.ticks = self.ticks[:: math.ceil(len(self.ticks) / 8)]
        else:
            self.ticks = ticks(low, high, whole)
        self.low, self.high = min(self.ticks[0], low), max(self.ticks[-1], high)
        if not self.log:
            room = margin * (self.high - self.low)
            self.low, self.high = min(self.low, low - room), max(self.high, high + room)

    def at(self, value: float) -> float:
        """0 at the lower end, 1 at the upper; values beyond an end are put there."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / (math.log(self.high / self.low) or 1)
        return (value - self.low) / ((self.high - self.low) or 1)

    def across(self, value: float) -> str:
        """The place from the left."""
        return f"{100 * self.at(value):.2f}%"

    def down(self, value: float, height: float) -> float:
        """The place from the top."""
        return height * (1 - self.at(value))

    def label(self, tick: float) -> str:
        if tick >= 1e5:  # 1, 3 or so times a power of ten
            power = math.floor(math.log10(tick) + 1e-9)
            first = f"{tick / 10.0**power:.3g}"
            return f"{'' if first == '1' else f'{first}·'}10{str(power).translate(RAISED)}"
        return f"{tick:,.0f}" if self.log and tick >= 1 else f"{tick:.{decimals(self.ticks)}f}"


def axes(across: Axis, up: Axis, height: float, titles: tuple[str, str], below: float = 38.0) -> list[Markup]:
    """Gridlines, numbers and titles of both axes: the lower one's `below` the chart, the other's above it. Where the
    lower one's numbers would touch on a phone, every other one is not shown there (`odd`)."""
    numbers = [across.label(tick) for tick in across.ticks]
    odd = " odd" if sum(len(text) + 2 for text in numbers) > 44 else ""
    return [*(gridline(up.down(tick, height), up.label(tick)) for tick in up.ticks),
            *(tag("text", text, x=across.across(tick), y=height + 18, class_=f"mid{odd * (k % 2)}")
              for k, (tick, text) in enumerate(zip(across.ticks, numbers, strict=True))),
            tag("text", titles[0], x="50%", y=height + below, class_="mid title"),
            tag("text", titles[1], x=-38, y=-13, class_="title")]


def gridline(y: float, text: str) -> Markup:
    line = tag("line", x1="0", x2="100%", y1=y, y2=y, class_="grid")
    return line + tag("text", text, x=-8, y=y, dy="0.35em", class_="end")


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Four to eight round numbers around [low, high]."""
    low, high = max(low, -1e300), min(high, 1e300)  # an interval may have no end
    reach = (high - low) or 0.1
    step = 10 ** math.floor(math.log10(reach / 4))
    step *= next(m for m in (1, 2, 5, 10) if reach / (step * m) <= 7)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def decimals(ticks: Sequence[float]) -> int:
    return max(len(f"{t:.10f}".rstrip("0").partition(".")[2]) for t in ticks)


@dataclass(frozen=True)
class Frame:
    """Layers that a plan merges or removes, as drawn on the diagonal of the heat map."""

    group: Group
    removed: bool
    title: str
    plans: str | None = None
    """Keys of the plans that do it, for the page's script."""
    opacity: float | None = None


def heatmap(matrix_LL: np.ndarray, frames: Iterable[Frame], label: str, small: bool = False) -> Markup:
    """A layer similarity matrix, layer 0 in the lower left corner, what plans do framed on the diagonal.

    One pixel a layer pair, enlarged without smoothing: a few kilobytes at any depth.
    Args:
        label: what it shows, in words.
        small: as one of many pictures; with lines through the pair that is pointed at.
    """
    n = len(matrix_LL)
    size, left, top, right, bottom = (240.0, 40.0, 4.0, 4.0, 34.0) if small else (380.0, 50.0, 6.0, 6.0, 40.0)
    below, beside = (14, 5) if small else (17, 7)
    apart = (5 if n <= 30 else 10 if n <= 60 else 20) if small else 5 if n <= 50 else 10
    cell = size / n
    parts = [pixels(matrix_LL, left, top, size)]
    for frame in frames:
        group, side = frame.group, (frame.group.stop - frame.group.start) * cell
        x, y = left + group.start * cell, top + size - group.stop * cell
        both = (tag("rect", x=x, y=y, width=side, height=side, class_=c)
                for c in ("frame halo", "frame gone" if frame.removed else "frame"))
        parts.append(tag("g", tag("title", frame.title), *both, class_="window" if small else None,
                         data_plans=frame.plans, opacity=frame.opacity))
    for layer in range(0, n, apart):
        centre = (layer + 0.5) * cell
        parts.append(tag("text", str(layer), x=left + centre, y=top + size + below, class_="mid"))
        parts.append(tag("text", str(layer), x=left - beside, y=top + size - centre, dy="0.35em", class_="end"))
    middle = top + size / 2
    parts += [tag("text", "layer", x=left + size / 2, y=top + size + (30 if small else 36), class_="mid title"),
              tag("text", "layer", x=12, y=middle, class_="mid title", transform=f"rotate(-90 12 {middle:g})")]
    if small:
        parts.append(tag("g", class_="cross", hidden="", data_cell=f"{cell:.6g}"))
    return tag("svg", *parts, viewBox=f"0 0 {left + size + right:g} {top + size + bottom:g}", role="img",
               aria_label=label, class_="heatmap sheet" if small else "heatmap", data_left=left, data_top=top,
               data_size=size, data_n=n if small else None)


def rounded(matrix_LL: np.ndarray) -> list[list[float | None]]:
    """The matrix to three decimals, as the page's script reads it; null where it is not finite."""
    return [[round(float(v), 3) if math.isfinite(v) else None for v in row] for row in matrix_LL]


def colour_bar() -> Markup:
    """The heat maps' scale, 0 to 1, half of it above `KNEE`."""
    numbers = Markup("").join(Markup('<span style="left:{:g}%">{:g}</span>').format(100 * shade(tick), tick)
                              for tick in SCALE_TICKS)
    return Markup('<div class="bar" aria-hidden="true"><i style="background:linear-gradient(90deg, {})"></i>{}</div>'
                  ).format(", ".join(SCALE), numbers)


def shade(similarity: float | np.ndarray) -> Any:
    """Where on the colour scale a similarity lies, 0 to 1."""
    return np.interp(similarity, (0, KNEE, 1), (0, 0.5, 1))


def levels(matrix_LL: np.ndarray) -> np.ndarray:
    """Scores as bytes, 255 for 1."""
    found: np.ndarray = (np.clip(np.nan_to_num(matrix_LL), 0, 1) * 255).round().astype("uint8")
    return found


def pixels(matrix_LL: np.ndarray, x: float, y: float, size: float) -> Markup:
    """A matrix of scores as an embedded picture, layer 0 below left; a byte a pair before compression.

    Scores below 0 (the unbiased estimator goes there) and those that are not finite take the colour of 0.
    """
    picture, file = Image.fromarray(levels(matrix_LL[::-1])), io.BytesIO()
    picture.putpalette(palette())
    picture.save(file, "PNG", optimize=True)
    return tag("image", href=f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}", x=x, y=y,
               width=size, height=size, preserveAspectRatio="none", class_="pixels")


def palette() -> bytes:
    """256 colours from 0 to 1, RGB."""
    anchors = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in SCALE], dtype="float64")
    at, levels = np.linspace(0, 1, len(anchors)), shade(np.linspace(0, 1, 256))
    colours = np.stack([np.interp(levels, at, anchors[:, i]) for i in range(3)], axis=-1)
    return bytes(colours.round().astype("uint8").tobytes())
