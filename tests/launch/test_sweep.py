"""A multirun end to end on tiny models: it goes on past failures, is resumed, and shares what can be shared."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from sweeping import QUICK, STAGES, Sweep, environment, wait_for


def test_a_sweep_survives_what_its_cells_do_and_resume_completes_it(sweep: Sweep) -> None:
    process = sweep.start("0,1,2", s0=("plan", "hang", ""), s1=("plan", "raise", "no luck"))
    pid = sweep.until(0, "plan")["pid"]

    second = sweep.run("0,1,2")  # meanwhile, another launcher on the same folder: refused by name
    assert second.code == 2
    assert f"pid {process.pid} " in second.err
    assert str(sweep.folder) in second.err
    assert re.search(r"running .*seed=0", sweep.slm("status").out)

    os.kill(pid, signal.SIGKILL)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert sweep.statuses() == {0: "failed", 1: "failed", 2: "finished"}
    records = sweep.records()
    assert records[0]["error"] == {"type": "ProcessDied", "message": "killed by SIGKILL", "stage": "plan"}
    assert records[1]["error"] == {"type": "ValueError", "message": "no luck", "stage": "plan"}
    for seed in (0, 1):
        assert records[seed]["run_id"] in err
        assert str(sweep.folder_of(seed) / "run.log") in err
    assert "Traceback" in (sweep.folder_of(1) / "run.log").read_text()
    index = json.loads((sweep.folder / "index.json").read_text())
    assert index["counts"] == {"finished": 1, "failed": 2, "died": 0, "running": 0, "waiting": 0}
    for record in records.values():
        assert record["group"] == sweep.folder.name
        assert record["config"]["save_model"] is False
        assert (sweep.folder / record["run_id"]).is_dir()
        assert not any(o.startswith("hydra") for o in record["overrides"])
    shown = sweep.slm("status")
    assert shown.code == 1
    assert re.search(r"failed .*seed=1 .*plan.*no luck", shown.out)

    before = sweep.stamps()
    again = sweep.slm("resume")
    assert again.code == 0, again.err
    assert set(sweep.statuses().values()) == {"finished"}
    assert before.items() <= sweep.stamps().items()  # what was finished was not touched
    assert again.out.count("started") == 2
    assert sweep.slm("status").code == 0
    sweep.check_whole()


@pytest.mark.parametrize("whole_group", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_jobs_die_with_a_killed_launcher_and_resume_completes(sweep: Sweep, whole_group: bool) -> None:
    process = sweep.start("0,1", s1=("merge", "hang", ""))
    pid = sweep.until(1, "merge")["pid"]
    wait_for(lambda: sweep.statuses().get(0) == "finished")
    before = sweep.stamps()
    os.killpg(process.pid, signal.SIGKILL) if whole_group else process.kill()
    process.communicate()
    wait_for(lambda: not os.path.exists(f"/proc/{pid}") or "Z" in open(f"/proc/{pid}/stat").read().split()[2])
    shown = sweep.slm("status")
    assert re.search(r"died .*seed=1 .*stage merge", shown.out)
    sweep.check_whole()
    again = sweep.slm("resume")
    assert again.code == 0, again.err
    assert before.items() <= sweep.stamps().items()
    assert set(sweep.statuses().values()) == {"finished"}


@pytest.mark.slow
def test_a_cell_that_raises_in_every_stage(sweep: Sweep) -> None:
    """All in one process, by Hydra's own launcher: there the sweeper, the index and resume hold as well."""
    sweep.settings = ["hydra/launcher=basic"]
    deeds = {f"s{i}": (name, "exit" if name == "recover" else "raise", "7") for i, name in enumerate(STAGES)}
    seeds = ",".join(map(str, range(len(STAGES) + 1)))
    ended = sweep.run(seeds, **deeds)
    assert ended.code == 1
    records = sweep.records()
    assert records.pop(len(STAGES))["status"] == "finished"
    assert {s: (r["status"], r["error"]["stage"]) for s, r in records.items()} == {
        i: ("failed", name) for i, name in enumerate(STAGES)
    }
    assert all(r["run_id"] in ended.err for r in records.values())
    again = sweep.slm("resume")
    assert again.code == 0, again.err
    assert set(sweep.statuses().values()) == {"finished"}
    sweep.check_whole()


@pytest.mark.slow
def test_two_sweeps_at_once_on_one_cache_compute_shared_stages_once(sweep: Sweep) -> None:
    other = Sweep(sweep.folder.with_name("other"), sweep.cache, sweep.settings)
    grids = [(sweep, "0"), (other, "0")]
    started = [
        s.start(seeds, f"merge_rule={rule}") for (s, seeds), rule in zip(grids, ("mean", "keep_low"), strict=True)
    ]
    assert [p.wait(120) for p in started] == [0, 0]
    records = [*sweep.records().values(), *other.records().values()]
    computed = [s["name"] for r in records for s in r["stages"] if not s["cached"]]
    assert [computed.count(name) for name in ("calibrate", "similarity", "evaluate_dense")] == [1, 1, 1]
    shown = sweep.slm("status", "--json")
    assert [c["state"] for c in json.loads(shown.out)] == ["finished"]


@pytest.mark.slow
def test_a_job_that_outlived_its_launcher_is_waited_for(sweep: Sweep) -> None:
    first = sweep.run("0", s0=("load", "raise", "x"))
    assert first.code == 1
    folder, go = sweep.folder_of(0), sweep.folder.with_name("go")
    alone = [sys.executable, "-m", "slm_exp", *QUICK, "seed=0", "save_model=false", f"cache.dir={sweep.cache}"]
    deeds = {"s0": ("merge", "until", str(go))}
    with open(sweep.folder.with_name("orphan.log"), "w") as log:
        orphan = subprocess.Popen([*alone, f"hydra.run.dir={folder}"], stdout=log, stderr=log, env=environment(deeds))
    try:
        assert sweep.until(0, "merge")["pid"] == orphan.pid
        process = sweep.start("0")
        wait_for(lambda: "another process is computing run" in (folder / "run.log").read_text())
        assert process.poll() is None
        go.touch()
        assert process.wait(60) == 0
    finally:
        orphan.kill()
        orphan.wait()
    assert sweep.records()[0]["pid"] == orphan.pid  # its result stands; nothing was computed again


@pytest.mark.slow
def test_out_of_memory_is_retried_with_half_the_batch(sweep: Sweep) -> None:
    ended = sweep.run("0", "hydra.launcher.retries=1", s0=("evaluate", "memory", "no more"))
    assert ended.code == 1
    assert "again with evaluation.batch_size=2" in ended.out
    assert sweep.records()[0]["config"]["evaluation"]["batch_size"] == 2
    assert sweep.folder_of(0).name == sweep.records()[0]["run_id"]  # the same run, whatever the batch
