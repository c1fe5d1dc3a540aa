"""The layer similarity matrix as a picture, with what plans do to the layers drawn on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slm_exp.core.files import writing
from slm_exp.core.types import Group
from slm_exp.reporting.svg import KNEE, span

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
    """A figure of `matrix`, with a title that says how it was estimated and what the plan does.

    Args:
        similarity: [L, L] and how it was estimated; both go into the subtitle.
        plan: what was decided, or None for the matrix alone.
        title: one line.
        kind: of the figure, where it is not matplotlib's own.
    """
    from matplotlib.figure import Figure

    figure = (kind or Figure)(figsize=(7.2, 7.0), dpi=150, facecolor="white")  # no pyplot: nothing global, no display
    axes = figure.add_axes((0.09, 0.075, 0.76, 0.76 * 7.2 / 7.0))
    matrix(axes, similarity, [plan] if plan else [], figure.add_axes((0.88, 0.075, 0.025, 0.76 * 7.2 / 7.0)))
    fontsize = 13 * min(1, 62 / max(1, len(title)))  # a long repo id still fits
    figure.text(0.09, 0.957, title, fontsize=fontsize, fontweight="bold", color=INK)
    estimate = (f"CKA of layer outputs, {similarity.kernel} kernel, {similarity.estimator}, first tokens "
                f"{'left out' if similarity.skip_first_token else 'kept'}")
    figure.text(0.09, 0.945, "\n".join([estimate, *([_effect(plan)] if plan else [])]), fontsize=9, color=SOFT,
                va="top", linespacing=1.45)
    return figure


def matrix(axes: Axes, similarity: LayerSimilarity, plans: Sequence[MergePlan], beside: Axes | None = None,
           line: float = 1.8) -> None:
    """Similarity of every pair of layers, layer 0 in the lower left corner, colours fixed at 0 to 1, half of them above
    KNEE. What plans merge is framed, and named where there is one; removed layers are framed in another colour.

    Scores below 0 (unbiased CKA of unlike layers scatters around 0) take the colour of 0, and the colour bar says so.
    Args:
        beside: where the colour bar goes; None makes room for it.
        line: width of the frames, points.
    """
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    matrix_LL, n = similarity.matrix_LL, len(similarity.matrix_LL)
    image = axes.imshow(matrix_LL, origin="lower", cmap="viridis", interpolation="nearest",
                        norm=TwoSlopeNorm(KNEE, 0, 1))
    framed = {(g, False) for p in plans for g in p.groups} | {(Group(i, i + 1), True) for p in plans for i in p.dropped}
    for group, removed in sorted(framed):
        side, halo = group.stop - group.start, [withStroke(linewidth=2.4 * line, foreground="white")]
        axes.add_patch(Rectangle((group.start - 0.5, group.start - 0.5), side, side, fill=False, linewidth=line,
                                 edgecolor=GONE if removed else INK, joinstyle="miter", path_effects=halo, zorder=3))
        if len(plans) == 1 and not removed:
            left = group.start > n / 5  # a name stands left of its frame where there is room
            axes.annotate(span(group), ((group.start if left else group.stop) - 0.5, group.start + (side - 1) / 2),
                          xytext=(-6 if left else 6, 0), textcoords="offset points", ha="right" if left else "left",
                          va="center", fontsize=5 * line, fontweight="bold", color=INK, path_effects=halo, zorder=4)
    axes.set(xlabel="layer", ylabel="layer", xlim=(-0.5, n - 0.5), ylim=(-0.5, n - 0.5))
    axes.locator_params(integer=True)
    axes.spines[:].set_visible(False)
    below = float(matrix_LL.min()) < -0.005
    place = {"cax": beside} if beside else {"ax": axes, "fraction": 0.046, "pad": 0.03}
    bar = axes.figure.colorbar(image, **place, extend="min" if below else "neither", extendfrac=0.03,
                               ticks=[0, 0.2, 0.4, 0.6, 0.8, 0.9, 1], label=f"CKA, {similarity.kernel} kernel")
    bar.outline.set_visible(False)  # type: ignore[operator]


def _effect(plan: MergePlan) -> str:
    sublayers = Counter(part.kind for part in plan.sublayers)
    done = [f"{sum(g.stop - g.start for g in plan.groups)} merged into {len(plan.groups)}"] if plan.groups else []
    done += [f"{count} {what}" for what, count in (
        ("removed", len(plan.dropped)), ("without attention", sublayers["attention"]), ("without mlp", sublayers["mlp"])
    ) if count]
    how = " ".join(filter(None, (plan.method, plan.rule))) + (f" at {plan.threshold:g}" if plan.threshold else "")
    effect = f"{plan.n_layers} layers → {plan.n_layers_out}: {', '.join(done) or 'nothing merged'}"
    return effect + (f" ({how})" if plan.method else "")
