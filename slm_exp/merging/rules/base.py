"""The `merge_rule` group: what one layer is made of when a window of layers is merged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from slm_exp.core.cost import Work
from slm_exp.core.errors import ArchitectureError
from slm_exp.core.registry import Component
from slm_exp.core.types import CalibrationTokens, Group
from slm_exp.models.base import ModelHandle
from slm_exp.models.layout import LayerLayout
from slm_exp.models.sizes import Sizes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slm_exp.engine.runner import BlockRunner


class FitTask(Protocol):
    """What tokens to fit on depend on."""

    @property
    def handle(self) -> ModelHandle: ...

    @property
    def tokens(self) -> CalibrationTokens:
        """That the fit may not share."""

    @property
    def seed(self) -> int: ...


class Merged(NamedTuple):
    """One layer made of a window: a module to host it, and the parameters that differ from the module's own."""

    host: int
    """Which of the window's layers, counted from its lowest. Its attention type and config entries hold."""
    weights: dict[str, Tensor]
    """By name inside the layer. Selected parameters are the layers' own tensors, combined ones are new."""


class _Stack(Sequence["Tensor"]):
    """One parameter of each layer of a window, lowest first, each fetched when it is looked at."""

    def __init__(self, fetch: Callable[[int], Tensor], numbers: range) -> None:
        self.fetch, self.numbers = fetch, numbers
        self.last: dict[int, Tensor] = {}
        """The one fetched last, by its layer: a rule that selects gives it back."""

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return _Stack(self.fetch, self.numbers[at])
        at = self.numbers[at]
        if at not in self.last:
            self.last = {at: self.fetch(at)}
        return self.last[at]


@dataclass
class MergeRule(Component, ABC):
    """Combines projection matrices (and routers and experts); norms and biases stay the lowest layer's unless
    `whole_layer`."""

    attention_from: ClassVar[str] = "low"
    """Which layer's attention type, RoPE kind and per-layer config entries hold: the one that gives q and k."""
    whole_layer: ClassVar[bool] = False
    """True when norms and biases come from the layer `attention_from` names as well (keep_top)."""
    fits: ClassVar[bool] = False
    """Whether it is a `FittingRule`."""

    def lengths(self) -> dict[str, int]:
        """The longest sequence that each setting makes the model read."""
        return {}

    def check_data(self, dense: ModelHandle) -> None:
        """Raise ConfigError or DataError where the rule's tokens cannot be had. Called before weights load."""

    def cost(self, sizes: Sizes, windows: float) -> Work:
        """Of fitting so many windows."""
        return Work()

    def memory(self, sizes: Sizes) -> float:
        """Bytes that fitting takes beside the model, about."""
        return 0

    @abstractmethod
    def combine(self, weights: Sequence[Tensor]) -> Tensor:
        """One projection's merged weight from that projection of each layer, lowest first (two or more). Returns one of
        `weights` itself where the rule selects (no copy), else a new tensor of the same dtype. Arithmetic is float32 or
        wider."""

    def merge(self, layout: LayerLayout, layers: Sequence[nn.Module],
              parameter: Callable[[int, str], Tensor] | None = None) -> Merged:
        """The layer that a window of layers (lowest first, two or more) becomes. Modifies nothing.

        Args:
            parameter: gives one of the window's k-th layer, where the modules do not hold them: read when the rule
                looks at it, so that one projection of one layer is in memory at a time.
        Raises ArchitectureError: the layers do not have the same parameters in the same shapes.
        """
        sources = [dict(layer.named_parameters()) for layer in layers]
        for i, other in enumerate(sources[1:], 1):
            for name in sorted(set(sources[0]) | set(other)):
                low, high = ("x".join(map(str, s[name].shape)) if name in s else "missing" for s in (sources[0], other))
                if low != high:
                    raise ArchitectureError(
                        f"merging needs equal layers: {name} is {low} in the window's lowest layer and {high} in layer "
                        f"{i} above it. Merge layers before pruning them to different widths.")

        def fetch(name: str, k: int) -> Tensor:
            return parameter(k, name) if parameter else sources[k][name].to(sources[host][name].device)

        host = len(layers) - 1 if self.attention_from == "top" else 0
        matrices = set(layout.matrices)
        weights: dict[str, Tensor] = {}
        for name in sources[host]:
            stack = _Stack(partial(fetch, name), range(len(layers)))
            merged = self.combine(stack) if name in matrices else stack[host if self.whole_layer else 0]
            if merged is not stack.last.get(host):
                weights[name] = merged
        return Merged(host, weights)


@dataclass
class FittingRule(MergeRule):
    """Fits a merged layer on tokens. `combine` is what the fit starts from; a plan's layers lie beside it
    (`MergePlan.fitted`)."""

    fits: ClassVar[bool] = True

    @abstractmethod
    def draw(self, task: FitTask) -> CalibrationTokens:
        """The tokens to fit on."""

    @abstractmethod
    def fit(self, runner: BlockRunner, window: Group, entering_NTD: Tensor, wanted_NTD: Tensor) -> dict[str, Tensor]:
        """The parameters of a merged layer that differ from its host's, in the model's dtype.

        Args:
            runner: of the model, in float32, with the library's layers.
            window: the layers that become one.
            entering_NTD, wanted_NTD: the dense stream before and after them.
        """

    def needs_resident(self) -> str | None:
        return f"merge_rule={self.name} fits on all layers of a window at once"
