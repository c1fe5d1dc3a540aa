"""GLM-4: gate and up in one matrix, norms before and behind the sublayers."""

from __future__ import annotations

from slm_exp.models.layout import LayerLayout

LAYOUT = LayerLayout(
    "glm4",
    mlp_in=("mlp.gate_up_proj",),
    output_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
    no_width="gate and up are one matrix",
)
