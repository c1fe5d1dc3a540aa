"""Helium."""

from __future__ import annotations

from slm_exp.models.layout import LayerLayout

LAYOUT = LayerLayout("helium", no_width="its o_proj is as wide as the stream, whatever the heads")
