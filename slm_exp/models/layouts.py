"""What a decoder layer is made of, per model family. Families are data; an unknown one is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.core.errors import ArchitectureError, did_you_mean
from slm_exp.models.layerwise import PREFIX, has_own_code

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class LayerLayout:
    """Names inside one family's model. Dotted names are relative to the causal LM or, below, to a layer."""

    family: str
    decoder: str = "model"
    """The decoder without its head."""
    layer_list: str = "model.layers"
    final_norm: str = "model.norm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"
    attention_per_layer: bool = False
    """Whether config.layer_types decides each layer's attention; else the whole model has one kind."""
    per_layer_config: tuple[str, ...] = ("layer_types", "mlp_layer_types", "layer_widths")
    """Config lists with one entry per layer."""
    layer_counts: tuple[str, ...] = ("num_hidden_layers",)
    """Config fields that equal the number of layers."""
    layer_bounds: tuple[str, ...] = ("max_window_layers",)
    """Config fields that split the stack: how many of the lower layers have some property."""

    @property
    def projections(self) -> tuple[str, ...]:
        """The matrices that merge rules combine; `.weight` of each."""
        return (self.q, self.k, self.v, self.o, *self.mlp_in, self.mlp_out)

    @property
    def sublayers(self) -> dict[str, tuple[str, ...]]:
        """The matrices of each sublayer."""
        return {"attention": (self.q, self.k, self.v, self.o), "mlp": (*self.mlp_in, self.mlp_out)}

    @property
    def outputs(self) -> dict[str, tuple[str, ...]]:
        """What writes each sublayer's output into the residual stream: with these at zero, it does nothing."""
        return {"attention": (self.o,), "mlp": (self.mlp_out,)}

    def layers(self, model: PreTrainedModel) -> torch.nn.ModuleList:
        """The decoder layers, bottom to top."""
        return model.get_submodule(self.layer_list)  # type: ignore[return-value]

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model whose layers hold a tensor this layout does not account for. Shapes suffice: meta tensors do.

        Everything in a layer must be one of `projections` or a vector (a norm gain or a bias), and all layers alike,
        unless the config gives widths per layer (see width/layerwise.py).

        Raises:
            ArchitectureError: names the layer and the tensor.
        """
        shapes = [{name: tuple(p.shape) for name, p in layer.named_parameters()} for layer in self.layers(model)]
        matrices = {f"{name}.weight" for name in self.projections}
        for i, has in enumerate(shapes):
            where = f"{type(model).__name__} layer {i}"
            for name in sorted(matrices - set(has)):
                raise ArchitectureError(f"{where} has no {name}, which the {self.family} layout expects.")
            for name, shape in has.items():
                if name not in matrices and len(shape) > 1:
                    raise ArchitectureError(f"{where} has {name} of shape {list(shape)}, unknown to the {self.family} "
                                            "layout. See CONTRIBUTING, 'A new model family'.")
            if has != shapes[0] and not has_own_code(model.config):
                name = min(n for n in {*has, *shapes[0]} if has.get(n) != shapes[0].get(n))
                raise ArchitectureError(f"{where}: {name} has shape {has.get(name)}, in layer 0 "
                                        f"{shapes[0].get(name)}; only layers of one shape can be merged.")


FAMILIES = {
    "llama": LayerLayout("llama"),
    "mistral": LayerLayout("mistral"),
    "qwen2": LayerLayout("qwen2", attention_per_layer=True),
    "qwen3": LayerLayout("qwen3", attention_per_layer=True),
}
ATTENTION_KINDS = ("full_attention", "sliding_attention")
NOT_PER_LAYER = ("architectures", "eos_token_id", "bad_words_ids")  # lists whose length says nothing about layers


def layout_for(config: PretrainedConfig) -> LayerLayout:
    """The layout of a model's family, after refusing every config feature it does not account for.

    Reads the config only, so a model is refused before its weights load.

    Raises:
        ArchitectureError: the family or a feature is unknown; names it and, for a family, the known ones.
    """
    family = str(config.model_type).removeprefix(PREFIX)
    if getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(f"model_type = {family!r} is an encoder-decoder; only decoder-only models will do.")
    if family not in FAMILIES:
        raise ArchitectureError(f"model_type = {family!r} is not understood; known: {', '.join(sorted(FAMILIES))}. "
                                f"{did_you_mean(family, FAMILIES)} See CONTRIBUTING, 'A new model family'.")
    layout = FAMILIES[family]
    for refused in _REFUSALS:
        reason = refused(config, layout)
        if reason:
            raise ArchitectureError(f"{type(config).__name__}: {reason}")
    return layout


def _widths(config: PretrainedConfig, layout: LayerLayout) -> str | None:
    if getattr(config, "layer_widths", None) and not has_own_code(config):
        return f"layer_widths in a config of model_type {config.model_type}, which has layers of one width."
    return None


def _quantised(config: PretrainedConfig, layout: LayerLayout) -> str | None:
    about = getattr(config, "quantization_config", None)
    if about is None:
        return None
    method = about.get("quant_method") if isinstance(about, dict) else getattr(about, "quant_method", None)
    return (f"quantization_config ({getattr(method, 'value', method)}): quantised weights cannot be merged. "
            "Take the original checkpoint, merge, and quantise afterwards.")


def _not_causal(config: PretrainedConfig, layout: LayerLayout) -> str | None:
    names = getattr(config, "architectures", None) or []
    if names and not any(name.endswith("ForCausalLM") for name in names):
        return f"architectures = {names}: not a causal language model (its weights would lack the output head)."
    return None


def _heterogeneous(config: PretrainedConfig, layout: LayerLayout) -> str | None:
    if getattr(config, "is_heterogeneous", False):
        return "per_layer_config gives layers shapes of their own; only layers of one shape can be merged."
    return None


def _unknown_lists(config: PretrainedConfig, layout: LayerLayout) -> str | None:
    n = config.num_hidden_layers
    for name, value in vars(config).items():
        public = name.lstrip("_")
        if public in (*layout.per_layer_config, *NOT_PER_LAYER) or not isinstance(value, (list, tuple)):
            continue
        if len(value) == n > 1:
            return (f"{public} = {list(value)} has one entry per layer and is unknown to the {layout.family} "
                    "layout; merging would leave it behind.")
    for name in layout.per_layer_config:
        value = getattr(config, name, None)
        if value is not None and len(value) != n:
            return f"{name} has {len(value)} entries for {n} layers."
    return None


def _attention_kinds(config: PretrainedConfig, layout: LayerLayout) -> str | None:
    kinds = list(getattr(config, "layer_types", None) or [])
    for kind in kinds:
        if kind not in ATTENTION_KINDS:
            return f"layer_types has {kind!r}; known: {', '.join(ATTENTION_KINDS)}."
    if len(set(kinds)) > 1 and not layout.attention_per_layer:
        return f"layer_types mixes {' and '.join(sorted(set(kinds)))}, but {layout.family} gives every layer the same."
    return None


def _rope_per_layer(config: PretrainedConfig, layout: LayerLayout) -> str | None:
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [key for key, value in dict(rope).items() if isinstance(value, dict)]
    return f"rope_parameters differ by layer type ({', '.join(kinds)}); not understood." if kinds else None


_REFUSALS: tuple[Callable[[PretrainedConfig, LayerLayout], str | None], ...] = (
    _quantised,
    _not_causal,
    _widths,
    _heterogeneous,
    _unknown_lists,
    _attention_kinds,
    _rope_per_layer,
)
