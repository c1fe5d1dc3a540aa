"""Llama, and what calls itself that: Vicuna, SmolLM2, Yi, ..."""

from __future__ import annotations

from slm_exp.models.layout import LayerLayout

LAYOUT = LayerLayout("llama", fields=("pretraining_tp",), layerwise=True)
