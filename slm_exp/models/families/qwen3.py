"""Qwen3: norms of queries and keys."""

from __future__ import annotations

from slm_exp.models.layout import LayerLayout

LAYOUT = LayerLayout(
    "qwen3",
    attention_per_layer=True,
    fields=("use_sliding_window", "sliding_window"),
    window="upper",
    layerwise=True,
)
