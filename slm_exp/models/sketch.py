"""A model from its config alone: sizes by arithmetic, the digest where it is known. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from slm_exp.core.errors import ConfigError
from slm_exp.models.files import Tensor
from slm_exp.models.handle import ModelHandle
from slm_exp.models.layouts import FAMILIES
from slm_exp.models.sizes import BYTES, Sizes, named, sizes_in, sizes_of

UNKNOWN = "?"
"""A digest that is not known here begins with it; what follows keeps unknown things apart."""


@dataclass(frozen=True)
class Sketch:
    """What is known of a model without opening it."""

    name: str
    digest: str
    """As `ModelHandle.digest`; begins with `?` where it is not known."""
    sizes: Sizes | None
    handle: ModelHandle | None
    """Stands in for the model wherever only config and digest are looked at; has no weights to load."""
    dtype: str = "float32"
    random: bool = False
    notes: tuple[str, ...] = ()
    """What is not known, and why."""

    @property
    def bytes(self) -> int:
        """Of the weights in memory."""
        return self.sizes.total * BYTES.get(self.dtype, 4) if self.sizes else 0


def unknown(name: str) -> Sketch:
    """Of a source that says nothing of itself before it is opened."""
    return Sketch(name, f"{UNKNOWN}{name}", None, None, notes=(f"model={name}: only the run itself knows its size.",))


def sketch_of(name: str, value: str, config: Mapping[str, Any] | None, dtype: str, device_type: str,
              random: bool = False, notes: tuple[str, ...] = (), tensors: Mapping[str, Tensor] | None = None) -> Sketch:
    """A sketch by the fields of config.json; None where there is none.

    Args:
        value: the model's digest, or one that begins with UNKNOWN.
        tensors: of its weights, where their headers have been read.
    """
    sizes = None
    if config is not None:
        try:
            sizes = sizes_in(config, tensors) if tensors else sizes_of(config)
        except ConfigError as error:
            notes = (*notes, f"{name}: its size is not known here: {error}")
    if sizes is None or config is None:
        return Sketch(name, value, None, None, dtype, random, notes)

    def refuse() -> Any:
        raise AssertionError("a sketch has no weights")

    handle = ModelHandle(name, SimpleNamespace(**named(config)), FAMILIES[str(config["model_type"])], value,  # type: ignore[arg-type]
                         SimpleNamespace(type=device_type), refuse, refuse, random=random)  # type: ignore[arg-type]
    handle.__dict__ |= {"sizes": sizes, "n_params": sizes.total, "layer_params": sizes.layer,  # cached properties
                        "sublayer_params": (sizes.sublayers,) * sizes.n_layers}  # no empty model
    return Sketch(name, value, sizes, handle, dtype, random, notes)
