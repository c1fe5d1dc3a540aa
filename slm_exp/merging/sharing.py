"""A model made of another's tensors: every module is copied, no tensor is, except where a replacement is given."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from slm_exp.models.layouts import LayerLayout


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
    # A deep copy that finds every tensor already copied: as itself, or as its replacement wherever it occurs.
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for name, tensor in (tensors or {}).items():
        old = model.get_parameter(name)
        memo[id(old)] = torch.nn.Parameter(tensor.detach().to(old.device, old.dtype), requires_grad=False)
    if config is not None:
        memo[id(model.config)] = config
    if layers is not None:
        own: Any = model.get_submodule(layer_list)
        memo[id(own)] = torch.nn.ModuleList(copy.deepcopy(own[i], memo) for i in layers)
    out: PreTrainedModel = copy.deepcopy(model, memo)
    if layers is not None:
        _number(out, layer_list, layers)
    if config is not None:
        for module in out.modules():
            if isinstance(getattr(module, "config", None), PretrainedConfig):
                module.config = config  # type: ignore[assignment]
    return out


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
