"""Sublayers and MLP channels against each other: what each change costs, and the cheapest set.

Letters: C channels of an MLP, K those that stay, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slm_exp.core.cache.journal import Journal
from slm_exp.core.types import CalibrationTokens
from slm_exp.engine.progress import ticking
from slm_exp.engine.ridge import eliminated, moments
from slm_exp.engine.runner import BlockRunner, Slot
from slm_exp.merging.sizes import full_shape
from slm_exp.models.base import ModelHandle
from slm_exp.search import knapsack
from slm_exp.search.inputs import journal_of
from slm_exp.search.task import PlanTask

POWER = 1.3
"""By which a price grows with the channels that go, between those that are measured."""


@dataclass(frozen=True)
class Price:
    """What changes of one layer cost: KL divergence of the predictions from the dense model's, in nats a token."""

    attention: float | None
    """Of removing it; None of the first layer's, which stays."""
    half: float
    """Of an MLP of half its width, its last projection refitted to the channels that stay."""
    least: float
    """Of the narrowest."""
    order: tuple[int, ...]
    """Channels in the order in which they go, as far as the narrowest."""

    def mlp(self, gone: int, widest: int) -> float:
        """Of an MLP without so many channels. `widest`: channels that go for half the width."""
        if gone <= widest:
            return self.half * (gone / widest) ** POWER
        more = max(self.least - self.half, 0.0)
        return self.half + more * ((gone - widest) / (len(self.order) - widest)) ** POWER


class Choice(NamedTuple):
    """What becomes of one layer."""

    layer: int
    attention: bool
    """Whether it goes."""
    channels: int
    """MLP channels that go."""


def prices(task: PlanTask, fit: CalibrationTokens, layers: range, step: int, least: int, dtype: str | None
           ) -> dict[int, Price]:
    """The price of every change of `layers`, scored on the task's tokens after fits on others.

    Every layer is kept in the store as soon as it is known.
    Args:
        fit: tokens of the fits, of no document that is scored on.
        step: channels that go at once.
        least: channels of the narrowest MLP.
        dtype: that the layers and the head of scored models run in; None is the model's own.
    Cost: two passes over the tokens of the fits, and for every layer C / step inverses in float64 and three models.
    """
    journal = Journal(journal_of(task.store, {
        "value": "joint", "model": task.handle.digest, "device": task.handle.device.type, "tokens": task.tokens.digest,
        "fit": fit.digest, "computed_in": dtype, "step": step, "least": least}))
    found: dict[int, Price] = {}
    with ticking("prices", len(layers), "layer") as tick:
        walk = _Walk(task, fit, dtype)
        for i in layers:
            if str(i) not in journal.entries:
                journal.append(str(i), walk.price(i, step, least))
            attention, half, narrowest, order = journal.entries[str(i)]
            found[i] = Price(attention, half, narrowest, tuple(order))
            tick(f"layer {i}: attention {math.nan if attention is None else attention:.3f}, half MLP {half:.3f}")
    return found


class _Walk:
    """Up the dense model, over the tokens of the fits; nothing runs for layers whose price is known."""

    def __init__(self, task: PlanTask, fit: CalibrationTokens, dtype: str | None) -> None:
        self.task, self.dtype, self.ids = task, dtype, fit.tokens_NT
        self.layout = task.handle.layout
        self.at = -1

    def price(self, i: int, step: int, least: int) -> list[Any]:
        """As `Price`, in JSON."""
        self._reach(i)
        layer, name = self.task.handle.layers[i], self.layout.mlp_out
        attention = None if i == 0 else self._divergence({i: Slot(i, without=frozenset({"attention"}))})
        sums, _ = moments(self.hooked, Slot(i), name, self.states[0], self.states[1],
                          torch.zeros(len(self.ids), dtype=torch.bool))
        weight: Any = layer.get_submodule(name).weight
        wide = weight.shape[1]
        left, order, costs = set(range(wide)), [], {}
        half = wide - step * (wide // (2 * step))
        for stay_K, map_KD in eliminated(sums.xx_CC[:wide, :wide], weight.double().T, step, least):
            order += sorted(left - set(stay_K.tolist()))
            left = set(stay_K.tolist())
            if len(stay_K) in (half, least):
                costs[len(stay_K)] = self._divergence({i: Slot(i, narrowed(self.layout, layer, stay_K, map_KD))})
        return [attention, costs[half], costs[least], order]

    def _reach(self, i: int) -> None:
        """`states`: entering layer i, and leaving it."""
        if self.at < 0:
            self.hooked = BlockRunner(self.task.handle, self.ids, torch.float32, fuse=False)
            self.plain = BlockRunner(self.task.handle, self.ids, torch.float32)
            self.states = [self.plain.embed()] * 2
        while self.at < i:
            self.at += 1
            self.states = [self.states[1], self.plain.block(Slot(self.at), self.states[1])]

    def _divergence(self, changes: Mapping[int, Slot]) -> float:
        engine = self.task.engine
        slots = tuple(changes.get(i, slot) for i, slot in enumerate(engine.dense))
        value = engine.distance(slots, "kl", self.dtype)
        return value if math.isfinite(value) else 1e9


def narrowed(layout: Any, layer: Any, stay_K: Tensor | Sequence[int], map_KD: Tensor | None = None
             ) -> dict[str, Tensor]:
    """A layer's MLP weights with some channels left, by name. `map_KD`: its last projection, where it is refitted."""
    index = torch.as_tensor(stay_K)
    out = layer.get_submodule(layout.mlp_out).weight
    new = {f"{layout.mlp_out}.weight": out[:, index] if map_KD is None else map_KD.T.to(out.dtype).contiguous()}
    for name in layout.mlp_in:
        for part, tensor in layer.get_submodule(name).named_parameters():
            new[f"{name}.{part}"] = tensor[index]
    return {name: tensor.detach() for name, tensor in new.items()}


def slots_without(handle: ModelHandle, gone: Collection[int], channels: Sequence[Sequence[int]]) -> tuple[Slot, ...]:
    """The model without the attention of some layers, with these channels left in every MLP."""
    wide = full_shape(handle.config).channels
    return tuple(Slot(i, narrowed(handle.layout, handle.layers[i], c) if len(c) < wide else {},
                      without=frozenset({"attention"} if i in gone else ())) for i, c in enumerate(channels))


def cheapest(found: Mapping[int, Price], need: float, gain: Callable[[Choice], float], step: int, wide: int
             ) -> list[Choice]:
    """The changes of least price together that gain `need` or more; prices are taken to add up.

    Args:
        gain: what a choice takes away, in the unit of `need`.
        step, wide: channels that go at once, and of a whole MLP.
    Raises ValueError: all changes together take less away.
    """
    half = wide - step * (wide // (2 * step))
    choices = [list(_choices(i, price, step, wide - half)) for i, price in found.items()]
    options = [[knapsack.Option(price, gain(choice)) for choice, price in some] for some in choices]
    taken = knapsack.cheapest(options, need)
    return [some[at][0] for some, at in zip(choices, taken, strict=True)]


def _choices(i: int, price: Price, step: int, widest: int) -> Iterator[tuple[Choice, float]]:
    for gone in range(0, len(price.order) + 1, step):
        mlp = price.mlp(gone, widest) if gone else 0.0
        yield Choice(i, False, gone), mlp
        if price.attention is not None:
            yield Choice(i, True, gone), mlp + max(price.attention, 0.0)
