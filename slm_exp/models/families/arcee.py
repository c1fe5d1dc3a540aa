"""Arcee: an MLP without gate."""

from __future__ import annotations

from slm_exp.models.layout import LayerLayout

LAYOUT = LayerLayout("arcee", mlp_in=("mlp.up_proj",))
