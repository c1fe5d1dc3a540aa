"""Granite: multipliers of embeddings, attention, residual sums and logits."""

from __future__ import annotations

from slm_exp.models.layout import LayerLayout

LAYOUT = LayerLayout(
    "granite",
    residual_scale="residual_multiplier",
    logit_divisor="logits_scaling",
    fields=("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"),
)
