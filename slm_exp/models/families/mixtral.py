"""Mixtral: a router and experts in place of the MLP."""

from __future__ import annotations

from slm_exp.models.layout import SPARSE, LayerLayout

LAYOUT = LayerLayout(
    "mixtral",
    mlp_in=(),
    mlp_out="",
    experts=("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    fields=("sliding_window", "num_experts_per_tok", "num_local_experts", "router_aux_loss_coef",
            "router_jitter_noise"),
    fixed={"output_router_logits": (False,)},
    window="whole",
    no_width=SPARSE,
    tiny={"num_local_experts": 4},
)
