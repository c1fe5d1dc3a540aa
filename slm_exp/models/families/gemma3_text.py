"""Gemma 3 (text): as Gemma 2 with norms of queries and keys, and a rotary table for each attention kind."""

from __future__ import annotations

from dataclasses import replace

from slm_exp.models.families import gemma2

LAYOUT = replace(
    gemma2.LAYOUT,
    family="gemma3_text",
    fields=(*(f for f in gemma2.LAYOUT.fields if f != "attn_logit_softcapping"), "rope_parameters"),
    fixed={**gemma2.LAYOUT.fixed, "attn_logit_softcapping": (None,)},  # sdpa leaves a cap out
)
