"""What W&B holds of a multirun, read back from its offline files."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from sweeping import Sweep, wait_for

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tracking"))

from readback import read_run


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["processes", "joblib", "basic"])
def test_one_run_per_cell_in_one_group_under_its_run_id(sweep: Sweep, launcher: str) -> None:
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    settings = {
        "processes": ["hydra.launcher.workers=2"],
        "joblib": ["hydra/launcher=joblib_cores"],
        "basic": ["hydra/launcher=basic"],
    }
    sweep.settings = ["tracking=wandb", *settings[launcher]]
    ended = sweep.run("0,1,2", s1=("plan", "raise", "no luck"))
    assert ended.code == 1, ended.err
    for seed, record in sweep.records().items():
        folders = list((sweep.folder_of(seed) / "wandb").glob("offline-run-*"))
        assert len(folders) == 1
        run = read_run(folders[0])
        assert (run.id, run.group) == (record["run_id"], sweep.folder.name)
        assert run.config["run_id"] == record["run_id"]
        assert run.exit_code == (1 if seed == 1 else 0)
        if seed != 1:
            assert run.summary["layers/after"] == record["layers"]["after"]
    again = sweep.slm("resume")
    assert again.code == 0, again.err
    ids = {read_run(f).id for f in sweep.folder.glob("*/wandb/offline-run-*")}
    assert ids == {r["run_id"] for r in sweep.records().values()}  # the repeated cell is no second run


@pytest.mark.slow
def test_a_killed_cell_leaves_a_readable_run(sweep: Sweep) -> None:
    sweep.settings = ["tracking=wandb"]
    process = sweep.start("0", s0=("merge", "hang", ""))
    record = sweep.until(0, "merge")
    folder = next((sweep.folder_of(0) / "wandb").glob("offline-run-*"))
    wait_for(lambda: "stages/plan/seconds" in read_run(folder).summary)  # W&B writes within a second
    os.kill(record["pid"], signal.SIGKILL)
    process.communicate(timeout=60)
    run = read_run(folder)
    assert run.id == record["run_id"]
    assert run.exit_code is None
    assert run.config["seed"] == 0
    assert json.loads((sweep.folder_of(0) / "record.json").read_text())["status"] == "failed"
