"""Run a model one decoder layer at a time over the whole calibration set, with weights overridden where requested.

Everything that looks at hidden states stands on this: layer similarity streams them, the search restarts from
any of them. The model itself is never modified.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slm_exp.core.errors import ArchitectureError
from slm_exp.core.types import SUBLAYERS, Group
from slm_exp.engine.calls import entering
from slm_exp.engine.fused import fused_layer, supported
from slm_exp.models.base import ModelHandle

log = logging.getLogger(__name__)

FUSED_TOLERANCE = {"torch.float32": 1e-4, "torch.bfloat16": 5e-2}
"""How far the fused block may be from the library's, relative to what the layer adds to the states."""
TOKENS_PER_BATCH = {"cpu": 640, "cuda": 8192}
"""A block runs over at most this many tokens at once: on a CPU its inner states then stay in the cache."""

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Slot:
    """One layer of a trial model: an original layer's module, some parameters replaced or a sublayer left out."""

    host: int
    """The original layer whose module, attention type and per-layer config entries run."""
    weights: Mapping[str, Tensor] = field(default_factory=lambda: _NOTHING, compare=False)
    """Replaced parameters by name inside the layer, e.g. `self_attn.q_proj.weight`. Empty: a kept layer."""
    merged: Group | None = None
    """Layers to be merged by the task's rule in place of `weights`; only the scoring engine does that, as it runs."""
    without: frozenset[str] = frozenset()
    """`attention` or `mlp`: that sublayer, with its norm, does not run and the states pass it by."""
    scale: float = 1.0
    """What the layer adds to the stream is multiplied by this; likewise only by the scoring engine."""
    refit: tuple[int, int] | None = None
    """Dense layers [start, stop) whose work it takes over by a refitted projection; see search/refit.py."""

    def __post_init__(self) -> None:
        if not self.without < set(SUBLAYERS):
            raise ValueError(f"a slot may be without one of {', '.join(SUBLAYERS)}, not {sorted(self.without)}; a "
                             "layer without both is left out of the model.")


class BlockRunner:
    """Embedding, decoder layers and final norm of a model, each over all N x T calibration tokens.

    Works for any Hugging Face decoder: what a layer is called with (mask, rotary tables, its attention type's
    variant of either) is taken from the decoder's own forward. Models spread over devices work too: states
    follow the layers. Every call runs without gradients.
    Args:
        handle: the model; its weights load here.
        tokens_NT: [N, T] token ids.
        dtype: compute in this dtype instead of the model's; weights are cast layer by layer, as they run.
        fuse: use the fused CPU block for layers it understands (see engine/fused.py), else the library's layer.
    """

    def __init__(self, handle: ModelHandle, tokens_NT: np.ndarray | Tensor, dtype: torch.dtype | None = None,
                 fuse: bool = True) -> None:
        self.handle = handle
        self.model = handle.model
        self.tokens_NT = torch.as_tensor(tokens_NT).long()
        self.dtype = dtype or next(handle.layers.parameters()).dtype
        self.forwards = 0
        """Decoder-layer passes over the whole calibration set so far."""
        self.rows = max(1, TOKENS_PER_BATCH.get(self._device(0).type, 8192) // self.tokens_NT.shape[1])
        for i, layer in enumerate(() if handle.streamed else handle.layers):
            if any(p.is_meta for p in layer.parameters()):
                raise ArchitectureError(
                    f"layer {i} is offloaded to disk or host memory; its weights cannot be read. "
                    "Use a machine whose devices hold the model, or a smaller model.dtype."
                )
        self.fuse = fuse
        self.fused: list[bool | None] = [None] * handle.n_layers
        """Which layers run by engine/fused.py; null: has not run yet."""
        _, calls = self._enter(self.tokens_NT[:1])
        self._calls = [self._cast(kwargs, self._device(i), self.dtype) for i, kwargs in enumerate(calls)]

    def embed(self) -> Tensor:
        """The states entering layer 0: [N, T, D] in the runner's dtype."""
        parts = [self._enter(rows)[0].to(self.dtype) for rows in self.tokens_NT.split(self.rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def block(self, slot: Slot, h_NTD: Tensor) -> Tensor:
        """One decoder layer over the whole calibration set: [N, T, D] -> [N, T, D], a new tensor."""
        self.forwards += 1
        host = slot.host
        with torch.inference_mode():
            if self.fused[host] is None:
                self.fused[host] = self._may_fuse(host, h_NTD)
            if self.fused[host]:
                weights, call, layer = self._weights(slot, everything=True), self._calls[host], self.handle.layers[host]
                run = lambda rows: fused_layer(layer, weights, call, rows, self.dtype, slot.without)  # noqa: E731
            else:
                weights = self._weights(slot) | self._silenced(slot)
                h_NTD = h_NTD.to(self._device(host), self.dtype)
                run = lambda rows: self._library_layer(host, weights, self._calls[host], rows)  # noqa: E731
            if len(h_NTD) <= self.rows:
                return run(h_NTD)
            out = torch.empty_like(h_NTD)
            for start in range(0, len(h_NTD), self.rows):
                out[start : start + self.rows] = run(h_NTD[start : start + self.rows])
            return out

    def states(self) -> list[Tensor]:
        """Entering layers 0..L-1, and the last one's output before the final norm: L + 1 of [N, T, D]."""
        states = [self.embed()]
        for i in range(self.handle.n_layers):
            states.append(self.block(Slot(i), states[-1]))
        return states

    def last_state(self) -> Tensor:
        """After all layers and the final norm: [N, T, D]. Cost: one forward pass but for the head."""
        h_NTD = self.embed()
        for i in range(self.handle.n_layers):
            h_NTD = self.block(Slot(i), h_NTD)
        return self.finish(h_NTD)

    def finish(self, h_NTD: Tensor) -> Tensor:
        """The model's last hidden state, after the final norm: [N, T, D] -> [N, T, D]."""
        norm = self.model.get_submodule(self.handle.layout.final_norm)
        with torch.inference_mode():
            weights = {name: p.to(self.dtype) for name, p in norm.named_parameters()}
            device = next(iter(weights.values())).device
            return torch.func.functional_call(norm, weights, (h_NTD.to(device, self.dtype),))

    def logits(self, last_MD: Tensor, vocabulary: slice = slice(None)) -> Tensor:
        """The head on last hidden states: [M, D] -> [M, V], or the columns of a part of the vocabulary."""
        head: Any = self.model.get_output_embeddings()
        weight, bias = head.weight[vocabulary], head.bias
        with torch.inference_mode():
            x_MD = last_MD.to(weight.device, self.dtype)
            out_MV = torch.nn.functional.linear(
                x_MD, weight.to(self.dtype), None if bias is None else bias[vocabulary].to(self.dtype)
            )
            return self.handle.layout.logits(self.handle.config, out_MV)

    def call(self, i: int, dtype: torch.dtype) -> dict[str, Any]:
        """What layer i is called with beside the states (mask, rotary tables), its floats in `dtype`."""
        return self._cast(self._calls[i], self._device(i), dtype)  # type: ignore[no-any-return]

    def _device(self, i: int) -> torch.device:
        return self.handle.device if self.handle.streamed else next(self.handle.layers[i].parameters()).device

    def _weights(self, slot: Slot, everything: bool = False) -> dict[str, Tensor]:
        """Parameters and buffers as the layer runs with them: all, or those that differ from the module's own."""
        if slot.merged is not None or slot.refit is not None or slot.scale != 1:
            raise ValueError(f"{slot} has yet to be merged, refitted or scaled; the scoring engine does that.")
        layer = self.handle.layers[slot.host]
        own = dict(layer.named_parameters()) | dict(layer.named_buffers())
        unknown = sorted(set(slot.weights) - set(own))
        if unknown:
            raise ArchitectureError(f"layer {slot.host} has no parameter {', '.join(unknown)} to replace.")
        return {
            name: t
            for name, mine in own.items()
            if (t := self._to(slot.weights.get(name, mine), mine.device, self.dtype)) is not mine or everything
        }

    def _silenced(self, slot: Slot) -> dict[str, Tensor]:
        """Zeros in place of what writes a left-out sublayer into the stream; the library's layer computes the rest."""
        layer = self.handle.layers[slot.host]
        return {
            f"{module}.{name}": torch.zeros_like(p, dtype=self.dtype)
            for kind in slot.without
            for module in self.handle.layout.outputs[kind]
            for name, p in layer.get_submodule(module).named_parameters()
        }

    def _library_layer(self, host: int, weights: dict[str, Tensor], call: dict[str, Any], h_BTD: Tensor) -> Tensor:
        out = torch.func.functional_call(self.handle.layers[host], weights, (h_BTD,), call)
        return out[0] if isinstance(out, tuple) else out

    def _may_fuse(self, host: int, h_NTD: Tensor) -> bool:
        """Whether the fused layer is understood and agrees with the library's, in the states' dtype, on one sample."""
        layer, call = self.handle.layers[host], self._calls[host]
        if not self.fuse or not supported(layer, call, self.dtype):
            return False
        row, device = h_NTD[:1], h_NTD.device
        exact = {name: self._to(t, device, row.dtype) for name, t in layer.state_dict().items()}
        library = self._library_layer(host, exact, self._cast(call, device, row.dtype), row) - row
        fused = fused_layer(layer, self._weights(Slot(host), everything=True), call, row, self.dtype) - row
        size = library.double().norm().clamp(min=1e-30)  # a layer may add nothing at all
        error = float((fused.double() - library.double()).norm() / size)
        if not error < FUSED_TOLERANCE[str(self.dtype)]:
            log.warning(
                "layer %d: the fused block differs from the library's by %.1e of its update; not used.", host, error
            )
        return error < FUSED_TOLERANCE[str(self.dtype)]

    def _enter(self, tokens_BT: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Run the decoder with its layers passing states through: (embedded tokens, every layer's keywords)."""
        decoder = self.model.get_submodule(self.handle.layout.decoder)
        device = next(self.model.get_input_embeddings().parameters()).device
        return entering(decoder, self.handle.layers, {"input_ids": tokens_BT.to(device), "use_cache": False})

    @staticmethod
    def _to(t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        return t.to(device, dtype) if t.is_floating_point() else t.to(device)

    @classmethod
    def _cast(cls, value: Any, device: torch.device, dtype: torch.dtype) -> Any:
        """Tensors inside a layer's keywords, moved to its device and floats to a dtype."""
        if isinstance(value, torch.Tensor):
            return cls._to(value, device, dtype)
        if isinstance(value, dict):
            return {k: cls._cast(v, device, dtype) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(cls._cast(v, device, dtype) for v in value)
        return value
