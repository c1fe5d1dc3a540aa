"""What the units of a model take on one device: a table of times, measured once and kept in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from slm_exp.core.documents import Document
from slm_exp.core.files import digest, write_json

FILE = "latency.json"
ROUNDS, WARM = 16, 2
"""Passes that every time is the median of, and those before them that do not count."""


class Times(Document, allow_inf_nan=False):
    """Some timings, in seconds."""

    median: float
    q1: float
    q3: float
    """Quartiles: the spread over rounds."""


class Narrow(Document, allow_inf_nan=False):
    """An MLP of one width."""

    channels: int
    share: float
    """Of all its channels."""
    seconds: Times


class Kind(Document, allow_inf_nan=False):
    """A layer of one kind: those that the config tells apart, e.g. by their attention."""

    layers: list[int]
    """That are of it."""
    attention: Times
    """With its norm, and the sum with the stream."""
    mlp: list[Narrow]
    """Likewise, by width, ascending; the last is the whole."""


class Checked(Document, allow_inf_nan=False):
    """A whole model, as the table predicts it and as it was measured between the rounds."""

    layers: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Of the prediction, relative."""
        return self.predicted / self.measured - 1


class LatencyTable(Document, allow_inf_nan=False):
    """Times of the units of one model, at one shape of input, on one device."""

    device: str
    """Its name."""
    threads: int | None
    """On a CPU."""
    dtype: str
    batch: int
    length: int
    phase: Literal["prefill", "decode"]
    clock: str
    """What the seconds are of."""
    rounds: int
    """In each of which every width has its turn."""
    kinds: list[Kind]
    rest: Times
    """Embedding, final norm and head."""
    checks: list[Checked]

    @property
    def digest(self) -> str:
        """Plans that a target in milliseconds decides depend on it."""
        return digest(self.model_dump())

    @property
    def spread(self) -> float:
        """Distance of the quartiles of a whole layer, relative to the median, of the kind with the largest."""
        return max((k.attention.q3 - k.attention.q1 + k.mlp[-1].seconds.q3 - k.mlp[-1].seconds.q1)
                   / (k.attention.median + k.mlp[-1].seconds.median) for k in self.kinds)

    def describe(self) -> str:
        """One line: what it is of, and how far its predictions were from whole models."""
        errors = ", ".join(f"{c.error:+.1%} at {c.layers} layers" for c in self.checks)
        threads = f", {self.threads} threads" if self.threads else ""
        return (f"latency of {self.phase} at batch {self.batch}, length {self.length}, {self.dtype} on {self.device}"
                f"{threads} ({self.clock}): spread of a layer {self.spread:.1%}, predictions of whole models {errors}")

    def save(self, folder: Path) -> None:
        write_json(folder / FILE, self.model_dump())

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls.model_validate_json((folder / FILE).read_bytes())
