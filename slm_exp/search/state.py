"""The released search as a state machine: which candidate comes next, and what a verdict does. Runs no model.

A window starts as the two layers below the protected top and grows downwards while its score passes. When it stops
passing, what had passed is committed as a group (two layers or more), and the layer that made it fail becomes the
top of the next window. Layers below the window are never touched, so positions in the model at that moment equal
original indices, and a group, once committed, is never merged again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from slm_exp.core.types import Group


class Candidate(NamedTuple):
    """A trial model: layers low..high (inclusive) merged, the groups above merged, all others kept."""

    low: int
    high: int
    groups: tuple[Group, ...]
    """Committed, in original indices, highest first."""

    def above(self, n_layers: int) -> tuple[Group, ...]:
        """The slots above the window, bottom to top; a kept layer is a group of one."""
        out: list[Group] = []
        i = self.high + 1
        for group in reversed(self.groups):
            out += (Group(j, j + 1) for j in range(i, group.start))
            out.append(group)
            i = group.stop
        return (*out, *(Group(j, j + 1) for j in range(i, n_layers)))

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
        """The candidate failed: commit what passed before, go on with a window of the layer that failed.

        The released code scores that one-layer window too: the model it has just committed, which passed already.
        """
        return replace(self.close(), low=self.low - 1, high=self.low)

    def close(self) -> SearchState:
        """Commit the open window, if there is one."""
        if self.open_group is None:
            return self
        return replace(self, high=self.low + 1, groups=(*self.groups, self.open_group))
