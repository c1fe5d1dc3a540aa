"""The stages of an experiment, each declared once: what it computes, what its result depends on, which code does it.

The pipeline carries the declarations out; the forecast (`slm plan`) walks the same ones with digests where the run has
values; the stage cache takes its keys from here and from nowhere else.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

from slm_exp.calibration.heldout import RULE
from slm_exp.core.cache.code import PACKAGE, Code, code_files
from slm_exp.core.cache.store import Inputs, StageStore
from slm_exp.core.files import JsonObject, digest
from slm_exp.core.plugins import plugin_of
from slm_exp.core.registry import Component
from slm_exp.core.runtime import device_name, world
from slm_exp.core.timing import LatencyTable
from slm_exp.core.types import CalibrationTokens, LayerSimilarity, MergePlan
from slm_exp.core.widths import WidthDecision
from slm_exp.evaluation.base import EvalReport
from slm_exp.merging.surgery import apply_plan
from slm_exp.merging.width import apply_width
from slm_exp.models.base import ModelHandle, dtype_name
from slm_exp.pipeline.config import RunConfig
from slm_exp.pipeline.memory import opened
from slm_exp.recovery.base import Recovery, RecoveryResult, RecoveryTask, with_tensors
from slm_exp.recovery.gain import HeldOutLoss, chain_report, held_out_loss
from slm_exp.runs.tracking.base import Tracker
from slm_exp.search.task import PlanTask
from slm_exp.similarity.layers import layer_similarity
from slm_exp.width.base import NarrowedScore, WidthTask

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Experiment:
    """What the stages of one run read and leave behind; every stage sets the field that it names."""

    cfg: RunConfig
    folder: Path
    store: StageStore
    training: Path | None = None
    """Where a training keeps its checkpoints; null is the run's folder."""
    track: Tracker | None = None
    record: JsonObject = field(default_factory=dict)
    """The run's record, as far as it is known."""

    dense: ModelHandle = field(init=False)
    latency: LatencyTable = field(init=False)
    """Where the method's target is a time."""
    tokens: CalibrationTokens = field(init=False)
    similarity: LayerSimilarity = field(init=False)
    dense_report: EvalReport = field(init=False)
    width: WidthDecision | None = None
    """Null where nothing is pruned."""
    plan: MergePlan = field(init=False)
    model: ModelHandle = field(init=False)
    """The model as far as it is compressed: the dense one at first."""
    narrowed: NarrowedScore = field(init=False)
    recovery: RecoveryResult = field(init=False)
    recoveries: list[RecoveryResult] = field(default_factory=list)
    """All so far, of a chain."""
    held_out: HeldOutLoss = field(init=False)
    losses: list[HeldOutLoss] = field(default_factory=list)
    """Before the first step of a chain, and after each."""
    report: EvalReport = field(init=False)
    speed: JsonObject = field(init=False)
    saved: None = None
    reported: None = None

    @property
    def task(self) -> PlanTask:
        """What a method may look at; its model is the dense one."""
        cfg = self.cfg
        return PlanTask(self.dense, self.tokens, cfg.similarity, cfg.kernel, cfg.merge_rule, self.similarity,
                        self.store, cfg.seed)

    @property
    def width_ratio(self) -> float:
        """Share of the decoder layers' parameters for the width pruner to remove."""
        return known(self.cfg.width.ratio_for, self.cfg.method, self.dense, self.model)

    @property
    def recovery_report(self) -> JsonObject:
        """`recovery` of the record, as far as it is known."""
        recipe = self.cfg.recovery
        if not self.losses:
            return self.recovery.report
        return chain_report([p.name for p in recipe.parts()], [r.report for r in self.recoveries], self.losses)

    def on(self, model: ModelHandle) -> Inputs:
        """What the result of running a model depends on."""
        return {"model": model.digest, "dtype": self.cfg.model.dtype, "device": self.dense.device.type}


class Unknown(str):
    """What only the run will know: any part of an unknown value is unknown too. For the forecast."""

    def __new__(cls, *parts: object) -> Unknown:
        return str.__new__(cls, f"?{digest([str(p) for p in parts])}")

    def __getattr__(self, name: str) -> Unknown:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unknown(self, name)

    def __call__(self, *args: object) -> Unknown:
        return Unknown(self, *args)


def known(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, or an unknown where an argument is one."""
    return cast(T, Unknown(function, *args)) if any(isinstance(a, Unknown) for a in args) else function(*args)


def _none(x: Experiment) -> None:
    return None


@dataclass(frozen=True)
class Stage(Generic[T]):
    """One stage. `compute` gives the value of the field `field`; `then` says what follows from it, without weights."""

    name: str
    field: str
    compute: Callable[[Experiment], T]
    kind: type[T] | None = None
    """How the stage cache keeps the value; null: every run computes it."""
    inputs: Callable[[Experiment], Inputs | None] = _none
    """All that the value depends on, besides the code and the libraries; null: this time it is not kept."""
    code: Callable[[Experiment], tuple[str, ...]] = lambda x: ()
    """Files and folders of the package that compute the value."""
    libraries: tuple[str, ...] = ("torch", "transformers")
    """Distributions whose version decides the value too."""
    when: Callable[[Experiment], bool] = lambda x: True
    """Whether this run has the stage at all."""
    works: Callable[[Experiment], bool] = lambda x: True
    """Whether it has anything to do, as the forecast reports it."""
    then: Callable[[Experiment], object] = _none
    small: bool = False
    """Whether the value is small enough for the forecast to read from the cache."""
    light: bool = False
    """Whether computing touches no weights, so that the forecast does it."""
    cache: str = ""
    """The cache's folder, where it is not `name`."""

    def carry_out(self, x: Experiment) -> bool:
        """Set the experiment's field from the stage cache or by computing. Returns whether it came from the cache."""
        inputs, cached = self.inputs(x), False
        if self.kind is None or inputs is None:
            value = self.compute(x)
        else:
            made_by = Code(self.code(x), self.libraries)
            value, cached = x.store.cached(self.folder, inputs, self.kind, lambda: self.compute(x), made_by)  # type: ignore[type-var]
        setattr(x, self.field, value)
        self.then(x)
        return cached

    def key(self, x: Experiment, inputs: Inputs) -> str:
        """Of the value in the cache."""
        return x.store.key(self.folder, inputs, Code(self.code(x), self.libraries))

    def files(self, x: Experiment) -> set[str]:
        """Every file of the package that is in the value's key."""
        return code_files(self.code(x))

    @property
    def folder(self) -> str:
        """In the cache."""
        return self.cache or self.name


class Step(NamedTuple):
    """What the record times under one name."""

    name: str
    stages: tuple[Stage[Any], ...]


def code_of(*members: Component) -> tuple[str, ...]:
    """The files of this package that define members of config groups and their base classes. A plug-in's code is in the
    member's identity."""
    kinds = [kind for member in members for kind in type(member).__mro__ if kind is not object]
    inside = (Path(inspect.getfile(kind)).resolve() for kind in kinds if plugin_of(kind) is None)
    return tuple(dict.fromkeys(str(f.relative_to(PACKAGE)) for f in inside if f.is_relative_to(PACKAGE)))


# --- load


def _load(x: Experiment) -> ModelHandle:
    cfg = x.cfg
    dense = opened(cfg, cfg.runtime.prepare(cfg.seed, cfg.model.device))
    check_model(cfg, dense)
    return dense


def _check_lengths(cfg: RunConfig, dense: ModelHandle) -> None:
    """Refuse sequences longer than the model has positions. Raises ConfigError, which names the field."""
    merges = cfg.method.uses_merge_rule() and cfg.method.replays is None
    read = {**cfg.calibration.lengths(), **cfg.evaluation.lengths(), **cfg.recovery.lengths(),
            **cfg.similarity.lengths(), **cfg.method.lengths(), **(cfg.merge_rule.lengths() if merges else {})}
    for name, tokens in read.items():
        dense.require_room(name, tokens)


def _check_width(cfg: RunConfig, dense: ModelHandle) -> None:
    cfg.width.check_model(dense, cfg.method)
    cfg.width.check_depth(cfg.method, dense)


def _check_rule(cfg: RunConfig, dense: ModelHandle) -> None:
    if cfg.method.uses_merge_rule() and cfg.method.replays is None:
        cfg.merge_rule.check_data(dense)


Checks = tuple[tuple[tuple[str, ...], Callable[[RunConfig, ModelHandle], None]], ...]
"""(groups, check of their settings against a model)."""

LIGHT_CHECKS: Checks = (
    (("calibration", "evaluation", "recovery", "similarity", "merge_rule", "method"), _check_lengths),
    (("calibration",), lambda cfg, dense: cfg.calibration.check_data(dense)),
    (("evaluation",), lambda cfg, dense: cfg.evaluation.check_files(dense)),
)
"""That look at the model's config alone: also where nothing but a sketch of it is here."""
CHECKS: Checks = (
    *LIGHT_CHECKS,
    (("calibration",), lambda cfg, dense: cfg.calibration.check_source()),
    (("calibration",), lambda cfg, dense: cfg.calibration.check_model(dense)),
    (("width", "method"), _check_width),
    (("evaluation",), lambda cfg, dense: cfg.evaluation.check_data(dense.random)),
    (("evaluation",), lambda cfg, dense: cfg.evaluation.check_model(dense)),
    (("recovery",), lambda cfg, dense: cfg.recovery.check_data(dense)),
    (("similarity",), lambda cfg, dense: cfg.similarity.check_data(dense)),
    (("merge_rule", "method"), _check_rule),
    (("method",), lambda cfg, dense: cfg.method.check_data(dense)),
)


def check_model(cfg: RunConfig, dense: ModelHandle, passed: set[str] | None = None, checks: Checks = CHECKS) -> None:
    """Refuse what this model cannot do, before weights load.

    Args:
        passed: checks that other jobs with this model have passed, by the settings they look at; more are added.
    Raises:
        ConfigError / DataError: names the field.
    """
    passed = set() if passed is None else passed
    for i, (groups, check) in enumerate(checks):
        if (looked := repr([i, *(getattr(cfg, group) for group in groups)])) not in passed:
            check(cfg, dense)
            passed.add(looked)


def _loaded(x: Experiment) -> None:
    x.model, x.plan = x.dense, MergePlan(x.dense.n_layers)


LOAD = Stage("load", "dense", _load, then=_loaded)


def _measure(x: Experiment) -> LatencyTable:
    from slm_exp.engine.latency import measure

    return measure(x.dense, dtype_name(x.dense.config, x.cfg.model.dtype), **(x.cfg.method.timed_by() or {}))


def _latency_inputs(x: Experiment) -> Inputs:
    device, threads = x.dense.device, x.cfg.runtime.cpu_threads() if x.dense.device.type == "cpu" else None
    seen = device.type == "cpu" or hasattr(device, "index")  # the forecast opens no GPU
    name = device_name(device) if seen else Unknown(device.type)
    return {**x.on(x.dense), "name": name, "threads": threads, **(x.cfg.method.timed_by() or {})}


def _measured(x: Experiment) -> None:
    """The method knows what its target is met by, and refuses what cannot be met while nothing is computed."""
    if not isinstance(x.latency, Unknown):
        log.info("%s", x.latency.describe())
        x.cfg = replace(x.cfg, method=x.cfg.method.timed(x.latency))
        x.cfg.method.check_model(x.dense)


LATENCY = Stage(
    "latency", "latency", _measure, LatencyTable, _latency_inputs,
    code=lambda x: ("core/timing.py", "engine/latency.py", "methods/base.py", "models"), small=True, then=_measured,
    when=lambda x: x.cfg.method.timed_by() is not None)
"""Times of the model's units on this device: measured once, before anything else, as what cannot be met is refused."""

BUILT = ("core/types.py", "core/widths.py", "models", "merging")
"""What a compressed model is built by: the result of any stage that looks at one depends on it."""
READ = ("calibration", "core/text.py")
"""What text is read and cut by."""

# --- calibrate, similarity, evaluate_dense

CALIBRATE = Stage(
    "calibrate", "tokens", lambda x: x.cfg.calibration.draw(x.dense, x.cfg.seed), CalibrationTokens,
    lambda x: {"source": x.cfg.calibration.identity(), "seed": x.cfg.seed, "tokenizer": x.dense.digest},
    code=lambda x: (*READ, "core/types.py", "models"), libraries=("transformers",), small=True)


SIMILARITY = Stage(
    "similarity", "similarity", lambda x: layer_similarity(x.dense, x.tokens, x.cfg.kernel, x.cfg.similarity),
    LayerSimilarity,
    lambda x: {**x.on(x.dense), "tokens": x.tokens.digest, **x.cfg.matrix_identity()},
    code=lambda x: ("core/types.py", "similarity", "kernels", "engine", "models"))

EVALUATE_DENSE = Stage(
    "evaluate_dense", "dense_report", lambda x: x.cfg.evaluation.run(x.dense), EvalReport,
    lambda x: {**x.on(x.dense), **x.cfg.evaluation.measured_by()},
    code=lambda x: (*BUILT, *READ, "evaluation", "engine/fused.py", "engine/calls.py"),
    libraries=("torch", "transformers", "lm_eval"), works=lambda x: x.cfg.evaluation.measures, cache="evaluate")

# --- width: of the dense model before the plan, or of the merged one


def _width_inputs(x: Experiment) -> Inputs | None:
    if not x.cfg.width.prunes:
        return None
    return {**x.on(x.model), "tokens": x.tokens.digest, "width": x.cfg.width.identity(), "ratio": x.width_ratio,
            "slots": x.plan.slots, "seed": x.cfg.seed}


def _narrow(x: Experiment) -> None:
    if x.width is not None:
        x.model = known(apply_width, x.model, x.width)


def _with_width(plan: MergePlan, width: WidthDecision) -> MergePlan:
    return replace(plan, width=width)


def _in_plan(x: Experiment) -> None:
    if x.width is not None:
        x.plan = known(_with_width, x.plan, x.width)


def _narrow_the_merged(x: Experiment) -> None:
    _in_plan(x)
    _narrow(x)


WIDTH_BEFORE: Stage[Any] = Stage(
    "width", "width", lambda x: x.cfg.width.decide(WidthTask(x.model, x.tokens, x.plan.slots, x.width_ratio,
                                                             x.cfg.seed, n_dense=x.dense.n_layers)),
    WidthDecision, _width_inputs,
    code=lambda x: (*BUILT, "width", "engine", "search", "similarity", "kernels"),
    works=lambda x: x.cfg.width.prunes, then=_narrow, small=True)
WIDTH_AFTER = replace(WIDTH_BEFORE, then=_narrow_the_merged)

# --- plan


def _depth_method(x: Experiment) -> Any:
    """The depth method with its part of a target that depth and width share."""
    return known(x.cfg.width.depth_method, x.cfg.method, x.dense, x.model)


def _decided(x: Experiment) -> None:
    """Where width came first, the plan says so."""
    if x.cfg.width.order == "before":
        _in_plan(x)
    if not isinstance(x.plan, Unknown):
        x.plan = replace(x.plan, target=x.cfg.width.target_of(x.cfg.method, x.plan.target))


PLAN = Stage(
    "plan", "plan", lambda x: _depth_method(x).plan(x.task.on(x.model, x.cfg.method.uses_layer_similarity)), MergePlan,
    lambda x: {**x.on(x.model), "tokens": x.tokens.digest, **x.cfg.plan_identity(),
               "method": _depth_method(x).identity(), "seed": x.cfg.seed,
               **({"latency": x.latency.digest} if LATENCY.when(x) else {})},
    code=lambda x: (*BUILT, *code_of(x.cfg.method, x.cfg.width), "search", "engine", "similarity", "kernels",
                    *READ),
    then=_decided, small=True)

# --- merge

MERGE = Stage("merge", "model", lambda x: known(apply_plan, x.dense, x.plan, x.cfg.merge_rule), light=True,
              works=lambda x: x.plan.changes_layers)


def _narrowed_score(x: Experiment) -> NarrowedScore:
    from slm_exp.width.score import narrowed_score

    return narrowed_score(x.task, x.model)


def _rescored(x: Experiment) -> None:
    if not isinstance(x.narrowed, Unknown):
        x.plan = replace(x.plan, final_score=x.narrowed.score)


RESCORE = Stage(
    "narrowed_score", "narrowed", _narrowed_score, NarrowedScore,
    lambda x: {**x.on(x.dense), "compressed": x.model.digest, "tokens": x.tokens.digest,
               "similarity": x.cfg.similarity.identity(), "kernel": x.cfg.kernel.identity()},
    code=lambda x: (*BUILT, "width/score.py", "engine", "similarity", "kernels"),
    cache="width", when=lambda x: x.plan.width is not None, then=_rescored)
"""The final score of a model that is narrower than the one the search saw: where the plan came with its width."""
RESCORE_NARROWED = replace(RESCORE, when=lambda x: x.width is not None)

# --- recover


def _recovery_identity(x: Experiment, recipe: Recovery) -> Inputs:
    return {"recovery": recipe.identity(), "tokens": x.tokens.digest,
            "samples": known(digest, known(list, x.tokens.sample_ids)), "seed": x.cfg.seed}


def _recover_inputs(x: Experiment, recipe: Recovery) -> Inputs | None:
    if not recipe.stored() or world() > 1:  # of several processes, one must not find what another computes
        return None
    return {**_recovery_identity(x, recipe), "model": x.model.digest, "dense": x.dense.digest,
            "plan": x.plan.effect(), "device": x.dense.device.type}


def _recovered(x: Experiment, recipe: Recovery) -> None:
    x.recoveries.append(x.recovery)
    x.model = known(with_tensors, x.model, x.recovery, _recovery_identity(x, recipe))


def _recover(x: Experiment, recipe: Recovery) -> RecoveryResult:
    from slm_exp.recovery.judged import judged

    return judged(recipe, RecoveryTask(x.model, x.dense, x.plan, x.tokens, x.training or x.folder, x.track,
                                       x.cfg.seed))


def recover(recipe: Recovery) -> Stage[RecoveryResult]:
    """The stage of one recovery."""
    return Stage(
        "recover", "recovery", lambda x: _recover(x, recipe), RecoveryResult, lambda x: _recover_inputs(x, recipe),
        code=lambda x: (*BUILT, *READ, "recovery", "engine"), libraries=("torch", "transformers", "peft"),
        works=lambda x: recipe.changes_weights, then=lambda x: _recovered(x, recipe))


HELD_OUT = Stage(
    "held_out", "held_out", lambda x: held_out_loss(x.model, x.dense, x.tokens), HeldOutLoss,
    lambda x: {**x.on(x.model), "dense": x.dense.digest, "tokens": x.tokens.digest, "held_out": RULE},
    code=lambda x: (*BUILT, *READ, "recovery/gain.py", "engine"), cache="recover", small=True,
    then=lambda x: x.losses.append(x.held_out))
"""The loss of the model as it is by now, between the steps of a chain."""


def recoveries(cfg: RunConfig) -> tuple[Stage[Any], ...]:
    """One recovery, or the steps of a chain with the loss before the first and after each."""
    stages = [recover(recipe) for recipe in cfg.recovery.parts()]
    if cfg.recovery.parts() == (cfg.recovery,):
        return tuple(stages)
    return (HELD_OUT, *(part for stage in stages for part in (stage, HELD_OUT)))


# --- evaluate

EVALUATE = replace(EVALUATE_DENSE, name="evaluate", field="report", compute=lambda x: x.cfg.evaluation.run(x.model),
                   inputs=lambda x: {**x.on(x.model), **x.cfg.evaluation.measured_by()})

TIME = Stage("time", "speed", lambda x: x.cfg.evaluation.time(x.dense, x.model), when=lambda x: x.cfg.evaluation.times)
"""Latency of both models in turns; a timing never comes from the cache."""

# --- save, report


def _save(x: Experiment) -> None:
    from slm_exp.runs.checkpoint import save_checkpoint

    save_checkpoint(x.model, x.folder / "model", plan=x.plan, tokens=x.tokens, record=x.record)


SAVE = Stage("save", "saved", _save, when=lambda x: bool(x.cfg.save_model))
"""model/: the checkpoint, verified in a fresh process before it appears."""
REPORT = Stage("report", "reported", _none)
"""Pages and pictures, which observers draw."""


def steps(cfg: RunConfig) -> tuple[Step, ...]:
    """The stages in paper order, under the names that the record times them by."""
    before = cfg.width.order == "before"
    return (
        Step("load", (LOAD, LATENCY)),
        Step("calibrate", (CALIBRATE,)),
        Step("similarity", (SIMILARITY,)),
        Step("evaluate_dense", (EVALUATE_DENSE,)),
        *([Step("width", (WIDTH_BEFORE,))] if before else []),
        Step("plan", (PLAN,)),
        Step("merge", (MERGE, RESCORE)),
        *([Step("width", (WIDTH_AFTER, RESCORE_NARROWED))] if not before else []),
        Step("recover", recoveries(cfg)),
        Step("evaluate", (EVALUATE, TIME)),
        Step("save", (SAVE,)),
        Step("report", (REPORT,)),
    )
