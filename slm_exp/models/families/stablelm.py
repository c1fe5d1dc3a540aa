"""StableLM: layer norms, a part of each head is rotated."""

from __future__ import annotations

from slm_exp.models.layout import LayerLayout

LAYOUT = LayerLayout(
    "stablelm",
    no_width="its config has no head_dim: the heads make up the hidden size",
    fields=("layer_norm_eps", "use_qkv_bias", "use_parallel_residual", "hidden_dropout"),
    fixed={"qk_layernorm": (False,)},
)
