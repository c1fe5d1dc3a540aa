"""A whole run: what W&B keeps of it is what record.json says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders.runs import QUICK
from readback import offline_runs

from slm_exp.core.errors import StageError
from slm_exp.launch.compose import compose_run
from slm_exp.pipeline import run as pipeline
from slm_exp.runs.tracking.base import flat

MIRRORED = [*QUICK, "tracking=wandb", "method.threshold=0.5", "save_model=false"]


def test_summary_and_config_equal_the_record(tmp_path: Path) -> None:
    overrides = [*MIRRORED, f"cache.dir={tmp_path / 'cache'}"]
    for _ in range(2):  # the second time it is finished and makes no second run
        pipeline.run(compose_run(overrides), tmp_path / "run", overrides, "thresholds")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    (run,) = offline_runs(tmp_path / "run")
    assert (run.id, run.group, run.exit_code) == (record["run_id"], "thresholds", 0)
    assert {name: run.config[name] for name in record["config"]} == record["config"]
    assert (run.config["run_id"], run.config["overrides"]) == (record["run_id"], overrides)
    sections = ("status", "stages", "plan", "layers", "params", "model", "calibration", "eval")
    expected = flat({name: record[name] for name in sections})
    assert {"params/ratio_removed", "plan/final_score", "stages/plan/seconds", "status"} <= set(expected)
    assert {path: run.summary.get(path) for path in expected} == expected
    assert run.summary["plan"]["nrows"] == record["layers"]["after"]
    assert run.summary["trace"]["nrows"] == record["plan"]["evaluations"]
    assert run.summary["similarity"]["_type"] == "image-file"


def test_a_failed_run_is_closed_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*args: object) -> None:
        raise ValueError("told to")

    monkeypatch.setattr("slm_exp.pipeline.stages.apply_plan", explode)
    with pytest.raises(StageError):
        pipeline.run(compose_run([*MIRRORED, f"cache.dir={tmp_path / 'cache'}"]), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    (run,) = offline_runs(tmp_path / "run")
    assert (run.exit_code, run.summary["status"]) == (1, record["status"])
    assert {path: run.summary[path] for path in flat({"error": record["error"]})} == {
        "error/type": "ValueError", "error/message": "told to", "error/stage": "merge"}
