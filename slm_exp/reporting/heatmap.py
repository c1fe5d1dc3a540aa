"""The layer similarity matrix as a picture, with what the plan does to the layers drawn on it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from slm_exp.core.files import writing
from slm_exp.reporting.svg import KNEE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from slm_exp.core.types import LayerSimilarity, MergePlan

INK, SOFT, GONE = "#1c2127", "#59626d", "#e8590c"


def draw_heatmap(similarity: LayerSimilarity, plan: MergePlan | None, path_png: Path, title: str) -> None:
    """Write `heatmap` as a PNG, atomically; folders are made."""
    with writing(path_png) as tmp:
        heatmap(similarity, plan, title).savefig(tmp, format="png")


def heatmap(similarity: LayerSimilarity, plan: MergePlan | None, title: str, kind: type[Figure] | None = None
            ) -> Figure:
    """Similarity of every pair of layers, layer 0 in the lower left corner, colours fixed at 0 to 1, half of
    them above 0.8.

    Merged windows are framed and named on the diagonal; removed layers are struck out, removed sublayers counted below
    the title. Scores below 0 (unbiased CKA of unlike layers scatters around 0) take the colour of 0, and the colour
    bar says so.
    Args:
        similarity: [L, L] and how it was estimated; both go into the subtitle.
        plan: what was decided, or None for the matrix alone.
        title: one line.
        kind: of the figure, where it is not matplotlib's own.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator

    matrix_LL = similarity.matrix_LL
    n_layers = len(matrix_LL)
    figure = (kind or Figure)(figsize=(7.2, 7.0), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)  # no pyplot: nothing global, no display
    axes = figure.add_axes((0.09, 0.075, 0.76, 0.76 * 7.2 / 7.0))
    image = axes.imshow(matrix_LL, origin="lower", cmap="viridis", interpolation="nearest",
                        norm=TwoSlopeNorm(KNEE, 0, 1))

    step = 1 if n_layers <= 12 else 5 if n_layers <= 50 else 10
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MultipleLocator(step))
        axis.set_minor_locator(MultipleLocator(1))
    axes.set(xlim=(-0.5, n_layers - 0.5), ylim=(-0.5, n_layers - 0.5))
    axes.tick_params(length=3.5, width=0.7, color=SOFT, labelcolor=INK, labelsize=9)
    axes.tick_params(which="minor", length=1.5 if n_layers <= 50 else 0, width=0.5, color=SOFT)
    axes.set_xlabel("layer", fontsize=10, color=INK)
    axes.set_ylabel("layer", fontsize=10, color=INK)
    axes.spines[:].set_visible(False)

    below = float(matrix_LL.min()) < -0.005
    bar = figure.colorbar(image, cax=figure.add_axes((0.88, 0.075, 0.025, 0.76 * 7.2 / 7.0)),
                          extend="min" if below else "neither", extendfrac=0.03,
                          ticks=[0, 0.2, 0.4, 0.6, 0.8, 0.85, 0.9, 0.95, 1])
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(length=3.5, width=0.7, color=SOFT, labelcolor=INK, labelsize=9)

    if plan is not None:
        _draw_plan(axes, plan)
    fontsize = 13 * min(1, 62 / max(1, len(title)))  # a long repo id still fits
    figure.text(0.09, 0.957, title, fontsize=fontsize, fontweight="bold", color=INK)
    estimate = (f"CKA of layer outputs, {similarity.kernel} kernel, {similarity.estimator}, first tokens "
                f"{'left out' if similarity.skip_first_token else 'kept'}")
    lines = [estimate, *([_effect(plan)] if plan is not None else [])]
    figure.text(0.09, 0.945, "\n".join(lines), fontsize=9, color=SOFT, va="top", linespacing=1.45)
    return figure


def _draw_plan(axes: Axes, plan: MergePlan) -> None:
    from matplotlib import patheffects
    from matplotlib.patches import Rectangle

    def halo(width: float) -> list[patheffects.AbstractPathEffect]:
        return [patheffects.withStroke(linewidth=width, foreground="white")]

    for layer in plan.dropped:
        for band in (axes.axhspan, axes.axvspan):
            band(layer - 0.5, layer + 0.5, color="white", alpha=0.35, linewidth=0)
        axes.plot(layer, layer, marker="x", markersize=150 / plan.n_layers, markeredgewidth=2, color=GONE,
                  path_effects=halo(3.5), clip_on=False)
    for group in plan.groups:
        size = group.stop - group.start
        axes.add_patch(Rectangle((group.start - 0.5, group.start - 0.5), size, size, fill=False, edgecolor=INK,
                                 linewidth=1.8, joinstyle="miter", path_effects=halo(4.2), clip_on=False, zorder=3))
        left = group.start > plan.n_layers / 5  # a name stands left of its frame where there is room
        axes.annotate(f"{group.start}–{group.stop - 1}", (group.start - 0.5 if left else group.stop - 0.5,
                      (group.start + group.stop - 1) / 2), xytext=(-6 if left else 6, 0), textcoords="offset points",
                      ha="right" if left else "left", va="center", fontsize=9, fontweight="bold", color=INK,
                      path_effects=halo(2.5), zorder=4)


def _effect(plan: MergePlan) -> str:
    sublayers = Counter(part.kind for part in plan.sublayers)
    done = [f"{sum(g.stop - g.start for g in plan.groups)} merged into {len(plan.groups)}"] if plan.groups else []
    done += [f"{count} {what}" for what, count in (
        ("removed", len(plan.dropped)), ("without attention", sublayers["attention"]), ("without mlp", sublayers["mlp"])
    ) if count]
    how = " ".join(filter(None, (plan.method, plan.rule))) + (f" at {plan.threshold:g}" if plan.threshold else "")
    effect = f"{plan.n_layers} layers → {plan.n_layers_out}: {', '.join(done) or 'nothing merged'}"
    return effect + (f" ({how})" if plan.method else "")
