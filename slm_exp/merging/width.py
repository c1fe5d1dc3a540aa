"""Carrying out a width decision: a narrower model that shares every unchanged tensor with the one it comes from."""

from __future__ import annotations

import base64
import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slm_exp.core.errors import PlanError
from slm_exp.core.files import digest
from slm_exp.merging.sizes import full_shape, head_dim
from slm_exp.models.base import ModelHandle
from slm_exp.models.layerwise import layerwise_classes

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

EFFECT = ("sizes", "kept", "means", "hidden")
"""The entries that decide the model; the others say how they were found."""


def pack_indices(indices: Sequence[int], n: int) -> str:
    """A subset of range(n) as base64 of its bits, lowest first: 1536 channels take 256 characters."""
    bits = bytearray((n + 7) // 8)
    for i in indices:
        bits[i // 8] |= 1 << i % 8
    return base64.b64encode(bytes(bits)).decode()


def unpack_indices(text: str) -> list[int]:
    """The subset again, ascending."""
    return [8 * at + bit for at, byte in enumerate(base64.b64decode(text)) for bit in range(8) if byte >> bit & 1]


def pack_floats(values: Sequence[float]) -> str:
    """Float32 values as base64."""
    import numpy as np

    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()


def unpack_floats(text: str) -> Tensor:
    """[n] float32."""
    import numpy as np
    import torch

    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").copy())


def apply_width(handle: ModelHandle, width: dict[str, Any]) -> ModelHandle:
    """The narrower model that a plan's `width` makes of `handle`'s, built on first use of `.model`.

    Needs what is stored in `width` and nothing else: no tokens, no scores. Embeddings, norms and projections of
    layers that lose nothing are the same tensors, the rest are new; the input model stays as it is.

    Raises:
        PlanError: the decision is for a model of other sizes.
    Cost: the memory of the narrowed projections.
    """
    _check(handle, width)
    effect = {name: width[name] for name in EFFECT if width.get(name)}
    return ModelHandle(
        name=handle.name,
        config=narrower_config(handle.config, handle.layout.family, width),
        layout=handle.layout,
        digest=digest({"model": handle.digest, "width": effect}),
        device=handle.device,
        load_model=lambda: _build(handle, width),
        load_tokenizer=lambda: handle.tokenizer,
        note=handle.note,
        random=handle.random,
        lineage={
            "base": handle.lineage.get("base", handle.name),
            "base_digest": handle.lineage.get("base_digest", handle.digest),
            **{k: v for k, v in handle.lineage.items() if k not in ("base", "base_digest")},
            "width": {k: width.get(k) for k in ("method", "ratio", "reached", "uniform", "sizes")},
        },
    )


def _check(handle: ModelHandle, width: dict[str, Any]) -> None:
    full, sizes, kept = full_shape(handle.config), width["sizes"], width["kept"]
    lists = (*(sizes[k] for k in ("heads", "kv_heads", "channels")), *kept.values())
    if any(len(values) != handle.n_layers for values in lists):
        raise PlanError(f"the plan's width is for {len(sizes['heads'])} layers; {handle.name} has {handle.n_layers}.")
    if getattr(handle.config, "layer_widths", None):
        raise PlanError(f"{handle.name} has layers of different widths already; they cannot be narrowed again.")
    for i in range(handle.n_layers):
        channels = unpack_indices(kept["channels"][i])
        for what, found, asked, n in (
            ("query heads", kept["query_heads"][i], sizes["heads"][i], full.heads),
            ("key-value heads", kept["kv_heads"][i], sizes["kv_heads"][i], full.kv_heads),
            ("MLP channels", channels, sizes["channels"][i], full.channels),
        ):
            if len(found) != asked or not found or found[0] < 0 or found[-1] >= n:
                raise PlanError(f"the plan's width keeps {len(found)} {what} of layer {i}, the highest "
                                f"{max(found, default=None)}; expected {asked} of {handle.name}'s {n}.")


def is_uniform(config: PretrainedConfig, sizes: dict[str, Any]) -> bool:
    """Whether an ordinary config of the family can describe these widths."""
    from slm_exp.merging.sizes import Shape, legal

    shapes = {Shape(*s) for s in zip(sizes["heads"], sizes["kv_heads"], sizes["channels"], strict=True)}
    return len(shapes) == 1 and legal(config, shapes.pop(), sizes["hidden"])


def narrower_config(config: PretrainedConfig, family: str, width: dict[str, Any]) -> PretrainedConfig:
    """A copy of a config that describes the narrower model: an ordinary one where all layers are alike."""
    sizes = width["sizes"]
    changes: dict[str, Any] = {"head_dim": head_dim(config), "hidden_size": sizes["hidden"]}
    if width.get("means"):
        changes |= {"attention_bias": True, "mlp_bias": True}
    shapes = list(zip(sizes["heads"], sizes["kv_heads"], sizes["channels"], strict=True))
    if is_uniform(config, sizes):
        names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        out = copy.deepcopy(config)
        for name, value in (changes | dict(zip(names, shapes[0], strict=True))).items():
            setattr(out, name, value)
        return out
    kind: Any = layerwise_classes()[family][0]
    about = config.to_dict() | changes | {"layer_widths": [list(s) for s in shapes]}
    about.pop("model_type")
    own: PretrainedConfig = kind.from_dict(about)
    own._attn_implementation = config._attn_implementation
    return own


def _build(handle: ModelHandle, width: dict[str, Any]) -> PreTrainedModel:
    import torch
    from transformers import PretrainedConfig

    wide, layout = handle.model, handle.layout
    config = narrower_config(wide.config, layout.family, width)
    memo: dict[int, object] = {id(t): t for t in (*wide.parameters(), *wide.buffers())}  # copied as themselves
    memo[id(wide.config)] = config
    model: PreTrainedModel = copy.deepcopy(wide, memo)
    with torch.no_grad():
        for i, layer in enumerate(layout.layers(model)):
            _narrow_layer(layer, handle, width, i)
        if width.get("hidden"):
            _narrow_stream(model, handle, unpack_indices(width["hidden"]))
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PretrainedConfig):
            module.config = config  # type: ignore[assignment]
    if hasattr(config, "layer_widths"):
        model.__class__ = layerwise_classes()[layout.family][1]  # the same modules; the class that can make them again
    return model


def _narrow_layer(layer: nn.Module, handle: ModelHandle, width: dict[str, Any], i: int) -> None:
    """Cut the rows and columns of one layer's removed units, in place on a copy of the layer."""
    layout, full, per = handle.layout, full_shape(handle.config), head_dim(handle.config)
    kept, means = width["kept"], width.get("means")
    query, kv = ([h * per + c for h in kept[name][i] for c in range(per)] for name in ("query_heads", "kv_heads"))
    channels = unpack_indices(kept["channels"][i])
    for out_name, stay, kind, n in ((layout.o, query, "attention", full.heads * per),
                                    (layout.mlp_out, channels, "mlp", full.channels)):
        linear = layer.get_submodule(out_name)
        if means:
            gone = sorted(set(range(n)) - set(stay))
            weight: Any = linear.weight
            added = weight[:, gone].float() @ unpack_floats(means[kind][i]).to(weight.device)
            bias = added if linear.bias is None else linear.bias.float() + added  # type: ignore[operator]
            _set(linear, "bias", bias.to(weight.dtype))
        _take(linear, stay, n, dim=1)
    for name, stay, n in ((layout.q, query, full.heads * per), (layout.k, kv, full.kv_heads * per),
                          (layout.v, kv, full.kv_heads * per), *((m, channels, full.channels) for m in layout.mlp_in)):
        linear = layer.get_submodule(name)
        _take(linear, stay, n, dim=0)
        if means and linear.bias is None:  # the switch that carries the others' biases gives every projection one
            weight = linear.weight
            _set(linear, "bias", weight.new_zeros(len(weight)))
    for module in layer.modules():
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = len(kept["query_heads"][i]) // len(kept["kv_heads"][i])  # type: ignore[assignment]
        if hasattr(module, "intermediate_size"):
            module.intermediate_size = len(channels)  # type: ignore[assignment]


def _take(linear: nn.Module, stay: Sequence[int], n: int, dim: int) -> None:
    """Keep some rows (dim 0) or columns (dim 1) of a linear module; all of them leaves the tensors as they are."""
    if len(stay) == n:
        return
    import torch

    weight: Any = linear.weight
    index = torch.tensor(stay, device=weight.device)  # int64: in the weight's dtype, bfloat16 counts to 256
    _set(linear, "weight", weight.index_select(dim, index))
    if dim == 0 and linear.bias is not None:
        bias: Any = linear.bias
        _set(linear, "bias", bias.index_select(0, index))
    setattr(linear, ("out_features", "in_features")[dim], len(stay))


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    import torch

    setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))


def _narrow_stream(model: PreTrainedModel, handle: ModelHandle, stay: Sequence[int]) -> None:
    """Keep some channels of the residual stream: in embeddings, head, norms and every layer's projections."""
    layout, n = handle.layout, int(handle.config.hidden_size)
    out = {layout.o, layout.mlp_out}
    for layer in layout.layers(model):
        for name in layout.projections:
            _take(layer.get_submodule(name), stay, n, dim=0 if name in out else 1)
        for module in layer.modules():
            if getattr(module, "hidden_size", None) == n:
                module.hidden_size = len(stay)  # type: ignore[assignment]
        for name, module in layer.named_children():
            if not any(p.startswith(f"{name}.") for p in layout.projections):
                _take_norm(module, stay)
    _take_norm(model.get_submodule(layout.final_norm), stay)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    tied = head.weight is embedding.weight
    for module in (embedding, head):
        _set(module, "weight", module.weight[:, list(stay)].contiguous())
    if tied:
        head.weight = embedding.weight
    embedding.embedding_dim, head.in_features = len(stay), len(stay)


def _take_norm(norm: nn.Module, stay: Sequence[int]) -> None:
    weight: Any = norm.weight
    _set(norm, "weight", weight[list(stay)].contiguous())
