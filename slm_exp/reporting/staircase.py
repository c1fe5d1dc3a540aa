"""The threshold path as a picture: layers left over the threshold, and the final score beside it."""

from __future__ import annotations

from pathlib import Path

from slm_exp.core.files import JsonObject, writing


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
