"""OLMo 3: as OLMo 2, three layers in four local."""

from __future__ import annotations

from slm_exp.models.layout import LayerLayout

LAYOUT = LayerLayout(
    "olmo3",
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    attention_per_layer=True,
    fields=("sliding_window", "rope_parameters"),
    window="whole",
    no_width="q_norm and k_norm run over all heads together",
)
