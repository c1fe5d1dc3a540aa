"""Disks that are full at every write of a run: for real, a tmpfs that is one page larger at each step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import attack
import pytest
from attack import EVALUATION, FULL, SHARE
from server import Server

from slm_exp.core.cache.folder import find_entries, problem
from slm_exp.core.errors import SlmError
from slm_exp.runs.record import Run
from slm_exp.runs.state import FINISHED

PAGE = 4096
RUN = ("model=tiny", "tracking=none", *EVALUATION, "save_model=false",
       "calibration.n_samples=2", "calibration.seq_len=16", "method.threshold=0.6")


def mount(path: Path, options: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder to mount on."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a small file system needs root")
    path = tmp_path / "disk"
    path.mkdir()
    yield path
    subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)


def pages(folder: Path) -> int:
    return sum(-(-p.stat().st_size // PAGE) for p in folder.rglob("*") if p.is_file()) + 8


@pytest.mark.parametrize("where", ["the run's folder", "the cache"])
def test_full_at_every_write(where: str, disk: Path, server: Server, tmp_path: Path) -> None:
    """A full disk of the run's folder fails the run in a line; one of the cache costs time only. Never a wrong file."""
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    ended = server.call("slm-exp", *RUN, f"hydra.run.dir={whole}", f"cache.dir={cache}")
    assert ended.status == 0, ended.output
    expected = json.loads((whole / "record.json").read_text())
    here = where == "the run's folder"
    most = 2 * pages(whole if here else cache)
    step = max(1, round(1 / SHARE)) if FULL else most - 2
    ways: Counter[str] = Counter()
    for n in range(2, most + step, step):
        mount(disk, f"size={n * PAGE}")
        try:
            run, store = (disk / "run", cache) if here else (tmp_path / f"run{n}", disk / "cache")
            words = (*RUN, f"hydra.run.dir={run}", f"cache.dir={store}")
            ended = server.call("slm-exp", *words)
            assert "Traceback" not in ended.output or "No space left" in ended.output, ended.output
            try:
                read = Run.read(run, verify=True)
                state = read.state
                assert (read.problems == ()) or state != FINISHED
                assert (state == FINISHED) == (ended.status == 0)
            except SlmError:
                state = "no record"
                assert ended.status != 0
            if not here:
                assert state == FINISHED, ended.output
                assert all(problem(entry.path) is None for entry in find_entries(store) if store.is_dir())
            ways[state] += 1
            if state != FINISHED:
                subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
                again = server.call("slm-exp", *words)
                assert again.status == 0, again.output
            record = json.loads((run / "record.json").read_text())
            assert (record["plan"], record["eval"]) == (expected["plan"], expected["eval"])
            assert not list(run.rglob("*.tmp"))
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=False)
    found = ", ".join(f"{n} {state}" for state, n in ways.most_common())
    attack.rows.append((f"the disk of {where} full after n pages, n = 2, {2 + step} ... {most}", str(ways.total()),
                        f"{found}; none damaged, the same command completed each with the same numbers"))
