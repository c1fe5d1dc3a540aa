"""Trackio and TensorBoard, read back from the SQLite and event files they leave; skipped where not installed."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["model=tiny", "evaluation=none", "calibration.n_samples=4", "calibration.seq_len=32", "save_model=false",
         "method.threshold=0.5", "runtime=cpu"]  # fmt: skip


def slm_exp(folder: Path, *words: str, code: int = 0) -> dict[str, Any]:
    """A run in a process of its own; its record."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRACKIO_DIR": str(folder / "trackio"),
                   "SLM_EXP_CACHE": str(folder / "cache")}  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "slm_exp", *QUICK, *words, f"hydra.run.dir={folder / 'run'}"],
                          cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == code, done.stderr
    assert "Trackio" not in done.stdout
    return json.loads((folder / "run" / "record.json").read_text())  # type: ignore[no-any-return]


def test_trackio_has_the_record_under_one_run(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    words = ("tracking=trackio", "tracking.project=mine", "tracking.group=g", "tracking.tags=[demo]")
    record = slm_exp(tmp_path, *words)
    (tmp_path / "run" / "record.json").unlink()
    slm_exp(tmp_path, *words)  # again: no second run
    with sqlite3.connect(tmp_path / "trackio" / "mine.db") as db:
        ((name, config),) = db.execute("select run_name, config from configs").fetchall()
        rows = [json.loads(row) for (row,) in db.execute("select metrics from metrics order by id")]
    config = json.loads(config)
    assert name == f"tiny-slm-top_layer-0.5-{record['run_id'][:8]}"
    assert (config["run_id"], config["_Group"], config["tags"]) == (record["run_id"], "g", ["demo"])
    assert config["method"]["threshold"] == 0.5
    seen = {key: value for row in rows for key, value in row.items()}
    assert seen["layers/after"] == record["layers"]["after"]
    assert seen["plan/final_score"] == record["plan"]["final_score"]
    assert seen["status"] == "finished"
    assert seen["similarity"]["_type"] == "trackio.image"
    assert len(seen["plan"]["_value"]) == record["layers"]["after"]


def test_tensorboard_has_the_record_by_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = slm_exp(tmp_path, "tracking=tensorboard", "tracking.run_name=mine")
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    (after,) = found.Scalars("layers/after")
    assert after.value == record["layers"]["after"]
    assert found.Scalars("plan/final_score")[0].value == pytest.approx(record["plan"]["final_score"])
    texts = {tag.removesuffix("/text_summary"): found.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
             for tag in found.Tags()["tensors"]}
    assert (texts["run/name"], texts["config/run_id"], texts["status"]) == ("mine", record["run_id"], "finished")
    assert texts["plan"].count("\n") == 1 + record["layers"]["after"]
    assert found.Tags()["images"] == ["similarity"]


@pytest.mark.parametrize("name", ["trackio", "tensorboard"])
def test_a_failed_run_says_so(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    (tmp_path / "a.txt").write_text("any text " * 50)
    slm_exp(tmp_path, f"tracking={name}", "evaluation.corpora.a=a.txt", "evaluation.dense_range.a=[1,2]", code=1)
    if name == "trackio":
        with sqlite3.connect(tmp_path / "trackio" / "slm_exp.db") as db:
            last = json.loads(db.execute("select metrics from metrics order by id desc limit 1").fetchone()[0])
        assert (last["status"], last["error/stage"]) == ("failed", "evaluate_dense")
    else:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
        assert found.Tensors("status/text_summary")[-1].tensor_proto.string_val[0] == b"failed"
