"""`similarity.after=reconstruct`: a candidate is scored as it is after the layer beside each of its cuts is refitted.

The core of `recovery=reconstruct`: the layer's `down_proj` (its `o_proj`, where it lost the MLP), once, by ridge
regression in float64, fitted on the dense stream that enters the layer, not on that of a model recovered so far: so a
refit depends on one cut alone and is computed once for all candidates that have it. Fitted and scored on disjoint
tokens: a score on those of the fit would reward overfitting.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from slm_exp.core.types import CalibrationTokens
from slm_exp.engine.ridge import changed, held_out, inputs_of, moments, ridge_step
from slm_exp.engine.runner import Slot
from slm_exp.models.streaming import shells
from slm_exp.search.fitting import Fits, disjoint
from slm_exp.search.inputs import SearchInputs
from slm_exp.similarity.base import KEPT_BYTES

log = logging.getLogger(__name__)

RIDGES = [1e-3, 1e-2, 1e-1, 1.0, 10.0]


def with_refits(slots: tuple[Slot, ...], n_layers: int) -> tuple[Slot, ...]:
    """A model's slots, those beside a cut marked with the dense layers [start, stop) whose work they take over."""
    starts = [slot.merged.start if slot.merged else slot.host for slot in slots]
    starts[:1] = [0]  # what is removed at the very bottom, the lowest layer left takes over
    ends = [*starts[1:], n_layers]
    return tuple(replace(slot, refit=(start, end)) if end - start > 1 or slot.without else slot
                 for slot, start, end in zip(slots, starts, ends, strict=True))


def note(task: SearchInputs) -> tuple[str, ...]:
    """What a plan says of its scores."""
    if task.similarity.after is None:
        return ()
    return ("scores are of models refitted beside their cuts (similarity.after=reconstruct), by tokens of their own; "
            "the plan itself refits nothing: recovery=reconstruct does.",)


class Refits(Fits):
    """Refitted weights by cut, none computed twice while there is room.

    Memory: as `Fits`, and KEPT_BYTES.
    """

    def __init__(self, task: SearchInputs) -> None:
        super().__init__(task)
        self._kept: OrderedDict[Slot, dict[str, Tensor]] = OrderedDict()

    @cached_property
    def tokens(self) -> CalibrationTokens:
        """Those to fit on. Raises DataError: they are too few, or share text with those that are scored on."""
        task = self.task
        return disjoint(task.similarity.fit_source().draw(task.handle, task.seed, task.tokens), task.tokens,
                        "similarity.after=reconstruct", "similarity.fit_path")

    @property
    def digest(self) -> str | None:
        """Of the tokens to fit on; None where nothing is refitted."""
        return None if self.task.similarity.after is None else self.tokens.digest

    def block_forwards(self, refits: int) -> int:
        """Of so many refits and the dense pass they need, in passes over the tokens that are scored on."""
        if not refits:
            return 0
        share = self.tokens.tokens_NT.size / self.task.tokens.tokens_NT.size
        return math.ceil(share * (self.task.handle.n_layers + refits))

    def weights(self, slot: Slot, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All parameters of a marked slot's layer that differ from its module's own. `weights`: those that differ
        without a refit. Cost: one block forward over the fitting tokens, and the normal equations of one projection."""
        if slot not in self._kept:
            room = KEPT_BYTES
            for old in reversed([*self._kept]):
                room -= sum(t.numel() * t.element_size() for t in self._kept[old].values())
                if room < 0:
                    del self._kept[old]
            self._kept[slot] = self.fit(slot, weights)
        self._kept.move_to_end(slot)
        return {**weights, **self._kept[slot]}

    def fit(self, slot: Slot, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `weights` gives beyond those given, computed anew."""
        assert slot.refit is not None
        (start, end), states, handle = slot.refit, self.states, self.task.handle
        left = [m for kind in ("mlp", "attention") if kind not in slot.without for m in handle.layout.fitted[kind]]
        if not left:  # experts alone, which no regression changes
            return {}
        module = left[0]
        plain = Slot(slot.host, weights, without=slot.without)
        fit, held = moments(self.runner, plain, module, states[start], states[end], held_out(len(states[0])))
        step = ridge_step(fit, held, RIDGES)
        with torch.inference_mode():
            return changed(handle.layout, handle.layers[slot.host], module, weights, step[0]) if step else {}

    @cached_property
    def states(self) -> list[Tensor]:
        layout = self.task.handle.layout
        (module,) = layout.fitted["mlp"] or layout.fitted["attention"]
        inputs = inputs_of(shells(self.task.handle.layers)[0].get_submodule(module))
        if self.tokens.tokens_NT.size < 2 * inputs:
            log.warning("similarity.after=reconstruct fits %d inputs on %d tokens; several times as many tokens are "
                        "better (similarity.fit_samples, similarity.fit_seq_len).", inputs, self.tokens.tokens_NT.size)
        return super().states
