"""What of a run the stage cache already has: the pipeline's stages walked with digests where the run has values.

Where the digest of an input is not known (weights never read here, tokens not drawn yet, a plan not searched yet) a
stage is a certain miss if no current entry agrees with what is known, and otherwise unknown.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from slm_exp.core.cache import journal
from slm_exp.core.cache.store import Inputs, StageStore
from slm_exp.core.errors import SlmError
from slm_exp.core.files import digest, plain
from slm_exp.core.types import MergePlan
from slm_exp.core.widths import WidthDecision
from slm_exp.merging.width import narrowed_digest
from slm_exp.methods.base import Method
from slm_exp.models.base import ModelHandle
from slm_exp.models.sketch import Sketch
from slm_exp.pipeline.config import RunConfig
from slm_exp.pipeline.stages import CALIBRATE, LOAD, PLAN, Experiment, Stage, Unknown, known, steps
from slm_exp.search.inputs import journal_inputs, journal_of

CACHED, SHARED, COMPUTE, MAYBE, NOTHING = "cached", "shared", "compute", "unknown", "-"
"""Its result is in the cache; an earlier job of the grid computes it; has to be computed; only the run will know."""
BY_EFFORT = (NOTHING, CACHED, SHARED, MAYBE, COMPUTE)


class Lookup:
    """The cache folder by key, and what the jobs looked up so far will have put there."""

    def __init__(self, folder: Path | None) -> None:
        self.store = StageStore(folder)
        self.coming: set[str] = set()
        self._entries: dict[tuple[str, tuple[str, ...]], list[Inputs]] = {}

    def state(self, stage: Stage[Any], x: Experiment, inputs: Inputs) -> tuple[str, Path | None]:
        """CACHED with the entry's folder, SHARED, COMPUTE or MAYBE; a result that is to come is remembered."""
        folder = self.store.folder
        name = digest({"stage": stage.folder, "inputs": inputs})
        if folder is None:
            return COMPUTE, None
        open_ended = any(isinstance(v, Unknown) for v in inputs.values())
        if not open_ended and ((entry := folder / stage.folder / stage.key(x, inputs)) / "manifest.json").is_file():
            return CACHED, entry
        if name in self.coming:
            return SHARED, None
        self.coming.add(name)
        return (MAYBE if open_ended and self._could_be(stage, x, inputs) else COMPUTE), None

    def _could_be(self, stage: Stage[Any], x: Experiment, inputs: Inputs) -> bool:
        """Whether some current entry agrees with every input that is known."""
        known = {k: plain(v) for k, v in inputs.items() if not isinstance(v, Unknown)}
        return any(all(entry.get(k) == v for k, v in known.items()) for entry in self._current(stage, x))

    def _current(self, stage: Stage[Any], x: Experiment) -> list[Inputs]:
        """Inputs of the entries that today's code and libraries would use."""
        of = stage.folder, stage.code(x)  # stages share folders, and each method has code of its own
        if of not in self._entries:
            current: list[Inputs] = []
            for manifest in (self.store.folder or Path()).glob(f"{stage.folder}/[!.]*/manifest.json"):
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    inputs = json.loads(manifest.read_text(encoding="utf-8"))["inputs"]
                    if stage.key(x, inputs) == manifest.parent.name:
                        current.append(inputs)
            self._entries[of] = current
        return self._entries[of]


@dataclass
class Outline:
    """How a run would go, stage by stage."""

    stages: dict[str, str] = field(default_factory=dict)
    """Stage -> its state, in the pipeline's order."""
    plan: MergePlan | None = None
    """Where the cache, a plan file or known scores tell it."""
    plan_from: str = ""
    """How it is known."""
    method: Method | None = None
    """As it is once the times of units are known that its target is met by."""
    parts: dict[str, list[str]] = field(default_factory=dict)
    """The states of stages that a run may have several of, by their name: the recoveries of a chain."""


def walk(cfg: RunConfig, model: Sketch, lookup: Lookup, save_model: bool) -> Outline:
    """Walk the pipeline's stages. Opens no weights and computes nothing that takes time."""
    out = Outline()
    x = Experiment(cfg, Path(), lookup.store)
    assert model.handle is not None
    x.dense = model.handle
    if model.digest.startswith("?"):
        x.dense = replace(model.handle, digest=Unknown(model.digest))
        known_sizes = ("sizes", "n_params", "layer_params", "sublayer_params")
        vars(x.dense).update({name: vars(model.handle)[name] for name in known_sizes})  # as in the sketch
    LOAD.then(x)
    first, *others = steps(cfg)
    measuring = [_advance(stage, x, lookup, out) for stage in first.stages if stage is not LOAD and stage.when(x)]
    out.method = x.cfg.method
    if measuring:
        out.stages["latency"] = measuring[0]
    for step in (step for step in others if step.name not in ("save", "report")):
        states = [_advance(stage, x, lookup, out) for stage in step.stages if stage.when(x)]
        out.stages[step.name] = max(states, key=BY_EFFORT.index, default=NOTHING)
    out.stages["save"] = COMPUTE if save_model else NOTHING
    out.stages["report"] = COMPUTE
    needs = [state for name, state in out.stages.items() if name not in ("merge", "report")]
    idle = all(state in (CACHED, SHARED, NOTHING) for state in needs)
    out.stages = {"load": NOTHING if idle else COMPUTE, **out.stages}
    return out


def _advance(stage: Stage[Any], x: Experiment, lookup: Lookup, out: Outline) -> str:
    """What has to be done for a stage; the experiment gets its value, or an unknown one."""
    if not stage.works(x):
        return NOTHING
    state, entry = COMPUTE, None
    inputs = stage.inputs(x) if stage.kind else None
    if inputs is not None:
        state, entry = lookup.state(stage, x, inputs)
    value = _value(stage, x, entry)
    if stage is PLAN:
        out.plan, out.plan_from = value, "in the cache"
        if value is None:
            out.plan, out.plan_from = value, _ = _plan(x)
    if value is None:  # what a merge makes depends on the plan, which is no input of a cache
        value = Unknown(stage.name, inputs, x.model.digest, x.plan)
    setattr(x, stage.field, value)
    out.parts.setdefault(stage.name, []).append(state)
    if stage.field == "width":  # what stands in for the model has no modules to narrow; its digest may be known
        wider, x.model = x.model, cast(ModelHandle, Unknown(x.model.digest))
        stage.then(x)
        shared = x.cfg.width.order == "before" and x.cfg.width.share is not None  # then the plan asks for its sizes
        if isinstance(value, WidthDecision) and not isinstance(wider, Unknown) and not shared:
            x.model = replace(wider, digest=known(narrowed_digest, wider.digest, value))
        return state
    stage.then(x)
    return state


def _value(stage: Stage[Any], x: Experiment, entry: Path | None) -> Any:
    """A small value from the cache or a file, or one that costs nothing to compute; None where only the run knows."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, SlmError):  # a stand-in's parts
        if entry is not None and stage.small and stage.kind is not None:
            return stage.kind.load(entry)  # type: ignore[attr-defined]
        if stage.light or (stage is CALIBRATE and x.cfg.calibration.reads_ids):
            value = stage.compute(x)
            return None if isinstance(value, Unknown) else value
    return None


def _plan(x: Experiment) -> tuple[MergePlan | None, str]:
    """The plan where a file gives it, or where the scores that its search would need are in the cache."""
    cfg, method = x.cfg, x.cfg.method
    if method.replays is not None:
        return (method.replays if method.compensate is None else None), "as given"
    unknown = any(isinstance(v, Unknown) for v in (x.model, x.model.digest, x.tokens))
    fits = cfg.similarity.after or cfg.merge_rule.fits  # their tokens are not drawn here
    if x.store.folder is None or unknown or fits:
        return None, ""
    inputs = journal_inputs("score", model=x.model.digest, device=x.model.device.type, tokens=x.tokens.digest,
                            similarity=cfg.similarity, kernel=cfg.kernel, rule=cfg.merge_rule, fit=None)
    scores, _ = journal.read(journal_of(x.store, inputs) or Path())
    plan = method.plan_from_scores(x.model.n_layers, scores, cfg.merge_rule.name)
    return plan, "from scores in the cache" if plan else ""
