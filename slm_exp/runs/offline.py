"""Offline W&B runs, and sending them to the server, each once."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from slm_exp.core.errors import SlmError
from slm_exp.core.format import printable
from slm_exp.runs.record import read_run, say_unverified
from slm_exp.runs.state import FINISHED, in_use


class OfflineRun(NamedTuple):
    """One `wandb/offline-run-<stamp>-<id>/` folder, by its transaction log `run-<id>.wandb`."""

    log: Path

    @property
    def folder(self) -> Path:
        return self.log.parent

    @property
    def run_folder(self) -> Path:
        """The experiment's folder, which holds `wandb/`, and the lock of a process that still writes it."""
        return self.folder.parent.parent

    @property
    def sent(self) -> bool:
        """W&B's own marker, so that `wandb sync` and `wandb clean` agree with us."""
        return self.log.with_suffix(".wandb.synced").exists()


def find_offline_runs(folders: Sequence[Path]) -> list[OfflineRun]:
    """Every offline run below the folders, oldest first; of one id one, which stands for the run on the server.

    Of several attempts at a run (killed, then run again; also in another folder) a finished one counts before one that
    is not, then the newest: it logs every stage anew, and W&B would otherwise mix histories under one id.
    """
    logs = {log.resolve() for folder in folders for log in folder.rglob("run-*.wandb")
            if log.parent.name.startswith("offline-run-")}
    order = {log: (log.parent.name[:27], log.stat().st_mtime_ns) for log in logs}  # offline-run-YYYYMMDD_HHMMSS
    best: dict[str, Path] = {}
    for log in sorted(logs, key=lambda log: (_finished(log.parents[2]), *order[log])):
        best[log.name] = log
    return [OfflineRun(log) for log in sorted(best.values(), key=lambda log: order[log])]


def _finished(folder: Path) -> bool:
    run = read_run(folder)
    return run is not None and run.record.status == FINISHED


def check_reachable(url: str, seconds: float = 10.0) -> None:
    """Request anything from the server, through the configured proxies. Raises SlmError: no answer. Without this check
    `wandb sync` would retry for hours."""
    try:
        urllib.request.urlopen(url, timeout=seconds).close()
    except urllib.error.HTTPError:
        pass  # an answer, if an unfriendly one
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise SlmError(f"W&B server {url} does not answer ({reason}). Sync from a machine with network, "
                       "or set WANDB_BASE_URL to your own server.") from None


def send(runs: Sequence[OfflineRun]) -> None:
    """Send these runs with W&B's own sync, which leaves its marker beside each one it has sent. Raises SlmError: wandb
    missing, server out of reach, no credentials, or a run that was not sent."""
    try:
        import wandb
    except ImportError as error:
        raise SlmError(f"slm sync needs the wandb package ({error}). pip install wandb.") from None
    url = str(wandb.setup().settings.base_url)
    if wandb.run is None:
        wandb.teardown()  # setup() started a helper process; the one below starts its own
    check_reachable(url)
    command = [sys.executable, "-m", "wandb", "sync", *(str(run.folder) for run in runs)]
    with tempfile.TemporaryDirectory() as scratch:  # for its debug logs, which it would leave in the current folder
        subprocess.run(command, cwd=scratch, check=False,
                       env={**os.environ, "WANDB_DIR": scratch, "WANDB_BASE_URL": url},
                       stdin=subprocess.DEVNULL)  # never ask for a key: say what is missing instead
    if left := [run for run in runs if not run.sent]:
        raise SlmError(f"{len(left)} of {len(runs)} runs not sent, the first {left[0].folder}; W&B's reason is above. "
                       "Without a key: `wandb login`, or WANDB_API_KEY. Run the same command again to send the rest.")


def sync(folders: Sequence[Path], dry_run: bool = False, verify: bool = False) -> int:
    """`slm sync`: send what was not sent, but runs that go on and damaged ones. 1 where a run was not sent."""
    found = find_offline_runs(folders)
    waiting = [run for run in found if not run.sent]
    busy = [run for run in waiting if in_use(run.run_folder)]
    reads = {run: read_run(run.run_folder, verify) for run in waiting if run not in busy}
    damage = {run: read.damage for run, read in reads.items() if read and read.damage}
    due = [run for run in reads if run not in damage]
    for run in busy:
        print(f"still running, left for later: {run.run_folder}")
    for run, what in damage.items():
        print(printable(f"slm sync: {run.run_folder} is damaged and is not sent: {what}"), file=sys.stderr)
    if dry_run:
        for run in due:
            print(f"would send {run.folder}")
    elif due:
        try:
            send(due)
        except SlmError as error:
            print(f"slm sync: {error}", file=sys.stderr)
            return 1
    if unverified := say_unverified(read for run in due if (read := reads[run])):
        print(unverified)
    print(f"{len(due)} {'to send' if dry_run else 'sent'}, {len(found) - len(waiting)} sent before, {len(busy)} still "
          "running.")
    return int(bool(damage))
