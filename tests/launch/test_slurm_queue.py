"""What a sweep's folder and Slurm's queue say together; the cluster itself is in tests/slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slm_exp.cli import sweep as command
from slm_exp.core.errors import ConfigError
from slm_exp.launch.slurm import FILE, Queue, Submitted
from slm_exp.runs.sweep import Cell, Job


def cell(state: str, error: str | None = None) -> Cell:
    return Cell(Job("a", ("seed=0",), Path("a")), state, error=error)


def queue(job: str, **states: str) -> Queue:
    return Queue({"a": Submitted(job=job, user="me", log="slurm/1.log")}, {k.lstrip("j"): s for k, s in states.items()})


@pytest.mark.parametrize(("before", "job", "state", "after", "busy"), [
    ("waiting", "7_0", "PENDING", "waiting", True),
    ("waiting", "7_0", "RUNNING", "running", True),  # it has not got to its record yet
    ("died", "7_0", "PENDING", "waiting", True),  # preempted, requeued
    ("waiting", "7", "RUNNING", "waiting", True),  # the job on its node has not come to this cell
    ("running", "7", "RUNNING", "running", True),
    ("failed", "7_0", "RUNNING", "failed", False),  # its task is about to end
    ("failed", "7_0", "PENDING", "waiting", True),
    ("finished", "7_0", "PENDING", "finished", False),
])  # fmt: skip
def test_a_cell_in_the_queue(before: str, job: str, state: str, after: str, busy: bool) -> None:
    q = queue(job, **{f"j{job}": state})
    told = q.told(cell(before))
    assert (told.state, q.busy(cell(before))) == (after, busy)
    assert (f"job {job} is {state}" in (told.error or "")) == busy


@pytest.mark.parametrize(("later", "after"), [(60, "waiting"), (-60, "failed")])
def test_a_cell_that_failed_before_its_node_job_waits_until_the_workers_reach_it(later: int, after: str,
                                                                                 tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("{}")
    since = (tmp_path / "record.json").stat().st_mtime + later
    q = Queue({"a": Submitted(job="7", user="me", log="slurm/1.log", since=since)}, {"7": "RUNNING"})
    failed = Cell(Job("a", ("seed=0",), tmp_path), "failed", error="ValueError: of the last attempt")
    assert q.told(failed).state == after
    assert q.busy(failed) == (after == "waiting")
    if after == "failed":
        assert q.told(failed).error == "ValueError: of the last attempt"


@pytest.mark.parametrize(("before", "after"), [("waiting", "died"), ("died", "died"), ("failed", "failed"),
                                               ("running", "running"), ("finished", "finished")])  # fmt: skip
def test_a_cell_that_left_the_queue(before: str, after: str) -> None:
    q = queue("7_0", j8="RUNNING")
    assert not q.busy(cell(before))
    assert q.told(cell(before)).state == after
    if after == "died":
        assert "job 7_0 ended without a result; see slurm/1.log" in (q.told(cell(before)).error or "")
    assert Queue().told(cell(before)).state == before  # never submitted


def test_nothing_is_started_while_the_queue_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    run_id = "0" * 16
    about = {"run_id": run_id, "overrides": ["model=tiny", "evaluation=none"], "folder": run_id, "slug": "",
             "save_model": False}
    (tmp_path / "sweep.json").write_text(json.dumps({"argv": [], "cwd": str(tmp_path), "jobs": [about]}))
    (tmp_path / FILE).write_text(json.dumps({"cells": {run_id: {"job": "7_0", "user": "me", "log": "x"}}}))
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue
    monkeypatch.chdir(tmp_path)
    assert command.main(["status", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "waiting" in out
    assert "the queue does not answer here" in err
    with pytest.raises(SystemExit) as stop:
        command.main(["resume", str(tmp_path)])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "1 unfinished cells were submitted to Slurm (job 7)" in err
    assert str(tmp_path / FILE) in err
    assert not (tmp_path / run_id).exists()
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ConfigError, match="remove it"):
        command.main(["status", str(tmp_path)])
