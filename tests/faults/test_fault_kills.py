"""SIGKILL at a random moment: nothing half-written counts, and the same command completes what is missing."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import attack
import pytest
from attack import EVALUATION, size
from server import Ended, Server

from slm_exp.core.cache.folder import find_entries, problem
from slm_exp.core.errors import SlmError
from slm_exp.runs.record import Run
from slm_exp.runs.state import FINISHED, RUNNING

CELLS = 3
SWEEP = ("-m", "model=tiny", "tracking=none", *EVALUATION, "save_model=false",
         "calibration.n_samples=2", "calibration.seq_len=16", "method.threshold=0.5,0.7,0.9", "hydra/launcher=basic")
"""In one process, so that a kill meets a run at work and not the start of an interpreter."""


TRAINING = ("model=tiny", "tracking=none", "evaluation=none", "save_model=true", "calibration.n_samples=2",
            "calibration.seq_len=16", "method=first", "method.target_layers=6", "recovery=lora",
            "recovery.data=bundled", "recovery.seq_len=32", "recovery.batch_size=4", "recovery.micro_batch_size=2",
            "recovery.max_steps=40", "recovery.checkpoint_every=4", "recovery.warmup_steps=1", "recovery.held_out=4",
            "recovery.lr=1e-2")
"""One run that trains, with checkpoints to go on from, and saves its model."""
TIMED = ("seconds", "minutes", "estimate")
"""Of a recovery's report, and nothing to compare."""


def records(folder: Path) -> list[Path]:
    """Of a run, or of the runs of a sweep."""
    return [*folder.glob("record.json"), *folder.glob("*/record.json")]


def outcome(record: dict[str, Any]) -> tuple[Any, ...]:
    """What a run measured and left: plan, scores, training, the weights' digests."""
    trained = {key: value for key, value in (record.get("recovery") or {}).items() if key not in TIMED}
    weights = {name: about["sha256"] for name, about in record["files"].items() if name.endswith(".safetensors")}
    return record["plan"], record["eval"], trained, weights


def results(folder: Path) -> dict[str, Any]:
    """run_id -> the outcome of a finished run."""
    return {r["run_id"]: outcome(r) for path in records(folder)
            if (r := json.loads(path.read_text()))["status"] == FINISHED}


def killed(what: str, server: Server, words: tuple[str, ...], where: str, cells: int, wanted: int,
           tmp_path: Path) -> None:
    """Kill a command `wanted` times, at random moments of what it takes undisturbed; each time it is given again, and
    where it came to its end, a new folder is begun. Adds a row to the table.

    Args:
        where: the setting that names its folder.
        cells: the runs it makes.
    """
    def call(name: str, kill_after: float | None = None) -> Ended:
        return server.call("slm-exp", *words, f"{where}={tmp_path / name}", f"cache.dir={tmp_path / name}_cache",
                           kill_after=kill_after)

    whole = call("undisturbed")
    assert whole.status == 0, whole.output
    expected = results(tmp_path / "undisturbed")
    assert len(expected) == cells
    chance = random.Random(None if attack.FULL else 7)
    kills, completed, round_ = 0, 0, 0
    states: Counter[str] = Counter()
    stages: Counter[str] = Counter()
    while kills < wanted or round_ > completed:
        if round_ == completed:
            round_ += 1
        folder, cache = tmp_path / f"round{round_}", tmp_path / f"round{round_}_cache"
        ended = call(folder.name, chance.uniform(0.02, 0.95) * whole.seconds if kills < wanted else None)
        for path in records(folder):
            run = Run.read(path.parent)
            assert run.state != RUNNING, "the lock of a killed process is free"
            if run.state == FINISHED:
                assert Run.read(path.parent, verify=True).problems == ()
                assert outcome(run.record.raw) == expected[run.record.run_id]
            states[run.state] += 1
            stages[run.record.stage or "between stages"] += run.state != FINISHED
        for entry in find_entries(cache) if cache.is_dir() else ():
            assert problem(entry.path) is None, entry.path
        if ended.killed:
            kills += 1
        else:
            assert ended.status == 0, ended.output
            assert results(folder) == expected
            assert not [p for p in folder.rglob(".*") if p.name.endswith(".tmp") or p.name.startswith(".model.")]
            completed += 1
    found = ", ".join(f"{n} {state}" for state, n in states.most_common())
    attack.rows.append((f"SIGKILL of {what} at a random moment", str(kills),
                        f"records found: {found}; none damaged, {completed} of {round_} completed by the same command "
                        f"with the same numbers; killed at: "
                        f"{', '.join(f'{s} {n}' for s, n in stages.most_common() if n)}"))


def test_kills_of_a_sweep(server: Server, tmp_path: Path) -> None:
    killed(f"a sweep of {CELLS} cells", server, SWEEP, "hydra.sweep.dir", CELLS, size(2, 100), tmp_path)


@pytest.mark.skipif(not attack.FULL, reason="a minute: make test-faults")
def test_kills_of_a_training_that_saves_its_model(server: Server, tmp_path: Path) -> None:
    """It goes on from its last whole checkpoint, to the same bits."""
    killed("a run that trains and saves its model", server, TRAINING, "hydra.run.dir", 1, size(0, 12), tmp_path)


def test_a_record_that_is_half_written_is_no_record(tmp_path: Path) -> None:
    """What a kill could leave if records were not renamed into place."""
    text = json.dumps({"run_id": "a", "status": FINISHED})
    for n in range(len(text)):
        (tmp_path / "record.json").write_text(text[:n])
        with pytest.raises(SlmError):
            Run.read(tmp_path)
