"""SmolLM3: some layers without rotary embedding (no_rope_layers)."""

from __future__ import annotations

from slm_exp.models.layout import LayerLayout

LAYOUT = LayerLayout(
    "smollm3",
    attention_per_layer=True,
    per_layer_config=("layer_types", "mlp_layer_types", "layer_widths", "no_rope_layers"),
    fields=("use_sliding_window", "sliding_window", "no_rope_layer_interval"),
    window="upper",
)
