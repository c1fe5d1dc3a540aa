"""The threshold path as a picture: layers left over the threshold, and the final score beside it."""

from __future__ import annotations

from pathlib import Path

from slm_exp.core.files import JsonObject, writing

BUDGETS = {"params": ("parameters, M", 1e6), "flops_per_token": ("GFLOP a token", 1e9),
           "latency_s": ("latency of a prefill, ms", 1e-3), "bytes": ("weights file, MB", 1e6)}
"""Of a size in path.json: what it is, and one of it on the axis."""


def on_front(sizes: list[JsonObject], budget: str) -> list[bool]:
    """Which sizes no other beats by a budget: none costs as little and scores higher, or less and as high."""
    return [not any(b[budget] <= a[budget] and b["best_final_score"] >= a["best_final_score"]
                    and (b[budget], -b["best_final_score"]) != (a[budget], -a["best_final_score"]) for b in sizes)
            for a in sizes]


def draw_budgets(result: JsonObject, path: Path) -> None:
    """Draw the best final score of every size in path.json over each budget, with the front. Writes a PNG."""
    from matplotlib.figure import Figure

    sizes = result["sizes"]
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, (budget, (label, one)) in zip(figure.subplots(1, len(BUDGETS), sharey=True), BUDGETS.items(),
                                            strict=True):
        points = sorted((s[budget] / one, s["best_final_score"], best)
                        for s, best in zip(sizes, on_front(sizes, budget), strict=True))
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o", color="0.6", markersize=4,
                  label="beaten by another")
        front = [(x, y) for x, y, best in points if best]
        axes.step([x for x, _ in front], [y for _, y in front], "o-", where="post", color="#3b528b", markersize=4,
                  linewidth=1.2, label="front")
        axes.set_xlabel(label)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("best final score")
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{result['model']['name']}: the best plan of every size, over what it costs", x=0.01, ha="left",
                    fontsize=11)
    with writing(path) as tmp:
        figure.savefig(tmp, format="png", dpi=150)


def draw_staircase(result: JsonObject, path: Path) -> None:
    """Draw the contents of path.json: a staircase of layers, final scores on the same threshold axis. Writes a PNG."""
    from matplotlib.figure import Figure

    plans = result["plans"]
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    layers, scores = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    edges = [x for p in plans for x in (p["threshold_low"], p["threshold_high"])]
    layers.plot(edges, [p["n_layers"] for p in plans for _ in "ab"], color="#3b528b", linewidth=1.6)
    layers.fill_between(edges, [p["n_layers"] for p in plans for _ in "ab"], step=None, color="#3b528b", alpha=0.12)
    layers.set_ylabel("layers left")
    layers.set_ylim(0, result["model"]["n_layers"] + 1)
    scores.hlines([p["final_score"] for p in plans], [p["threshold_low"] for p in plans],
                  [p["threshold_high"] for p in plans], color="#b5367a", linewidth=1.8)
    scores.plot(result["range"], result["range"], color="0.6", linewidth=0.8, linestyle=":")
    scores.set_ylabel("final score")
    scores.set_xlabel("threshold")
    scores.set_xlim(*result["range"])
    for axes in (layers, scores):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for a, b in result["unknown"]:
            axes.axvspan(a, b, color="0.85", hatch="///", linewidth=0)
    config = result["config"]
    layers.set_title(f"{result['model']['name']}: {len(plans)} plans, {config['merge_rule']['name']} by "
                     f"{config['similarity']['name']}", loc="left", fontsize=11)
    with writing(path) as tmp:
        figure.savefig(tmp, format="png", dpi=150)
