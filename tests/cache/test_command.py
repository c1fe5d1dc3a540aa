"""`slm cache` on a small cache: what it shows, what pruning takes and leaves, what verifying finds."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from slm_exp.cli.cache import main
from slm_exp.cli.main import run_command
from slm_exp.core.cache.folder import MARKER, find_entries, remove
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
        (["--max-size", "4000B"], [3]),
        (["--max-size", "0.004 mb"], [3]),
        (["--max-size", "4KiB"], [3]),
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


WRONG_AGES, WRONG_SIZES = ("soon", "30", "30mb", "3D2", ""), ("3 apples", "20", "20Gi", "-1GB", "1e9", "3d")


@pytest.mark.parametrize("args", [["prune"], *(["prune", "--older-than", age] for age in WRONG_AGES),
                                  *(["prune", "--max-size", size] for size in WRONG_SIZES)])
def test_wrong_calls_name_the_remedy(tmp_path: Path, args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["--dir", str(tmp_path), *args]) == 2
    assert "--" in capsys.readouterr().err


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["--dir", str(tmp_path / "none")]) == 2
    assert "cache.dir" in capsys.readouterr().err


# --- what is no cache --------------------------------------------------------------------------------------------


DESTRUCTIVE = [["prune", "--max-size", "0"], ["prune", "--older-than", "0s"], ["verify", "--repair"]]


def everything(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() and not p.is_symlink() else ""
            for p in folder.rglob("*")}


@pytest.mark.parametrize("by", ["--dir", "variable"])
@pytest.mark.parametrize("args", DESTRUCTIVE)
def test_a_folder_that_is_no_cache_is_refused_untouched(
    tmp_path: Path, args: list[str], by: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("thesis/chapter/text.tex", "plan/0123456789abcdef/text.tex", "model/photos/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("years of work")
    before = everything(tmp_path)
    monkeypatch.setenv("SLM_EXP_CACHE", str(tmp_path))
    assert run_command(main, [*(["--dir", str(tmp_path)] * (by == "--dir")), *args]) == 2
    assert "nothing in it was touched" in capsys.readouterr().err
    assert everything(tmp_path) == before


@pytest.mark.parametrize("args", DESTRUCTIVE)
def test_what_is_no_entry_stays_in_a_cache(
    cache: Path, args: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("thesis")
    (outside / "text.tex").write_text("years of work")
    (outside / "0123456789abcdef").mkdir()
    (outside / "0123456789abcdef" / "more.tex").write_text("more years")
    for name in ("thesis/chapter/text.tex", "plan/notes/text.txt", "plan/0123456789ABCDEF/x", "plan/0123456789abcde/x"):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text("mine")
    for name in ("plan/fedcba9876543210", "width", "link"):
        (cache / name).symlink_to(outside)
    before = {name: text for name, text in everything(cache).items() if text == "mine"}
    assert main(["--dir", str(cache), *args]) == 0
    assert before == {name: text for name, text in everything(cache).items() if text == "mine"}
    assert (outside / "text.tex").exists()
    assert (outside / "0123456789abcdef" / "more.tex").exists()
    assert (cache / "plan/fedcba9876543210").is_symlink()
    assert not remove(cache / "plan/fedcba9876543210")
    assert not remove(cache / "thesis/chapter")


def test_a_cache_of_an_older_version_is_taken_over(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / MARKER).unlink()
    (cache / "digests").mkdir()
    (cache / "digests" / "0123456789abcdef.json").write_text("{}")
    (cache / "thesis.tex").write_text("mine")
    assert run_command(main, ["--dir", str(cache), "prune", "--max-size", "4kB"]) == 2
    assert "holds thesis.tex" in capsys.readouterr().err
    assert left(cache) == [1, 2, 3]
    (cache / "thesis.tex").unlink()
    assert main(["--dir", str(cache), "prune", "--max-size", "4kB"]) == 0
    assert left(cache) == [3]
    assert (cache / MARKER).is_file()


def test_a_run_marks_its_cache_but_no_folder_that_holds_more(tmp_path: Path) -> None:
    for folder in (tmp_path / "new", tmp_path / "mine"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / "thesis.tex").write_text("mine")
        StageStore(folder).entry_folder("plan", {}, lambda f: (f / "x").write_bytes(b"x"))
        assert (folder / MARKER).exists() == (folder.name == "new")
    (tmp_path / "forged").mkdir()
    (tmp_path / "forged" / MARKER).write_text("Signature: 8a477f597d28d172789f06886806bc55")  # some other program's
    assert run_command(main, ["--dir", str(tmp_path / "forged"), "prune", "--max-size", "0"]) == 2


def test_links_and_locks_do_not_end_a_command_nor_stay(cache: Path) -> None:
    (cache / "plan" / ".x.1.tmp").symlink_to("/nonexistent")
    old = cache / "plan" / ".0123456789abcdef.lock"
    old.write_text("")
    for path in (cache / "plan" / ".x.1.tmp", old):
        os.utime(path, (time.time() - 2 * DAY,) * 2, follow_symlinks=False)
    assert main(["--dir", str(cache)]) == 0
    assert main(["--dir", str(cache), "prune", "--max-size", "0"]) == 0
    assert sorted(p.name for p in (cache / "plan").iterdir()) == []


@pytest.mark.parametrize("text", [b"[]", b"3", b'{"files": 3}', b'{"files": {"x": {}}}', b'{"files": {"x": 3}}',
                                  b'{"files": {"../../x": {"bytes": 1, "digest": ""}}}', b"\xff", b"[" * 10**5])
def test_a_damaged_manifest_costs_that_entry(cache: Path, text: bytes) -> None:
    (find_entries(cache)[0].path / "manifest.json").write_bytes(text)
    assert main(["--dir", str(cache), "verify"]) == 1
    assert main(["--dir", str(cache), "verify", "--repair"]) == 0
    assert left(cache) == [2, 3]
