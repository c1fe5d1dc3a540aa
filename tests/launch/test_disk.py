"""Disks that are full or read-only, for real: a small tmpfs, no mock."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from sweeping import Sweep


@pytest.mark.slow
def test_a_disk_that_fills_up_while_a_record_is_written(mount: Callable[..., Path], tmp_path: Path) -> None:
    disk = mount("disk", "size=4m")
    sweep = Sweep(disk / "sweep", tmp_path / "cache", ["hydra.launcher.workers=1"])
    filler = disk / "filler"
    ended = sweep.run("0,1", s1=("similarity", "fill", str(filler)))
    assert ended.code == 1
    assert sweep.records()[0]["status"] == "finished"
    assert sweep.records()[1]["status"] != "finished"
    assert "seed=1" in ended.err
    sweep.check_whole()
    assert sweep.slm("status").code == 1
    filler.unlink()
    before = sweep.stamps()
    again = sweep.slm("resume")
    assert again.code == 0, again.err
    assert before.items() <= sweep.stamps().items()
    sweep.check_whole()


@pytest.mark.slow
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(mount: Callable[..., Path], tmp_path: Path) -> None:
    disk = mount("disk", "size=4m")
    sweep = Sweep(disk / "sweep", tmp_path / "cache", ["hydra.launcher.workers=1", "save_model=true"])
    filler = disk / "filler"
    ended = sweep.run("0", s0=("save", "fill", str(filler)))
    assert ended.code == 1
    assert not (sweep.folder_of(0) / "model").exists()  # a checkpoint appears whole or not at all
    sweep.check_whole()
    filler.unlink()
    again = sweep.slm("resume")
    assert again.code == 0, again.err
    assert (sweep.folder_of(0) / "model" / "config.json").exists()
    assert not list(sweep.folder.rglob("*.tmp"))


def test_a_read_only_output_folder_is_refused_before_anything_loads(mount: Callable[..., Path], tmp_path: Path) -> None:
    disk = mount("disk", "ro")
    ended = Sweep(disk / "sweep", tmp_path / "cache").run("0,1")
    assert ended.code == 2
    assert "hydra.sweep.dir" in ended.err
    assert "Read-only" in ended.err


@pytest.mark.slow
def test_a_cell_whose_folder_is_read_only_fails_alone(mount: Callable[..., Path], sweep: Sweep) -> None:
    first = sweep.run("0,1", s0=("load", "raise", "x"), s1=("load", "raise", "x"))
    assert first.code == 1
    folder = sweep.folder_of(0)
    mount(str(folder.relative_to(sweep.folder.parent)), "ro")
    ended = sweep.slm("resume")
    assert ended.code == 1
    assert "Read-only file system" in ended.err
    assert sweep.records()[1]["status"] == "finished"
    subprocess.run(["umount", str(folder)], check=True)
    assert sweep.slm("resume").code == 0


@pytest.mark.slow
def test_a_cache_on_a_full_disk_costs_time_not_the_run(mount: Callable[..., Path], sweep: Sweep) -> None:
    disk = mount("cache", "size=64k")
    (disk / "filler").write_bytes(b"x" * 60_000)
    ended = sweep.run("0")
    assert ended.code == 0, ended.err
    assert sweep.statuses() == {0: "finished"}


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncate", "garbage"])
def test_a_damaged_record_is_not_taken_for_a_finished_one(sweep: Sweep, damage: str) -> None:
    assert sweep.run("0").code == 0
    path = sweep.folder_of(0) / "record.json"
    path.write_text(path.read_text()[:200] if damage == "truncate" else "{}")
    assert sweep.slm("status").code == 1
    assert sweep.slm("resume").code == 0
    assert json.loads(path.read_text())["status"] == "finished"
