"""The offline run on disk says what the record says, whatever ends the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from readback import OfflineRun, offline_runs

from slm_exp.core.errors import ConfigError
from slm_exp.runs.tracking.base import flat, slug
from slm_exp.runs.tracking.none import NoTracking
from slm_exp.runs.tracking.wandb import WandbTracking

CONFIG = {
    "model": {"name": "tiny", "path": ""},
    "method": {"name": "slm", "threshold": 0.9, "target_layers": None, "target_ratio": None},
    "merge_rule": {"name": "top_layer"},
    "kernel": {"name": "linear"},
    "similarity": {"name": "flat_cosine"},
    "width": {"name": "none"},
    "recovery": {"name": "none"},
    "seed": 0,
}
SECTIONS: list[dict[str, Any]] = [
    {"stages": {"load": {"seconds": 0.25, "cached": False}}},
    {"plan": {"n_layers": 8, "groups": [[4, 6]], "threshold": 0.9, "final_score": 0.93, "rule": "mean"}},
    {"params": {"before": 100, "after": 90, "ratio_removed": 0.1}},
    {"eval": {"dense": {"tasks": {"piqa": {"acc": 0.6, "acc_stderr": 0.1, "n": 20}}, "average": None}}},
]


def running_record(**more: Any) -> dict[str, Any]:
    return {"run_id": "0123456789abcdef", "config": CONFIG, "overrides": ["model=tiny"], "group": None, **more}


@pytest.fixture(autouse=True)
def _no_wandb_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in os.environ if n.startswith("WANDB_") and n != "WANDB_SERVICE"]:  # that one is W&B's own
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def track(tracking: WandbTracking, folder: Path, record: dict[str, Any] | None = None) -> OfflineRun:
    with tracking.session(record or running_record(), folder) as tracker:
        for section in SECTIONS:
            tracker.log(section)
    return offline_runs(folder)[-1]


def test_config_metrics_and_identity_equal_the_record(tmp_path: Path) -> None:
    run = track(WandbTracking(tags=["demo"], project="p"), tmp_path, running_record(group="thresholds"))
    assert (run.id, run.project, run.group, run.tags) == ("0123456789abcdef", "p", "thresholds", ["demo"])
    assert run.name == "tiny-slm-top_layer-0.9"
    assert {k: run.config[k] for k in CONFIG} == CONFIG
    assert run.config["overrides"] == ["model=tiny"]
    assert run.config["run_id"] == "0123456789abcdef"
    for section in SECTIONS:
        for path, value in flat(section).items():
            assert run.summary[path] == value
            in_history = [row[path] for row in run.history if path in row]
            assert in_history == ([] if isinstance(value, (str, bool)) else [value])
    assert [row["_step"] for row in run.history] == list(range(len(SECTIONS)))
    assert run.exit_code == 0


def test_flat_takes_named_lists_by_name_and_leaves_out_what_is_no_number() -> None:
    section = {"stages": [{"name": "plan", "seconds": 2.0}], "plan": {"groups": [[1, 3]], "a": float("nan"), "b": None}}
    assert flat(section) == {"stages/plan/seconds": 2.0}


def test_picture_and_table_are_in_the_run(tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "similarity.png"
    Image.new("RGB", (4, 4)).save(picture)
    with WandbTracking().session(running_record(), tmp_path) as tracker:
        tracker.image("similarity", picture)
        tracker.table("plan", ["slot", "layers"], [[0, "0"], [1, "1-2"]])
    (run,) = offline_runs(tmp_path)
    assert run.summary["similarity"]["_type"] == "image-file"
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    table = json.loads((folder / "files" / run.summary["plan"]["path"]).read_text())
    assert table == {"columns": ["slot", "layers"], "data": [[0, "0"], [1, "1-2"]]}
    assert (folder / "files" / run.summary["similarity"]["path"]).read_bytes() == picture.read_bytes()


def test_everything_stays_in_the_run_folder(tmp_path: Path) -> None:
    script = """
from pathlib import Path
from slm_exp.runs.tracking.wandb import WandbTracking
with WandbTracking().session({"run_id": "a", "config": {}}, Path("run")) as tracker:
    tracker.table("plan", ["slot"], [[0]])
"""
    home = tmp_path / "home"
    env = {**os.environ, "HOME": str(home), "PYTHONPATH": os.getcwd(), "XDG_CACHE_HOME": "", "XDG_DATA_HOME": ""}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not home.exists() or not list(home.rglob("*"))
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "home") == ["run"]
    assert done.stdout + done.stderr == ""


def test_one_line_of_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="slm_exp")
    track(WandbTracking(), tmp_path)
    (line,) = [r.message for r in caplog.records if r.name.startswith("slm_exp")]
    assert "0123456789abcdef" in line
    assert "slm sync" in line


def test_two_runs_in_one_process_are_two_runs_and_a_failed_one_says_so(tmp_path: Path) -> None:
    def fail() -> None:
        with WandbTracking().session(running_record(run_id="bad"), tmp_path / "a") as tracker:
            tracker.log(SECTIONS[0])
            raise ZeroDivisionError("by zero")

    with pytest.raises(ZeroDivisionError):
        fail()
    good = track(WandbTracking(), tmp_path / "b", running_record(run_id="good"))
    (bad,) = offline_runs(tmp_path / "a")
    assert (bad.id, bad.exit_code, bad.summary["status"]) == ("bad", 1, "failed")
    assert (bad.summary["error/type"], bad.summary["error/message"]) == ("ZeroDivisionError", "by zero")
    assert (good.id, good.exit_code, len(good.history)) == ("good", 0, len(SECTIONS))
    assert "WANDB_DATA_DIR" not in os.environ


def test_a_failure_is_told_as_the_record_tells_it(tmp_path: Path) -> None:
    error = KeyError("https://me:secret@host/x is not there")
    error.add_note("stage: plan")
    with pytest.raises(KeyError), WandbTracking().session(running_record(), tmp_path):
        raise error
    (run,) = offline_runs(tmp_path)
    assert run.summary["error/stage"] == "plan"
    assert run.summary["error/message"] == "'https://***@host/x is not there'"


def test_killed_two_seconds_after_the_start_the_config_is_on_disk(tmp_path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from slm_exp.runs.tracking.wandb import WandbTracking
with WandbTracking().session({running_record()!r}, Path("run")) as tracker:
    tracker.log({SECTIONS[0]!r})
    print("open", flush=True)
    time.sleep(60)
"""
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    time.sleep(2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (run,) = offline_runs(tmp_path / "run")
    assert run.exit_code is None
    assert run.id == "0123456789abcdef"
    assert {k: run.config[k] for k in CONFIG} == CONFIG
    assert run.history[0]["stages/load/seconds"] == 0.25


def test_a_repeated_run_keeps_its_id(tmp_path: Path) -> None:
    track(WandbTracking(), tmp_path)
    track(WandbTracking(), tmp_path)
    assert [run.id for run in offline_runs(tmp_path)] == ["0123456789abcdef"] * 2


def test_the_environment_names_project_and_entity_and_a_name_fits_the_server(tmp_path: Path) -> None:
    """In a process of its own: W&B reads its environment once."""
    script = f"""
from pathlib import Path
from slm_exp.runs.tracking.wandb import WandbTracking
for name, tracking in (("theirs", WandbTracking(run_name="n" * 200)), ("ours", WandbTracking(project="p", entity="e"))):
    with tracking.session({running_record()!r}, Path(name)): pass
"""
    named = {"WANDB_PROJECT": "lab", "WANDB_ENTITY": "team"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, **named, "PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stderr
    (theirs,), (ours,) = (offline_runs(tmp_path / name) for name in ("theirs", "ours"))
    assert (theirs.project, theirs.name, ours.project) == ("lab", "n" * 128, "p")
    assert (theirs.entity, ours.entity) == ("team", "e")


def test_under_an_agent_its_id_is_kept_and_run_id_is_in_the_config(tmp_path: Path) -> None:
    """In a process of its own: W&B reads its environment once."""
    script = f"""
from pathlib import Path
from slm_exp.runs.tracking.wandb import WandbTracking
assert WandbTracking().resolved_mode() == "online"
with WandbTracking(mode="offline").session({running_record()!r}, Path("run")): pass
"""
    agent = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "agentrun", "WANDB_PROJECT": "theirs"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, **agent, "PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stderr
    (run,) = offline_runs(tmp_path / "run")
    assert (run.id, run.project, run.config["run_id"]) == ("agentrun", "theirs", "0123456789abcdef")


@pytest.mark.parametrize(("mode", "environment", "expected"), [
    (None, {}, "offline"),
    (None, {"WANDB_MODE": "online"}, "online"),
    (None, {"WANDB_MODE": "dryrun"}, "offline"),
    (None, {"WANDB_SWEEP_ID": "s"}, "online"),
    (None, {"WANDB_SWEEP_ID": "s", "WANDB_MODE": "disabled"}, "disabled"),
    ("offline", {"WANDB_MODE": "online", "WANDB_SWEEP_ID": "s"}, "offline"),
])
def test_who_decides_the_mode(
    mode: str | None, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert WandbTracking(mode=mode).resolved_mode() == expected


def test_bad_modes_are_refused_with_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"tracking.mode = onlin; expected one of .*\. Did you mean online"):
        WandbTracking(mode="onlin")
    monkeypatch.setenv("WANDB_MODE", "never")
    with pytest.raises(ConfigError, match="WANDB_MODE = never"):
        WandbTracking().resolved_mode()


def test_online_without_a_key_names_the_remedy(tmp_path: Path) -> None:
    """In a process of its own, without a terminal to ask at."""
    script = f"""
from pathlib import Path
from slm_exp.core.errors import ConfigError
from slm_exp.runs.tracking.wandb import WandbTracking
try:
    with WandbTracking(mode="online").session({running_record()!r}, Path("run")): pass
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert "tracking.mode = online; W&B cannot start a run: No API key configured" in done.stdout, done.stderr
    assert "tracking.mode=offline" in done.stdout
    assert "tracking=none" in done.stdout


def test_missing_wandb_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb, or use tracking=none"):
        with WandbTracking().session(running_record(), tmp_path):
            pass


@pytest.mark.parametrize("tracking", [WandbTracking(mode="disabled"), NoTracking()])
def test_disabled_and_none_leave_nothing(tracking: WandbTracking | NoTracking, tmp_path: Path) -> None:
    with tracking.session(running_record(), tmp_path) as tracker:
        tracker.log(SECTIONS[0])
        tracker.table("plan", ["slot"], [[0]])
        tracker.image("similarity", tmp_path / "missing.png")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_mirror_warns_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with WandbTracking().session(running_record(), tmp_path) as tracker:
        tracker.image("similarity", tmp_path / "missing.png")
        tracker.log(SECTIONS[0])
    assert "record in the run's folder is complete" in caplog.text
    (run,) = offline_runs(tmp_path)
    assert run.exit_code == 0
    assert run.summary["stages/load/seconds"] == 0.25


@pytest.mark.parametrize(("change", "expected"), [
    ({}, "tiny-slm-top_layer-0.9"),
    ({"model": {"name": "hf", "path": "meta-llama/Llama-2-7b-hf"}}, "Llama-2-7b-hf-slm-top_layer-0.9"),
    ({"method": {"name": "slm", "target_layers": 25}}, "tiny-slm-top_layer-25layers"),
    ({"method": {"name": "slm", "target_ratio": 0.2}, "seed": 3}, "tiny-slm-top_layer-0.2less-seed3"),
    ({"similarity": {"name": "cka"}, "kernel": {"name": "rbf"}}, "tiny-slm-top_layer-0.9-cka_rbf"),
    ({"similarity": {"name": "angular"}, "width": {"name": "flap", "ratio": 0.2}, "recovery": {"name": "lora"}},
     "tiny-slm-top_layer-0.9-angular-flap0.2-lora"),
])
def test_names_say_what_a_run_is(change: dict[str, Any], expected: str) -> None:
    assert slug({**CONFIG, **change}) == expected
