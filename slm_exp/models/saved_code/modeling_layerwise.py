"""Llama, Mistral, Qwen2 and Qwen3 whose layers have widths of their own. Saved beside the weights of such a model.

`config.layer_widths` has for every layer [query heads, key-value heads, MLP channels]; the config's own counts are
those of the model before pruning. Load with `from_pretrained(folder, trust_remote_code=True)`. Needs transformers
alone.
"""

from __future__ import annotations

import copy
from typing import Any

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


def narrow(model: Any) -> None:
    """Make every decoder layer anew, as wide as `config.layer_widths` says."""
    config, layers = model.config, model.model.layers
    for i, (heads, kv_heads, channels) in enumerate(config.layer_widths):
        own = copy.copy(config)  # a plain copy: the family's checks are about the whole model's counts
        own.num_attention_heads, own.num_key_value_heads, own.intermediate_size = heads, kv_heads, channels
        layers[i] = type(layers[i])(own, i)
        for module in layers[i].modules():
            if getattr(module, "config", None) is own:
                module.config = config  # what is set later, e.g. the attention implementation, reaches every layer
    model.post_init()


class LayerwiseLlamaConfig(LlamaConfig):
    model_type = "layerwise_llama"
    layer_widths: list | None = None


class LayerwiseMistralConfig(MistralConfig):
    model_type = "layerwise_mistral"
    layer_widths: list | None = None


class LayerwiseQwen2Config(Qwen2Config):
    model_type = "layerwise_qwen2"
    layer_widths: list | None = None


class LayerwiseQwen3Config(Qwen3Config):
    model_type = "layerwise_qwen3"
    layer_widths: list | None = None


class LayerwiseLlamaForCausalLM(LlamaForCausalLM):
    config_class = LayerwiseLlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        narrow(self)


class LayerwiseMistralForCausalLM(MistralForCausalLM):
    config_class = LayerwiseMistralConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        narrow(self)


class LayerwiseQwen2ForCausalLM(Qwen2ForCausalLM):
    config_class = LayerwiseQwen2Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        narrow(self)


class LayerwiseQwen3ForCausalLM(Qwen3ForCausalLM):
    config_class = LayerwiseQwen3Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        narrow(self)


FAMILIES = {
    "llama": (LayerwiseLlamaConfig, LayerwiseLlamaForCausalLM),
    "mistral": (LayerwiseMistralConfig, LayerwiseMistralForCausalLM),
    "qwen2": (LayerwiseQwen2Config, LayerwiseQwen2ForCausalLM),
    "qwen3": (LayerwiseQwen3Config, LayerwiseQwen3ForCausalLM),
}
