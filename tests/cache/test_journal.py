"""The growing dictionary: what is written is found, what is torn is not taken for whole."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from slm_exp.core.cache.folder import problem
from slm_exp.core.cache.journal import FILE, Journal, read


def test_entries_come_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a")
    values = {"x": 0.1 + 0.2, "y": [1, None, "é\n"], "x y": {"deep": -1e-300}}
    for key, value in values.items():
        journal.append(key, value)
    assert Journal(tmp_path / "a").entries == values
    assert Journal(tmp_path / "nothing").entries == {}
    assert not (tmp_path / "nothing").exists()


def test_without_a_folder_it_lives_in_memory() -> None:
    journal = Journal(None)
    journal.append("x", 1)
    assert journal.entries == {"x": 1}


def test_cut_anywhere_every_whole_line_survives(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for i in range(5):
        journal.append(f"k{i}", i / 7)
    whole = (tmp_path / FILE).read_bytes()
    ends = [*[i for i, byte in enumerate(whole) if byte == ord("\n")][1:], len(whole)]
    for cut in range(len(whole)):
        (tmp_path / FILE).write_bytes(whole[:cut])
        entries, damaged = read(tmp_path)
        assert len(entries) == sum(end <= cut for end in ends)
        assert damaged <= 1
        assert all(entries[f"k{i}"] == i / 7 for i in range(len(entries)))


def test_a_torn_line_does_not_spoil_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Journal(tmp_path).append("a", 1)
    with open(tmp_path / FILE, "ab") as f:
        f.write(b'\n12345678 ["b", 2')
    with caplog.at_level(logging.WARNING):
        Journal(tmp_path).append("c", 3)
    assert "1 damaged lines" in caplog.text
    assert read(tmp_path) == ({"a": 1, "c": 3}, 1)


def test_a_changed_digit_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "scores" / "key"
    Journal(folder).append("a", 0.905)
    assert problem(folder) is None
    (folder / FILE).write_bytes((folder / FILE).read_bytes().replace(b"0.905", b"0.805"))
    assert read(folder) == ({}, 1)
    assert problem(folder) == f"1 lines of {FILE} are damaged"


def test_a_folder_that_cannot_be_written_only_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    journal = Journal(tmp_path / "file" / "scores")
    with caplog.at_level(logging.WARNING):
        journal.append("a", 1)
        journal.append("b", 2)
    assert journal.entries == {"a": 1, "b": 2}
    assert caplog.text.count("could not store scores") == 1


def test_several_processes_append_to_one_journal(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from slm_exp.core.cache.journal import Journal\n"
        "j = Journal(Path(sys.argv[1]))\n"
        "for i in range(200): j.append(f'{sys.argv[2]}-{i}', [i] * 20)\n"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "abc"]
    assert [w.wait(60) for w in workers] == [0, 0, 0]
    entries, damaged = read(tmp_path)
    assert damaged == 0
    assert entries == {f"{name}-{i}": [i] * 20 for name in "abc" for i in range(200)}
