"""Values of models with layers merged, left out or halved, without building them: only what changed is run.

Every depth baseline that scores candidates stands on this. A candidate starts from the states of the longest prefix
it shares with the base: the dense model, or whatever a greedy method has committed to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from slm_exp.core.cache.journal import Journal
from slm_exp.engine.runner import BlockRunner, Slot
from slm_exp.engine.vocabulary import mean_loss
from slm_exp.merging.compensation import scaled_outputs, scales
from slm_exp.search.refit import Refits, with_refits
from slm_exp.search.scoring import merged_slot

if TYPE_CHECKING:
    from torch import Tensor

    from slm_exp.core.types import MergePlan
    from slm_exp.merging.rules.base import MergeRule
    from slm_exp.search.task import PlanTask
    from slm_exp.similarity.base import Scorer

Slots = tuple[Slot, ...]


def slots_of(plan: MergePlan, rule: MergeRule) -> Slots:
    """The layers of the model that a plan makes, bottom to top. Touches no weights: `ReducedModels` does."""
    top = rule.attention_from == "top"
    halves = {(s["layer"], s["kind"]) for s in plan.sublayers}
    return tuple(
        Slot(group.stop - 1 if top else group.start, merged=group, scale=scale)
        if group.stop - group.start > 1
        else Slot(group.start, without=frozenset(kind for layer, kind in halves if layer == group.start), scale=scale)
        for group, scale in zip(plan.slots, scales(plan), strict=True)
    )


class ReducedModels:
    """Values of reduced models over the calibration tokens, none computed twice.

    Values are kept in the task's store as they come: a killed search goes on where it was, and other methods and
    runs find them. Weights load when the first value is missing.

    Memory: the dense states ([N, T, D] for every layer), those of the base where they differ, and the states in work.
    """

    def __init__(self, task: PlanTask) -> None:
        self.task = task
        self.dense: Slots = tuple(Slot(i) for i in range(task.handle.n_layers))
        """The dense model."""
        self._base = self.dense
        self._states: list[Tensor] | None = None  # entering the base's slots, as far as they are known
        self._values: dict[tuple[str, Slots], float] = {}
        self._unnamed = 0
        self._journals: dict[str, Journal] = {}
        self._refits = Refits(task)
        self._cost = _Cost(self.dense)

    @property
    def evaluations(self) -> int:
        """Distinct models that a value was asked of."""
        return len({slots for _, slots in self._values}) + self._unnamed

    @property
    def block_forwards(self) -> int:
        """Decoder-layer passes that the values asked for take, the dense pass and the commits included.

        A layer that lacks a half counts one half, and the total is rounded up. The head is not counted (a loss over
        SmolLM2's vocabulary takes as long as eight layers). Counted as if nothing had been in the store: the cost of
        a search is a property of the search.
        """
        refits = len(self._cost.refits)
        return math.ceil(self._cost.spent) + (self._refits.block_forwards(refits) if refits else 0)

    @cached_property
    def dense_states(self) -> list[Tensor]:
        """The states entering layers 0..L-1 and the last layer's output, before the final norm: L + 1 of [N, T, D].

        Cost: L block forwards, once.
        """
        states = [self.runner.embed()]
        for slot in self.dense:
            states.append(self.runner.block(slot, states[-1]))
        return states

    @cached_property
    def runner(self) -> BlockRunner:
        """Runs single layers over the calibration set. Weights load here. What is run directly is not counted."""
        return BlockRunner(self.task.handle, self.task.tokens.tokens_NT)

    def score(self, slots: Sequence[Slot]) -> float:
        """The model against the dense one by the task's similarity, after the final norm; 1 is identical."""
        return self.measure(slots, "score", lambda last_NTD: self._against(last_NTD))

    def loss(self, slots: Sequence[Slot]) -> float:
        """Mean next-token cross entropy in nats over the calibration tokens; infinite where it is not a number."""
        return self.measure(slots, "loss", lambda last_NTD: mean_loss(self.runner, last_NTD))

    def measure(self, slots: Sequence[Slot], name: str, of: Callable[[Tensor], float]) -> float:
        """Any value of the model's last hidden state (after the final norm, [N, T, D]).

        With `similarity.after` it is that of the model with the layer beside each cut refitted.

        Args:
            slots: the model's layers, bottom to top. A model with `Slot.weights` has no name to remember its value by
                (one with `Slot.merged` has): it is computed at every call.
            name: what the value is; values of one name are remembered together.
            of: computes it. Not finite counts as infinite.
        Cost: one block forward for every slot above the longest prefix shared with the base.
        """
        slots = self._as_run(slots)
        if any(slot.weights for slot in slots):
            self._cost.ask(slots)
            self._unnamed += 1
            return of(self._last_state(slots))
        if (name, slots) not in self._values:
            self._cost.ask(slots)
            journal, key = self._journal(name), self._key(slots)
            if key not in journal.entries:
                value = of(self._last_state(slots))
                journal.append(key, value if math.isfinite(value) else None)
            kept = journal.entries[key]
            self._values[name, slots] = math.inf if kept is None else float(kept)
        return self._values[name, slots]

    def commit(self, slots: Sequence[Slot]) -> None:
        """Make this model the base whose states are reused. Its layers run when a candidate needs their output."""
        slots = self._as_run(slots)
        if self._states is not None:
            del self._states[shared(self._base, slots) + 1 :]
        self._base = slots
        self._cost.commit(slots)

    def _as_run(self, slots: Sequence[Slot]) -> Slots:
        return with_refits(tuple(slots), len(self.dense)) if self.task.similarity.after else tuple(slots)

    def _last_state(self, slots: Slots) -> Tensor:
        prefix = shared(self._base, slots)
        if self._states is None:
            self._states = self.dense_states[: shared(self.dense, self._base) + 1]
        while len(self._states) <= prefix:
            self._states.append(self.block(self._base[len(self._states) - 1], self._states[-1]))
        h_NTD = self._states[prefix]
        for slot in slots[prefix:]:
            h_NTD = self.block(slot, h_NTD)
        return self.runner.finish(h_NTD)

    def block(self, slot: Slot, h_NTD: Tensor) -> Tensor:
        """One layer on any states, merged and scaled as it runs: [N, T, D] -> [N, T, D]. Not counted."""
        weights = merged_slot(self.task, slot.merged).weights if slot.merged else slot.weights
        if slot.scale != 1:
            layout, layer = self.task.handle.layout, self.task.handle.layers[slot.host]
            weights = {**weights, **scaled_outputs(layout, layer, weights, slot.scale)}
        if slot.refit:
            weights = self._refits.weights(slot, weights)
        return self.runner.block(Slot(slot.host, weights, without=slot.without), h_NTD)

    @cached_property
    def _against(self) -> Scorer:
        return self.task.similarity.against(self.runner.finish(self.dense_states[-1]), self.task.kernel)

    def _key(self, slots: Slots) -> str:
        """A model's layers as text. The rule counts only where something is merged."""
        layers = [[s.host, s.merged and list(s.merged), s.scale, *sorted(s.without)] for s in slots]
        return json.dumps([layers, self.task.rule.identity()] if any(s.merged for s in slots) else [layers])

    def _journal(self, name: str) -> Journal:
        """Values of one name for this model and these tokens, as far as the store has them."""
        if name not in self._journals:
            task = self.task
            inputs: dict[str, Any] = {
                "of": f"reduced:{name}",
                "model": task.handle.digest,
                "device": task.handle.device.type,
                "tokens": task.tokens.digest,
                **self._refits.identity(),
            }
            if name == "score":
                inputs |= {"similarity": task.similarity.name}
                if task.similarity.uses_kernel():
                    inputs |= {"similarity": task.similarity.identity(), "kernel": task.kernel.identity()}
            folder = task.store.folder
            self._journals[name] = Journal(folder and folder / "scores" / task.store.key("scores", inputs))
        return self._journals[name]


def shared(a: Slots, b: Slots) -> int:
    """How many slots two models have in common from the bottom up. Replaced weights are alike if they are the same."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y or x.weights is not y.weights), min(len(a), len(b)))


def blocks(slots: Slots) -> float:
    """Block forwards of running these layers: one each, one half where a half is left out."""
    return sum(1 - len(slot.without) / 2 for slot in slots)


class _Cost:
    """Block forwards of the values asked for, whether or not they had to be run."""

    def __init__(self, dense: Slots) -> None:
        self.base, self.known = dense, len(dense)  # slots of the base whose output is known
        self.spent = blocks(dense)
        self.refits: set[Slot] = set()

    def ask(self, slots: Slots) -> None:
        prefix = shared(self.base, slots)
        self.spent += blocks(self.base[self.known : prefix]) + blocks(slots[prefix:])
        self.known = max(self.known, prefix)
        self.refits.update(slot for slot in slots if slot.refit)

    def commit(self, slots: Slots) -> None:
        self.known = min(self.known, shared(self.base, slots))
        self.base = slots
