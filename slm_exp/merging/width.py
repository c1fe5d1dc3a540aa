"""Carrying out a width decision: a narrower model that shares every unchanged tensor with the one it comes from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from slm_exp.core.errors import PlanError
from slm_exp.core.files import digest
from slm_exp.core.widths import WidthDecision, WidthSizes, unpack_floats, unpack_indices
from slm_exp.merging.sharing import shared_copy
from slm_exp.merging.sizes import Shape, full_shape, head_dim, legal
from slm_exp.models.base import ModelHandle
from slm_exp.models.layerwise import layerwise_classes

EFFECT = ("sizes", "kept", "means", "hidden")
"""The entries that decide the model; the others say how they were found."""


def apply_width(handle: ModelHandle, width: WidthDecision) -> ModelHandle:
    """The narrower model that a decision makes of `handle`'s, built on first use of `.model`.

    Needs what is stored in `width` and nothing else: no tokens, no scores. Embeddings, norms and projections of
    layers that lose nothing are the same tensors, the rest are new; the input model stays as it is.

    Raises:
        PlanError: the decision is for a model of other sizes.
    Cost: the memory of the narrowed projections.
    """
    _check(handle, width)
    about = width.to_json()
    return ModelHandle(
        name=handle.name,
        config=narrower_config(handle.config, handle.layout.family, width.sizes, width.means is not None),
        layout=handle.layout,
        digest=digest({"model": handle.digest, "width": {name: about[name] for name in EFFECT if about.get(name)}}),
        device=handle.device,
        load_model=lambda: _build(handle, width),
        load_tokenizer=lambda: handle.tokenizer,
        note=handle.note,
        random=handle.random,
        licences=handle.licences,
        lineage={
            "base": handle.lineage.get("base", handle.name),
            "base_digest": handle.lineage.get("base_digest", handle.digest),
            **{k: v for k, v in handle.lineage.items() if k not in ("base", "base_digest")},
            "width": {k: about.get(k) for k in ("method", "ratio", "reached", "uniform", "sizes")},
        },
    )


def _check(handle: ModelHandle, width: WidthDecision) -> None:
    """Raise PlanError where a decision is for a model of other sizes."""
    full, per, sizes, kept = full_shape(handle.config), head_dim(handle.config), width.sizes, width.kept
    if len(sizes.heads) != handle.n_layers:
        raise PlanError(f"the plan's width is for {len(sizes.heads)} layers; {handle.name} has {handle.n_layers}.")
    if getattr(handle.config, "layer_widths", None):
        raise PlanError(f"{handle.name} has layers of different widths already; they cannot be narrowed again.")
    group = full.heads // full.kv_heads
    for i in range(handle.n_layers):
        query, kv, channels = kept.query_heads[i], kept.kv_heads[i], width.channels(i)
        for what, found, n in (("query heads", query, full.heads), ("key-value heads", kv, full.kv_heads),
                               ("MLP channels", channels, full.channels)):
            if found[-1] >= n:
                raise PlanError(f"the plan's width keeps {len(found)} {what} of layer {i}, the highest {found[-1]}; "
                                f"expected {len(found)} of {handle.name}'s {n}.")
        if [h // group for h in query] != [k for k in kv for _ in range(len(query) // len(kv))]:
            raise PlanError(f"the plan's width keeps query heads {query} and key-value heads {kv} of layer {i}; "
                            f"expected as many of each key-value head, which {group} share in {handle.name}.")
        if width.means is None:
            continue
        for kind, n in (("attention", (full.heads - len(query)) * per), ("mlp", full.channels - len(channels))):
            if (size := len(unpack_floats(getattr(width.means, kind)[i]))) != n:
                raise PlanError(f"width.means.{kind}[{i}] has {size} means; expected {n}, one an input that goes.")
    hidden = int(handle.config.hidden_size)
    highest = max(unpack_indices(width.hidden), default=0) if width.hidden else hidden - 1
    if highest >= hidden or (width.hidden is None and sizes.hidden != hidden):
        raise PlanError(f"the plan's width has {sizes.hidden} channels of the residual stream, the highest {highest}; "
                        f"{handle.name} has {hidden}.")


def narrower_config(config: PretrainedConfig, family: str, sizes: WidthSizes, biases: bool) -> PretrainedConfig:
    """A copy of a config that describes the narrower model: an ordinary one where all layers have one width.

    Args:
        biases: whether the model gets biases of attention and MLP.
    """
    changes: dict[str, Any] = {"head_dim": head_dim(config), "hidden_size": sizes.hidden}
    if biases:
        changes |= {"attention_bias": True, "mlp_bias": True}
    shapes = [Shape(*s) for s in zip(sizes.heads, sizes.kv_heads, sizes.channels, strict=True)]
    if len(set(shapes)) == 1 and legal(config, shapes[0], sizes.hidden):
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


def _build(handle: ModelHandle, width: WidthDecision) -> PreTrainedModel:
    wide, layout = handle.model, handle.layout
    config = narrower_config(wide.config, layout.family, width.sizes, width.means is not None)
    model = shared_copy(wide, config=config)
    with torch.no_grad():
        for i, layer in enumerate(layout.layers(model)):
            _narrow_layer(layer, handle, width, i)
        if width.hidden:
            _narrow_stream(model, handle, unpack_indices(width.hidden))
    if hasattr(config, "layer_widths"):
        model.__class__ = layerwise_classes()[layout.family][1]  # the same modules; the class that can make them again
    return model


def _narrow_layer(layer: nn.Module, handle: ModelHandle, width: WidthDecision, i: int) -> None:
    """Cut the rows and columns of one layer's removed units, in place on a copy of the layer."""
    layout, full, per, means = handle.layout, full_shape(handle.config), head_dim(handle.config), width.means
    heads, kv_heads = width.kept.query_heads[i], width.kept.kv_heads[i]
    query, kv = ([h * per + c for h in units for c in range(per)] for units in (heads, kv_heads))
    channels = width.channels(i)
    for out_name, stay, kind, n in ((layout.o, query, "attention", full.heads * per),
                                    (layout.mlp_out, channels, "mlp", full.channels)):
        linear = layer.get_submodule(out_name)
        if means:
            gone = sorted(set(range(n)) - set(stay))
            weight: Any = linear.weight
            mean = torch.tensor(unpack_floats(getattr(means, kind)[i]), dtype=torch.float32, device=weight.device)
            added = weight[:, gone].float() @ mean
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
            module.num_key_value_groups = len(heads) // len(kv_heads)  # type: ignore[assignment]
        if hasattr(module, "intermediate_size"):
            module.intermediate_size = len(channels)  # type: ignore[assignment]


def _take(linear: nn.Module, stay: Sequence[int], n: int, dim: int) -> None:
    """Keep some rows (dim 0) or columns (dim 1) of a linear module; all of them leaves the tensors as they are."""
    if len(stay) == n:
        return
    weight: Any = linear.weight
    index = torch.tensor(stay, device=weight.device)  # int64: in the weight's dtype, bfloat16 counts to 256
    _set(linear, "weight", weight.index_select(dim, index))
    if dim == 0 and linear.bias is not None:
        bias: Any = linear.bias
        _set(linear, "bias", bias.index_select(0, index))
    setattr(linear, ("out_features", "in_features")[dim], len(stay))


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    setattr(module, name, nn.Parameter(tensor, requires_grad=False))


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
