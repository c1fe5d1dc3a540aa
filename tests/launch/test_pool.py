"""The pool with jobs that are small programs: what ends how, what is tried again, and who dies with whom."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from slm_exp import __version__
from slm_exp.core.runtime import available_memory
from slm_exp.launch import pool as pool_module
from slm_exp.launch.plugins import with_reason
from slm_exp.launch.pool import Pool, died_of
from slm_exp.launch.screen import Screen
from slm_exp.launch.workers import GIB, Worker, make_workers, visible_gpus
from slm_exp.runs.sweep import DAMAGED, DIED, FAILED, FINISHED, WAITING, Cell, Job, read_cell

# A job: writes a running record, does `body`, writes the finished one. It knows its batch size and its folder.
PROGRAM = """
import json, os, pathlib, signal, sys, time
folder, batch = pathlib.Path(sys.argv[1]), int(sys.argv[2])
record = {"run_id": folder.name, "status": "running", "versions": {"slm_exp": %r}, "stage": "plan", "seconds": 1.0,
          "stages": [{"name": "plan", "seconds": 1.0, "cached": False}], "env": dict(os.environ), "batch": batch}
def write(status, **more):
    (folder / "record.json").write_text(json.dumps(record | {"status": status} | more))
write("running")
%s
write("finished")
"""


@pytest.fixture
def job(tmp_path: Path) -> Callable[[str], Job]:
    """`job("name")`: a job whose folder is below tmp_path."""
    return lambda name: Job(name, (f"x={name}",), tmp_path / name)


def pool_of(bodies: dict[str, str], workers: int = 2, **settings: object) -> Pool:
    def command(job: Job, batch: int | None) -> list[str]:
        program = PROGRAM % (__version__, textwrap.dedent(bodies.get(job.run_id, "")))
        return [sys.executable, "-S", "-c", program, str(job.folder), str(batch or 0)]

    return Pool([Worker(f"w{i}", {"SLOT": str(i)}) for i in range(workers)], command, **settings)  # type: ignore[arg-type]


def run(pool: Pool, jobs: list[Job]) -> tuple[list[str], str]:
    out = io.StringIO()
    cells = pool.run(jobs, Screen("s", jobs, out=out))
    assert [c.job for c in cells] == jobs  # the order given, whatever the order of ending
    return [c.state for c in cells], out.getvalue()


def test_every_way_to_end_and_the_others_go_on(job: Callable[[str], Job]) -> None:
    bodies = {
        "raises": "raise ValueError('no luck')",
        "exits": "sys.exit(7)",
        "killed": "os.kill(os.getpid(), signal.SIGKILL)",
        "says_no": "write('failed', error={'type': 'StageError', 'message': 'bad', 'stage': 'plan'}); sys.exit(1)",
        "crashes_early": "os.remove(folder / 'record.json'); print('a last word', flush=True); os._exit(3)",
    }
    jobs = [job(n) for n in [*bodies, "good1", "good2"]]
    states, said = run(pool_of(bodies), jobs)
    assert states == [FAILED] * 5 + [FINISHED] * 2
    assert "killed by SIGKILL" in said
    assert "a last word" in said
    cell = read_cell(job("killed"))
    assert (cell.state, cell.stage, cell.error) == (FAILED, "plan", "ProcessDied: killed by SIGKILL")
    assert "Traceback" in (job("raises").folder / "run.log").read_text()
    assert "ValueError: no luck" in (job("raises").folder / "run.log").read_text()


def test_no_more_jobs_at_once_than_workers_each_with_its_own_environment(
    job: Callable[[str], Job], tmp_path: Path
) -> None:
    busy = tmp_path / "busy"
    busy.mkdir()
    body = f"""
    mine = pathlib.Path({str(busy)!r}) / os.environ["SLOT"]
    mine.touch(exist_ok=False)                     # fails when this worker already has a job
    time.sleep(0.3)
    mine.unlink()
    """
    jobs = [job(str(i)) for i in range(6)]
    states, _ = run(pool_of({j.run_id: body for j in jobs}, workers=3), jobs)
    assert states == [FINISHED] * 6


def test_out_of_memory_is_tried_again_with_half_the_batch_until_it_fits_or_retries_end(
    job: Callable[[str], Job],
) -> None:
    body = """
    if batch == 0 or batch > LIMIT:
        write('failed', error={'type': 'OutOfMemoryError', 'message': 'CUDA out of memory.', 'stage': 'evaluate'})
        sys.exit(1)
    """
    bodies = {
        "fits_at_4": body.replace("LIMIT", "4"),
        "never": body.replace("LIMIT", "0"),
        "other": "write('failed', error={'type': 'ValueError', 'message': 'x', 'stage': 'plan'}); sys.exit(1)",
    }
    jobs = [job(n) for n in bodies]
    states, said = run(pool_of(bodies, batch_size=lambda job: 16, retries=2), jobs)
    assert states == [FINISHED, FAILED, FAILED]
    assert json.loads((jobs[0].folder / "record.json").read_text())["batch"] == 4
    attempts = [(j.folder / "run.log").read_text().count("--- 2") for j in jobs]
    assert attempts == [3, 3, 1]
    assert "evaluation.batch_size=8" in said


def test_a_job_the_kernel_took_for_memory_is_tried_again(
    job: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = iter(range(100))
    monkeypatch.setattr(pool_module, "oom_kills", lambda: next(count))  # the kernel's counter moves on every look
    body = "if batch != 2: os.kill(os.getpid(), signal.SIGKILL)"
    states, _ = run(pool_of({"a": body}, batch_size=lambda job: None), [job("a")])
    assert states == [FINISHED]
    monkeypatch.setattr(pool_module, "oom_kills", lambda: 0)  # killed by somebody: once
    states, _ = run(pool_of({"b": body}), [job("b")])
    assert states == [FAILED]


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A memory cgroup of 100 MB; skips where none can be made."""
    roots = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]  # v1, v2
    for group, limit in ((roots[0] / "slm_test", "memory.limit_in_bytes"), (roots[1] / "slm_test", "memory.max")):
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text("100M")
            yield group
            return
        except OSError:
            continue
        finally:
            group.rmdir()
    pytest.skip("no memory cgroup can be made here")


@pytest.mark.slow
def test_the_kernels_own_out_of_memory_killer(job: Callable[[str], Job], small_memory: Path) -> None:
    body = f"""
    pathlib.Path({str(small_memory / "cgroup.procs")!r}).write_text(str(os.getpid()))
    x = b"x" * (300_000_000 if batch != 4 else 1000)
    """
    states, said = run(pool_of({"a": body}, batch_size=lambda job: 8), [job("a")])
    assert states == [FINISHED]
    assert "again with evaluation.batch_size=4" in said
    states, _ = run(pool_of({"b": body}, retries=0), [job("b")])
    assert states == [FAILED]
    assert "out-of-memory killer" in (read_cell(job("b")).error or "")


@pytest.mark.parametrize("status", ["failed", "running"])
def test_an_earlier_launchs_record_does_not_speak_for_a_job_that_got_to_none(
    job: Callable[[str], Job], tmp_path: Path, status: str
) -> None:
    body = """
    print("a last word", flush=True)
    (folder.parent / "tries").open("a").write("x")
    os._exit(3)
    """
    old = job("a")
    old.folder.mkdir()
    about = {"run_id": "a", "status": status, "stage": "save",
             "error": {"type": "OutOfMemoryError", "message": "CUDA out of memory.", "stage": "evaluate"}}
    (old.folder / "record.json").write_text(json.dumps(about))
    pool = pool_of({"a": body})
    pool.command = lambda job, batch, make=pool.command: [  # type: ignore[misc]
        w.replace('write("running")', "") for w in make(job, batch)]
    (cell,) = pool.run([old], Screen("s", [old], out=io.StringIO()))
    assert (cell.state, cell.stage) == (FAILED, None)
    assert cell.error == "ended with exit status 3; last log line: a last word"
    assert (tmp_path / "tries").read_text() == "x"  # it was not tried again for the earlier one's memory
    assert (read_cell(old).state, read_cell(old).error) == (DIED, "a last word")


def test_the_launchers_reason_counts_where_the_folder_has_an_earlier_launchs(job: Callable[[str], Job]) -> None:
    old, new = (Cell(job("a"), FAILED, "plan", error, 1.0) for error in ("ValueError: old", "ValueError: new"))
    assert with_reason(old, "no right to write", {"a": old}).error == "no right to write"
    assert with_reason(new, "stage plan failed", {"a": old}) == new


def test_what_a_job_leaves_behind_is_killed(job: Callable[[str], Job]) -> None:
    body = """
    import subprocess
    child = subprocess.Popen(["sleep", "60"])
    (folder / "child").write_text(str(child.pid))
    """
    states, _ = run(pool_of({"a": body}), [job("a")])
    assert states == [FINISHED]
    assert gone(int((job("a").folder / "child").read_text()))


def test_a_run_folder_that_cannot_be_made_fails_that_job_only(job: Callable[[str], Job], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    bad = Job("bad", (), tmp_path / "file" / "bad")
    states, said = run(pool_of({}), [bad, job("good")])
    assert states == [FAILED, FINISHED]
    assert "NotADirectoryError" in said


def gone(pid: int, within: float = 5.0) -> bool:
    """Whether a process has ended (or is a zombie nobody has buried yet)."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


LAUNCHER = """
import sys
from pathlib import Path
from slm_exp.runs.sweep import Job
from slm_exp.launch.pool import Interrupted, Pool
from slm_exp.launch.screen import Screen
from slm_exp.launch.workers import Worker
root = Path(sys.argv[1])
job_program = '''
import os, sys, time, pathlib, signal
from slm_exp.cli.job import die_with, _terminated
die_with(int(sys.argv[1]))
signal.signal(signal.SIGTERM, _terminated)
folder = pathlib.Path(sys.argv[2])
try:
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(60)
except SystemExit:
    (folder / "told").write_text("")
    raise
'''
def command(job, batch):
    import os
    return [sys.executable, "-c", job_program, str(os.getpid()), str(job.folder)]
jobs = [Job(n, (), root / n) for n in ("a", "b", "c")]
try:
    Pool([Worker("w0"), Worker("w1")], command).run(jobs, Screen("s", jobs))
except Interrupted as stop:
    sys.exit(128 + stop.signum)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_jobs_die_with_their_launcher(tmp_path: Path, signum: int) -> None:
    heard = lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGHUP)]  # noqa: E731 - nohup, &
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path)], preexec_fn=heard)
    pids = [tmp_path / n / "pid" for n in "ab"]
    deadline = time.monotonic() + 30
    while not all(p.exists() and p.read_text() for p in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.send_signal(signum)
    code = launcher.wait(20)
    assert code == (-signum if signum == signal.SIGKILL else 128 + signum)
    assert all(gone(int(p.read_text())) for p in pids)
    assert not (tmp_path / "c").exists()  # what waited was not started
    assert all((tmp_path / n / "told").exists() == (signum != signal.SIGKILL) for n in "ab")


def test_gpus_are_dealt_out_and_cores_shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("slm_exp.launch.workers.cores", lambda: 8)
    many = 100
    on_gpus = make_workers(None, None, ["GPU-a", "GPU-b"], many)
    assert [w.env["CUDA_VISIBLE_DEVICES"] for w in on_gpus] == ["GPU-a", "GPU-b"]
    assert [w.env["OMP_NUM_THREADS"] for w in on_gpus] == ["4", "4"]
    assert [w.env["CUDA_VISIBLE_DEVICES"] for w in make_workers(3, None, ["0", "1"], many)] == ["0", "1", "0"]
    monkeypatch.setattr("slm_exp.launch.workers.available_memory", lambda: 20 * GIB)
    assert [w.env["OMP_NUM_THREADS"] for w in make_workers(None, None, [], many, 1000)] == ["1"] * 8
    assert [w.env["OMP_NUM_THREADS"] for w in make_workers(None, None, [], 2, 1000)] == ["4"] * 2  # two jobs only
    assert [w.env["OMP_NUM_THREADS"] for w in make_workers(None, None, [], many, GIB)] == ["2"] * 3  # 6 GiB a job
    assert [w.env["OMP_NUM_THREADS"] for w in make_workers(None, 4, [], many, 1000)] == ["4"] * 2
    assert [w.env["OMP_NUM_THREADS"] for w in make_workers(None, None, [], many)] == ["8"]  # who knows how large
    assert len(make_workers(None, None, [], many, 100 * GIB)) == 1
    assert make_workers(2, 3, [], many)[0].env["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "OMP_NUM_THREADS" not in make_workers(2, None, [], many)[0].env  # the user's own choice holds


def test_memory_is_what_the_machine_or_the_group_has_left() -> None:
    assert 0 < available_memory() < 2**50


@pytest.mark.parametrize(
    ("listing", "found"),
    [
        ("GPU 0: H200 (UUID: GPU-11-aa)\nGPU 1: H200 (UUID: GPU-22-bb)\n", ["GPU-11-aa", "GPU-22-bb"]),
        (
            "GPU 0: A100 (UUID: GPU-11)\n  MIG 1g.5gb Device 0: (UUID: MIG-1)\n  MIG 1g.5gb Device 1: (UUID: MIG-2)\n",
            ["MIG-1", "MIG-2"],
        ),
        ("", []),
    ],
)
def test_visible_gpus(listing: str, found: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<'X'\n{listing}X\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, 3")
    assert visible_gpus() == ["1", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_states_read_from_folders(job: Callable[[str], Job]) -> None:
    a = job("a")
    assert read_cell(a).state == WAITING
    a.folder.mkdir()
    (a.folder / "run.log").write_text("first\nSegmentation fault\n\n")
    assert (read_cell(a).state, read_cell(a).error) == (DIED, "Segmentation fault")
    (a.folder / "record.json").write_text(json.dumps({"status": "running", "stage": "merge", "run_id": "a"}))
    assert (read_cell(a).state, read_cell(a).stage) == (DIED, "merge")
    for damaged in ('{"status": "runn', '{"a": 1}'):
        (a.folder / "record.json").write_text(damaged)
        assert read_cell(a).state == DAMAGED
        assert "record.json cannot be read" in read_cell(a).why
    other = {"status": "finished", "run_id": "a", "versions": {"slm_exp": "0.0.0"}, "stages": [], "seconds": 1}
    (a.folder / "record.json").write_text(json.dumps(other))
    assert (read_cell(a).state, read_cell(a).error) == (WAITING, "finished by version 0.0.0")


def test_died_of() -> None:
    assert died_of(-9) == "killed by SIGKILL"
    assert died_of(3) == "ended with exit status 3"


def test_a_job_alone_is_shown_by_what_sets_it_apart_in_its_sweep(job: Callable[[str], Job]) -> None:
    out, (first, second) = io.StringIO(), (replace(job(x), overrides=("model=tiny", f"seed={x}")) for x in "12")
    Screen("s", [second], out=out, others=[first, second]).started(second, "cpu0")
    assert out.getvalue() == f"[0/1] started  {second.run_id} on cpu0: seed=2\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_redrawn_in_place_within_its_size(
    job: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "8")
    out, jobs = Terminal(), [job(str(i)) for i in range(20)]
    pool = pool_of({j.run_id: "sys.exit(1)" for j in jobs}, workers=4)
    screen = Screen("name", jobs, out=out)
    pool.run(jobs, screen)
    screen.close()
    frames = out.getvalue().split("\x1b[J")[1:]
    assert all(f.split("\x1b")[0].count("\n") <= 7 for f in frames)
    assert all(len(line) < 60 for f in frames for line in f.split("\x1b")[0].splitlines())
    assert "name: 0 of 20 finished, 20 failed, 0 running, 0 waiting" in frames[-1]
