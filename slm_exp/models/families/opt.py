"""OPT: learned positions, biases everywhere."""

from __future__ import annotations

from slm_exp.models.layout import LayerLayout

LAYOUT = LayerLayout(
    "opt",
    decoder="model.decoder",
    layer_list="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    o="self_attn.out_proj",
    mlp_in=("fc1",),
    mlp_out="fc2",
    fields=("ffn_dim", "dropout", "activation_function", "layerdrop", "init_std", "enable_bias"),
    fixed={"do_layer_norm_before": (True,), "_remove_final_layer_norm": (False,),
           "layer_norm_elementwise_affine": (True,)},
    same_size="word_embed_proj_dim",
    no_width="its config has no head_dim: the heads make up the hidden size",
    tiny={"ffn_dim": 64},
)
