"""Building the models of plans and width decisions: they share every unchanged tensor with the model they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from slm_exp.core.errors import PlanError
from slm_exp.core.types import MergePlan
from slm_exp.core.widths import NMask, WidthDecision, unpack_floats, unpack_indices
from slm_exp.merging.fitted import unpack
from slm_exp.merging.nm import masked
from slm_exp.merging.rules.base import Merged, MergeRule
from slm_exp.merging.sharing import replace_parameter, scaled_outputs, shared_copy
from slm_exp.merging.sizes import full_shape, head_dim
from slm_exp.models.base import ModelHandle
from slm_exp.models.layerwise import layerwise_classes
from slm_exp.models.streaming import StreamedLayers, shells


def build(handle: ModelHandle, plan: MergePlan, rule: MergeRule | None, hosts: list[int],
          config: PretrainedConfig) -> PreTrainedModel:
    """The model that a plan makes of `handle`'s.

    Args:
        hosts: for every layer of the result, the original layer whose module it has.
        config: of the result.
    Raises PlanError: the rule puts a merged layer into another module than its `attention_from` says.
    """
    layout = handle.layout
    fitted = unpack(plan.fitted) if plan.fitted else {}
    model = shared_copy(handle.model, config=config, layer_list=layout.layer_list, layers=hosts)
    dense: Any = handle.layers
    layers = layout.layers(model)

    def changed(at: int, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a layer of the result has in place of its module's `own` parameters."""
        slot, host, out = plan.slots[at], hosts[at], dict[str, Tensor]()
        module = shells(layers)[at]
        if slot.stop - slot.start > 1:
            assert rule is not None

            def parameter(k: int, name: str) -> Tensor:  # in the reading thread, where the layers are streamed
                i = slot.start + k
                return own[name] if i == host else dense.tensors(i, (name,))[name]

            with torch.no_grad():
                window = shells(dense)[slot.start : slot.stop]
                merged = (Merged(0, fitted[slot]) if rule.fits else
                          rule.merge(layout, window, parameter if handle.streamed else None))
            if slot.start + merged.host != host:
                raise PlanError(f"merge_rule={rule.name} hosts {slot} in layer {slot.start + merged.host}, not {host}.")
            out |= merged.weights
        if plan.scales[at] != 1:
            out |= scaled_outputs(layout, module, {**own, **out}, plan.scales[at])
        for output in (m for s in plan.sublayers if s.layer == host for m in layout.outputs[s.kind]):
            for name, _ in module.get_submodule(output).named_parameters():  # an ordinary layer that adds nothing here
                out[f"{output}.{name}"] = torch.zeros_like(own[f"{output}.{name}"])
        return out

    for at, slot in enumerate(plan.slots):
        if isinstance(layers, StreamedLayers):
            if slot.stop - slot.start > 1 or plan.scales[at] != 1 or any(s.layer == hosts[at] for s in plan.sublayers):
                layers.changes[at] = partial(changed, at)
            continue
        for name, tensor in changed(at, dict(layers[at].named_parameters())).items():
            replace_parameter(layers[at], name, tensor)
    return model


def with_masks(handle: ModelHandle, mask: NMask) -> PreTrainedModel:
    """The model with single weights of its decoder layers' projections at zero."""
    tensors = {f"{handle.layout.layer_list}.{i}.{name}": t for i, layer in enumerate(handle.layers)
               for name, t in masked(handle.layout, layer, mask, i).items()}
    return shared_copy(handle.model, tensors)


def narrowed(handle: ModelHandle, width: WidthDecision, config: PretrainedConfig) -> PreTrainedModel:
    """The model of a narrower config, from the units of `handle`'s that stay."""
    layout = handle.layout
    model = shared_copy(handle.model, config=config)
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
