"""What of a run the stage cache already has, told by walking the pipeline with keys instead of values.

Keys are built exactly as the stages build them. Where an input's digest is not known (weights never seen here, tokens
not drawn yet, a plan not searched yet) a stage is a certain miss if no current entry agrees with what is known, and
otherwise cannot be told.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_exp.core.cache import journal
from slm_exp.core.cache.store import StageStore
from slm_exp.core.errors import SlmError
from slm_exp.core.files import digest, plain
from slm_exp.core.types import CalibrationTokens, MergePlan
from slm_exp.forecast.shapes import UNKNOWN, Sketch
from slm_exp.merging.surgery import apply_plan

if TYPE_CHECKING:
    from slm_exp.models.base import ModelHandle
    from slm_exp.pipeline.config import RunConfig

CACHED, SHARED, COMPUTE, MAYBE, NOTHING = "cached", "shared", "compute", "unknown", "-"
STATES = {
    CACHED: "its result is in the stage cache",
    SHARED: "an earlier job of this grid computes it",
    COMPUTE: "has to be computed",
    MAYBE: "cannot be told here; counted as computed",
    NOTHING: "nothing to do",
}


class Lookup:
    """The cache folder, asked by key, and what the jobs asked about so far will have put there."""

    def __init__(self, folder: Path | None) -> None:
        self.store = StageStore(folder)
        self.coming: set[str] = set()
        self._entries: dict[str, list[dict[str, Any]]] = {}

    def state(self, stage: str, inputs: dict[str, Any]) -> tuple[str, Path | None]:
        """CACHED with the entry's folder, SHARED, COMPUTE or MAYBE; a result that is to come is remembered."""
        folder = self.store.folder
        name = digest({"stage": stage, "inputs": inputs})
        if folder is None:
            return COMPUTE, None
        open_ended = any(_unknown(v) for v in inputs.values())
        if not open_ended:
            entry = folder / stage / self.store.key(stage, inputs)
            if (entry / "manifest.json").is_file():
                return CACHED, entry
        if name in self.coming:
            return SHARED, None
        self.coming.add(name)
        return (MAYBE if open_ended and self._could_be(stage, inputs) else COMPUTE), None

    def _could_be(self, stage: str, inputs: dict[str, Any]) -> bool:
        """Whether some current entry agrees with every input that is known."""
        known = {k: plain(v) for k, v in inputs.items() if not _unknown(v)}
        return any(all(entry.get(k) == v for k, v in known.items()) for entry in self._current(stage))

    def _current(self, stage: str) -> list[dict[str, Any]]:
        """Inputs of the entries that today's code and libraries would use."""
        if stage not in self._entries:
            found: list[dict[str, Any]] = []
            for manifest in (self.store.folder or Path()).glob(f"{stage}/[!.]*/manifest.json"):
                try:
                    inputs = json.loads(manifest.read_text(encoding="utf-8"))["inputs"]
                except (OSError, ValueError, KeyError):
                    continue
                if self.store.key(stage, inputs) == manifest.parent.name:
                    found.append(inputs)
            self._entries[stage] = found
        return self._entries[stage]


def _unknown(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(UNKNOWN)


@dataclass
class Outline:
    """How a run would go, stage by stage."""

    stages: dict[str, str] = field(default_factory=dict)
    """Stage -> one of STATES, in the pipeline's order."""
    plan: MergePlan | None = None
    """Where the cache, a plan file or known scores tell it."""
    plan_from: str = ""
    """How it is known."""
    scored: int = 0
    """Candidates of a threshold search whose scores are in the cache."""
    tokens: CalibrationTokens | None = None


def outline(cfg: RunConfig, model: Sketch, device_type: str, lookup: Lookup, save_model: bool) -> Outline:
    """Walk the pipeline (see pipeline.py) with digests. Opens no weights and computes nothing."""
    out = Outline()
    dense = model.digest
    key = {"model": dense, "dtype": cfg.model.dtype, "device": device_type}

    inputs: dict[str, Any] = {"source": cfg.calibration.identity(), "seed": cfg.seed, "tokenizer": dense}
    out.stages["calibrate"], entry = lookup.state("calibrate", inputs)
    out.tokens = _tokens(cfg, model, entry)
    tokens = out.tokens.digest if out.tokens else f"{UNKNOWN}{digest(inputs)}"

    out.stages["similarity"], _ = lookup.state("similarity", {**key, "tokens": tokens, **cfg.matrix_identity()})
    measures = bool(cfg.evaluation.tasks or cfg.evaluation.corpora)
    measured = cfg.evaluation.measured_by()
    dense_state = lookup.state("evaluate", {**key, **measured})[0]
    out.stages["evaluate_dense"] = dense_state if measures else NOTHING

    start = dense
    if cfg.width.prunes and cfg.width.order == "before":
        out.stages["width"] = COMPUTE if lookup.store.folder is None else MAYBE
        start = f"{UNKNOWN}{digest([dense, cfg.width.identity(), tokens])}"
    method = cfg.method
    if model.handle is not None and cfg.width.order == "after":  # depth may have a part of the target only
        method = cfg.width.depth_method(method, model.handle, model.handle)
    decides = cfg.plan_identity() | {"method": method.identity()}
    inputs = {**key, "model": start, "tokens": tokens, **decides, "seed": cfg.seed}
    out.stages["plan"], entry = lookup.state("plan", inputs)
    _find_plan(out, cfg, model, start, device_type, tokens, lookup, entry)

    compressed: ModelHandle | None = None
    if out.plan is not None and model.handle is not None:
        compressed = _applied(cfg, model.handle, out.plan)
    result = compressed.digest if compressed else f"{UNKNOWN}{digest(inputs)}{cfg.merge_rule.name}"
    out.stages["merge"] = COMPUTE
    if out.plan is not None and not out.plan.groups and not out.plan.dropped and not out.plan.sublayers:
        out.stages["merge"] = NOTHING
    if cfg.width.prunes and cfg.width.order == "after":
        out.stages["width"] = MAYBE if lookup.store.folder else COMPUTE
        if out.plan is not None and getattr(cfg.width, "share", None) is None:
            asked = {**key, "model": result, "tokens": tokens, "width": cfg.width.identity(),
                     "ratio": cfg.width.ratio_for(cfg.method, compressed, compressed),  # type: ignore[arg-type]
                     "slots": out.plan.slots, "seed": cfg.seed}  # fmt: skip
            out.stages["width"], _ = lookup.state("width", asked)
        result = f"{UNKNOWN}{digest([result, cfg.width.identity()])}"
    out.stages.setdefault("width", NOTHING)
    out.stages["recover"] = NOTHING
    if cfg.recovery.name != "none":
        identity = {"recovery": cfg.recovery.identity(), "tokens": tokens, "seed": cfg.seed}
        out.stages["recover"] = COMPUTE
        if cfg.recovery.stored():
            samples = digest(list(out.tokens.sample_ids)) if out.tokens else UNKNOWN
            effect: Any = out.plan.effect() if out.plan is not None and not cfg.width.prunes else UNKNOWN
            asked = {**identity, "samples": samples, "model": result, "dense": dense, "plan": effect,
                     "device": device_type}  # fmt: skip
            out.stages["recover"], _ = lookup.state("recover", asked)
        result = f"{UNKNOWN}{digest([result, identity])}"
    state = lookup.state("evaluate", {**key, "model": result, **measured})[0] if measures else NOTHING
    out.stages["evaluate"] = COMPUTE if getattr(cfg.evaluation, "speed_runs", 0) else state  # times are never kept
    out.stages["save"] = COMPUTE if save_model else NOTHING
    out.stages["report"] = COMPUTE
    works = (CACHED, SHARED, NOTHING)
    needs = [s for name, s in out.stages.items() if name not in ("merge", "report")]
    out.stages = {"load": NOTHING if all(s in works for s in needs) else COMPUTE, **out.stages}
    return out


def _tokens(cfg: RunConfig, model: Sketch, entry: Path | None) -> CalibrationTokens | None:
    """The calibration tokens where they are in the cache or a file."""
    try:
        if entry is not None:
            return CalibrationTokens.load(entry)
        if cfg.calibration.name == "tokens" and model.handle is not None:
            return cfg.calibration.draw(model.handle, cfg.seed)
    except (OSError, ValueError, KeyError, SlmError):
        return None
    return None


def _find_plan(
    out: Outline, cfg: RunConfig, model: Sketch, start: str, device_type: str, tokens: str, lookup: Lookup,
    entry: Path | None,
) -> None:
    """The plan: from the cache, from the file that is replayed, or from scores that are in the cache already."""
    if entry is not None:
        try:
            out.plan, out.plan_from = MergePlan.load(entry), "in the cache"
        except (OSError, ValueError, KeyError, TypeError, SlmError):
            return
        return
    given = getattr(cfg.method, "given", None)
    if given is not None:
        out.plan_from = "as given"
        out.plan = given if cfg.method.compensate is None else None
        return
    if cfg.method.name != "slm" or cfg.method.target_layers or cfg.method.target_ratio or model.handle is None:
        return
    if _unknown(start) or _unknown(tokens) or lookup.store.folder is None or cfg.method.compensate:
        return
    score: dict[str, Any] = {"similarity": cfg.similarity.name}
    if cfg.similarity.uses_kernel():
        score = {"similarity": cfg.similarity.identity(), "kernel": cfg.kernel.identity()}
    inputs = {**score, "model": start, "device": device_type, "tokens": tokens, "rule": cfg.merge_rule.identity(),
              "computed_in": None}  # fmt: skip
    known, _ = journal.read(lookup.store.folder / "scores" / lookup.store.key("scores", inputs))
    out.plan, out.scored = _replayed(cfg, model.handle.n_layers, known)
    out.plan_from = "from scores in the cache" if out.plan else ""


def _replayed(cfg: RunConfig, n_layers: int, known: dict[str, Any]) -> tuple[MergePlan | None, int]:
    """The search at the config's threshold as far as scores are known: its plan, or None; and how many were."""
    state = cfg.method.start(n_layers)  # type: ignore[attr-defined]
    threshold = cfg.method.identity()["threshold"]
    n = 0
    while candidate := state.candidate:
        score = known.get(json.dumps([candidate.low, candidate.high, candidate.groups]))
        if score is None:
            return None, n
        n += 1
        state = state.accept() if score > threshold else state.reject()
    if cfg.method.commit_open_window:  # type: ignore[attr-defined]
        state = state.close()
    return MergePlan(n_layers, state.groups, method="slm", rule=cfg.merge_rule.name, threshold=threshold), n


def _applied(cfg: RunConfig, handle: ModelHandle, plan: MergePlan) -> ModelHandle | None:
    """The compressed model as a sketch: its config and digest. None where the plan is another model's or narrows."""
    if plan.width:
        return None
    try:
        return apply_plan(handle, replace(plan, width=None), cfg.merge_rule)
    except SlmError:
        return None
