"""Phi-3 and Phi-4-mini: q, k and v in one matrix, gate and up in another."""

from __future__ import annotations

from slm_exp.models.layout import FUSED, LayerLayout

LAYOUT = LayerLayout(
    "phi3",
    qkv="self_attn.qkv_proj",
    mlp_in=("mlp.gate_up_proj",),
    fields=("resid_pdrop", "embd_pdrop", "original_max_position_embeddings", "sliding_window"),
    window="whole",
    no_width=FUSED,
)
