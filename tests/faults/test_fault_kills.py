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
from server import Server

from slm_exp.core.cache.folder import find_entries, problem
from slm_exp.core.errors import SlmError
from slm_exp.runs.record import Run
from slm_exp.runs.state import FINISHED, RUNNING

CELLS = 3
SWEEP = ("-m", "model=tiny", "tracking=none", *EVALUATION, "save_model=false",
         "calibration.n_samples=2", "calibration.seq_len=16", "method.threshold=0.5,0.7,0.9", "hydra/launcher=basic")
"""In one process, so that a kill meets a run at work and not the start of an interpreter."""


def results(folder: Path) -> dict[str, Any]:
    """run_id -> what its record measured."""
    return {r["run_id"]: (r["plan"], r["eval"]) for path in folder.glob("*/record.json")
            if (r := json.loads(path.read_text()))["status"] == FINISHED}


@pytest.fixture(scope="module")
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """What the sweep measures where nobody kills it, and how long it takes."""
    at = tmp_path_factory.mktemp("undisturbed")
    ended = server.call("slm-exp", *SWEEP, f"hydra.sweep.dir={at}/sweep", f"cache.dir={at}/cache")
    assert ended.status == 0, ended.output
    found = results(at / "sweep")
    assert len(found) == CELLS
    return found, ended.seconds


def test_kills_of_a_sweep(server: Server, undisturbed: tuple[dict[str, Any], float], tmp_path: Path) -> None:
    expected, seconds = undisturbed
    chance = random.Random(None if attack.FULL else 7)
    wanted, kills, completed, round_ = size(2, 100), 0, 0, 0
    states: Counter[str] = Counter()
    stages: Counter[str] = Counter()
    while kills < wanted or round_ > completed:
        if round_ == completed:
            round_ += 1
        folder, cache = tmp_path / f"sweep{round_}", tmp_path / f"cache{round_}"
        moment = chance.uniform(0.02, 0.9) * seconds if kills < wanted else None
        ended = server.call("slm-exp", *SWEEP, f"hydra.sweep.dir={folder}", f"cache.dir={cache}", kill_after=moment)
        for path in folder.glob("*/record.json"):
            run = Run.read(path.parent)
            assert run.state != RUNNING, "the lock of a killed process is free"
            if run.state == FINISHED:
                assert Run.read(path.parent, verify=True).problems == ()
                assert (run.record.raw["plan"], run.record.raw["eval"]) == expected[run.record.run_id]
            states[run.state] += 1
            stages[run.record.stage or "between stages"] += run.state != FINISHED
        for entry in find_entries(cache) if cache.is_dir() else ():
            assert problem(entry.path) is None, entry.path
        if ended.killed:
            kills += 1
        else:
            assert ended.status == 0, ended.output
            assert results(folder) == expected
            assert not [p for p in folder.rglob("*") if p.name.startswith(".record.json.")]
            completed += 1
    found = ", ".join(f"{n} {state}" for state, n in states.most_common())
    attack.rows.append(("SIGKILL of a sweep of 3 cells at a random moment", str(kills),
                        f"records found: {found}; none damaged, {completed} of {round_} sweeps completed by the same "
                        f"command with the same numbers; killed at: "
                        f"{', '.join(f'{s} {n}' for s, n in stages.most_common() if n)}"))


def test_a_record_that_is_half_written_is_no_record(tmp_path: Path) -> None:
    """What a kill could leave if records were not renamed into place."""
    text = json.dumps({"run_id": "a", "status": FINISHED})
    for n in range(len(text)):
        (tmp_path / "record.json").write_text(text[:n])
        with pytest.raises(SlmError):
            Run.read(tmp_path)
