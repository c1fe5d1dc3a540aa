"""StarCoder2: biases everywhere, an MLP without gate."""

from __future__ import annotations

from slm_exp.models.layout import LayerLayout

LAYOUT = LayerLayout(
    "starcoder2",
    mlp_in=("mlp.c_fc",),
    mlp_out="mlp.c_proj",
    fields=("norm_epsilon", "sliding_window", "residual_dropout", "embedding_dropout", "use_bias"),
    window="whole",
)
