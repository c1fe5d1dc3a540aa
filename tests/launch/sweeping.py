"""Running real sweeps of tiny models in processes of their own, with cells that misbehave on demand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MISBEHAVE = Path(__file__).with_name("misbehave")
QUICK = [
    "model=tiny",
    "evaluation=none",
    "tracking=none",
    "runtime=cpu",
    "calibration.n_samples=4",
    "calibration.seq_len=32",
    "method.threshold=0.5",
]
STAGES = [
    "load",
    "calibrate",
    "similarity",
    "evaluate_dense",
    "plan",
    "merge",
    "width",
    "recover",
    "evaluate",
    "save",
    "report",
]


@dataclass
class Sweep:
    """One sweep folder and the commands on it. Cells differ in their seed, by which they can be made to misbehave."""

    folder: Path
    cache: Path
    settings: list[str] = field(default_factory=list)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def command(self, seeds: str, *overrides: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "slm_exp",
            "-m",
            *QUICK,
            f"seed={seeds}",
            f"hydra.sweep.dir={self.folder}",
            f"cache.dir={self.cache}",
            *self.settings,
            *overrides,
        ]

    def start(self, seeds: str, *overrides: str, **deeds: tuple[str, str, str]) -> subprocess.Popen[str]:
        """The multirun as a process; `s3=("plan", "raise", "no luck")` is what the cell with seed 3 does."""
        process = subprocess.Popen(
            self.command(seeds, *overrides),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(deeds),
            cwd=ROOT,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def close(self) -> None:
        """Leave no launcher behind, whatever the test did; jobs die with it."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.communicate()

    def run(self, seeds: str, *overrides: str, **deeds: tuple[str, str, str]) -> Ended:
        process = self.start(seeds, *overrides, **deeds)
        return Ended.wait(process)

    def slm(self, *words: str) -> Ended:
        """`slm sweep ...` on this folder."""
        verb, *rest = words
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "slm_exp.cli",
                "sweep",
                verb,
                *[w for w in rest if w.startswith("-")],
                str(self.folder),
                *[w for w in rest if not w.startswith("-")],
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment({}),
            cwd="/",
        )
        return Ended.wait(process)

    def records(self) -> dict[int, dict[str, Any]]:
        """seed -> record, of every cell that has one that can be read."""
        found = [json.loads(p.read_text()) for p in self.folder.glob("*/record.json")]
        return {r["config"]["seed"]: r for r in found}

    def folder_of(self, seed: int) -> Path:
        jobs = json.loads((self.folder / "sweep.json").read_text())["jobs"]
        return next(self.folder / j["folder"] for j in jobs if f"seed={seed}" in j["overrides"])

    def statuses(self) -> dict[int, str]:
        return {seed: r["status"] for seed, r in sorted(self.records().items())}

    def until(self, seed: int, stage: str, within: float = 60) -> dict[str, Any]:
        """Wait until that cell's record says that it is in that stage; the record."""

        def there() -> dict[str, Any] | None:
            record = self.records().get(seed)
            return record if record and record.get("stage") == stage else None

        return wait_for(there, within)

    def stamps(self) -> dict[int, int]:
        """When each finished record was written; a cell that is not computed again keeps its own."""
        return {
            seed: (self.folder_of(seed) / "record.json").stat().st_mtime_ns
            for seed, status in self.statuses().items()
            if status == "finished"
        }

    def check_whole(self) -> None:
        """Nothing half-written stands under a final name, and nothing temporary is left by processes that live."""
        for path in self.folder.rglob("*.json"):
            json.loads(path.read_text())
        for seed, record in self.records().items():
            if record["status"] == "finished":
                assert [s["name"] for s in record["stages"]] == STAGES, seed
                assert (self.folder_of(seed) / "plan.json").exists()


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @classmethod
    def wait(cls, process: subprocess.Popen[str], within: float = 180) -> Ended:
        try:
            out, err = process.communicate(timeout=within)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"still at work after {within} s:\n{out}\n{err}") from None
        return cls(process.returncode, out, err)


def environment(deeds: dict[str, tuple[str, str, str]]) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLM_EXP_SWEEP", "WANDB_"))}
    paths = [str(MISBEHAVE), str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    env |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    if deeds:
        env["SLM_TEST_MISBEHAVE"] = json.dumps({seed.lstrip("s"): deed for seed, deed in deeds.items()})
    return env


def wait_for(look: Callable[[], Any], within: float = 60) -> Any:
    deadline = time.monotonic() + within
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
    return found
