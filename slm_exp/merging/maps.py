"""Maps of the residual stream behind layers, as a model's own modules (see models/saved_code)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from slm_exp.merging.sharing import shared_copy
from slm_exp.models.layerwise import has_own_code, layerwise_classes, own_config
from slm_exp.models.layouts import layout_for
from slm_exp.models.saved_code.modeling_layerwise import StreamMap, map_stream

PART = ".stream_maps."


def map_names(layer_list: str, layer: int, at: int, rank: int) -> tuple[str, ...]:
    """The parameters of a layer's map number `at`."""
    return tuple(f"{layer_list}.{layer}{PART}{at}.{part}.weight" for part in (("down", "up") if rank else ("whole",)))


def ranks(config: PretrainedConfig) -> list[list[int]]:
    """Of every layer's maps."""
    return [list(r) for r in getattr(config, "stream_maps", None) or [[]] * int(config.num_hidden_layers)]


def mapped_config(config: PretrainedConfig, tensors: Mapping[str, Tensor]) -> PretrainedConfig:
    """A config with the maps that new tensors are parameters of, behind those that it has; itself where there are none.
    """
    found = ranks(config)
    for name in sorted((n for n in tensors if PART in n), key=_place):
        layer, at, part = _place(name)
        if part != "up":
            assert at == len(found[layer]), f"{name}: the layer has {len(found[layer])} maps"
            found[layer].append(len(tensors[name]) if part == "down" else 0)
    if found == ranks(config):
        return config
    family = layout_for(config).family
    return own_config(config, family, stream_maps=found)  # type: ignore[no-any-return]


def _place(name: str) -> tuple[int, int, str]:
    """(layer, number of the map, part) of a parameter."""
    path, _, rest = name.partition(PART)
    at, part, _ = rest.split(".")
    return int(path.rpartition(".")[2]), int(at), part


def with_maps(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """As `shared_copy`, with the maps that `tensors` may have put behind their layers."""
    if not any(PART in name for name in tensors):
        return shared_copy(model, tensors)
    config = mapped_config(model.config, tensors)
    old = ranks(model.config)
    out = shared_copy(model, {n: t for n, t in tensors.items() if PART not in n}, config=config)
    layout = layout_for(config)
    for i, (layer, before, after) in enumerate(zip(layout.layers(out), old, ranks(config), strict=True)):
        first: Any = next(layer.parameters())
        new = []
        for at, rank in enumerate(after[len(before) :], len(before)):
            with torch.device("meta"):
                one = StreamMap(config, rank)
            for name in map_names(layout.layer_list, i, at, rank):
                part = one.get_submodule(name.split(".")[-2])
                part.weight = torch.nn.Parameter(tensors[name].detach().to(first.device, first.dtype), False)
            new.append(one.train(layer.training))
        map_stream(layer, new)
    assert has_own_code(config)
    out.__class__ = layerwise_classes()[layout.family][1]
    return out
