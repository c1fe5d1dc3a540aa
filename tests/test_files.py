"""Atomic writes and digests."""

import json
from pathlib import Path

import pytest

from slm_exp.core.files import digest, probing, read_json, write_json, write_text, writing
from slm_exp.runs.record import check_writable


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    write_text(tmp_path / "a.txt", "old")

    def fail():
        with writing(tmp_path / "a.txt") as tmp:
            tmp.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("number", ["1" + "0" * 101, "-1" + "0" * 400, "1e309", "NaN"])
def test_a_number_that_nothing_can_be_reckoned_with_is_none(number, tmp_path):
    (tmp_path / "a.json").write_text(f'{{"a": [{number}]}}')
    with pytest.raises(ValueError, match="number"):
        read_json(tmp_path / "a.json")


def test_processes_that_probe_one_new_folder_do_not_disturb_each_other(tmp_path, monkeypatch):
    folder, make = tmp_path / "new" / "run", Path.mkdir
    left = [1]

    def removed_at_once(path, *args, **kwargs):
        make(path, *args, **kwargs)
        if path == folder and left and left.pop():
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", removed_at_once)
    check_writable(folder)
    assert not left
    assert not folder.parent.exists()
    with probing(folder) as probe:
        assert probe.exists()
        (folder.parent / "another").touch()
    assert [p.name for p in folder.parent.iterdir()] == ["another"]


def test_json_is_strict(tmp_path):
    write_json(tmp_path / "a.json", {"x": float("nan"), "y": (1, 2.5), 3: None})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "y": [1, 2.5], "3": None}


def test_digest_ignores_order_and_feels_values():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": (1, 2), "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert len(digest("x")) == 16
