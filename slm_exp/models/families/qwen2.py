"""Qwen2 and Qwen2.5: biases of q, k and v."""

from __future__ import annotations

from slm_exp.models.layout import LayerLayout

LAYOUT = LayerLayout(
    "qwen2",
    attention_per_layer=True,
    fields=("use_sliding_window", "sliding_window"),
    window="upper",
    layerwise=True,
)
