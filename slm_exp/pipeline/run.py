"""One experiment on a page: load, calibrate, compare, measure, plan, merge, narrow, recover, measure, save, report."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slm_exp.core.files import digest
from slm_exp.core.runtime import world
from slm_exp.core.types import CalibrationTokens, LayerSimilarity, MergePlan
from slm_exp.core.widths import WidthDecision
from slm_exp.evaluation.base import EvalReport, Evaluation
from slm_exp.merging.surgery import apply_plan, zeroed
from slm_exp.merging.width import apply_width
from slm_exp.models.base import ModelHandle
from slm_exp.pipeline.config import RunConfig
from slm_exp.pipeline.observers import Recorder, Stage
from slm_exp.recovery.base import RecoveryResult, RecoveryTask, with_tensors
from slm_exp.runs.record import is_finished
from slm_exp.runs.tracking.none import NoTracking
from slm_exp.search.task import PlanTask
from slm_exp.similarity.layers import layer_similarity
from slm_exp.width.base import NarrowedScore, WidthTask
from slm_exp.width.score import narrowed_score


def run(
    cfg: RunConfig, folder: Path, overrides: Sequence[str] = (), group: str | None = None, training: Path | None = None
) -> dict[str, Any]:
    """Carry out one experiment and leave its record in `folder`; a finished one is returned as it is.

    Every stage takes its result from the stage cache when an earlier run had the same inputs; weights load only
    when a stage needs them.

    Args:
        training: where a training keeps its checkpoints, if not in `folder` (see `take_part`).
    Raises:
        StageError: names the stage and chains the cause; the failed record is on disk.
    """
    with Recorder(cfg, folder, overrides, group) as rec:
        if rec.finished:
            rec.accept_evaluations()
            return rec.record
        with cfg.tracking.session(rec.record, folder) as rec.track:
            for message in cfg.advice():
                rec.warn(message)

            with rec.stage("load"):
                device = cfg.runtime.prepare(cfg.seed, cfg.model.device)
                dense = cfg.model.open(device, Path(cfg.cache.dir))
                cfg.width.check_model(dense, cfg.method)
                cfg.width.check_depth(cfg.method, dense)
                cfg.evaluation.check_data(dense.random)
                cfg.evaluation.check_model(dense)
                cfg.recovery.check_data(dense)
                cfg.similarity.check_data(dense)
                rec.note(device=cfg.runtime.describe(device),
                         model={"name": dense.name, "note": dense.note, "digest": dense.digest})
            model_key = {"model": dense.digest, "dtype": cfg.model.dtype, "device": device.type}

            with rec.stage("calibrate") as stage:
                tokens = stage.compute(CalibrationTokens, lambda: cfg.calibration.draw(dense, cfg.seed),
                                       source=cfg.calibration.identity(), seed=cfg.seed, tokenizer=dense.digest)
                tokens.save(folder)
                rec.note(calibration=tokens.describe())

            with rec.stage("similarity") as stage:
                alike = stage.compute(LayerSimilarity,
                                      lambda: layer_similarity(dense, tokens, cfg.kernel, cfg.similarity),
                                      **model_key, tokens=tokens.digest, **cfg.matrix_identity())
                alike.save(folder)

            with rec.stage("evaluate_dense") as stage:
                report = stage.compute(EvalReport, lambda: cfg.evaluation.run(dense),
                                       **model_key, **cfg.evaluation.measured_by())
                rec.keep_evaluation("dense", report)
                cfg.evaluation.accept(report, dense=True)

            start, width = dense, None
            if cfg.width.order == "before":
                with rec.stage("width") as stage:
                    start, width = narrow(cfg, stage, dense, tokens, dense, MergePlan(dense.n_layers))

            with rec.stage("plan") as stage:
                task = PlanTask(dense, tokens, cfg.similarity, cfg.kernel, cfg.merge_rule, alike, stage.store, cfg.seed)
                method = cfg.width.depth_method(cfg.method, dense, start)
                decides = cfg.plan_identity() | {"method": method.identity()}
                plan = stage.compute(MergePlan, lambda: method.plan(task.on(start, method.uses_layer_similarity)),
                                     **model_key | {"model": start.digest}, tokens=tokens.digest, **decides,
                                     seed=cfg.seed)
                plan = replace(plan, width=width or plan.width, target=cfg.width.target_of(cfg.method, plan.target))
                rec.keep_plan(plan)

            with rec.stage("merge"):
                compressed = apply_plan(dense, plan, cfg.merge_rule)
                if plan.width:  # narrowed before, or as the plan that is replayed says
                    plan = rescored(task, compressed, plan)
                    rec.keep_width(plan)

            if cfg.width.order == "after":
                with rec.stage("width") as stage:
                    compressed, width = narrow(cfg, stage, dense, tokens, compressed, plan)
                    if width:
                        plan = rescored(task, compressed, replace(plan, width=width))
                        rec.keep_width(plan)

            with rec.stage("recover") as stage:
                lost = RecoveryTask(compressed, dense, plan, tokens, training or folder, rec.track, cfg.seed)
                identity = {"recovery": cfg.recovery.identity(), "tokens": tokens.digest,
                            "samples": digest(list(tokens.sample_ids)), "seed": cfg.seed}
                if cfg.recovery.stored() and world() == 1:  # of several processes, one must not find another's result
                    result = stage.compute(RecoveryResult, lambda: cfg.recovery.recover(lost), **identity,
                                           model=compressed.digest, dense=dense.digest, plan=plan.effect(),
                                           device=compressed.device.type)
                else:
                    result = cfg.recovery.recover(lost)
                compressed = with_tensors(compressed, result, identity)
                rec.note(recovery=result.report)

            rec.note(layers={"before": dense.n_layers, "after": compressed.n_layers},
                     params={"before": dense.n_params, "after": compressed.n_params,
                             "ratio_removed": 1 - compressed.n_params / dense.n_params,
                             "zeroed": zeroed(compressed, plan)})

            with rec.stage("evaluate") as stage:
                report = stage.compute(EvalReport, lambda: cfg.evaluation.run(compressed),
                                       **model_key | {"model": compressed.digest},
                                       **cfg.evaluation.measured_by())
                rec.keep_evaluation("compressed", report)
                cfg.evaluation.accept(report, dense=False)
                if cfg.evaluation.speed_runs:
                    rec.keep_speed(cfg.evaluation.time(dense, compressed))
                    stage.cached = False  # a timing never comes from the cache

            with rec.stage("save"):
                if cfg.save_model:
                    rec.keep_model(compressed, plan, tokens)

            with rec.stage("report"):
                rec.draw(alike, plan)

            return rec.done()


def take_part(cfg: RunConfig, folder: Path) -> None:
    """What a process beside the first does under a launcher: come to the recovery, and train with the others."""
    if not cfg.recovery.trains() or is_finished(folder, cfg.run_id, with_model=bool(cfg.save_model)):
        return
    with tempfile.TemporaryDirectory(prefix="slm_exp-rank-") as own:
        run(replace(cfg, evaluation=Evaluation(), tracking=NoTracking(), save_model=False), Path(own), training=folder)


def narrow(
    cfg: RunConfig, stage: Stage, dense: ModelHandle, tokens: CalibrationTokens, handle: ModelHandle, plan: MergePlan
) -> tuple[ModelHandle, WidthDecision | None]:
    """A model narrowed as the width group decides, and the decision; `plan` made it from the dense."""
    task = WidthTask(handle, tokens, plan.slots, cfg.width.ratio_for(cfg.method, dense, handle), cfg.seed,
                     n_dense=dense.n_layers)
    if not cfg.width.prunes:
        return handle, cfg.width.decide(task)

    def decide() -> WidthDecision:
        decision = cfg.width.decide(task)
        assert decision is not None
        return decision

    decided = stage.compute(WidthDecision, decide, model=handle.digest, dtype=cfg.model.dtype,
                            device=handle.device.type, tokens=tokens.digest, width=cfg.width.identity(),
                            ratio=task.ratio, slots=plan.slots, seed=cfg.seed)
    return apply_width(handle, decided), decided


def rescored(task: PlanTask, compressed: ModelHandle, plan: MergePlan) -> MergePlan:
    """The plan with the score of the narrowed model, which the search has not seen. Kept in the task's store."""
    inputs = {"model": task.handle.digest, "compressed": compressed.digest, "device": task.handle.device.type,
              "tokens": task.tokens.digest, "similarity": task.similarity.identity(), "kernel": task.kernel.identity()}
    found, _ = task.store.cached("width", inputs, NarrowedScore, lambda: narrowed_score(task, compressed))
    return replace(plan, final_score=found.score)
