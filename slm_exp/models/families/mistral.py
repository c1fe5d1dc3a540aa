"""Mistral: one attention window for all layers."""

from __future__ import annotations

from slm_exp.models.layout import LayerLayout

LAYOUT = LayerLayout("mistral", fields=("sliding_window",), window="whole", layerwise=True)
