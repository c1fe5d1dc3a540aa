"""Gemma 3 (text): as Gemma 2 with norms of queries and keys, and a rotary table for each attention kind."""

from __future__ import annotations

from slm_exp.models.layout import LayerLayout

LAYOUT = LayerLayout(
    "gemma3_text",
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    norm_offset=1.0,
    logit_cap="final_logit_softcapping",
    attention_per_layer=True,
    fields=("hidden_activation", "query_pre_attn_scalar", "sliding_window", "final_logit_softcapping",
            "rope_parameters"),
    fixed={"use_bidirectional_attention": (None, False), "attn_logit_softcapping": (None,)},  # sdpa leaves a cap out
    window="whole",
)
