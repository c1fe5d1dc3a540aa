"""Big files are hashed once, and again whenever they may have changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slm_exp.core.cache import digests
from slm_exp.core.cache.digests import content_digest, files_digest
from slm_exp.core.files import file_digest


def overwrite(file: Path, stat: os.stat_result) -> None:
    """Other content of the same size in the same inode, with the times put back."""
    with open(file, "r+b") as f:
        f.write(b"WEIGHTS")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture
def read(monkeypatch):
    """The files that were read through."""
    seen = []
    monkeypatch.setattr(digests, "SMALL", 0)
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    monkeypatch.setattr(digests, "_seen", {})
    monkeypatch.setattr(digests, "file_digest", lambda p: seen.append(p.name) or file_digest(p))
    return seen


def test_an_unchanged_file_is_read_once(tmp_path, read):
    file = tmp_path / "a"
    file.write_bytes(b"weights")
    assert content_digest(file) == content_digest(file) == file_digest(file)
    assert read == ["a"]


def test_any_sign_of_change_means_reading(tmp_path, read):
    file = tmp_path / "a"
    file.write_bytes(b"weights")
    first = content_digest(file)
    stat = file.stat()
    file.write_bytes(b"WEIGHTS")  # same size
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert content_digest(file) != first
    other = tmp_path / "b"
    other.write_bytes(b"weightz")
    os.utime(other, ns=(stat.st_atime_ns, file.stat().st_mtime_ns))
    os.replace(other, file)  # same size and mtime, another inode
    assert content_digest(file) == file_digest(file)
    assert len(read) == 3


def test_a_small_file_is_always_read(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"weights")
    first, stat = content_digest(file), file.stat()
    overwrite(file, stat)
    assert content_digest(file) == file_digest(file) != first


def test_a_file_that_changed_a_moment_ago_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "SMALL", 0)
    file = tmp_path / "a"
    file.write_bytes(b"weights")
    content_digest(file)
    assert digests.must_be_read(file)
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    content_digest(file)
    assert not digests.must_be_read(file)


def test_a_large_file_changed_with_its_times_put_back_is_read(tmp_path, read):
    file = tmp_path / "a"
    file.write_bytes(b"weights")
    first, stat = content_digest(file), file.stat()
    overwrite(file, stat)
    assert file.stat().st_ino == stat.st_ino
    assert content_digest(file) == file_digest(file) != first


def test_the_memory_lies_in_the_cache_folder_that_a_run_uses(tmp_path, monkeypatch, read):
    monkeypatch.setenv("SLM_EXP_CACHE", str(tmp_path / "default"))
    file = tmp_path / "a"
    file.write_bytes(b"weights")
    digests.remember_in(tmp_path / "mine")
    try:
        content_digest(file)
    finally:
        digests.remember_in(None)
    assert len(list((tmp_path / "mine" / "digests").iterdir())) == 1
    assert not (tmp_path / "default").exists()
    digests._seen.clear()  # as another process
    content_digest(file)
    assert len(read) == 2


@pytest.mark.parametrize("spoilt", ["", "{}", "[1]", '{"path": 3}'])
def test_a_spoilt_memory_only_costs_time(tmp_path, monkeypatch, spoilt):
    monkeypatch.setenv("SLM_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SMALL", 0)
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    monkeypatch.setattr(digests, "_seen", {})
    file = tmp_path / "a"
    file.write_bytes(b"weights")
    first = content_digest(file)
    (memory,) = (tmp_path / "cache" / "digests").iterdir()
    memory.write_text(spoilt)
    assert content_digest(file) == first


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "SMALL", 0)
    (tmp_path / "cache").write_text("a file, not a folder")
    monkeypatch.setenv("SLM_EXP_CACHE", str(tmp_path / "cache"))
    assert content_digest(tmp_path / "cache") == file_digest(tmp_path / "cache")


def test_several_files_by_name_and_contents(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        for name in ("a", "b"):
            (folder / name).write_text(name)
    both = [here / "a", here / "b"]
    assert files_digest(both, here) == files_digest(both[::-1], here)
    assert files_digest(both, here) == files_digest([there / "a", there / "b"], there)
    assert files_digest(both[:1], here) != files_digest(both, here)
    os.replace(there / "b", there / "c")
    assert files_digest(both, here) != files_digest([there / "a", there / "c"], there)
