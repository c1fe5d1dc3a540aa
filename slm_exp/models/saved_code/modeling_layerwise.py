"""Llama, Mistral, Qwen2 and Qwen3 whose layers have widths of their own, or maps of the residual stream behind them.
Saved beside the weights of such a model.

`config.layer_widths` has for every layer [query heads, key-value heads, MLP channels]; the config's own counts are
those of the model before pruning. `config.stream_maps` has for every layer the ranks of the maps behind it, one after
the other (see `StreamMap`). Load with `from_pretrained(folder, trust_remote_code=True)`. Needs transformers alone.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


class StreamMap(nn.Module):
    """The residual stream times a matrix (rank 0), or with a map of low rank of the normed stream added to it."""

    def __init__(self, config: Any, rank: int) -> None:
        super().__init__()
        n = config.hidden_size
        self.rank, self.eps = rank, config.rms_norm_eps
        if rank:
            self.down, self.up = nn.Linear(n, rank, bias=False), nn.Linear(rank, n, bias=False)
        else:
            self.whole = nn.Linear(n, n, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        if not self.rank:
            return self.whole(h)
        x = h.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return h + self.up(self.down(x.to(h.dtype)))


@functools.cache
def mapped(kind: Any) -> Any:
    """A class of decoder layers whose output passes `stream_maps`."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = kind.forward(self, *args, **kwargs)
        for one in self.stream_maps:
            out = one(out)
        return out

    return type(f"Mapped{kind.__name__}", (kind,), {"forward": forward})


def map_stream(layer: Any, maps: list) -> None:
    """Put maps behind a layer, after those that it has."""
    if maps and not hasattr(layer, "stream_maps"):
        layer.__class__ = mapped(type(layer))  # type: ignore[arg-type]
        layer.stream_maps = nn.ModuleList()
    for one in maps:
        layer.stream_maps.append(one)


def build(model: Any) -> None:
    """Make every decoder layer anew, as wide as `config.layer_widths` says, with the maps that `stream_maps` says."""
    config, layers = model.config, model.model.layers
    for i, (heads, kv_heads, channels) in enumerate(config.layer_widths or []):
        own = copy.copy(config)  # a plain copy: the family's checks are about the whole model's counts
        own.num_attention_heads, own.num_key_value_heads, own.intermediate_size = heads, kv_heads, channels
        layers[i] = type(layers[i])(own, i)
        for module in layers[i].modules():
            if getattr(module, "config", None) is own:
                module.config = config  # what is set later, e.g. the attention implementation, reaches every layer
    for layer, ranks in zip(layers, config.stream_maps or [], strict=False):
        map_stream(layer, [StreamMap(config, rank) for rank in ranks])
    model.post_init()


class LayerwiseLlamaConfig(LlamaConfig):
    model_type = "layerwise_llama"
    layer_widths: list | None = None
    stream_maps: list | None = None


class LayerwiseMistralConfig(MistralConfig):
    model_type = "layerwise_mistral"
    layer_widths: list | None = None
    stream_maps: list | None = None


class LayerwiseQwen2Config(Qwen2Config):
    model_type = "layerwise_qwen2"
    layer_widths: list | None = None
    stream_maps: list | None = None


class LayerwiseQwen3Config(Qwen3Config):
    model_type = "layerwise_qwen3"
    layer_widths: list | None = None
    stream_maps: list | None = None


class LayerwiseLlamaForCausalLM(LlamaForCausalLM):
    config_class = LayerwiseLlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        build(self)


class LayerwiseMistralForCausalLM(MistralForCausalLM):
    config_class = LayerwiseMistralConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        build(self)


class LayerwiseQwen2ForCausalLM(Qwen2ForCausalLM):
    config_class = LayerwiseQwen2Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        build(self)


class LayerwiseQwen3ForCausalLM(Qwen3ForCausalLM):
    config_class = LayerwiseQwen3Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        build(self)


FAMILIES = {
    "llama": (LayerwiseLlamaConfig, LayerwiseLlamaForCausalLM),
    "mistral": (LayerwiseMistralConfig, LayerwiseMistralForCausalLM),
    "qwen2": (LayerwiseQwen2Config, LayerwiseQwen2ForCausalLM),
    "qwen3": (LayerwiseQwen3Config, LayerwiseQwen3ForCausalLM),
}
