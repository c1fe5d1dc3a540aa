"""`slm cache` on a small cache: what it shows, what pruning takes and leaves, what verifying finds."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from slm_exp.cli.cache import find_entries, main
from slm_exp.cli.main import run_command
from slm_exp.core.cache.store import StageStore

DAY = 86400


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Three entries of 1, 2 and 3 kB, last used 30, 20 and 10 days ago, and what a killed process left."""
    store = StageStore(tmp_path)
    for i in (1, 2, 3):
        entry = store.entry_folder(
            "plan" if i < 3 else "model", {"i": i}, lambda f, i=i: (f / "x").write_bytes(b"x" * 1000 * i)
        )
        os.utime(entry, (time.time() - (4 - i) * 10 * DAY,) * 2)
    tmp = tmp_path / "plan" / ".dead.1.abc.tmp"
    tmp.mkdir()
    (tmp / "half").write_bytes(b"x" * 500)
    os.utime(tmp, (time.time() - 2 * DAY,) * 2)
    return tmp_path


def left(cache: Path) -> list[int]:
    """Sizes in kB, least recently used first."""
    return [e.bytes // 1000 for e in find_entries(cache)]


def test_show_counts_by_stage(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dir", str(cache)]) == 0
    said = capsys.readouterr().out
    assert "3 entries" in said
    assert sorted(line.split()[:2] for line in said.splitlines()[1:3]) == [["model", "1"], ["plan", "2"]]
    assert "1 half-written" in said
    assert left(cache) == [1, 2, 3]


@pytest.mark.parametrize(
    ("args", "kept"),
    [
        (["--older-than", "25d"], [2, 3]),
        (["--older-than", "2w"], [3]),
        (["--older-than", "365d"], [1, 2, 3]),
        (["--max-size", "4kB"], [3]),
        (["--max-size", "1GB"], [1, 2, 3]),
        (["--max-size", "0"], []),
        (["--older-than", "25d", "--max-size", "4kb"], [3]),
        (["--older-than", "1d", "--dry-run"], [1, 2, 3]),
    ],
)
def test_prune_takes_the_least_recently_used(cache: Path, args: list[str], kept: list[int]) -> None:
    assert main(["--dir", str(cache), "prune", *args]) == 0
    assert left(cache) == kept
    assert (cache / "plan" / ".dead.1.abc.tmp").exists() == ("--dry-run" in args)


def test_use_makes_an_entry_young_again(cache: Path) -> None:
    StageStore(cache).entry_folder("plan", {"i": 1}, lambda f: pytest.fail("it is there"))
    main(["--dir", str(cache), "prune", "--older-than", "5d"])
    assert left(cache) == [1]


def test_prune_leaves_an_entry_that_is_being_computed(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = find_entries(cache)[0].path
    with FileLock(entry.with_name(f".{entry.name}.lock")):
        main(["--dir", str(cache), "prune", "--older-than", "1d"])
    assert left(cache) == [1]
    assert "1 in use" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_verify_names_damage_and_repair_removes_it(
    cache: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--dir", str(cache), "verify"]) == 0
    file = find_entries(cache)[1].path / "x"
    if damage == "truncate":
        file.write_bytes(b"x" * 1999)
    elif damage == "flip":
        file.write_bytes(b"y" * 2000)
    elif damage == "remove":
        file.unlink()
    else:
        (file.parent / "manifest.json").write_text("{")
    assert main(["--dir", str(cache), "verify"]) == 1
    assert str(file.parent) in capsys.readouterr().err
    assert main(["--dir", str(cache), "verify", "--repair"]) == 0
    assert main(["--dir", str(cache), "verify"]) == 0
    assert len(left(cache)) == 2


@pytest.mark.parametrize("args", [["prune"], ["prune", "--older-than", "soon"], ["prune", "--max-size", "3 apples"]])
def test_wrong_calls_name_the_remedy(tmp_path: Path, args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["--dir", str(tmp_path), *args]) == 2
    assert "--" in capsys.readouterr().err


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["--dir", str(tmp_path / "none")]) == 2
    assert "cache.dir" in capsys.readouterr().err
