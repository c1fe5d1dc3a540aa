"""Gemma 2: four norms a layer, every other layer local, soft caps of attention scores and logits."""

from __future__ import annotations

from slm_exp.models.layout import LayerLayout

LAYOUT = LayerLayout(
    "gemma2",
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    norm_offset=1.0,
    logit_cap="final_logit_softcapping",
    attention_per_layer=True,
    fields=("hidden_activation", "query_pre_attn_scalar", "sliding_window", "final_logit_softcapping",
            "attn_logit_softcapping"),
    fixed={"use_bidirectional_attention": (None, False)},
    window="whole",
)
