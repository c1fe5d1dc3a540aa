"""The released search as a state machine: which candidate comes next, and what a verdict does. Runs no model.

A window starts as the two layers below the protected top and grows downwards while its score passes. When it stops
passing, what had passed is committed as a group (two layers or more), and the layer that made it fail becomes the
top of the next window. Layers below the window are never touched, so positions in the model at that moment equal
original indices, and a group, once committed, is never merged again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from slm_exp.core.types import Group


def layers_key(layers: Iterable[tuple[Any, ...]]) -> str:
    """A trial model's name in a journal: `layers` are (start, stop) of original ones, and what else is done to each."""
    return json.dumps([layer[0] if layer == (layer[0], layer[0] + 1) else layer for layer in layers])


class Candidate(NamedTuple):
    """A trial model: layers low..high (inclusive) merged, the groups above merged, all others kept."""

    low: int
    high: int
    groups: tuple[Group, ...]
    """Committed, in original indices, highest first."""

    def slots(self, n_layers: int) -> tuple[Group, ...]:
        """The model's layers, bottom to top; a kept layer is a group of one."""
        out: list[Group] = []
        for group in (Group(self.low, self.high + 1), *reversed(self.groups), Group(n_layers, n_layers)):
            out += (Group(i, i + 1) for i in range(out[-1].stop if out else 0, group.start))
            out.append(group)
        return tuple(out[:-1])

    def key(self, n_layers: int) -> str:
        """What it is called in a journal of scores."""
        return layers_key(self.slots(n_layers))

    def blocks(self, n_layers: int) -> int:
        """Decoder layers to run from the dense states entering `low`: the merged one and those above it."""
        return n_layers - self.high - sum(g.stop - g.start - 1 for g in self.groups)


@dataclass(frozen=True)
class SearchState:
    """Where a search stands; every verdict gives a new state, so both verdicts can be followed."""

    low: int
    """Lowest layer of the next candidate."""
    high: int
    """Highest layer of the window. Layers low+1..high are one layer, or have passed together."""
    floor: int = 0
    """The search never merges a layer below this."""
    groups: tuple[Group, ...] = ()
    """Committed so far, highest first."""

    @classmethod
    def start(cls, n_layers: int, protect_first: int = 0, protect_last: int = 1) -> SearchState:
        """Nothing merged, the two layers below the protected last ones in question."""
        high = n_layers - 1 - protect_last
        return cls(high - 1, high, protect_first)

    @property
    def candidate(self) -> Candidate | None:
        """What to score next; None when the search is over."""
        return Candidate(self.low, self.high, self.groups) if self.low >= self.floor else None

    @property
    def open_group(self) -> Group | None:
        """Layers that have passed together and are not committed yet."""
        return Group(self.low + 1, self.high + 1) if self.high - self.low > 1 else None

    @property
    def model(self) -> Candidate | None:
        """The committed model as the candidate it once was, so its score is known; None while it is the dense one."""
        if not self.groups:
            return None
        last = self.groups[-1]
        return Candidate(last.start, last.stop - 1, self.groups[:-1])

    def accept(self) -> SearchState:
        """The candidate passed: the window takes in its lowest layer."""
        return replace(self, low=self.low - 1)

    def reject(self) -> SearchState:
        """The candidate failed: commit what passed before, go on with a window of the layer that failed. The released
        code scores that one-layer window too: the model it has just committed, which passed already."""
        return replace(self.close(), low=self.low - 1, high=self.low)

    def close(self) -> SearchState:
        """Commit the open window, if there is one."""
        group = self.open_group
        return replace(self, high=self.low + 1, groups=(*self.groups, group)) if group else self

    def replay(self, n_layers: int, threshold: float, scores: Mapping[str, float]) -> SearchState | None:
        """The end of the search from here, by known `scores` (by `Candidate.key`); None where one is missing."""
        state = self
        while candidate := state.candidate:
            score = scores.get(candidate.key(n_layers))
            if score is None:
                return None
            state = state.accept() if score > threshold else state.reject()
        return state

    def block_forwards(self, n_layers: int) -> tuple[int, int]:
        """Of a search from here on, the dense pass left out: (if every candidate passes, if none does). Either way
        every layer below the window is in question once; what passes shortens the candidates that follow."""
        spent = []
        for verdict in (SearchState.accept, SearchState.reject):
            state, blocks = self, 0
            while candidate := state.candidate:
                blocks += candidate.blocks(n_layers)
                state = verdict(state)
            spent.append(blocks)
        return spent[0], spent[1]
