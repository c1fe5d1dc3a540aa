"""The small values that flow between stages: all frozen, all to and from JSON or npz.

Letters in names: N samples, T tokens, D hidden size, L decoder layers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slm_exp.core.errors import PlanError
from slm_exp.core.widths import WidthDecision

if TYPE_CHECKING:
    import numpy as np


SUBLAYERS = ("attention", "mlp")
"""The halves of a decoder layer, in the order in which they run."""


class Group(NamedTuple):
    """Layers [start, stop) in original indices that share one slot of the compressed model."""

    start: int
    stop: int


@dataclass(frozen=True)
class Trial:
    """One scored candidate of a search: layers low..high (positions at that moment, inclusive)."""

    low: int
    high: int
    score: float
    accepted: bool


@dataclass(frozen=True)
class MergePlan:
    """Which layers of a model are merged or removed, and how that was decided. Touches no weights.

    A layer in no group and not dropped is kept as it is.
    """

    n_layers: int
    """Layers of the dense model."""
    groups: tuple[Group, ...] = ()
    """Half-open, in original indices, ascending, disjoint, more than one layer each."""
    dropped: tuple[int, ...] = ()
    """Original indices of layers removed, not merged."""
    method: str = ""
    rule: str = ""
    similarity: str = ""
    threshold: float | None = None
    target: dict[str, Any] | None = None
    """`{asked, complete}` when a size was asked for."""
    final_score: float | None = None
    """Compressed against dense by the similarity asked; 1 is identical."""
    sublayers: tuple[dict[str, Any], ...] = ()
    """`{layer, kind}`, kind `attention` or `mlp`: halves of layers removed. Both of one layer: it is dropped."""
    width: WidthDecision | None = None
    """When width was pruned."""
    compensation: dict[str, Any] | None = None
    """`{kind, cuts: [{start, stop, alpha}]}` when the stream is rescaled behind cuts: see merging/compensation.py."""
    trace: tuple[Trial, ...] = ()
    evaluations: int = 0
    block_forwards: int = 0
    """Decoder-layer forward passes over the whole calibration set, the dense pass included."""
    notes: tuple[str, ...] = ()
    """What a reader should know, e.g. that the released code would have dropped the open window."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(sorted(Group(*g) for g in self.groups)))
        try:
            halves = {(int(half["layer"]), str(half["kind"])) for half in self.sublayers}
        except (KeyError, TypeError, ValueError):
            raise PlanError(f"sublayers = {list(self.sublayers)}; expected {{layer, kind}} for each.") from None
        whole = {layer for layer, _ in halves if all((layer, kind) in halves for kind in SUBLAYERS)}
        object.__setattr__(self, "dropped", tuple(sorted((*self.dropped, *whole))))
        halves = {half for half in halves if half[0] not in whole}
        object.__setattr__(self, "sublayers", tuple({"layer": i, "kind": kind} for i, kind in sorted(halves)))
        taken: dict[int, str] = {}
        members = [(f"group [{g.start}, {g.stop})", range(g.start, g.stop)) for g in self.groups]
        members += [(f"dropped layer {i}", range(i, i + 1)) for i in self.dropped]
        members += [(f"layer {i} without {kind}", range(i, i + 1)) for i, kind in sorted(halves)]
        for label, layers in members:
            if layers.start < 0 or layers.stop > self.n_layers or len(layers) == 0:
                raise PlanError(f"{label} lies outside a model of {self.n_layers} layers.")
            if label.startswith("group") and len(layers) < 2:
                raise PlanError(f"{label} holds one layer; a group has at least two. Leave it out of `groups`.")
            for i in layers:
                if i in taken:
                    raise PlanError(f"{label} and {taken[i]} overlap at layer {i}.")
                taken[i] = label
        for _, kind in halves:
            if kind not in SUBLAYERS:
                raise PlanError(f"sublayers has kind {kind!r}; known: {', '.join(SUBLAYERS)}.")
        about = self.compensation or {"kind": "magnitude"}
        cuts = about.get("cuts", ())
        if about.get("kind") != "magnitude" or not all({"start", "stop", "alpha"} <= set(cut) for cut in cuts):
            raise PlanError(f"compensation = {about}; expected {{kind: magnitude, cuts: [{{start, stop, alpha}}]}}.")
        for cut in cuts:
            if not 0 < cut["alpha"] < float("inf"):
                raise PlanError(f"compensation of layers {cut['start']}..{cut['stop'] - 1} has alpha = {cut['alpha']}; "
                                "expected a number above 0.")
        if len(self.slots) == 0:
            raise PlanError(f"the plan leaves none of {self.n_layers} layers.")

    @property
    def slots(self) -> tuple[Group, ...]:
        """The compressed model's layers, bottom to top; a kept layer is a group of one."""
        starts = {g.start: g for g in self.groups}
        inside = {i for g in self.groups for i in range(g.start + 1, g.stop)}
        gone = inside.union(self.dropped)
        return tuple(starts.get(i, Group(i, i + 1)) for i in range(self.n_layers) if i not in gone)

    @property
    def n_layers_out(self) -> int:
        return len(self.slots)

    def effect(self) -> dict[str, Any]:
        """What the plan does to weights, without how it was found: equal effect means equal model."""
        return {
            "n_layers": self.n_layers,
            "groups": [list(g) for g in self.groups],
            "dropped": list(self.dropped),
            "sublayers": [dict(s) for s in self.sublayers],
            "rule": self.rule if self.groups else None,
            "width": self.width.to_json() if self.width else None,
            **({"compensation": self.compensation} if (self.compensation or {}).get("cuts") else {}),
        }

    def to_json(self) -> dict[str, Any]:
        """The contents of plan.json."""
        out = dataclasses.asdict(self)
        out["width"] = self.width.to_json() if self.width else None
        out["groups"] = [list(g) for g in self.groups]
        for name in ("dropped", "sublayers", "trace", "notes"):
            out[name] = list(out[name])
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MergePlan:
        """Read a plan back; groups, dropped and rule suffice, unknown keys are refused by name."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise PlanError(f"plan has unknown fields {', '.join(unknown)}; known: {', '.join(sorted(known))}.")
        if "n_layers" not in data:
            raise PlanError("plan has no n_layers.")
        data = dict(data)
        data["width"] = None if data.get("width") is None else WidthDecision.from_json(data["width"])
        data["trace"] = tuple(Trial(**t) for t in data.get("trace", ()))
        for name in ("groups", "dropped", "sublayers", "notes"):
            data[name] = tuple(data.get(name) or ())
        return cls(**data)

    def save(self, folder: Path) -> None:
        """Write plan.json into `folder`, atomically."""
        from slm_exp.core.files import write_json

        write_json(folder / "plan.json", self.to_json())

    @classmethod
    def load(cls, folder: Path) -> MergePlan:
        return cls.from_json(json.loads((folder / "plan.json").read_text()))


@dataclass(frozen=True)
class CalibrationTokens:
    """The tokens every stage sees. Equal digests mean equal calibration."""

    tokens_NT: np.ndarray
    """[N, T] int32 token ids."""
    source: str
    """Where they came from, e.g. `bundled` or a path."""
    sample_ids: tuple[str, ...] = ()
    """One per row: which document (and offset) a row was cut from."""

    @property
    def digest(self) -> str:
        """sha256 over shape and ids, 16 hex digits."""
        import numpy as np

        ids = np.ascontiguousarray(self.tokens_NT, dtype="<i4")
        return hashlib.sha256(repr(ids.shape).encode() + ids.tobytes()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """The record's `calibration` section."""
        return {"source": self.source, "sample_ids": list(self.sample_ids), "digest": self.digest,
                "shape": list(self.tokens_NT.shape)}

    def save(self, folder: Path) -> None:
        """Write calibration_tokens.npy (ids) and calibration.json (source, sample ids, digest)."""
        import numpy as np

        from slm_exp.core.files import write_json, writing

        with writing(folder / "calibration_tokens.npy") as tmp:
            with open(tmp, "wb") as f:
                np.save(f, self.tokens_NT.astype("<i4"), allow_pickle=False)
        write_json(folder / "calibration.json", self.describe())

    @classmethod
    def load(cls, folder: Path) -> CalibrationTokens:
        import numpy as np

        about = json.loads((folder / "calibration.json").read_text())
        ids = np.load(folder / "calibration_tokens.npy", allow_pickle=False)
        return cls(ids, about["source"], tuple(about["sample_ids"]))


@dataclass(frozen=True)
class LayerSimilarity:
    """How alike every pair of layers' outputs is (CKA over pre-norm block outputs)."""

    matrix_LL: np.ndarray
    """[L, L] float32, symmetric, 1 on the diagonal; higher is more alike."""
    kernel: str
    estimator: str
    skip_first_token: bool
    batch: int

    def save(self, folder: Path) -> None:
        """Write similarity.npz."""
        import numpy as np

        from slm_exp.core.files import writing

        with writing(folder / "similarity.npz") as tmp:
            with open(tmp, "wb") as f:
                np.savez(f, matrix=self.matrix_LL.astype("float32"), kernel=self.kernel, estimator=self.estimator,
                         skip_first_token=self.skip_first_token, batch=self.batch)

    @classmethod
    def load(cls, folder: Path) -> LayerSimilarity:
        import numpy as np

        with np.load(folder / "similarity.npz", allow_pickle=False) as z:
            return cls(z["matrix"], str(z["kernel"]), str(z["estimator"]), bool(z["skip_first_token"]), int(z["batch"]))
