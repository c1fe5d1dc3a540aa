"""Command R: attention and MLP side by side behind one norm, scaled logits."""

from __future__ import annotations

from slm_exp.models.layout import LayerLayout

LAYOUT = LayerLayout(
    "cohere",
    logit_scale="logit_scale",
    fields=("logit_scale", "layer_norm_eps"),
    fixed={"use_qk_norm": (False,)},
)
