"""One lock for every folder, with and without flock; logs that follow no link."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import Timeout

from slm_exp.core import locks
from slm_exp.core.locks import Lock, in_use
from slm_exp.core.logs import LogFile, mask_logs, open_log


@pytest.fixture(params=[None, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP],
                ids=["flock", "ENOLCK", "ENOSYS", "EOPNOTSUPP"])  # fmt: skip
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """A file system: with flock, or one that answers so."""
    if request.param is not None:

        def flock(fd: int, operation: int) -> None:
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr(fcntl, "flock", flock)
        monkeypatch.setattr(locks, "_warned", set())
    return request.param


def test_a_second_taker_is_refused_and_a_later_one_is_not(
    system: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / ".lock"
    assert not in_use(path)
    with Lock(path).held():
        assert in_use(path)
        with pytest.raises(Timeout):
            Lock(path).acquire(timeout=0)
    assert not in_use(path)
    with Lock(path).held(timeout=0):
        pass
    warnings = [r for r in caplog.records if "no flock" in r.getMessage()]
    assert len(warnings) == (system is not None)


def test_a_lock_that_may_only_be_read_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, really_open = tmp_path / ".lock", os.open

    def another_users(name: str | Path, flags: int, *args: int, **kwargs: int) -> int:
        if Path(name) == path and flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(name))
        return really_open(name, flags, *args, **kwargs)

    with Lock(path).held():
        monkeypatch.setattr(os, "open", another_users)
        assert in_use(path)
    assert not in_use(path)


def test_what_a_killed_holder_left_stops_nobody(system: int | None, tmp_path: Path) -> None:
    """Also the empty file that a host with flock has used."""
    path = tmp_path / ".lock"
    path.touch()
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    with Lock(path).held():
        marker = path.with_name(".lock.held")
        text = marker.read_text() if marker.exists() else ""
    if text:
        marker.write_text(text.replace(str(os.getpid()), str(dead.pid)))
    with Lock(path).held(timeout=30):
        pass


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        Lock(tmp_path / "file" / ".lock").acquire(timeout=0)


def test_a_log_is_never_written_through_a_link(tmp_path: Path) -> None:
    victim, link = tmp_path / "thesis.txt", tmp_path / "run.log"
    victim.write_text("years of work")
    link.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        open_log(link)
    with pytest.raises(OSError, match="symbolic link"):
        LogFile(str(link))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"."):
        open_log(tmp_path / "pipe")
    assert victim.read_text() == "years of work"
    with open_log(tmp_path / "new.log") as log:
        log.write(b"a\n")
    with open_log(tmp_path / "new.log") as log:
        log.write(b"b\n")
    assert (tmp_path / "new.log").read_text() == "a\nb\n"


def test_log_records_are_masked(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()
    try:
        mask_logs()
        mask_logs()
        logging.getLogger("x").warning("from %s, %d times", "https://me:secret@host/a", 3)
    finally:
        logging.setLogRecordFactory(before)
    assert caplog.records[0].getMessage() == "from https://***@host/a, 3 times"
