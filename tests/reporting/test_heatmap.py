"""The picture: written whole, right way up, and the plan is on it."""

from __future__ import annotations

import numpy as np
import pytest

from slm_exp.core.types import LayerSimilarity, MergePlan, Sublayer
from slm_exp.reporting.heatmap import draw_heatmap


def blocks(n_layers: int) -> LayerSimilarity:
    """The lower half of the layers alike, nothing else, one pair a little below zero."""
    matrix = np.eye(n_layers, dtype="float32")
    matrix[: n_layers // 2, : n_layers // 2] = 1
    matrix[0, -1] = matrix[-1, 0] = -0.02
    return LayerSimilarity(matrix, "rbf", "unbiased", True, 256)


def pixels(path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., :3]


def test_layer_0_is_in_the_lower_left_corner(tmp_path):
    draw_heatmap(blocks(12), None, tmp_path / "a.png", "a title")
    image = pixels(tmp_path / "a.png")
    height, width = image.shape[:2]
    assert width > 1000
    lower_left, upper_right = image[int(0.8 * height), int(0.2 * width)], image[int(0.25 * height), int(0.6 * width)]
    assert lower_left.argmin() == 2  # viridis at 1: yellow
    assert lower_left.min() < 0.3 < lower_left.max()
    assert upper_right.max() < 0.4  # viridis at 0: dark violet
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("plan", [
    MergePlan(12, groups=((1, 3), (5, 9)), method="slm", rule="mean", threshold=0.9),
    MergePlan(12, dropped=(0, 11), method="short"),
    MergePlan(12, sublayers=(Sublayer(4, "attention"),), method="halves"),
    MergePlan(12),
])
def test_the_plan_is_drawn(tmp_path, plan):
    draw_heatmap(blocks(12), None, tmp_path / "bare.png", "a title")
    draw_heatmap(blocks(12), plan, tmp_path / "deep" / "er" / "plan.png", "a title")
    bare, drawn = pixels(tmp_path / "bare.png"), pixels(tmp_path / "deep" / "er" / "plan.png")
    assert bare.shape == drawn.shape
    below_title = slice(int(0.14 * len(bare)), None)
    assert (bare != drawn).any()
    assert (bare[below_title] != drawn[below_title]).any() == bool(plan.groups or plan.dropped)


@pytest.mark.parametrize("n_layers", [2, 30, 80, 126])
def test_any_depth_and_any_title(tmp_path, n_layers):
    title = "a-very-long-organisation-name/a-very-long-model-name-with-many-parts-70b-instruct-v0.3: layer similarity"
    draw_heatmap(blocks(n_layers), MergePlan(n_layers, dropped=(1,)), tmp_path / "a.png", title)
    margin = pixels(tmp_path / "a.png")[:, -6:]
    assert (margin == 1).all()  # nothing runs off the edge


def test_no_global_figure_is_left(tmp_path):
    import matplotlib.pyplot as plt

    draw_heatmap(blocks(4), None, tmp_path / "a.png", "a title")
    assert plt.get_fignums() == []
