"""Qwen2-MoE: routed experts beside a shared one with a gate of its own."""

from __future__ import annotations

from slm_exp.models.layout import SPARSE, LayerLayout

LAYOUT = LayerLayout(
    "qwen2_moe",
    mlp_in=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    mlp_out="mlp.shared_expert.down_proj",
    experts=("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.shared_expert_gate.weight"),
    attention_per_layer=True,
    fields=("use_sliding_window", "sliding_window", "moe_intermediate_size", "shared_expert_intermediate_size",
            "num_experts_per_tok", "num_experts", "norm_topk_prob", "router_aux_loss_coef", "qkv_bias"),
    fixed={"output_router_logits": (False,), "mlp_only_layers": ([], None), "decoder_sparse_step": (1,)},
    window="upper",
    no_width=SPARSE,
    tiny={"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
          "shared_expert_intermediate_size": 32},
)
