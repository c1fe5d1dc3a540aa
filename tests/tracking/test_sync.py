"""`slm sync` sends every offline run once, and says why where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from slm_exp.cli import sync
from slm_exp.runs import offline as runs


def offline(folder: Path, run_id: str, stamp: str = "20260101_120000", suffix: str = "") -> Path:
    path = folder / "wandb" / f"offline-run-{stamp}-{run_id}{suffix}" / f"run-{run_id}.wandb"
    path.parent.mkdir(parents=True)
    path.write_bytes(b":W&B")
    return path


class _Unfriendly(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A W&B server as far as `sync` asks one itself; `sent` collects what `wandb sync` was given."""
    http = HTTPServer(("127.0.0.1", 0), _Unfriendly)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{http.server_port}"
    runs.check_reachable(url)
    monkeypatch.setattr(runs, "check_reachable", lambda _: None)
    sent: list[Path] = []

    def wandb_sync(command: list[str], **kwargs: Any) -> None:
        assert command[1:4] == ["-m", "wandb", "sync"]
        for folder in map(Path, command[4:]):
            if (folder / "refuse").exists():
                continue
            (log,) = folder.glob("*.wandb")
            log.with_suffix(".wandb.synced").touch()
            sent.append(folder)

    monkeypatch.setattr(subprocess, "run", wandb_sync)
    yield sent
    http.shutdown()
    http.server_close()


def test_sends_once(tmp_path: Path, server: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    first = offline(tmp_path / "sweep" / "a", "a")
    second = offline(tmp_path / "sweep" / "b", "b", "20260101_110000")
    assert sync.main([str(tmp_path / "sweep"), str(tmp_path / "sweep" / "a")]) == 0
    assert server == [second.parent, first.parent]  # oldest first, each once
    assert sync.main([str(tmp_path)]) == 0
    assert len(server) == 2
    assert "0 sent, 2 sent before, 0 still running." in capsys.readouterr().out


def test_only_the_newest_attempt_at_a_run_is_sent(tmp_path: Path, server: list[Path]) -> None:
    offline(tmp_path, "a", "20260101_120000")
    offline(tmp_path, "a", "20260102_120000")
    newest = offline(tmp_path, "a", "20260102_120000", "-1")
    os.utime(newest, (2_000_000_000, 2_000_000_000))
    assert sync.main([str(tmp_path)]) == 0
    assert server == [newest.parent]
    again = offline(tmp_path, "a", "20260103_120000")
    assert sync.main([str(tmp_path)]) == 0
    assert server == [newest.parent, again.parent]


def test_one_id_in_two_folders_is_sent_once_and_nothing_worse_over_a_finished_one(
    tmp_path: Path, server: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    finished = offline(tmp_path / "x" / "a", "a", "20260101_120000")
    (tmp_path / "x" / "a" / "record.json").write_text('{"run_id": "a", "status": "finished"}')
    offline(tmp_path / "y" / "a", "a", "20260102_120000")  # begun later elsewhere, and killed
    assert sync.main([str(tmp_path)]) == 0
    assert server == [finished.parent]
    assert sync.main([str(tmp_path)]) == 0
    assert server == [finished.parent]
    assert "0 sent, 1 sent before" in capsys.readouterr().out


def test_a_finished_run_follows_an_attempt_that_was_sent(tmp_path: Path, server: list[Path]) -> None:
    killed = offline(tmp_path / "y" / "a", "a", "20260102_120000")
    assert sync.main([str(tmp_path)]) == 0
    finished = offline(tmp_path / "x" / "a", "a", "20260101_120000")
    (tmp_path / "x" / "a" / "record.json").write_text('{"run_id": "a", "status": "finished"}')
    assert sync.main([str(tmp_path)]) == 0
    assert server == [killed.parent, finished.parent]


def test_a_run_still_going_waits(tmp_path: Path, server: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    log = offline(tmp_path, "a")
    hold = "import sys, filelock; a = filelock.FileLock(sys.argv[1]); a.acquire(); print('held', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / ".lock")], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    assert sync.main([str(tmp_path)]) == 0
    assert server == []
    assert "1 still running" in capsys.readouterr().out
    process.communicate("\n")
    assert sync.main([str(tmp_path)]) == 0
    assert server == [log.parent]


def test_what_was_refused_is_named_and_exits_1(
    tmp_path: Path, server: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    offline(tmp_path / "a", "a")
    refused = offline(tmp_path / "b", "b").parent
    (refused / "refuse").touch()
    assert sync.main([str(tmp_path)]) == 1
    assert f"1 of 2 runs not sent, the first {refused}" in capsys.readouterr().err
    (refused / "refuse").unlink()
    assert sync.main([str(tmp_path)]) == 0


def test_dry_run_sends_nothing(tmp_path: Path, server: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    log = offline(tmp_path, "a")
    assert sync.main([str(tmp_path), "--dry-run"]) == 0
    assert server == []
    assert f"would send {log.parent}" in capsys.readouterr().out


def test_no_network_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = offline(tmp_path, "a")
    monkeypatch.setitem(sys.modules, "wandb", _FakeWandb("http://127.0.0.1:9"))
    assert sync.main([str(tmp_path)]) == 1
    assert "W&B server http://127.0.0.1:9 does not answer" in capsys.readouterr().err
    assert not log.with_suffix(".wandb.synced").exists()


def test_no_key_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The real `wandb sync`, which has no credentials in an empty home."""
    offline(tmp_path, "a")
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(runs, "check_reachable", lambda _: None)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert sync.main([str(tmp_path)]) == 1
    assert list(Path().iterdir()) == []
    err = capfd.readouterr().err
    assert "No API key" in err
    assert "`wandb login`, or WANDB_API_KEY" in err


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sync.main([str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


class _FakeWandb:
    """As much of wandb as tells the server's address; the real one reads its environment once per process."""

    run = None

    def __init__(self, base_url: str) -> None:
        self.settings = self
        self.base_url = base_url

    def teardown(self) -> None:
        pass

    def setup(self) -> _FakeWandb:
        return self
