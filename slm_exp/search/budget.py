"""Budgets that people have: operations or milliseconds of the compressed model, and what its parts cost. No torch.

A model costs the sum of its parts by any measure: attention and MLP of every layer, and the rest (embedding, final
norm, head). Operations follow from the sizes; milliseconds from a table measured on the device (engine/latency.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from slm_exp.core.errors import ConfigError, require
from slm_exp.core.timing import LatencyTable
from slm_exp.core.types import SUBLAYERS, BudgetReached, Kind, MergePlan
from slm_exp.models.base import ModelHandle

PHASES = ("prefill", "decode")
SLACK = 1e-6
"""Relative: the feasibility that a knapsack's solver keeps to, and more than sums in another order differ by."""

Curve = tuple[tuple[float, float], ...]
"""(share of an MLP's channels, cost), ascending from share 0 to 1; between the points it is straight."""
Part = tuple[int, Kind]
"""A layer's attention or MLP."""


@dataclass(frozen=True)
class UnitCosts:
    """What the parts of a model cost by one measure."""

    attention: tuple[float, ...]
    """Of every layer."""
    mlp: tuple[Curve, ...]
    """Of every layer, by the share of its channels."""
    rest: float
    channels: int
    """Of a whole MLP."""

    def part(self, layer: int, kind: Kind) -> float:
        return self.attention[layer] if kind == "attention" else self.mlp[layer][-1][1]

    def narrow(self, layer: int, share: float) -> float:
        """Of a layer's MLP with so many of its channels; 0 where none is left."""
        curve = self.mlp[layer]
        if share <= 0:
            return 0.0
        at = max(1, min(bisect_left(curve, share, key=lambda point: point[0]), len(curve) - 1))
        (a, low), (b, high) = curve[at - 1 : at + 1]
        return low + (high - low) * (share - a) / (b - a)

    def layer(self, layer: int) -> float:
        return sum(self.part(layer, kind) for kind in SUBLAYERS)

    @property
    def n_layers(self) -> int:
        return len(self.attention)

    @property
    def dense(self) -> float:
        return self.rest + sum(map(self.layer, range(self.n_layers)))

    def without(self, parts: Iterable[Part]) -> float:
        """Of the model that lacks these."""
        return self.dense - sum(self.part(*part) for part in parts)

    def of(self, plan: MergePlan) -> float:
        """Of a plan's model, as an engine runs it that skips removed sublayers."""
        gone = {(s.layer, s.kind) for s in plan.sublayers}
        total = self.rest
        widths = plan.width.sizes.channels if plan.width else [self.channels] * len(plan.slots)
        for at, slot in enumerate(plan.slots):
            total += 0.0 if (slot.start, "attention") in gone else self.attention[slot.start]
            if (slot.start, "mlp") not in gone:
                total += self.narrow(slot.start, widths[at] / self.channels)
        return total


@dataclass(frozen=True)
class Budget:
    """What the compressed model may cost at most."""

    field: str
    """That asks for it."""
    asked: float | str
    limit: float
    costs: UnitCosts
    show: Callable[[float], str]
    """A cost for people."""
    what: str
    """What is counted, and where."""

    def fits(self, cost: float) -> bool:
        return cost <= self.limit * (1 + SLACK)

    def layers(self, fewest: int) -> int:
        """The most layers, of their mean cost, that fit. Raises ConfigError: even `fewest` do not, or all do; names the
        nearest sizes."""
        n, costs = self.costs.n_layers, self.costs
        each = (costs.dense - costs.rest) / n
        left = max((k for k in range(fewest, n + 1) if self.fits(costs.rest + k * each)), default=None)
        self.refuse_none(costs.rest + fewest * each if left is None else None,
                         f"{fewest} of {n} layers", f"each layer is {self.show(each)}")
        assert left is not None
        return left

    def check(self, parts: Collection[Part]) -> None:
        """Refuse what cannot be met by removing all of these but one. Raises ConfigError: names the nearest."""
        least = self.costs.without(parts)
        if len(parts) == 2 * self.costs.n_layers:
            least += min(self.costs.part(*part) for part in parts)
        self.refuse_none(None if self.fits(least) else least, f"all {len(parts)} sublayers that may go removed",
                         f"a layer is {self.show(self.costs.layer(0))}")

    def refuse_none(self, least: float | None, how: str, step: str) -> None:
        """Raise ConfigError where `least` does not fit (null: it does), or where the dense model fits as it is."""
        dense = f"the dense model has {self.show(self.costs.dense)}"
        if least is not None:
            raise ConfigError(f"{self.field} = {self.asked}; expected {self.what} that can be reached. The nearest is "
                              f"{self.show(least)} ({how}); {dense}, {step}.")
        if self.fits(self.costs.dense):
            raise ConfigError(f"{self.field} = {self.asked}; expected less {self.what} than the dense model has: "
                              f"{dense}, so nothing would be removed.")

    def reached(self, plan: MergePlan) -> BudgetReached:
        """For the plan: what was asked and what its model has."""
        return BudgetReached(self.field.partition("_")[2], self.limit, self.costs.of(plan), self.costs.dense, self.what)


def flops_costs(handle: ModelHandle, length: int, phase: str) -> UnitCosts:
    """Operations of a token in a prompt of `length` tokens (prefill: half of them are seen on average) or after so many
    (decode); by `models.sizes.Sizes`, from shapes alone."""
    sizes = handle.sizes
    of = sizes.sublayer_flops((length + 1) / 2 if phase == "prefill" else length + 1)
    n = handle.n_layers
    return UnitCosts((of["attention"],) * n, (((0.0, 0.0), (1.0, of["mlp"])),) * n, sizes.head_flops(1), sizes.mlp)


def latency_costs(table: LatencyTable) -> UnitCosts:
    """Seconds of a pass, from a table that was measured."""
    attention: dict[int, float] = {}
    mlp: dict[int, Curve] = {}
    for kind in table.kinds:
        curve: Curve = ((0.0, 0.0), *((narrow.share, narrow.seconds.median) for narrow in kind.mlp))
        attention |= dict.fromkeys(kind.layers, kind.attention.median)
        mlp |= dict.fromkeys(kind.layers, curve)
    n = len(attention)
    return UnitCosts(tuple(attention[i] for i in range(n)), tuple(mlp[i] for i in range(n)), table.rest.median,
                     table.kinds[0].mlp[-1].channels)


def flops_budget(handle: ModelHandle, share: float, length: int, phase: str) -> Budget:
    """Of `method.target_flops`."""
    costs = flops_costs(handle, length, phase)
    return Budget("method.target_flops", share, share * costs.dense, costs,
                  lambda cost: f"{cost / costs.dense:.3f}",
                  f"share of the dense model's operations a token ({phase} at length {length})")


def latency_budget(asked: str, table: LatencyTable) -> Budget:
    """Of `method.target_latency`."""
    costs = latency_costs(table)
    number, percent = parse_latency(asked)
    limit = number * costs.dense if percent else number
    return Budget("method.target_latency", asked, limit, costs,
                  lambda cost: f"{1e3 * cost:.3g}ms" + (f" ({cost / costs.dense:.1%})" if percent else ""),
                  f"latency ({table.phase} at batch {table.batch}, length {table.length} on {table.device})")


def parse_latency(asked: str) -> tuple[float, bool]:
    """`20ms` -> (0.02, False), seconds; `80%` -> (0.8, True), a share of dense. Raises ConfigError: no unit, or no
    number > 0."""
    text = str(asked).strip()
    for unit, factor in (("ms", 1e-3), ("%", 1e-2)):
        if text.endswith(unit):
            try:
                number = float(text.removesuffix(unit)) * factor
            except ValueError:
                break
            if 0 < number < (1.0 if unit == "%" else float("inf")):
                return number, unit == "%"
    require(False, "method.target_latency", asked, "milliseconds (20ms), or a share of dense below 100% (80%)",
            "The unit is required.")
    raise AssertionError
