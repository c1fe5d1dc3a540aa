"""One experiment on one page: load, calibrate, compare, measure, plan, merge, narrow, heal, measure, save, report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slm_exp.config import RunConfig
from slm_exp.evaluation.base import EvalReport
from slm_exp.merging.surgery import apply_plan
from slm_exp.methods.base import PlanTask
from slm_exp.records import Recorder
from slm_exp.similarity.layers import layer_similarity
from slm_exp.types import CalibrationTokens, LayerSimilarity, MergePlan


def run(cfg: RunConfig, folder: Path, overrides: Sequence[str] = (), group: str | None = None) -> dict[str, Any]:
    """Carry out one experiment and leave its record in `folder`; a finished one is returned as it is.

    Every stage takes its result from the stage cache when an earlier run had the same inputs; weights load only
    when a stage needs them.

    Raises:
        StageError: names the stage and chains the cause; the failed record is on disk.
    """
    with Recorder(cfg, folder, overrides, group) as rec:
        if rec.finished:
            return rec.record
        with cfg.tracking.session(rec.record, folder) as rec.track:
            for message in cfg.advice():
                rec.warn(message)

            with rec.stage("load"):
                device = cfg.runtime.prepare(cfg.seed, cfg.model.device)
                dense = cfg.model.open(device, Path(cfg.cache.dir))
                cfg.method.check_model(dense)
                cfg.evaluation.check_data(dense.random)
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
                                       **model_key, evaluation=cfg.evaluation.identity())
                rec.keep_evaluation("dense", report)

            with rec.stage("plan") as stage:
                task = PlanTask(dense, tokens, cfg.similarity, cfg.kernel, cfg.merge_rule, alike, stage.store, cfg.seed)
                plan = stage.compute(MergePlan, lambda: cfg.method.plan(task),
                                     **model_key, tokens=tokens.digest, **cfg.plan_identity(), seed=cfg.seed)
                rec.keep_plan(plan)

            with rec.stage("merge"):
                compressed = apply_plan(dense, plan, cfg.merge_rule)

            with rec.stage("width"):
                compressed = cfg.width.prune(compressed, tokens)

            with rec.stage("recover"):
                compressed = cfg.recovery.heal(compressed, dense, tokens)

            rec.note(layers={"before": dense.n_layers, "after": compressed.n_layers},
                     params={"before": dense.n_params, "after": compressed.n_params,
                             "ratio_removed": 1 - compressed.n_params / dense.n_params})

            with rec.stage("evaluate") as stage:
                report = stage.compute(EvalReport, lambda: cfg.evaluation.run(compressed),
                                       **model_key | {"model": compressed.digest},
                                       evaluation=cfg.evaluation.identity())
                rec.keep_evaluation("compressed", report)

            with rec.stage("save"):
                if cfg.save_model:
                    rec.keep_model(compressed, plan, tokens)

            with rec.stage("report"):
                rec.draw(alike, plan)

            return rec.done()
