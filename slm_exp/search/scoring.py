"""Scores of candidates: hidden states enter from the one dense pass, only the window and the layers above run."""

from __future__ import annotations

import json
from functools import cached_property
from typing import TYPE_CHECKING

from slm_exp.core.cache.journal import Journal
from slm_exp.core.types import Group
from slm_exp.engine.runner import BlockRunner, Slot
from slm_exp.search.refit import Refits

if TYPE_CHECKING:
    from torch import Tensor

    from slm_exp.search.state import Candidate
    from slm_exp.search.task import PlanTask
    from slm_exp.similarity.base import Scorer


def merged_slot(task: PlanTask, group: Group) -> Slot:
    """The layer that a group becomes by the task's rule; a group of one is the layer itself."""
    if group.stop - group.start == 1:
        return Slot(group.start)
    merged = task.rule.merge(task.handle.layout, list(task.handle.layers[group.start : group.stop]))
    return Slot(group.start + merged.host, merged.weights)


class CandidateScorer:
    """Scores trial models against the dense one without building them, none twice.

    Scores are kept in the task's store as they come: a killed search goes on where it was, and searches with other
    thresholds, of this process or another, find them. Weights load when the first score is missing.

    Memory: the dense states entering layers 0..top ([N, T, D] each), one merged layer, and the states in work.
    """

    def __init__(self, task: PlanTask, top: int) -> None:
        """`top`: the highest layer a window may start at; the states above it are not kept."""
        self.task = task
        self.top = top
        self.asked: set[tuple[Candidate, str | None]] = set()
        """What has been scored here, and in which dtype."""
        self._refits = Refits(task)
        self._journals: dict[str | None, Journal] = {}
        self._runners: dict[str | None, BlockRunner] = {}

    @property
    def block_forwards(self) -> int:
        """Decoder-layer passes that the scores asked for take, the dense pass included.

        Counted as if none had been in the store: the cost of a search is a property of the search.
        """
        n_layers = self.task.handle.n_layers
        forwards = n_layers + sum(candidate.blocks(n_layers) for candidate, _ in self.asked)
        if self.task.similarity.after:
            cuts = {(c.low, c.high + 1) for c, _ in self.asked} | {tuple(g) for c, _ in self.asked for g in c.groups}
            forwards += self._refits.block_forwards(len(cuts))
        return forwards

    def score(self, candidate: Candidate, dtype: str | None = None) -> float:
        """The candidate's score. Cost: `candidate.blocks(L)` block forwards, in `dtype` where one is given."""
        self.asked.add((candidate, dtype))
        journal = self._journal(dtype)
        key = json.dumps([candidate.low, candidate.high, candidate.groups])
        if key not in journal.entries:
            journal.append(key, self._compute(candidate, dtype))
        return float(journal.entries[key])

    def _compute(self, candidate: Candidate, dtype: str | None) -> float:
        states, against = self._dense
        runner = self._runner(dtype)
        h_NTD = states[candidate.low]
        window = Group(candidate.low, candidate.high + 1)
        for group in (window, *candidate.above(self.task.handle.n_layers)):
            # a merged layer is combined again each time it runs: a twentieth of running it, and nothing to keep
            h_NTD = runner.block(self._slot(group), h_NTD)
        return against(self._runner(None).finish(h_NTD))

    def _slot(self, group: Group) -> Slot:
        slot = merged_slot(self.task, group)
        if self.task.similarity.after is None or group.stop - group.start == 1:
            return slot
        named = Slot(slot.host, merged=group, refit=(group.start, group.stop))
        return Slot(slot.host, self._refits.weights(named, slot.weights))

    @cached_property
    def _dense(self) -> tuple[list[Tensor], Scorer]:
        """The states entering layers 0..top, and the score against the dense model's last state. L block forwards."""
        runner = self._runner(None)
        h_NTD = runner.embed()
        states = [h_NTD]
        for i in range(self.task.handle.n_layers):
            h_NTD = runner.block(Slot(i), h_NTD)
            if i < self.top:
                states.append(h_NTD)
        return states, self.task.similarity.against(runner.finish(h_NTD), self.task.kernel)

    def _runner(self, dtype: str | None) -> BlockRunner:
        import torch

        if dtype not in self._runners:
            as_type = None if dtype is None else getattr(torch, dtype)
            self._runners[dtype] = BlockRunner(self.task.handle, self.task.tokens.tokens_NT, as_type)
        return self._runners[dtype]

    def _journal(self, dtype: str | None) -> Journal:
        """Scores of this model, tokens, rule and similarity, as far as the store has them."""
        if dtype not in self._journals:
            task = self.task
            score: dict[str, object] = {"similarity": task.similarity.name}
            if task.similarity.uses_kernel():
                score = {"similarity": task.similarity.identity(), "kernel": task.kernel.identity()}
            inputs = {
                **score,
                **self._refits.identity(),
                "model": task.handle.digest,
                "device": task.handle.device.type,
                "tokens": task.tokens.digest,
                "rule": task.rule.identity(),
                "computed_in": dtype,
            }
            folder = task.store.folder
            self._journals[dtype] = Journal(folder and folder / "scores" / task.store.key("scores", inputs))
        return self._journals[dtype]
