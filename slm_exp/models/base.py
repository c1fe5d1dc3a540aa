"""The model under study: where it comes from (ModelSource) and the loaded thing (ModelHandle)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_exp.core.errors import require, require_one_of
from slm_exp.core.registry import Component, knob

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from slm_exp.models.layouts import LayerLayout

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
    """`auto` spreads a model over several devices (accelerate); null keeps it on one."""
    trust_remote_code: bool = False
    """Run code that comes with the repo. Off unless you say so."""

    def check(self) -> None:
        require_one_of("model.dtype", self.dtype, DTYPES)
        require(
            self.device is None or self.device.split(":")[0] in ("auto", "cpu", "cuda"),
            "model.device",
            self.device,
            "null, auto, cpu, cuda or cuda:N",
        )
        require(self.device_map in (None, "auto"), "model.device_map", self.device_map, "null or auto")

    def weights_bytes(self) -> int | None:
        """About how much memory the weights take; None where it is not known before they are fetched. Opens no file."""
        return None

    @abstractmethod
    def open(self, device: torch.device, cache_dir: Path) -> ModelHandle:
        """Find the model and read its config and tokenizer; weights load on first use of `handle.model`.

        Raises:
            ConfigError / ArchitectureError: not there, or not understood; names the remedy.
        """


@dataclass
class ModelHandle:
    """A model whose weights load on first use, and everything that is known about it without them."""

    name: str
    """Short name for people: `smollm2_135m`, a repo id, a folder's name."""
    config: PretrainedConfig
    layout: LayerLayout
    digest: str
    """16 hex digits over the weights (or repo id and commit): equal digests mean equal weights."""
    device: torch.device
    load_model: Callable[[], PreTrainedModel] = field(repr=False)
    load_tokenizer: Callable[[], PreTrainedTokenizerBase | None] = field(repr=False)
    note: str = ""
    """Shown beside every number, e.g. that the embedded weights are dequantised."""
    random: bool = False
    """True for made-up weights (`model=tiny`)."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """What was done to the dense model; empty for the dense model itself."""

    @cached_property
    def model(self) -> PreTrainedModel:
        """The weights, in eval mode, without gradients."""
        model = self.load_model()
        model.eval().requires_grad_(False)
        return model

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """None where a model has none (`tiny` with token files)."""
        return self.load_tokenizer()

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return "model" in self.__dict__

    @property
    def layers(self) -> torch.nn.ModuleList:
        """The decoder layers, bottom to top."""
        return self.layout.layers(self.model)

    @property
    def n_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @cached_property
    def n_params(self) -> int:
        """Parameters, each once, tied ones too. From shapes alone: loads no weights."""
        return count_params(self.model if self.loaded else empty_model(self.config))

    @cached_property
    def layer_params(self) -> int:
        """Parameters of one decoder layer, the mean where layers differ. Loads no weights."""
        model = self.model if self.loaded else empty_model(self.config)
        return count_params(self.layout.layers(model)) // self.n_layers


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config without weights (meta tensors), tied as the config says. Costs tens of milliseconds."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # from_config notes things in the config
    model.tie_weights()
    return model


def count_params(model: torch.nn.Module) -> int:
    """Parameters of a module, each once, tied ones too."""
    return sum(p.numel() for p in model.parameters())


def dtype_name(config: PretrainedConfig, dtype: str) -> str:
    """What a `dtype` field comes to: itself, or for `auto` the config's own (float32 where it has none)."""
    if dtype != "auto":
        return dtype
    own = getattr(config, "dtype", None)
    return "float32" if own is None else str(own).removeprefix("torch.")
