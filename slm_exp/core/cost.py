"""What a stage has to compute, by what it is fast or slow at: how components report their own cost."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

ADAM_BYTES = 16
"""Memory of a trained parameter: itself, its gradient and two moments in float32."""
EAGER = 512
"""Tokens up to which plain attention, there and back, is faster on a CPU than the fused one; it keeps its scores."""


def activations(rows: int, seq_len: int, layers: float, hidden: int, heads: int, recomputed: bool) -> float:
    """Bytes that a step of training keeps for its way back, about: 34 float32 numbers for every channel of the stream,
    and 10 bytes for every attention score. A layer of Llama's kind with LoRA kept 29 and 5.5, and freed space is not
    all used again. Autocast to bfloat16 changes little: what it casts is kept both ways.

    Args:
        rows: sequences at once.
        recomputed: whether every layer is computed again on the way back.
    """
    layer = rows * seq_len * (34 * 4 * hidden + 10 * heads * seq_len * (seq_len <= EAGER))
    return layer + layers * rows * seq_len * 4 * hidden if recomputed else layers * layer


def normal_equations(inputs: int, outputs: int, judged: float) -> float:
    """Bytes of a ridge regression in float64, about: the sums over all tokens, two changes beside them, and the
    `judged` tokens, or sums over these where there are more of them than inputs."""
    return 8 * inputs * (inputs + 3 * outputs) + min(8 * inputs, 4 * judged) * (inputs + outputs)


@dataclass(frozen=True)
class Work:
    """What a stage computes, by what it is fast or slow at."""

    blocks: float = 0
    """Operations in decoder layers."""
    head: float = 0
    """Operations in the output head."""
    wide: float = 0
    """Operations in float64."""
    moved: float = 0
    """Bytes read or written on disk."""
    read: float = 0
    """Bytes read from memory, where nothing else takes as long: generation."""
    starts: float = 0
    """Processes that import torch and transformers."""
    harness: float = 0
    """Imports of lm-eval and data sets."""
    fixed: float = 0
    """Seconds that depend on nothing here."""

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> Work:
        return Work(*(getattr(self, f.name) * times for f in fields(self)))

    @property
    def flops(self) -> float:
        return self.blocks + self.head + self.wide


@dataclass(frozen=True)
class Count:
    """A number of things, where it is a guess or a bound with the reason."""

    blocks: float
    """Block forwards over the whole calibration set."""
    heads: float = 0
    """Passes of the head over it."""
    scores: float = 1
    """Comparisons with the dense model's last state."""
    note: str = ""
    reads: float | None = None
    """Layers read from their files, where candidates share passes over them; null: one for every block forward."""


class Tokens(NamedTuple):
    """The calibration set's shape."""

    n: int
    t: int

    @property
    def total(self) -> int:
        return self.n * self.t
