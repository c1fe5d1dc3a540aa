"""A model made of another's tensors: every module is copied, no tensor is, except where a replacement is given."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from slm_exp.models.layouts import LayerLayout
from slm_exp.models.streaming import StreamedLayers, shells


def shared_copy(model: PreTrainedModel, tensors: Mapping[str, Tensor] | None = None,
                config: PretrainedConfig | None = None, layer_list: str = "",
                layers: Sequence[int] | None = None) -> PreTrainedModel:
    """A copy of a model's modules that shares every tensor but those given; tied ones stay tied.

    The input stays as it is. What is changed in the copy afterwards must be replaced, not written into.
    Args:
        tensors: replacements by name as in `model.named_parameters()`, tied ones once. They take the device and dtype
            of the parameters they replace.
        config: takes the place of the model's, in every module that holds one; None copies it.
        layer_list: path of the decoder layers in the model (`layout.layer_list`); only with `layers`.
        layers: the original layers that are left, each once, bottom to top; None keeps all. They are numbered anew.
    """
    listed = next((m for m in model.modules() if isinstance(m, StreamedLayers)), None)
    if listed is not None:
        listed.residence.leave()  # so that no layer's weights are copied with its module, and kept
    ordinary, streamed = _apart(model, tensors or {})
    # A deep copy that finds every tensor already copied: as itself, or as its replacement wherever it occurs.
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for name, tensor in ordinary.items():
        old = model.get_parameter(name)
        memo[id(old)] = torch.nn.Parameter(tensor.detach().to(old.device, old.dtype), requires_grad=False)
    if config is not None:
        memo[id(model.config)] = config
    if layers is not None or listed is not None:
        own: Any = listed if layers is None else model.get_submodule(layer_list)
        hosts = range(len(own)) if layers is None else layers
        modules = [copy.deepcopy(shells(own)[i], memo) for i in hosts]
        memo[id(own)] = torch.nn.ModuleList(modules) if listed is None else listed.of(hosts, modules)
    out: PreTrainedModel = copy.deepcopy(model, memo)
    for at, some in streamed.items():
        _change(out, at, some)
    if layers is not None:
        _number(out, layer_list, layers)
    if config is not None:
        for module in out.modules():
            if isinstance(getattr(module, "config", None), PretrainedConfig):
                module.config = config  # type: ignore[assignment]
    return out


def _apart(model: PreTrainedModel, tensors: Mapping[str, Tensor]
           ) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    """Replacements of ordinary parameters, and those of streamed layers by layer."""
    path = next((f"{name}." for name, m in model.named_modules() if isinstance(m, StreamedLayers)), None)
    ordinary, streamed = dict(tensors), defaultdict[int, dict[str, Tensor]](dict)
    for name in [name for name in tensors if path and name.startswith(path)]:
        at, _, inside = name.removeprefix(str(path)).partition(".")
        streamed[int(at)][inside] = ordinary.pop(name)
    return ordinary, streamed


def _change(model: PreTrainedModel, at: int, tensors: Mapping[str, Tensor]) -> None:
    """Give a streamed layer other parameters when it is read."""
    layers = next(m for m in model.modules() if isinstance(m, StreamedLayers))
    layers.changes[at] = lambda own: {name: t.to(own[name].dtype) for name, t in tensors.items()}


def replace_parameter(module: torch.nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in a parameter's place, on that one's device; a parameter (shared with another model) as it is."""
    path, _, leaf = name.rpartition(".")
    parent = module.get_submodule(path)
    tensor = tensor.to(getattr(parent, leaf).device)
    setattr(parent, leaf, tensor if isinstance(tensor, torch.nn.Parameter) else torch.nn.Parameter(tensor, False))


def _number(model: PreTrainedModel, layer_list: str, layers: Sequence[int]) -> None:
    """Give the layers their new numbers, also where accelerate notes each one's device (with a device map)."""
    for at, layer in enumerate(model.get_submodule(layer_list).children()):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = at  # type: ignore[assignment]
    placed: dict[str, Any] | None = getattr(model, "hf_device_map", None)
    if placed:
        numbers = {f"{layer_list}.{old}": f"{layer_list}.{at}" for at, old in enumerate(layers)}
        model.hf_device_map = {numbers.get(name, name): device for name, device in placed.items()  # type: ignore[assignment]
                               if name in numbers or not name.startswith(f"{layer_list}.")}


def scaled_outputs(layout: LayerLayout, layer: nn.Module, weights: Mapping[str, Tensor], scale: float
                   ) -> dict[str, Tensor]:
    """The parameters through which a layer adds to the stream, multiplied; new tensors of the same dtype. `weights`:
    parameters that replace the layer's own."""
    own = dict(layer.named_parameters())
    out = {}
    for name, offset in layout.written(layer).items():  # projections and biases; the gain of a norm behind them
        t = weights.get(name, own[name])
        out[name] = (t.to(torch.promote_types(t.dtype, torch.float32)) * scale + offset * (scale - 1)).to(t.dtype)
    return out
