"""The threshold path as a picture: layers left over the threshold, and the final score beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slm_exp.core.documents import parse
from slm_exp.core.files import JsonObject, writing
from slm_exp.reporting.budgets import BUDGETS
from slm_exp.reporting.measures import Losses
from slm_exp.runs.statistics.scores import on_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCORE, MERGED, RECOVERED = "best_final_score", "perplexity", "recovered_perplexity"
"""Qualities of a size in path.json."""


def qualities(result: JsonObject) -> list[JsonObject]:
    """The sizes of path.json, with the perplexities on held-out passages where one training recovered them all."""
    curve = result.get("recovery", {"sizes": {}})
    losses = {n: parse(Losses, of) for n, of in curve["sizes"].items()}
    found = {n: {MERGED: exponential(of.before), RECOVERED: exponential(of.recovered)} for n, of in losses.items()}
    return [{**size, **found.get(str(size["n_layers"]), {})} for size in result["sizes"]]


def exponential(loss: float | None) -> float:
    return math.inf if loss is None else math.exp(min(loss, 700.0))


def fronts(sizes: Sequence[JsonObject], quality: str = SCORE) -> dict[str, list[bool]]:
    """By every budget, which sizes no other beats."""
    sign = -1 if quality == SCORE else 1
    return {budget: on_front([(size[budget], sign * size[quality]) for size in sizes]) for budget in BUDGETS}


def draw_budgets(result: JsonObject, path: Path) -> None:
    """Draw the best final score of every size in path.json over each budget, with the front; and below, where one
    training recovered all sizes, their perplexities before and after it. Writes a PNG."""
    from matplotlib.figure import Figure

    sizes = qualities(result)
    curve = [size for size in sizes if RECOVERED in size]
    figure = Figure(figsize=(11, 6 if curve else 3.2), layout="constrained")
    rows = figure.subplots(1 + bool(curve), len(BUDGETS), sharey="row", sharex="col", squeeze=False)
    _over_budgets(rows[0], sizes, SCORE, "beaten by another", "0.6", "front", "#3b528b")
    rows[0][0].set_ylabel("best final score")
    if curve:
        _over_budgets(rows[1], curve, MERGED, "", "0.6", "merged", "0.6")
        _over_budgets(rows[1], curve, RECOVERED, "", "#b5367a", "after the one training", "#b5367a")
        rows[1][0].set_ylabel("perplexity, held-out passages")
        rows[1][0].set_yscale("log")
        for axes in rows[1]:
            axes.axhline(exponential(result["recovery"]["dense"]), color="0.6", linewidth=0.8, linestyle=":")
    for axes, budget in zip(rows[-1], BUDGETS.values(), strict=True):
        axes.set_xlabel(budget.label)
    for axes in figure.axes:
        axes.locator_params(axis="x", nbins=4)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for row in rows:
        row[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{result['model']['name']}: the best plan of every size, over what it costs", x=0.01, ha="left",
                    fontsize=11)
    with writing(path) as tmp:
        figure.savefig(tmp, format="png", dpi=150)


def _over_budgets(row: Sequence[Axes], sizes: Sequence[JsonObject], quality: str, all_are: str, grey: str, front: str,
                  colour: str) -> None:
    """Every size as a mark, and a staircase through those that no other beats."""
    for axes, (name, budget), best in zip(row, BUDGETS.items(), fronts(sizes, quality).values(), strict=True):
        points = sorted((size[name] / budget.one, size[quality], on) for size, on in zip(sizes, best, strict=True))
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o", color=grey, markersize=4, label=all_are)
        joined = [(x, y) for x, y, on in points if on]
        axes.step([x for x, _ in joined], [y for _, y in joined], "o-", where="post", color=colour, markersize=4,
                  linewidth=1.2, label=front)


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
