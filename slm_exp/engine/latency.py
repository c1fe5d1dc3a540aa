"""What attention, MLP (at several widths) and the head of a model take on this device: the table behind a budget in
milliseconds.

Nothing of it depends on what the weights are, so models of the same shapes with random weights are timed; the real
ones need not be loaded. All units are timed where they run, inside a pass of a model of many layers: a layer alone
would find its weights in the processor's cache. Widths and whole models take turns in every round, so that a machine
whose speed drifts does so for all of them.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from slm_exp.core.runtime import device_name
from slm_exp.core.timing import ROUNDS, WARM, Checked, Kind, LatencyTable, Narrow, Times
from slm_exp.core.types import SUBLAYERS
from slm_exp.engine.progress import ticking
from slm_exp.models.base import ModelHandle
from slm_exp.models.tiny import random_weights

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Widths of an MLP that are timed, where the family's layers can be narrowed."""
MULTIPLE = 8
ENOUGH_BYTES = 1 << 29
"""Layers are as many as take this, or all: more than any processor's cache holds."""
PARTS = (0.25, 0.5, 0.75)
"""Of the layers, in whole models that predictions are checked on."""


@dataclass
class Clock:
    """Seconds on a device. With one CPU thread those of the thread, which other work on the machine does not lengthen;
    else those on the wall, on a GPU between events."""

    device: torch.device

    @property
    def kind(self) -> str:
        if self.device.type == "cuda":
            return "GPU time"
        return "processor time" if torch.get_num_threads() == 1 else "wall time"

    def mark(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()

    def between(self, start: Any, end: Any) -> float:
        if self.device.type == "cuda":
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3
        return float(end - start)


@dataclass
class Model:
    """A random model that is timed, as a whole or by units."""

    handle: ModelHandle
    model: PreTrainedModel
    clock: Clock
    batch: int
    length: int
    decode: bool
    cache: Any = None
    layers: list[dict[str, float]] = field(default_factory=list)
    """Seconds of the last pass by units, of every layer."""
    rest: float = 0.0
    whole: float = 0.0

    def run(self) -> None:
        """One pass: sets `whole`."""
        ids = torch.zeros(self.batch, 1 if self.decode else self.length, dtype=torch.long, device=self.model.device)
        more: dict[str, Any] = {"use_cache": False}
        if self.decode:
            if self.cache is None:
                prompt = torch.zeros(self.batch, self.length, dtype=torch.long, device=self.model.device)
                self.cache = self.model(prompt, past_key_values=DynamicCache(config=self.model.config), use_cache=True
                                        ).past_key_values
            more = {"use_cache": True, "past_key_values": self.cache}
        start = self.clock.mark()
        self.model(ids, **more)
        self.whole = self.clock.between(start, self.clock.mark())

    def run_by_units(self) -> None:
        """One pass: sets `layers`, `rest` and `whole`. What neither sublayer does (norms, sums with the stream) counts
        half to each."""
        layout = self.handle.layout
        marks: dict[tuple[int, str], Any] = {}
        hooks: list[RemovableHandle] = []

        def note(i: int, name: str) -> Callable[..., None]:
            return lambda *_: marks.__setitem__((i, name), self.clock.mark())

        for i, layer in enumerate(layout.layers(self.model)):
            hooks += [layer.register_forward_pre_hook(note(i, "in")), layer.register_forward_hook(note(i, "out"))]
            for kind, names in layout.sublayers.items():
                first, last = (layer.get_submodule(name) for name in (names[0], names[-1]))
                hooks += [first.register_forward_pre_hook(note(i, f"{kind} in")),
                          last.register_forward_hook(note(i, f"{kind} out"))]
        try:
            self.run()
        finally:
            for hook in hooks:
                hook.remove()
        self.layers, self.rest = [], self.whole
        for i in range(len(layout.layers(self.model))):
            took = {kind: self.clock.between(marks[i, f"{kind} in"], marks[i, f"{kind} out"]) for kind in SUBLAYERS}
            total = self.clock.between(marks[i, "in"], marks[i, "out"])
            over = (total - sum(took.values())) / 2
            self.layers.append({kind: seconds + over for kind, seconds in took.items()})
            self.rest -= total


def measure(handle: ModelHandle, dtype: str, batch: int, length: int, phase: str) -> LatencyTable:
    """The table of a model's units at one shape of input, on its device. Loads no weights.

    Args:
        dtype: that its weights have once they are loaded.
        length: tokens of the prompt (prefill), or before the token (decode; the passes of the rounds come on top).
    Cost: ROUNDS + WARM passes of a model of each width and of three shorter ones; memory of ENOUGH_BYTES a width.
    """
    layout, decode, as_type = handle.layout, phase == "decode", getattr(torch, dtype)
    kinds = layout.kinds(handle.config)
    n = min(handle.n_layers, max(len(kinds), math.ceil(ENOUGH_BYTES / (handle.layer_params * as_type.itemsize))))
    hosts = list(range(n)) if n == handle.n_layers else [list(kinds)[i % len(kinds)] for i in range(n)]
    of = {i: host for host, layers in kinds.items() for i in layers}
    clock = Clock(handle.device)
    models = {channels: Model(handle, random_model(handle, hosts, channels, as_type), clock, batch, length, decode)
              for channels in _widths(handle)}
    wide = max(models)
    full = models[wide]
    shorter = [Model(handle, _shorter(handle, full.model, k), clock, batch, length, decode)
               for k in sorted({max(1, round(part * n)) for part in PARTS})]
    plain = Model(handle, full.model, clock, batch, length, decode)
    seen: dict[tuple[int, int, str], list[float]] = {}
    rest, wholes = list[float](), {id(m): list[float]() for m in (plain, *shorter)}
    with torch.inference_mode(), ticking(f"latency of units, {phase}", ROUNDS + WARM, "round") as tick:
        for turn in range(ROUNDS + WARM):
            turns: list[tuple[int | None, Model]] = [*models.items(), *((None, m) for m in (plain, *shorter))]
            for channels, model in turns if turn % 2 else reversed(turns):
                model.run() if channels is None else model.run_by_units()
                if turn < WARM:
                    continue
                if channels is None:
                    wholes[id(model)].append(model.whole)
                    continue
                for kind in SUBLAYERS:
                    for host in kinds:
                        some = [took[kind] for took, at in zip(model.layers, hosts, strict=True) if of[at] == host]
                        seen.setdefault((host, channels, kind), []).append(statistics.median(some))
                if model is full:
                    rest.append(model.rest)
            tick("")
    # hooks take time of their own, on a GPU above all: the units add up to a whole model that was timed without
    sums = [sum(seen[of[at], wide, kind][i] for at in hosts for kind in SUBLAYERS) + rest[i] for i in range(ROUNDS)]
    scale = statistics.median(wholes[id(plain)]) / statistics.median(sums)
    table = [Kind(layers=layers, attention=_times(seen[host, wide, "attention"], scale),
                  mlp=[Narrow(channels=channels, share=channels / wide,
                              seconds=_times(seen[host, channels, "mlp"], scale)) for channels in sorted(models)])
             for host, layers in kinds.items()]
    layer = {host: kind.attention.median + kind.mlp[-1].seconds.median for host, kind in zip(kinds, table, strict=True)}
    head = _times(rest, scale)
    checks = []
    for model in (*shorter, plain):
        k = len(layout.layers(model.model))
        checks.append(Checked(layers=k, predicted=head.median + sum(layer[of[at]] for at in hosts[:k]),
                              measured=statistics.median(wholes[id(model)])))
    return LatencyTable(
        device=device_name(handle.device), threads=torch.get_num_threads() if handle.device.type == "cpu" else None,
        dtype=dtype, batch=batch, length=length,
        phase=cast(Literal["prefill", "decode"], phase), clock=clock.kind, rounds=ROUNDS, kinds=table, rest=head,
        checks=checks)


def _times(values: Sequence[float], scale: float) -> Times:
    q1, median, q3 = (max(0.0, float(q) * scale) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return Times(median=median, q1=q1, q3=q3)


def _widths(handle: ModelHandle) -> list[int]:
    """Channels of the MLPs that are timed, ascending; only the whole one where layers cannot be narrowed."""
    wide = handle.sizes.mlp
    if handle.layout.no_width or getattr(handle.config, "layer_widths", None):
        return [wide]
    return sorted({wide, *(max(MULTIPLE, int(share * wide) // MULTIPLE * MULTIPLE) for share in SHARES[:-1])})


def random_model(handle: ModelHandle, hosts: Sequence[int], channels: int, dtype: torch.dtype) -> PreTrainedModel:
    """A model of these layers with MLPs of so many channels and random weights, on the handle's device."""
    config = handle.layout.config_of(handle.config, hosts)
    if channels != handle.sizes.mlp:
        config.intermediate_size = channels
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    random_weights(model, 0)
    for p in model.parameters():  # not `model.to(dtype)`, which would round RoPE's frequencies too
        p.data = p.data.to(dtype)
    return model.to(handle.device).eval().requires_grad_(False)


def _shorter(handle: ModelHandle, model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The lowest layers of a model as one of their own, with the same weights."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    out = copy.deepcopy(model, memo)
    path, _, name = handle.layout.layer_list.rpartition(".")
    own = handle.layout.layers(out)[:layers]
    setattr(out.get_submodule(path), name, own)
    out.config = handle.layout.config_of(model.config, range(layers))
    return out
