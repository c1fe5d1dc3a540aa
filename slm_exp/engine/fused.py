"""A llama-like decoder layer in few, large CPU operations: up to 1.2 times as fast as the library's in float32.

oneDNN multiplies faster than F.linear here, with the activation, the gate's product or the residual sum folded in:
fewer passes over fresh megabytes. In bfloat16 it is as fast as the library's layer, with its sums kept in the dtype
of the states. Only layers whose every parameter is known are taken; the runner compares each with the library's own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_CLASSES = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_LINEARS = (
    *(f"self_attn.{x}_proj" for x in "qkvo"),
    *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
)
_PARAMETERS = {f"{m}.weight" for m in (*_NORMS, *_HEAD_NORMS, *_LINEARS)} | {f"{m}.bias" for m in _LINEARS}


def supported(layer: Any, call: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Whether `fused_layer` computes what `layer(h, **call)` does: known parts only, CPU, float32 or bfloat16."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    parameters = dict(layer.named_parameters())
    config = getattr(getattr(layer, "self_attn", None), "config", None)
    hooks = any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in layer.modules())
    if type(layer).__name__ not in _CLASSES or config is None or hooks or not set(parameters) <= _PARAMETERS:
        return False
    cos = (call.get("position_embeddings") or (None,))[0]
    mask = call.get("attention_mask")
    return (
        all(p.device.type in ("cpu", "meta") for p in parameters.values())  # meta: its weights are read when it runs
        and (dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
        and config._attn_implementation == "sdpa"
        and config.hidden_act == "silu"
        and (mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 4))
        and isinstance(cos, torch.Tensor)
        and cos.dim() == 3
        and cos.shape[-1] == layer.self_attn.head_dim
    )


def fused_layer(layer: Any, weights: Mapping[str, Tensor], call: Mapping[str, Any], h_BTD: Tensor, dtype: torch.dtype,
                without: Collection[str] = ()) -> Tensor:
    """One decoder layer: [B, T, D] -> [B, T, D] in the dtype of `h_BTD`.

    The residual stream and its norms keep that dtype, matrix products and attention run in `dtype`: a bfloat16
    screen of float32 states loses nothing in the sums over layers.
    Args:
        layer: for its shapes and constants; must be `supported`.
        weights: every parameter of the layer by name, already in `dtype`.
        call: what the decoder calls the layer with, floats in `dtype`.
        without: `attention` or `mlp`: that sublayer is not computed.
    """
    linear = torch.ops.mkldnn._linear_pointwise
    attention, hd = layer.self_attn, layer.self_attn.head_dim
    B, T, D = h_BTD.shape
    h = h_BTD.reshape(B * T, D)

    def norm(x: Tensor, name: str) -> Tensor:
        module = layer.get_submodule(name)
        return functional.rms_norm(
            x, (x.shape[-1],), weights[f"{name}.weight"].to(x.dtype), module.variance_epsilon
        ).to(dtype)

    def into(h: Tensor, x: Tensor, name: str) -> Tensor:
        """h + linear(x), in one operation where the dtypes agree."""
        w, b = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        return linear.binary(x, h, w, b, "add") if h.dtype == dtype else h + linear(x, w, b, "none", [], "")

    if "attention" not in without:
        y = norm(h, "input_layernorm")
        cos, sin = (t.unsqueeze(2) for t in call["position_embeddings"])
        heads = []
        for p in "qkv":
            name = f"self_attn.{p}_proj"
            x = linear(y, weights[f"{name}.weight"], weights.get(f"{name}.bias"), "none", [], "").view(B, T, -1, hd)
            if f"self_attn.{p}_norm.weight" in weights:
                x = norm(x, f"self_attn.{p}_norm")
            heads.append(x if p == "v" else _rotate(x, cos, sin))
        q, k, v = (x.transpose(1, 2) for x in heads)
        if (past := call.get("past_key_values")) is not None:
            k, v = past.update(k, v, attention.layer_idx)
        mask = call.get("attention_mask")
        o = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=attention.scaling, enable_gqa=True
        )
        h = into(h, o.transpose(1, 2).reshape(B * T, -1), "self_attn.o_proj")
    if "mlp" not in without:
        y = norm(h, "post_attention_layernorm")
        gate = linear(y, weights["mlp.gate_proj.weight"], weights.get("mlp.gate_proj.bias"), "swish", [], "")
        y = linear.binary(y, gate, weights["mlp.up_proj.weight"], weights.get("mlp.up_proj.bias"), "mul")
        h = into(h, y, "mlp.down_proj")
    return h.view(B, T, D)


def _rotate(x_BTHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of the half-split kind: x * cos + (-x2, x1) * sin, written into one new tensor."""
    half = x_BTHE.shape[-1] // 2
    x1, x2 = x_BTHE[..., :half], x_BTHE[..., half:]
    out = torch.empty_like(x_BTHE)
    torch.mul(x1, cos[..., :half], out=out[..., :half]).addcmul_(x2, sin[..., :half], value=-1)
    torch.mul(x2, cos[..., half:], out=out[..., half:]).addcmul_(x1, sin[..., half:])
    return out
