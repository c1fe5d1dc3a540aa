"""What a decoder calls its layers with, and several forward passes in step, layer by layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slm_exp.core.errors import ArchitectureError
from slm_exp.models.layouts import layout_for
from slm_exp.models.streaming import StreamedLayers, shells, unread

STATES_BYTES = 1 << 29
"""States that go through a streamed model together."""


def entering(decoder: torch.nn.Module, layers: torch.nn.ModuleList, call: Mapping[str, Any]
             ) -> tuple[Tensor, list[dict[str, Any]]]:
    """Run a decoder with its layers passing states through: (embedded tokens, every layer's keywords)."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    names = list(inspect.signature(type(shells(layers)[0]).forward).parameters)[2:]  # after self and the states

    def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((hidden_states, dict(zip(names, args, strict=False)) | kwargs))
        return hidden_states

    with torch.inference_mode(), _forwards_replaced(layers, record):
        decoder(**call)
    if len(calls) != len(layers):
        raise ArchitectureError(
            f"{type(decoder).__name__} called {len(calls)} decoder layers, its list has {len(layers)}.")
    return calls[0][0], [kwargs for _, kwargs in calls]


def in_step(model: PreTrainedModel, calls: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """The last hidden states, after the final norm, of several calls of a model's decoder: every layer is asked for
    once and runs on the states of all. What a call gives does not depend on the others."""
    layers, decoder = layout_for(model.config).layers(model), model.base_model
    entered = [entering(decoder, layers, call) for call in calls]
    states = [h for h, _ in entered]
    with torch.inference_mode():
        for i, layer in enumerate(layers):
            for n, (_, kwargs) in enumerate(entered):
                out = layer(states[n], **kwargs[i])
                states[n] = out[0] if isinstance(out, tuple) else out
        last = []
        for call, h in zip(calls, states, strict=True):
            with _forwards_replaced(layers, lambda *args, h=h, **kwargs: h):
                last.append(decoder(**call).last_hidden_state)
    return last


def streams(model: PreTrainedModel) -> bool:
    """Whether a model's layers stay in their files."""
    return any(isinstance(module, StreamedLayers) for module in model.modules())


@contextmanager
def _forwards_replaced(layers: torch.nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
    """Give every layer another `forward` inside the block, which runs without weights; instance attributes
    (accelerate's hooks) come back."""
    modules = shells(layers)
    before = [layer.__dict__.get("forward") for layer in modules]
    try:
        for layer in modules:
            layer.forward = forward  # type: ignore[method-assign]
        with unread(layers):
            yield
    finally:
        for layer, own in zip(modules, before, strict=True):
            layer.__dict__.pop("forward", None)
            if own is not None:
                layer.forward = own
