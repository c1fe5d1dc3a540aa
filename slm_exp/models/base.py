"""The model under study: where it comes from. The loaded thing is `models.handle.ModelHandle`, known here too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slm_exp.core.errors import require, require_one_of
from slm_exp.core.registry import Component, knob
from slm_exp.core.runtime import DEVICE
from slm_exp.models.handle import ModelHandle as ModelHandle
from slm_exp.models.handle import count_params as count_params
from slm_exp.models.handle import dtype_name as dtype_name
from slm_exp.models.handle import empty_model as empty_model
from slm_exp.models.sketch import Sketch, unknown

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass
class ModelSource(Component, ABC):
    """A member of the `model` group: names a model, opens it without loading weights."""

    path: str = ""
    """A folder or a Hugging Face repo id."""
    revision: str | None = None
    """Commit, tag or branch of the repo; null is the default branch."""
    dtype: str = "float32"
    """float32, bfloat16, float16, or auto (as saved)."""
    device: str | None = knob(None)
    """cpu, cuda, cuda:1, ...; null follows runtime.device."""
    device_map: str | None = knob(None)
    """`auto` spreads a model over several devices (accelerate); null keeps it on one. What would be put off to the CPU
    or to disk stays in its files instead (runtime.memory)."""
    trust_remote_code: bool = False
    """Run code that comes with the repo. Off unless you say so."""

    def check(self) -> None:
        require_one_of("model.dtype", self.dtype, DTYPES)
        require(self.device is None or bool(DEVICE.fullmatch(self.device)), "model.device", self.device,
                "null, auto, cpu, cuda or cuda:N")
        require(self.device_map in (None, "auto"), "model.device_map", self.device_map, "null or auto")

    def refuse_elsewhere(self, why: str) -> None:
        """Refuse fields that say where a model comes from and how it is spread, for a source that would ignore them."""
        for name in ("path", "revision", "device_map", "trust_remote_code"):
            value = getattr(self, name)
            require(value == getattr(ModelSource, name), f"model.{name}", value,
                    f"no such setting, as model={self.name} {why}", "Leave it out; for another model use model=hf.")

    def weights_bytes(self) -> int | None:
        """About how much memory the weights take; None where it is not known before they are fetched. Opens no file."""
        return None

    def unread_weights(self) -> bool:
        """Whether `identity` would have to read large files, which takes a second a gigabyte. Costs no reading."""
        return False

    def sketch(self, cache_dir: Path, device_type: str) -> Sketch:
        """What is known of the model without opening it. Reads small files only, imports no torch. Raises ConfigError:
        config.json cannot be that of a model."""
        return unknown(self.name)

    def look(self) -> ModelHandle | None:
        """What `open` would give, without its digest and with no weights to load, as far as nothing has to be fetched
        or converted for it; None where that is all there is to see. Imports transformers where there is something.
        Raises ConfigError / ArchitectureError / CheckpointError: as `open` and the loading of weights would."""
        return None

    @abstractmethod
    def open(self, device: torch.device, cache_dir: Path) -> ModelHandle:
        """Find the model and read its config and tokenizer; weights load on first use of `handle.model`. Raises
        ConfigError / ArchitectureError: not there, or not understood; names the remedy."""
