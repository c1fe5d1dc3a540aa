"""Requests as trees of tokens: what several of them begin with is one path, computed once.

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
    """Sequences that begin alike. Node 0 is the first token; a node's number is higher than its parent's."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    """Where a node's token stands in its sequences, from 0."""
    branches: list[Branch] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    paths: list[np.ndarray] = field(default_factory=list)
    """For each request, the nodes of its tokens."""

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, request: Request, shared: int) -> None:
        """Add a request whose first `shared` tokens are those of the request added before."""
        start, stop = len(self), len(self) + len(request.tokens) - shared
        trunk = self.paths[-1][:shared] if shared else np.empty(0, dtype=np.int64)
        self.tokens += request.tokens[shared:]
        self.positions += range(shared, len(request.tokens))
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


def grow(requests: Sequence[Request]) -> list[Tree]:
    """Trees that hold every request once, longest first.

    In sorted order a request shares most with the one before it. It joins that one's tree when the tokens saved
    outweigh the attention of a longer row (a few common first words do not pay, a context does).
    """
    trees: list[Tree] = []
    before: tuple[int, ...] = ()
    for request in sorted(requests, key=lambda r: r.tokens):
        shared = common_prefix(before, request.tokens)
        if not trees or not _pays(len(trees[-1]), len(request.tokens), shared):
            trees.append(Tree())
            shared = 0
        trees[-1].add(request, shared)
        before = request.tokens
    return sorted(trees, key=len, reverse=True)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens are equal."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def _pays(tree: int, length: int, shared: int) -> bool:
    """Whether a sequence costs less as a branch of a tree than as a row of its own."""
    new = length - shared
    more_pairs = (tree + new) ** 2 - tree**2 - length**2
    return tree + new <= max(MAX_NODES, 2 * length) and shared * PAIRS_PER_TOKEN > more_pairs
