"""OLMo 2: norms behind the sublayers, none before them; queries and keys are normed over all heads."""

from __future__ import annotations

from slm_exp.models.layout import LayerLayout

LAYOUT = LayerLayout(
    "olmo2",
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    no_width="q_norm and k_norm run over all heads together",
)
