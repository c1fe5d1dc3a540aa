"""OLMo 3: as OLMo 2, three layers in four local."""

from __future__ import annotations

from dataclasses import replace

from slm_exp.models.families import olmo2

LAYOUT = replace(
    olmo2.LAYOUT,
    family="olmo3",
    attention_per_layer=True,
    fields=("sliding_window", "rope_parameters"),
    window="whole",
)
