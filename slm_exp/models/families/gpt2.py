"""GPT-2: learned positions, projections stored [inputs, outputs] (Conv1D)."""

from __future__ import annotations

from slm_exp.models.layout import FUSED, LayerLayout

LAYOUT = LayerLayout(
    "gpt2",
    decoder="transformer",
    layer_list="transformer.h",
    final_norm="transformer.ln_f",
    qkv="attn.c_attn",
    o="attn.c_proj",
    mlp_in=("mlp.c_fc",),
    mlp_out="mlp.c_proj",
    transposed=True,
    fields=("n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "resid_pdrop", "embd_pdrop",
            "attn_pdrop", "layer_norm_epsilon", "scale_attn_weights", "reorder_and_upcast_attn", "summary_type",
            "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    fixed={"scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    no_width=FUSED,
    tiny={"n_inner": 64},
)
