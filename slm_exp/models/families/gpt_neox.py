"""GPT-NeoX and Pythia: attention and MLP side by side on one stream, biases everywhere."""

from __future__ import annotations

from slm_exp.models.layout import FUSED, LayerLayout

LAYOUT = LayerLayout(
    "gpt_neox",
    decoder="gpt_neox",
    layer_list="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    qkv="attention.query_key_value",
    o="attention.dense",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
    fields=("hidden_dropout", "classifier_dropout", "layer_norm_eps", "use_parallel_residual", "is_decoder"),
    no_width=FUSED,
)
