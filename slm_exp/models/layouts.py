"""The layouts of all families: one file each in models/families. What is not understood is refused by name."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from slm_exp.core.errors import ArchitectureError, did_you_mean
from slm_exp.models import families
from slm_exp.models.layerwise import PREFIX, has_own_code
from slm_exp.models.layout import COMMON, LayerLayout

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _families() -> dict[str, LayerLayout]:
    """Every LAYOUT in models/families, by its model_type. A new file there joins by lying there."""
    names = sorted(found.name for found in pkgutil.iter_modules(families.__path__))
    layouts = [importlib.import_module(f"{families.__name__}.{name}").LAYOUT for name in names]
    return {layout.family: layout for layout in layouts}


FAMILIES = _families()
ATTENTION_KINDS = ("full_attention", "sliding_attention")
NOT_PER_LAYER = ("architectures", "eos_token_id", "bad_words_ids")  # lists whose length says nothing about layers


def layout_for(config: PretrainedConfig) -> LayerLayout:
    """The layout of a model's family, after refusing every config feature it does not account for.

    Reads the config only, so a model is refused before its weights load.
    Raises ArchitectureError: the family or a feature is unknown; names it and, for a family, the known ones.
    """
    family = str(config.model_type).removeprefix(PREFIX)
    if getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(f"model_type = {family!r} is an encoder-decoder; only decoder-only models will do.")
    if family not in FAMILIES:
        raise ArchitectureError(f"model_type = {family!r} is not understood; known: {', '.join(sorted(FAMILIES))}. "
                                f"{_meant(family)}See CONTRIBUTING, 'A new model family'.")
    layout = FAMILIES[family]
    for refused in _REFUSALS:
        reason = refused(config, layout)
        if reason:
            raise ArchitectureError(f"{type(config).__name__}: {reason}")
    return layout


def _meant(family: str) -> str:
    """A suggestion where the name is nobody's; a family that transformers knows was meant as it stands."""
    from transformers import CONFIG_MAPPING

    return "" if family in CONFIG_MAPPING else f"{did_you_mean(family, FAMILIES)} "


def _widths(config: PretrainedConfig, layout: LayerLayout) -> str | None:
    for name in ("layer_widths", "stream_maps"):
        if getattr(config, name, None) and not has_own_code(config):
            return f"{name} in a config of model_type {config.model_type}, which has layers of one width and no maps."
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
    if names and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
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


def _rope_per_kind(config: PretrainedConfig, layout: LayerLayout) -> str | None:
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [key for key, value in dict(rope).items() if isinstance(value, dict)]
    if not kinds or (layout.attention_per_layer and "rope_parameters" in layout.fields):
        return None
    return f"rope_parameters differ by layer type ({', '.join(kinds)}), but {layout.family} has one rotary table."


def _unknown_fields(config: PretrainedConfig, layout: LayerLayout) -> str | None:
    for name, allowed in layout.fixed.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            return (f"{name} = {value!r} is not understood by the {layout.family} layout; expected "
                    f"{' or '.join(map(repr, allowed))}.")
    if layout.same_size and getattr(config, layout.same_size) != config.hidden_size:
        return (f"{layout.same_size} = {getattr(config, layout.same_size)} projects states outside the decoder layers; "
                f"expected hidden_size = {config.hidden_size}.")
    for field in dataclasses.fields(type(config)):  # type: ignore[arg-type]
        if field.name in COMMON or field.name in (*layout.fields, *layout.fixed, *layout.per_layer_config,
                                                  *layout.layer_bounds, layout.same_size):
            continue
        value = getattr(config, field.name, field.default)
        if value != field.default and field.default is not dataclasses.MISSING:
            return f"{field.name} = {value!r} is unknown to the {layout.family} layout, which would ignore it."
    return None


_REFUSALS: tuple[Callable[[PretrainedConfig, LayerLayout], str | None], ...] = (
    _quantised,
    _not_causal,
    _widths,
    _heterogeneous,
    _unknown_lists,
    _attention_kinds,
    _rope_per_kind,
    _unknown_fields,
)
