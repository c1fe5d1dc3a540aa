"""The small values that flow between stages: all frozen, all to and from JSON or npz.

Letters in names: N samples, T tokens, D hidden size, L decoder layers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import truediv
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from slm_exp.core.documents import StrictValue, parse
from slm_exp.core.errors import PlanError
from slm_exp.core.files import MAX_BYTES, plain, plain_file, write_json, writing
from slm_exp.core.secrets import masked
from slm_exp.core.widths import WidthDecision

MAX_LAYERS = 10_000
"""Of any model a plan may be for."""
Kind = Literal["attention", "mlp"]
SUBLAYERS: tuple[Kind, ...] = ("attention", "mlp")
"""The two parts of a decoder layer, in the order in which they run."""
ALPHAS = (1e-6, 1e6)
"""Within which a factor of a compensation lies, and the product of all of a plan's within the square of these."""


class Group(NamedTuple):
    """Layers [start, stop) in original indices that share one slot of the compressed model."""

    start: int
    stop: int


@dataclass(frozen=True)
class Trial(StrictValue):
    """One scored candidate of a search: layers low..high (positions at that moment, inclusive)."""

    low: int
    high: int
    score: float | None
    """None where the candidate was rejected before all samples had run."""
    accepted: bool
    bound: float | None = None
    """Where there is no score: what it cannot exceed."""

    @property
    def most(self) -> float:
        """The score, or what it cannot exceed."""
        return self.score if self.score is not None else self.bound if self.bound is not None else 1.0


@dataclass(frozen=True, order=True)
class Sublayer(StrictValue):
    """The attention or the MLP of an original layer, with its norm."""

    layer: int
    kind: Kind


@dataclass(frozen=True)
class Cut(StrictValue):
    """Original layers [start, stop) that were removed or merged, or lost a sublayer."""

    start: int
    stop: int
    alpha: float
    """How much larger they would have made the residual stream."""


@dataclass(frozen=True)
class Compensation(StrictValue):
    """How the residual stream is rescaled after cuts: see search/compensation.py."""

    kind: Literal["magnitude"]
    cuts: tuple[Cut, ...]
    """Bottom to top."""


FITTED = "fitted.safetensors"


@dataclass(frozen=True)
class FittedFile(StrictValue):
    """What a merge rule fitted: a safetensors file beside the plan, with a tensor `START-STOP.NAME` for every parameter
    of a merged layer that differs from its host's (see `merging.fitted`)."""

    file: str
    """Its name in the plan's folder."""
    sha256: str

    def __post_init__(self) -> None:
        if Path(self.file).name != self.file or not self.file:
            raise PlanError(f"fitted.file = {self.file!r}; expected the name of a file beside the plan.")

    @classmethod
    def of(cls, data: bytes) -> FittedFile:
        """Held in memory until it is written beside a plan."""
        return cls(FITTED, hashlib.sha256(data).hexdigest())._from(lambda: data)

    def lies_in(self, folder: Path) -> None:
        """Say where its content is to be read from."""
        self._from((folder / self.file).read_bytes)

    def _from(self, source: Callable[[], bytes]) -> FittedFile:
        object.__setattr__(self, "_source", source)  # no field: no part of the JSON, nor of what makes two plans equal
        return self

    def read(self) -> bytes:
        """Its content. Raises PlanError: it is not there, or not what the plan was made with."""
        source = getattr(self, "_source", None)
        try:
            data: bytes = source() if source else b""
        except OSError as error:
            raise PlanError(f"fitted.file = {self.file}: it cannot be read beside the plan ({error.strerror}). Take "
                            "the folder of the run that made the plan.") from None
        if (found := hashlib.sha256(data).hexdigest()) != self.sha256:
            raise PlanError(f"fitted.file = {self.file}: sha256 {found[:16]}..., and the plan was made with "
                            f"{self.sha256[:16]}...; the layers of another plan would be built.")
        return data


@dataclass(frozen=True)
class Neighbour(StrictValue):
    """What a threshold just outside the chosen interval gives."""

    threshold: float
    n_layers: int
    final_score: float


@dataclass(frozen=True)
class SizeCost(StrictValue):
    """What a size among a path's plans costs to run, by its best plan."""

    n_layers: int
    params: int
    ratio_removed: float
    flops_per_token: float
    latency_s: float
    best_final_score: float
    threshold: tuple[float, float]


@dataclass(frozen=True)
class BudgetReached(StrictValue):
    """What a plan's model may cost, and what it costs, by operations or time."""

    measure: str
    """flops (operations a token) or latency (seconds)."""
    limit: float
    reached: float
    """By the sizes, or the table of times, of the parts that stay; removed sublayers skipped."""
    dense: float
    what: str
    """What is counted: phase, batch, length, device."""


@dataclass(frozen=True)
class Target(StrictValue):
    """The size that was requested of a plan; what does not apply is None and left out of the JSON."""

    asked: int | float | str
    """Layers, sublayers, a share of the parameters or operations, or a latency with its unit."""
    complete: bool
    """False where a budget ended the search: a better plan of this size may exist."""
    layers: int | None = None
    """Layers left."""
    sublayers: int | None = None
    """Sublayers removed."""
    threshold: float | tuple[float, float] | None = None
    """That reaches the size, or the interval of those that do."""
    neighbours: tuple[Neighbour, ...] | None = None
    sizes: tuple[SizeCost, ...] | None = None
    depth: float | None = None
    """The part that layers take of a target shared with width."""
    share: float | None = None
    """The part of the target that width takes."""
    budget: BudgetReached | None = None


@dataclass(frozen=True)
class MergePlan(StrictValue):
    """Which layers of a model are merged or removed, and how that was decided. Touches no weights.

    A layer in no group and not dropped is kept as it is.
    Raises PlanError: entries contradict each other or the number of layers.
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
    target: Target | None = None
    """Where a size was requested."""
    final_score: float | None = None
    """Compressed against dense by the run's similarity; 1 is identical."""
    sublayers: tuple[Sublayer, ...] = ()
    """Removed from layers that stay. Both of one layer: it is dropped."""
    width: WidthDecision | None = None
    """Where width was pruned."""
    compensation: Compensation | None = None
    fitted: FittedFile | None = None
    """Where the merge rule fits its layers."""
    trace: tuple[Trial, ...] = ()
    evaluations: int = 0
    block_forwards: int = 0
    """Decoder-layer forward passes over the whole calibration set, the dense pass included."""
    notes: tuple[str, ...] = ()
    """What a reader should know, e.g. that the released code would have dropped the open window."""

    def __post_init__(self) -> None:
        if not 0 < self.n_layers <= MAX_LAYERS:
            raise PlanError(f"n_layers = {self.n_layers}; expected a whole number from 1 to {MAX_LAYERS}.")
        object.__setattr__(self, "groups", tuple(sorted(Group(*g) for g in self.groups)))
        removed = set(self.sublayers)
        whole = {s.layer for s in removed if all(Sublayer(s.layer, kind) in removed for kind in SUBLAYERS)}
        object.__setattr__(self, "dropped", tuple(sorted((*self.dropped, *whole))))
        object.__setattr__(self, "sublayers", tuple(sorted(s for s in removed if s.layer not in whole)))
        taken: dict[int, str] = {}
        members = [(f"group [{g.start}, {g.stop})", range(g.start, g.stop)) for g in self.groups]
        members += [(f"dropped layer {i}", range(i, i + 1)) for i in self.dropped]
        members += [(f"layer {s.layer} without {s.kind}", range(s.layer, s.layer + 1)) for s in self.sublayers]
        for label, layers in members:
            if layers.start < 0 or layers.stop > self.n_layers or len(layers) == 0:
                raise PlanError(f"{label} lies outside a model of {self.n_layers} layers.")
            if label.startswith("group") and len(layers) < 2:
                raise PlanError(f"{label} holds one layer; a group has at least two. Leave it out of `groups`.")
            for i in layers:
                if i in taken:
                    raise PlanError(f"{label} and {taken[i]} overlap at layer {i}.")
                taken[i] = label
        if len(self.slots) == 0:
            raise PlanError(f"the plan leaves none of {self.n_layers} layers.")
        self._check_compensation()

    def _check_compensation(self) -> None:
        if self.compensation is None:
            return
        product, left = 1.0, [cut for cut in self.cuts if cut.stop < self.n_layers]
        for cut in self.compensation.cuts:
            where, (least, most) = f"compensation of layers {cut.start}..{cut.stop - 1}", ALPHAS
            product *= cut.alpha
            if not (least <= cut.alpha <= most and least**2 <= product <= most**2):
                raise PlanError(f"{where} has alpha = {cut.alpha:g}; expected a number from {least:g} to {most:g}.")
            if (cut.start, cut.stop) not in left:
                cuts = ", ".join(f"{a}..{b - 1}" for a, b in self.cuts if b < self.n_layers) or "none"
                raise PlanError(f"{where} is of no cut of this plan, or of one twice; cuts below the top: {cuts}.")
            left.remove(Group(cut.start, cut.stop))

    @property
    def slots(self) -> tuple[Group, ...]:
        """The compressed model's layers, bottom to top; a kept layer is a group of one."""
        starts = {g.start: g for g in self.groups}
        gone = {i for g in self.groups for i in range(g.start + 1, g.stop)}.union(self.dropped)
        return tuple(starts.get(i, Group(i, i + 1)) for i in range(self.n_layers) if i not in gone)

    @property
    def changes_layers(self) -> bool:
        """Whether any layer is merged, removed or loses a sublayer."""
        return bool(self.groups or self.dropped or self.sublayers)

    @property
    def runs(self) -> tuple[Group, ...]:
        """The original layers by what becomes of them: every slot's, and every run of dropped layers between."""
        out, at = [], 0
        for slot in (*self.slots, Group(self.n_layers, self.n_layers)):
            out += [run for run in (Group(at, slot.start), slot) if run.stop > run.start]
            at = slot.stop
        return tuple(out)

    @property
    def cuts(self) -> tuple[Group, ...]:
        """Runs of removed layers, merged groups, and layers that lost a sublayer; bottom to top."""
        changed = {*self.dropped, *(s.layer for s in self.sublayers)}
        return tuple(run for run in self.runs if run.stop - run.start > 1 or run.start in changed)

    @property
    def scales(self) -> tuple[float, ...]:
        """For every slot, what its layer's outputs are multiplied by: 1 without a compensation."""
        cuts = self.compensation.cuts if self.compensation else ()
        return tuple(reduce(truediv, (cut.alpha for cut in cuts if cut.stop <= slot.start), 1.0) for slot in self.slots)

    @property
    def n_layers_out(self) -> int:
        return len(self.slots)

    def effect(self) -> dict[str, Any]:
        """What the plan does to weights, without how it was found: equal effect means equal model."""
        data = self.to_json()
        out = {name: data[name] for name in ("n_layers", "groups", "dropped", "sublayers", "rule", "width")}
        if self.compensation and self.compensation.cuts:
            out["compensation"] = data["compensation"]
        if self.fitted:
            out["fitted"] = self.fitted.sha256
        return {**out, "rule": self.rule if self.groups else None}

    def to_json(self) -> dict[str, Any]:
        """The contents of plan.json."""
        out = dataclasses.asdict(self) | {"width": self.width and self.width.to_json()}
        if self.fitted is None:
            del out["fitted"]
        for trial in out["trace"]:
            if trial["bound"] is None:
                del trial["bound"]
        if self.target is not None:
            out["target"] = {name: value for name, value in out["target"].items() if value is not None}
        return plain(out)  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: Any, bare: bool = False) -> MergePlan:
        """Read a plan back. Records and plans of earlier versions are read too.

        Args:
            data: the contents of a plan.json.
            bare: `n_layers` may be absent; the plan is then for the fewest layers it can be for.
        Raises PlanError: names the field that is wrong or unknown, its value, and what was expected.
        """
        fill = bare and isinstance(data, dict) and data.get("n_layers") is None
        if isinstance(data, dict):
            data = {name: value for name, value in data.items() if value is not None}
            data = {"n_layers": MAX_LAYERS, **data} if fill else data
        try:
            width = WidthDecision.from_json(data.pop("width")) if isinstance(data, dict) and "width" in data else None
            plan = dataclasses.replace(parse(cls, data), width=width)
        except ValueError as error:
            raise PlanError(f"plan: {error}") from None
        if not fill:
            return plan
        ends = [*(g.stop for g in plan.groups), *(i + 1 for i in (*plan.dropped, *(s.layer for s in plan.sublayers)))]
        return dataclasses.replace(plan, n_layers=max(ends, default=0) + 1)

    def save(self, folder: Path) -> None:
        """Write plan.json into `folder`, atomically, and first what the merge rule fitted, if it does. Raises PlanError
        as `FittedFile.read`."""
        if self.fitted:
            with writing(folder / self.fitted.file) as tmp:
                tmp.write_bytes(self.fitted.read())
        write_json(folder / "plan.json", self.to_json())

    @classmethod
    def load(cls, folder: Path) -> MergePlan:
        plan = cls.from_json(json.loads((folder / "plan.json").read_text(encoding="utf-8")))
        if plan.fitted:
            plan.fitted.lies_in(folder)
        return plan


@dataclass(frozen=True)
class CalibrationTokens:
    """The tokens every stage sees. Equal digests mean equal calibration."""

    tokens_NT: np.ndarray
    """[N, T] int32 token ids."""
    source: str
    """Where they came from, e.g. `bundled` or a path."""
    sample_ids: tuple[str, ...] = ()
    """One per row: which document (and offset) a row was cut from."""

    def __post_init__(self) -> None:  # both may hold a file's name; drawn and read back they are the same
        object.__setattr__(self, "source", masked(self.source))
        object.__setattr__(self, "sample_ids", tuple(masked(self.sample_ids)))

    @property
    def digest(self) -> str:
        """sha256 over shape and ids, 16 hex digits."""
        ids = np.ascontiguousarray(self.tokens_NT, dtype="<i4")
        return hashlib.sha256(repr(ids.shape).encode() + ids.tobytes()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """The record's `calibration` section."""
        return {"source": self.source, "sample_ids": list(self.sample_ids), "digest": self.digest,
                "shape": list(self.tokens_NT.shape)}

    def save(self, folder: Path) -> None:
        """Write calibration_tokens.npy (ids) and calibration.json (source, sample ids, digest)."""
        with writing(folder / "calibration_tokens.npy") as tmp, open(tmp, "wb") as f:
            np.save(f, self.tokens_NT.astype("<i4"), allow_pickle=False)
        write_json(folder / "calibration.json", self.describe())

    @classmethod
    def load(cls, folder: Path) -> CalibrationTokens:
        about = json.loads((folder / "calibration.json").read_text())
        return cls(np.load(folder / "calibration_tokens.npy"), about["source"], tuple(about["sample_ids"]))


@dataclass(frozen=True)
class LayerSimilarity:
    """The similarity of every pair of layers' outputs (CKA over pre-norm block outputs)."""

    matrix_LL: np.ndarray
    """[L, L] float32, symmetric, 1 on the diagonal."""
    kernel: str
    estimator: str
    skip_first_token: bool
    batch: int

    def save(self, folder: Path) -> None:
        """Write similarity.npz."""
        with writing(folder / "similarity.npz") as tmp, open(tmp, "wb") as f:
            np.savez(f, matrix=self.matrix_LL.astype("float32"), kernel=self.kernel, estimator=self.estimator,
                     skip_first_token=self.skip_first_token, batch=self.batch)

    @classmethod
    def load(cls, folder: Path) -> LayerSimilarity:
        path = folder / "similarity.npz"
        with zipfile.ZipFile(plain_file(path)) as packed:
            if (size := sum(part.file_size for part in packed.infolist())) > MAX_BYTES:
                raise ValueError(f"it would unpack to {size:,} bytes")
        with np.load(path, allow_pickle=False) as z:
            return cls(z["matrix"], str(z["kernel"]), str(z["estimator"]), bool(z["skip_first_token"]), int(z["batch"]))
