"""Requests as trees of tokens: what several of them begin with is one path, computed once.

What many trees would begin with, as the examples before every question of a task, is their trunk: its keys and values
are computed once and stand before the nodes of each.

Letters: T nodes of a tree (padded to the longest of a batch), B trees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

MAX_NODES = 4096
"""Trees of short sequences stop growing here: a mask has the square of it."""
PAIRS_PER_TOKEN = 1000
"""Attention over this many (query, key) pairs costs about as much as a token's matrix products.

SmolLM2-135M: 3,000 by operations, and attention does a third as many a second. Larger models have more.
"""
TRUNK = 64
"""Tokens that sequences share at least before they may have a trunk."""
TRUNK_COST = 200
"""What a trunk costs besides its tokens, in tokens: passes of its own, and batches that only its trees can fill."""


class Request(NamedTuple):
    """One sequence that a model reads, and the tokens it should predict at the end of it."""

    owner: int
    """Whose result this is; several requests may share one."""
    tokens: tuple[int, ...]
    """What is read: at least one token, at least as many as there are targets."""
    targets: tuple[int, ...]
    """The i-th last target is predicted by the i-th last token."""


@dataclass
class Branch:
    """The nodes one request added to a tree, start <= node < stop, and all nodes it continues."""

    start: int
    stop: int
    trunk: np.ndarray
    """Nodes from the root to where it branches off."""


@dataclass
class Tree:
    """Sequences that begin alike. Node 0 is the first token after the trunk; parents have lower numbers."""

    trunk: tuple[int, ...] = ()
    """What stands before node 0 in every sequence, computed elsewhere and seen by every node."""
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    """Where a node's token stands in its sequences, trunk included, from 0."""
    branches: list[Branch] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    paths: list[np.ndarray] = field(default_factory=list)
    """For each request, the nodes of its tokens after the trunk."""

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, request: Request, shared: int) -> None:
        """Add a request whose first `shared` tokens after the trunk are those of the request added before."""
        tokens, before = request.tokens[len(self.trunk) :], len(self.trunk)
        start, stop = len(self), len(self) + len(tokens) - shared
        trunk = self.paths[-1][:shared] if shared else np.empty(0, dtype=np.int64)
        self.tokens += tokens[shared:]
        self.positions += range(before + shared, before + len(tokens))
        self.requests.append(request)
        self.paths.append(np.concatenate([trunk, np.arange(start, stop)]))
        if stop > start:
            self.branches.append(Branch(start, stop, trunk))

    def visible(self, size: int) -> np.ndarray:
        """[size, size] bool: which nodes (columns) a node (row) sees: its ancestors and itself. Padding sees itself."""
        out_TT = np.eye(size, dtype=bool)
        for branch in self.branches:
            rows = slice(branch.start, branch.stop)
            out_TT[rows, branch.trunk] = True
            out_TT[rows, rows] = np.tri(branch.stop - branch.start, dtype=bool)
        return out_TT

    def predictions(self) -> list[tuple[int, np.ndarray, tuple[int, ...]]]:
        """(owner, the nodes that predict, what they should predict) of every request."""
        return [(r.owner, path[len(path) - len(r.targets) :], r.targets)
                for r, path in zip(self.requests, self.paths, strict=True)]  # fmt: skip


def grow(requests: Sequence[Request], trunks: bool = True) -> list[Tree]:
    """Trees that hold every request once; those of one trunk stand together, longest first, and so do the others.

    Requests that begin alike get a trunk where that costs less than trees that begin with it.
    """
    rows = sorted(requests, key=lambda r: r.tokens)
    kinds: list[list[Tree]] = []
    others: list[Request] = []
    for place, shared in alike([r.tokens for r in rows]) if trunks else [(slice(None), 0)] * bool(rows):
        some = rows[place]
        length = min(shared, *(len(r.tokens) - len(r.targets) for r in some))  # what predicts stands in the trees
        if length >= TRUNK:
            trees = _grow(some, some[0].tokens[:length])
            if TRUNK_COST + length + length**2 / PAIRS_PER_TOKEN + _cost(trees) < _cost(_grow(some)):
                kinds.append(sorted(trees, key=len, reverse=True))
                continue
        others += some
    kinds.append(sorted(_grow(others), key=len, reverse=True))
    kinds = sorted(filter(None, kinds), key=lambda kind: -len(kind[0]) - len(kind[0].trunk))
    return [tree for kind in kinds for tree in kind]


def alike(rows: Sequence[tuple[int, ...]]) -> list[tuple[slice, int]]:
    """(which of these sorted sequences, how many first tokens they share): neighbours that share TRUNK or more."""
    out: list[tuple[slice, int]] = []
    start, shared = 0, 0
    for i, row in enumerate(rows):
        common = common_prefix(rows[i - 1], row) if i > start else len(row)
        if i > start and common < TRUNK:
            out.append((slice(start, i), shared))
            start, common = i, len(row)
        shared = common if i == start else min(shared, common)
    return [*out, (slice(start, len(rows)), shared)] if rows else []


def _grow(rows: Sequence[Request], trunk: tuple[int, ...] = ()) -> list[Tree]:
    """Trees of sorted requests that all begin with a trunk.

    In sorted order a request shares most with the one before it. It joins that one's tree when the tokens saved
    outweigh the attention of a longer row (a few common first words do not pay, a context does).
    """
    trees: list[Tree] = []
    before: tuple[int, ...] = ()
    for request in rows:
        shared = common_prefix(before, request.tokens) - len(trunk)
        if not trees or not _pays(len(trees[-1]), len(request.tokens) - len(trunk), shared):
            trees.append(Tree(trunk))
            shared = 0
        trees[-1].add(request, shared)
        before = request.tokens
    return trees


def _cost(trees: Sequence[Tree]) -> float:
    """What trees cost after their trunk, in tokens."""
    return sum(len(t) + len(t) * (len(t) + len(t.trunk)) / PAIRS_PER_TOKEN for t in trees)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens of two tuples are equal, by halving: comparing slices costs no Python loop over tokens."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _pays(tree: int, length: int, shared: int) -> bool:
    """Whether a sequence costs less as a branch of a tree than as a row of its own."""
    new = length - shared
    more_pairs = (tree + new) ** 2 - tree**2 - length**2
    return tree + new <= max(MAX_NODES, 2 * length) and shared * PAIRS_PER_TOKEN > more_pairs
