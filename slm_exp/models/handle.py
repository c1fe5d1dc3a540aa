"""A loaded model, or one that loads on first use, and everything known about it without weights."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_exp.core.errors import require
from slm_exp.models.origin import Origin
from slm_exp.models.sizes import Sizes

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from slm_exp.models.layout import LayerLayout


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
    licences: tuple[Path, ...] = ()
    """Licence and notice files that came with the weights; they go along with what is made of these."""
    origin: Origin = field(default_factory=Origin)
    """What the hub knows of the source."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """What was done to the dense model; empty for the dense model itself."""
    load_streamed: Callable[[], PreTrainedModel] | None = field(default=None, repr=False)
    """Loads the model with layers that stay in their files (see models/streaming.py); None where there are no files."""
    streamed: bool = False
    """Whether `model` is such a one."""

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

    def stream(self) -> ModelHandle:
        """The same model with layers that stay in their files."""
        assert self.load_streamed is not None
        return dataclasses.replace(self, load_model=self.load_streamed, streamed=True)

    @property
    def n_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def positions(self) -> int | None:
        """Tokens of the longest sequence; None where the config sets no limit."""
        return getattr(self.config, "max_position_embeddings", None) or getattr(self.config, "n_positions", None)

    def require_room(self, field: str, tokens: int) -> None:
        """Refuse sequences longer than the model has positions. Raises ConfigError: names the field."""
        longest = self.positions
        require(longest is None or tokens <= longest, field, tokens,
                f"at most {longest}, the positions of {self.name} (max_position_embeddings)")

    @cached_property
    def n_params(self) -> int:
        """Parameters, each once, tied ones too. From shapes alone: loads no weights."""
        return count_params(self.model if self.loaded else empty_model(self.config))

    @cached_property
    def layer_params(self) -> int:
        """Parameters of one decoder layer, the mean where layers differ. Loads no weights."""
        model = self.model if self.loaded else empty_model(self.config)
        return count_params(self.layout.layers(model)) // self.n_layers

    @cached_property
    def sizes(self) -> Sizes:
        """Sizes from shapes alone: loads no weights. Where layers differ, of one that is their mean."""
        model, n = empty_model(self.config), self.n_layers
        layers = self.layout.layers(model)
        products = [self.layout.products(layer, self.config) for layer in layers]
        head: Any = model.get_output_embeddings()
        vocab, hidden = head.weight.shape

        def mean(parts: Iterable[Mapping[str, float]]) -> dict[str, int]:
            return {kind: int(sum(part[kind] for part in parts) / n) for kind in ("attention", "mlp")}

        return Sizes(n, int(hidden), int(vocab), self.layer_params, self.n_params, mean(products),
                     sum(map(self.layout.attention_width, layers)) // n, int(self.config.num_attention_heads),
                     int(getattr(self.config, "intermediate_size", None) or 4 * hidden), mean(self.sublayer_params))

    @cached_property
    def sublayer_params(self) -> tuple[dict[str, int], ...]:
        """Of every layer, parameters of attention and of the MLP: projections and their biases. Loads no weights."""
        layers = self.layout.layers(self.model if self.loaded else empty_model(self.config))
        return tuple({kind: sum(count_params(layer.get_submodule(name)) for name in names)
                      for kind, names in self.layout.sublayers.items()} for layer in layers)


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config without weights (meta tensors), tied as the config says. Costs tens of milliseconds."""
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
    """The resolved dtype: `dtype` itself, or for `auto` the config's own (float32 where it has none)."""
    if dtype != "auto":
        return dtype
    own = getattr(config, "dtype", None)
    return "float32" if own is None else str(own).removeprefix("torch.")
