"""Qwen3-MoE: routed experts, norms of queries and keys."""

from __future__ import annotations

from slm_exp.models.layout import SPARSE, LayerLayout

LAYOUT = LayerLayout(
    "qwen3_moe",
    mlp_in=(),
    mlp_out="",
    experts=("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    fields=("use_sliding_window", "sliding_window", "moe_intermediate_size", "num_experts_per_tok", "num_experts",
            "norm_topk_prob", "router_aux_loss_coef"),
    fixed={"output_router_logits": (False,), "mlp_only_layers": ([], None), "decoder_sparse_step": (1,)},
    no_width=SPARSE,
    tiny={"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
)
