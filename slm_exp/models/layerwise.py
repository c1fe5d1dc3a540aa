"""Models whose layers have widths or stream maps of their own: the classes that build them, known to transformers."""

from __future__ import annotations

from functools import cache
from typing import Any

PREFIX = "layerwise_"
"""Of the model_type of such models; what follows is the family."""


def has_own_code(config: Any) -> bool:
    """Whether a model of this config is built by the code this package saves beside it; by nobody else's."""
    return str(getattr(config, "model_type", "")).startswith(PREFIX)


@cache
def layerwise_classes() -> dict[str, tuple[Any, Any]]:
    """(config, model) class of every family that can have layers of different widths.

    Registers them with AutoConfig and AutoModelForCausalLM, so that this process loads such checkpoints without
    running code from their folder, and saves that code beside the weights of any it writes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from slm_exp.models.saved_code.modeling_layerwise import FAMILIES

    classes: dict[str, tuple[Any, Any]] = FAMILIES
    for config, model in classes.values():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
        config.register_for_auto_class()
        model.register_for_auto_class("AutoModelForCausalLM")
    return classes


def own_config(config: Any, family: str, **changes: Any) -> Any:
    """A copy of a config, of the class whose layers differ, with `changes`."""
    about = config.to_dict() | changes
    about.pop("model_type")
    own = layerwise_classes()[family][0].from_dict(about)
    own._attn_implementation = config._attn_implementation
    return own
