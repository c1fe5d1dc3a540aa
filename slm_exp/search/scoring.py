"""Values of trial models with layers merged, left out or halved, without building them: only what changed is run.

The sliding search, the exact path and every baseline that scores candidates stand on this one engine. A trial model
starts from the states of the longest prefix it shares with the base: the dense model, or what a greedy method has
committed to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from slm_exp.core.cache.journal import Journal
from slm_exp.core.types import Group, MergePlan
from slm_exp.engine.gradients import Gradient, layer_gradients
from slm_exp.engine.runner import BlockRunner, Slot
from slm_exp.engine.vocabulary import mean_loss, prediction_distance, squared_distance
from slm_exp.merging.rules.base import MergeRule
from slm_exp.merging.sharing import scaled_outputs
from slm_exp.models.streaming import in_order, parameter, shells
from slm_exp.search.early import PARTS, Bounded, Samples
from slm_exp.search.fitting import Windows
from slm_exp.search.inputs import SearchInputs, journal_inputs, journal_of
from slm_exp.search.refit import Refits, with_refits
from slm_exp.search.state import Candidate, layers_key
from slm_exp.similarity.base import MeanScorer, Scorer

TOGETHER_BYTES = 1 << 30
"""States of models that share a pass over the file of a streamed one."""

Slots = tuple[Slot, ...]
Model = Candidate | MergePlan | Sequence[Slot]


def slot_of(group: Group, rule: MergeRule) -> Slot:
    """The layer that a group becomes, yet to be merged; a group of one is the layer itself."""
    if group.stop - group.start == 1:
        return Slot(group.start)
    return Slot(group.stop - 1 if rule.attention_from == "top" else group.start, merged=group)


def slots_of(plan: MergePlan, rule: MergeRule) -> Slots:
    """The layers of the model that a plan makes, bottom to top. Touches no weights: the engine does."""
    gone = {group: frozenset(s.kind for s in plan.sublayers if s.layer == group.start) for group in plan.slots}
    return tuple(replace(slot_of(group, rule), scale=scale, without=gone[group])
                 for group, scale in zip(plan.slots, plan.scales, strict=True))


class ScoringEngine:
    """Values of trial models over the calibration tokens, none computed twice.

    Values are kept in the task's store as they come: a killed search goes on where it was, and other methods and runs
    find them. Weights load when the first value is missing.
    Memory: the dense states ([N, T, D] for every layer, or up to `top`), those of the base where they differ, one
    merged layer, and the states in work.
    """

    def __init__(self, task: SearchInputs, top: int | None = None) -> None:
        """`top`: every model changes this layer or one below it, so states that enter higher ones are not kept."""
        self.task = task
        self.n_layers = task.handle.n_layers
        self.dense: Slots = tuple(Slot(i) for i in range(self.n_layers))
        """The dense model."""
        self._top = self.n_layers if top is None else top
        self._base = self.dense
        self._states: list[Tensor] | None = None  # entering the base's slots, as far as they are known
        self._values: dict[tuple[str, str | None, Slots], float] = {}
        self._unnamed = 0
        self._journals: dict[tuple[str, str | None, bool], Journal] = {}
        self._runners: dict[str | None, BlockRunner] = {}
        self._refits, self._windows = Refits(task), Windows(task)
        self._samples = Samples(task.tokens, 1 if task.handle.streamed else PARTS)
        self._cost = _Cost(self.dense)

    @property
    def evaluations(self) -> int:
        """Distinct models, and dtypes, that a value was requested of."""
        return len({(dtype, slots) for _, dtype, slots in self._values}.union(self._samples.requested)) + self._unnamed

    @property
    def block_forwards(self) -> int:
        """Decoder-layer passes that the requested values take, the dense pass and the commits included. A layer that
        lacks a sublayer counts one half, one that runs on some of the samples their share, and the total is rounded up;
        the head is not counted. Counted as if nothing had been in the store: the cost of a search is a property of the
        search."""
        more = self._windows.block_forwards(len(self._cost.merged)) if self.task.rule.fits else 0
        return math.ceil(self._cost.spent - 1e-6) + self._refits.block_forwards(len(self._cost.refits)) + more

    @property
    def dense_states(self) -> list[Tensor]:
        """The states entering layers 0..L-1 and the last layer's output, before the final norm: L + 1 of [N, T, D].
        Cost: L block forwards, once."""
        assert self._top == self.n_layers, "this engine does not keep them all"
        return self._dense_pass

    @cached_property
    def _dense_pass(self) -> list[Tensor]:
        """The dense states up to the one entering layer `top`; where that leaves the last one out, it is compared with
        here and not kept."""
        h_NTD = self.runner.embed()
        states = [h_NTD]
        for i, slot in enumerate(self.dense):
            h_NTD = self.runner.block(slot, h_NTD)
            if i < self._top:
                states.append(h_NTD)
        if self._top < self.n_layers:
            self._against = self._scorer(h_NTD)
        return states

    @cached_property
    def _against(self) -> Scorer:
        return self._scorer(self.dense_states[-1])

    def _scorer(self, last_NTD: Tensor) -> Scorer:
        return self.task.similarity.against(self.runner.finish(last_NTD), self.task.kernel)

    @property
    def runner(self) -> BlockRunner:
        """Runs single layers over the calibration set. Weights load here. What is run directly is not counted."""
        return self._runner(None)

    def _runner(self, dtype: str | None) -> BlockRunner:
        if dtype not in self._runners:
            as_type = None if dtype is None else getattr(torch, dtype)
            self._runners[dtype] = BlockRunner(self.task.handle, self.task.tokens.tokens_NT, as_type)
        return self._runners[dtype]

    def score(self, model: Model, dtype: str | None = None) -> float:
        """The model against the dense one by the task's similarity, after the final norm; 1 is identical. `dtype`: its
        layers run in this one instead of the model's own, e.g. `bfloat16`."""
        return self.measure(model, "score", lambda last_NTD: self._against(last_NTD), dtype)

    def bounded(self, model: Model, threshold: float, dtype: str | None = None) -> Bounded:
        """`score`, or, as soon as that is certain to be `threshold` or less, a bound on it. Only where the similarity
        is `by_sample`. Cost: that of `score`, or of the samples that had to run; merged layers are combined once."""
        slots = self._slots(model)
        journal, key = self._entry("samples", slots, dtype)
        ready: list[Slot] = []

        def run(rows: list[int]) -> list[float]:
            if self.task.handle.streamed:  # all samples: its layers cost more to read than to run
                def keep(last_NTD: Tensor) -> float:
                    found.extend(self._each(last_NTD, rows))
                    return 0.0

                found: list[float] = []
                self.compute(slots, keep, dtype)
                return found
            prefix, runner = shared(self._base, slots), self._runner(dtype)
            states = self._extended(prefix)
            ready.extend([] if ready else map(self._ready, slots[prefix:]))
            h_BTD = states[prefix][torch.as_tensor(rows, device=states[prefix].device)]
            for slot in ready:
                h_BTD = runner.block(slot, h_BTD)
            return self._each(runner.finish(h_BTD), rows)

        return self._samples.bounded((dtype, slots), threshold, journal, key, run,
                                     lambda share: self._cost.ask(slots, share))

    def _each(self, last_BTD: Tensor, rows: list[int]) -> list[float]:
        assert isinstance(self._against, MeanScorer), "the similarity is not by_sample"
        return self._against.each(last_BTD, torch.as_tensor(rows)).tolist()  # type: ignore[no-any-return]

    def loss(self, model: Model) -> float:
        """Mean next-token cross entropy in nats over the calibration tokens; infinite where it is not a number."""
        return next(self.losses([model]))

    def distance(self, model: Model, kind: str, dtype: str | None = None) -> float:
        """How far its predictions are from the dense model's, see `engine.vocabulary.prediction_distance`; or with
        `squared` its last hidden states, see `squared_distance`. `dtype`: as in `score`, and of the head."""
        return self.measure(model, kind, lambda h_NTD: self._apart(h_NTD, kind, dtype), dtype)

    def _apart(self, last_NTD: Tensor, kind: str, dtype: str | None = None) -> float:
        if kind == "squared":
            return squared_distance(self._dense_last, last_NTD)
        return prediction_distance(self._runner(dtype), self._dense_last, last_NTD, kind)

    def losses(self, models: Sequence[Model]) -> Iterator[float]:
        """Of each, see `loss`; of a streamed model in few passes over its file."""
        return self._measures(models, "loss", lambda last_NTD: mean_loss(self.runner, last_NTD))

    def distances(self, models: Sequence[Model], kind: str) -> Iterator[float]:
        """How far each is from the dense model, see `distance`."""
        return self._measures(models, kind, lambda h_NTD: self._apart(h_NTD, kind))

    def foresee(self, models: Sequence[Model]) -> None:
        """These will be scored: where the model is streamed, all of them in one pass over its file."""
        self._together(models, "score", lambda last_NTD: self._against(last_NTD))

    @cached_property
    def _dense_last(self) -> Tensor:
        """After the final norm."""
        return self.runner.finish(self.dense_states[-1])

    def gradients(self) -> Iterator[tuple[int, dict[str, Gradient]]]:
        """See `engine.gradients.layer_gradients`. Not counted."""
        return layer_gradients(self.runner, self.dense_states)

    def measure(self, model: Model, name: str, of: Callable[[Tensor], float], dtype: str | None = None) -> float:
        """Any value of the model's last hidden state (after the final norm, [N, T, D]).

        With `similarity.after` it is that of the model with the layer beside each cut refitted.
        Args:
            model: one of slots, bottom to top, with `Slot.weights` has no name to remember its value by (one with
                `Slot.merged` has): it is computed at every call.
            name: what the value is; values of one name are remembered together.
            of: computes it. Not finite counts as infinite.
        Cost: one block forward for every slot above the longest prefix shared with the base.
        """
        slots = self._slots(model)
        if any(slot.weights for slot in slots):
            self._cost.ask(slots)
            self._unnamed += 1
            return self.compute(slots, of, dtype)
        if (name, dtype, slots) not in self._values:
            self._cost.ask(slots)
            entries, key = self._entry(name, slots, dtype)
            if key not in entries.entries:
                value = self.compute(slots, of, dtype)
                entries.append(key, value if math.isfinite(value) else None)
            kept = entries.entries[key]
            self._values[name, dtype, slots] = math.inf if kept is None else float(kept)
        return self._values[name, dtype, slots]

    def _measures(self, models: Sequence[Model], name: str, of: Callable[[Tensor], float]) -> Iterator[float]:
        self._together(models, name, of)
        return (self.measure(model, name, of) for model in models)

    def _together(self, models: Sequence[Model], name: str, of: Callable[[Tensor], float]) -> None:
        """Put the values of streamed models into the journal, as many in a pass over the file as memory takes.

        Every layer is read once for all of them, and for the base's own states where those are not known. What this
        computes is counted when it is asked for, as ever.
        """
        if not self.task.handle.streamed:
            return
        missing = [slots for slots in dict.fromkeys(map(self._slots, models)) if not any(s.weights for s in slots)]
        missing = [slots for slots in missing if (entry := self._entry(name, slots))[1] not in entry[0].entries]
        states = self._known_states()
        at_once = max(2, TOGETHER_BYTES // (states[0].numel() * states[0].element_size()))
        for some in (missing[i : i + at_once] for i in range(0, len(missing), at_once)):
            if len(some) > 1:
                for slots, last_NTD in zip(some, self._last_states(some), strict=True):
                    entries, key = self._entry(name, slots)
                    value = of(self.runner.finish(last_NTD))
                    entries.append(key, value if math.isfinite(value) else None)

    def _last_states(self, models: Sequence[Slots]) -> list[Tensor]:
        """The output of the last layer of each, before the final norm; every layer is asked for once."""
        states, prefixes = self._known_states(), [shared(self._base, slots) for slots in models]
        left = [list(slots[prefix:]) for slots, prefix in zip(models, prefixes, strict=True)]
        base = list(self._base[len(states) - 1 : max(prefixes)])
        h: list[Tensor | None] = [None] * len(models)
        hosts = sorted({slot.host for slots in (base, *left) for slot in slots})
        with in_order(self.task.handle.layers, hosts):
            for host in hosts:
                for n, slots in enumerate(left):
                    if slots and slots[0].host == host:
                        entering = h[n] if h[n] is not None else states[prefixes[n]]
                        assert entering is not None
                        h[n] = self.block(slots.pop(0), entering)
                if base and base[0].host == host:
                    states.append(self.block(base.pop(0), states[-1]))
        return [h[n] if h[n] is not None else states[prefixes[n]] for n in range(len(models))]  # type: ignore[misc]

    def commit(self, model: Model) -> None:
        """Make this model the base whose states are reused. Its layers run when a candidate needs their output."""
        slots = self._slots(model)
        if self._states is not None:
            del self._states[shared(self._base, slots) + 1 :]
        self._base = slots
        self._cost.commit(slots)

    def block(self, slot: Slot, h_NTD: Tensor, dtype: str | None = None) -> Tensor:
        """One layer on any states, merged, scaled and refitted as it runs: [N, T, D] -> [N, T, D]. Not counted. A
        merged layer is combined again each time it runs: a twentieth of running it, and nothing to keep."""
        return self._runner(dtype).block(self._ready(slot), h_NTD)

    def _ready(self, slot: Slot) -> Slot:
        """A slot with the weights that it runs with."""
        weights, handle = slot.weights, self.task.handle
        if slot.merged and self.task.rule.fits:
            weights = self._windows.weights(slot.merged)
        elif slot.merged:
            start, layers = slot.merged.start, handle.layers
            layers[slot.host]  # streamed: first, so that what the rule takes from it is not read twice
            weights = self.task.rule.merge(handle.layout, shells(layers)[slice(*slot.merged)],
                                           (lambda k, name: parameter(layers, start + k, name)) if handle.streamed
                                           else None).weights
        if slot.scale != 1:
            weights = {**weights, **scaled_outputs(handle.layout, handle.layers[slot.host], weights, slot.scale)}
        if slot.refit:
            weights = self._refits.weights(slot, weights)
        return Slot(slot.host, weights, without=slot.without)

    def _slots(self, model: Model) -> Slots:
        if isinstance(model, Candidate):
            slots = tuple(slot_of(group, self.task.rule) for group in model.slots(self.n_layers))
        else:
            slots = slots_of(model, self.task.rule) if isinstance(model, MergePlan) else tuple(model)
        return with_refits(slots, self.n_layers) if self.task.similarity.after else slots

    def compute(self, slots: Slots, of: Callable[[Tensor], float], dtype: str | None) -> float:
        """Run a model for one value of its last hidden state: what is done where nothing has it yet. Not counted."""
        prefix = shared(self._base, slots)
        below = self._base[len(self._known_states()) - 1 : prefix]
        with in_order(self.task.handle.layers, [slot.host for slot in (*below, *slots[prefix:])]):
            h_NTD = self._extended(prefix)[prefix]
            for slot in slots[prefix:]:
                h_NTD = self.block(slot, h_NTD, dtype)
        return of(self.runner.finish(h_NTD))

    def _extended(self, prefix: int) -> list[Tensor]:
        """The states entering the base's slots, at least as far as the one after so many of them."""
        states = self._known_states()
        while len(states) <= prefix:
            states.append(self.block(self._base[len(states) - 1], states[-1]))
        return states

    def _known_states(self) -> list[Tensor]:
        """The states entering the base's slots, as far as they are known."""
        if self._states is None:
            self._states = self._dense_pass[: shared(self.dense, self._base) + 1]
        return self._states

    def _entry(self, name: str, slots: Slots, dtype: str | None = None) -> tuple[Journal, str]:
        """Where a value is kept, and under which key."""
        return self._journal(name, dtype, any(s.merged for s in slots)), entry_key(slots)

    def _journal(self, name: str, dtype: str | None, merges: bool) -> Journal:
        """Values of one name for this model and these tokens, as far as the store has them."""
        if (name, dtype, merges) not in self._journals:
            task = self.task
            inputs = journal_inputs(name, model=task.handle.digest, device=task.handle.device.type, dtype=dtype,
                                    tokens=task.tokens.digest, similarity=task.similarity, kernel=task.kernel,
                                    rule=task.rule if merges else None, fit=self._refits.digest,
                                    fitted=self._windows.digest if merges else None)
            self._journals[name, dtype, merges] = Journal(journal_of(task.store, inputs))
        return self._journals[name, dtype, merges]


def entry_key(slots: Slots) -> str:
    """What a model is called in a journal; that of a candidate is `Candidate.key`."""
    more = ((s.scale, *sorted(s.without)) if s.without or s.scale != 1 else () for s in slots)
    return layers_key((*(s.merged or (s.host, s.host + 1)), *rest) for s, rest in zip(slots, more, strict=True))


def shared(a: Slots, b: Slots) -> int:
    """How many slots two models have in common from the bottom up. Replaced weights must be the same object."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y or x.weights is not y.weights), min(len(a), len(b)))


def blocks(slots: Slots) -> float:
    """Block forwards of running these layers: one each, one half where a sublayer is left out."""
    return sum(1 - len(slot.without) / 2 for slot in slots)


class _Cost:
    """Block forwards of the requested values, whether or not they had to be run."""

    def __init__(self, dense: Slots) -> None:
        self.base, self.known = dense, len(dense)  # slots of the base whose output is known
        self.spent = blocks(dense)
        self.refits: set[Slot] = set()
        self.merged: set[Group] = set()

    def ask(self, slots: Slots, share: float = 1.0) -> None:
        """`share`: of the samples."""
        prefix = shared(self.base, slots)
        self.spent += blocks(self.base[self.known : prefix]) + share * blocks(slots[prefix:])
        self.known = max(self.known, prefix)
        self.refits.update(slot for slot in slots if slot.refit)
        self.merged.update(slot.merged for slot in slots if slot.merged)

    def commit(self, slots: Slots) -> None:
        self.known = min(self.known, shared(self.base, slots))
        self.base = slots
