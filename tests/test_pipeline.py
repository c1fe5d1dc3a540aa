"""One run, from config to record, on a random tiny model."""

import json
import logging
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from builders.runs import QUICK, tiny_run

from slm_exp.core.errors import ProtocolError, StageError
from slm_exp.core.types import MergePlan
from slm_exp.launch.compose import compose_run
from slm_exp.runs import record as records

STAGES = ["load", "calibrate", "similarity", "evaluate_dense", "plan", "merge", "width", "recover", "evaluate", "save",
          "report"]
HALF = "method.threshold=0.5"


@pytest.fixture
def run(tmp_path):
    return lambda *overrides, folder="run": tiny_run(tmp_path / folder, HALF, *overrides)


def test_a_run_leaves_what_the_contract_says(run, tmp_path):
    record = run("save_model=true")
    folder = tmp_path / "run"
    assert record == json.loads((folder / "record.json").read_text())
    assert record["status"] == "finished"
    assert [s["name"] for s in record["stages"]] == STAGES
    assert set(record) >= {"run_id", "status", "config", "overrides", "versions", "device", "git", "created", "seconds",
                           "stages", "layers", "params", "plan", "eval", "error"}
    for name in ("config.yaml", "plan.json", "similarity.npz", "similarity.png", "calibration_tokens.npy",
                 "report.html", "model/config.json", "model/plan.json"):
        assert (folder / name).is_file(), name
    plan = MergePlan.load(folder)
    assert plan.to_json() == record["plan"]
    assert record["layers"] == {"before": 8, "after": plan.n_layers_out}
    params = record["params"]
    assert params["ratio_removed"] == pytest.approx(1 - params["after"] / params["before"])
    with np.load(folder / "similarity.npz") as z:
        assert z["matrix"].shape == (8, 8)
        assert z["matrix"].dtype == np.float32
        assert {"kernel", "estimator", "skip_first_token", "batch"} <= set(z.files)
    assert np.load(folder / "calibration_tokens.npy").shape == (4, 32)
    assert not list(folder.rglob("*.tmp"))


def test_stages_that_do_nothing_have_no_line(run, caplog):
    """However long a busy machine takes for nothing; the record has the time of all."""
    with caplog.at_level(logging.INFO, logger="slm_exp"):
        run()
    said = [words[0] for words in (message.split() for message in caplog.messages) if words[0] in STAGES]
    assert said == ["load", "calibrate", "similarity", "plan", "merge", "report"]


def test_a_finished_run_returns_at_once(run, tmp_path, monkeypatch):
    first = run()
    monkeypatch.setattr("slm_exp.pipeline.stages.apply_plan", lambda *a: pytest.fail("computed again"))
    written = (tmp_path / "run" / "record.json").stat().st_mtime_ns
    assert run() == first
    assert (tmp_path / "run" / "record.json").stat().st_mtime_ns == written


def test_another_package_version_runs_again(run, monkeypatch):
    first = run()
    monkeypatch.setattr(records, "__version__", "99")
    assert run()["versions"]["slm_exp"] == "99" != first["versions"]["slm_exp"]


def test_a_missing_checkpoint_is_rebuilt(run, tmp_path):
    run()
    assert not (tmp_path / "run" / "model").exists()
    run("save_model=true")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_second_folder_takes_every_stage_from_the_cache(run):
    run()
    again = run(folder="other")
    assert {s["name"] for s in again["stages"] if s["cached"]} == {"calibrate", "similarity", "evaluate_dense", "plan",
                                                                  "evaluate"}


def test_calibration_can_be_repeated_from_its_own_file(run, tmp_path):
    first = run()
    again = run("calibration=tokens", f"calibration.path={tmp_path / 'run' / 'calibration_tokens.npy'}", folder="other")
    assert again["calibration"]["digest"] == first["calibration"]["digest"]
    assert again["plan"]["groups"] == first["plan"]["groups"]


PATCHES = {
    "load": "slm_exp.models.tiny.Tiny.open",
    "calibrate": "slm_exp.calibration.base.Calibration.draw",
    "similarity": "slm_exp.pipeline.stages.layer_similarity",
    "plan": "slm_exp.methods.slm.SLM.plan",
    "merge": "slm_exp.pipeline.stages.apply_plan",
    "width": "slm_exp.width.none.NoWidth.decide",
    "recover": "slm_exp.recovery.none.NoRecovery.recover",
    "evaluate_dense": "slm_exp.evaluation.base.Evaluation.run",
    "save": "slm_exp.runs.checkpoint.save_checkpoint",
    "report": "slm_exp.pipeline.observers.write_report",
}


@pytest.mark.parametrize("stage", PATCHES)
def test_a_failure_leaves_a_record_that_says_which_stage_and_why(run, tmp_path, monkeypatch, stage):
    def explode(*args, **kwargs):
        raise ValueError("told to")

    target = PATCHES[stage]
    if stage == "calibrate":
        cfg = compose_run(QUICK)
        target = f"{type(cfg.calibration).__module__}.{type(cfg.calibration).__name__}.draw"
    monkeypatch.setattr(target, explode)
    save = f"save_model={stage in ('save', 'report')}"  # a checkpoint takes a second process to verify
    with pytest.raises(StageError, match=f"'{stage}' failed: ValueError: told to"):
        run(save)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == "failed"
    assert record["error"] == {"type": "ValueError", "message": "told to", "stage": stage}
    assert [s["name"] for s in record["stages"]] == STAGES[: STAGES.index(stage)]
    assert not (tmp_path / "run" / "model").exists() or stage == "report"
    monkeypatch.undo()
    assert run(save)["status"] == "finished"


def test_an_interrupt_is_recorded_and_passes_through(run, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("slm_exp.pipeline.stages.apply_plan", stop)
    with pytest.raises(KeyboardInterrupt):
        run()
    error = json.loads((tmp_path / "run" / "record.json").read_text())["error"]
    assert error["type"] == "KeyboardInterrupt"
    assert error["stage"] == "merge"


def test_a_plan_that_merges_nothing_is_finished_with_a_warning(run):
    record = run("method.threshold=1")
    assert record["status"] == "finished"
    assert record["layers"]["after"] == 8
    assert any("merges and removes nothing" in w for w in record["warnings"])
    assert any("lower method.threshold" in w for w in record["warnings"])


def test_a_kernel_that_decides_nothing_is_said_and_shares_the_plan(run):
    linear = run()
    rbf = run("kernel=rbf", folder="rbf")
    assert any("similarity=cka" in w for w in rbf["warnings"])
    assert rbf["plan"] == linear["plan"]
    assert next(s for s in rbf["stages"] if s["name"] == "plan")["cached"]
    assert not next(s for s in rbf["stages"] if s["name"] == "similarity")["cached"]


def _run_in_process(folder: Path) -> None:
    tiny_run(folder, HALF)


def test_two_processes_on_one_folder_compute_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    folder = tmp_path / "run"
    jobs = [context.Process(target=_run_in_process, args=(folder,)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(timeout=240)
    assert [job.exitcode for job in jobs] == [0, 0]
    assert json.loads((folder / "record.json").read_text())["status"] == "finished"


def test_a_finished_run_is_held_to_a_range_given_later(run):
    """The range is no part of the run_id, so the record is found; and then looked at."""
    measured = ("evaluation.tasks=[piqa]", "evaluation.limit=2")
    run(*measured)
    with pytest.raises(ProtocolError, match=r"outside evaluation.dense_range: piqa: expected 101 to 102"):
        run(*measured, "evaluation.dense_range={piqa: [101, 102]}")
    assert run(*measured)["status"] == "finished"
