"""Commands in processes of their own, forked from one that has imported everything: a fifth of a second each.

Run as a program it reads requests from stdin, one JSON line each, and answers in the same way.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

UNTOLD = 97
"""Exit status where the output could not be written: the disk of this machine, not the command."""
ROOT = Path(__file__).resolve().parents[2]


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    """Exit status; minus the signal where one ended it."""
    output: str
    """stdout and stderr together, the last 20,000 characters."""
    seconds: float
    killed: bool
    """By us, at `kill_after`."""
    computing: float
    """Seconds of processor time, of it and of the processes that it waited for."""


class Server:
    """The process that forks."""

    def __init__(self) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline",
                            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         text=True, env=env)

    def call(self, program: str, *words: object, kill_after: float | None = None, cwd: Path = ROOT,
             limit: float = 600, env: Mapping[str, str] | None = None) -> Ended:
        """`slm WORDS` or `slm-exp WORDS`, killed with SIGKILL, and all that it started, after some seconds."""
        assert self._process.stdin
        assert self._process.stdout
        about = {"program": program, "argv": list(map(str, words)), "kill_after": kill_after, "cwd": str(cwd),
                 "limit": limit, "env": dict(env or {})}
        self._process.stdin.write(json.dumps(about) + "\n")
        self._process.stdin.flush()
        return Ended(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


def _child(program: str, argv: Sequence[str]) -> int:
    from slm_exp.cli import main, run

    try:
        return run.main(argv) if program == "slm-exp" else main.main(argv)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def _carry_out(request: dict[str, Any]) -> Ended:
    with tempfile.TemporaryFile() as out:
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for fd in (1, 2):
                os.dup2(out.fileno(), fd)
            os.chdir(request["cwd"])
            os.environ.update(request["env"])
            try:
                status = _child(request["program"], request["argv"])
                sys.stdout.flush()
                sys.stderr.flush()
            except (OSError, ValueError):
                status = UNTOLD
            os._exit(status & 255)
        until = started + (request["kill_after"] if request["kill_after"] is not None else request["limit"])
        done = 0
        while not done and time.monotonic() < until:
            done, how, used = os.wait4(pid, os.WNOHANG)
            time.sleep(0.002)
        killed = not done
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        if killed:
            _, how, used = os.wait4(pid, 0)
        seconds = time.monotonic() - started
        out.seek(0)
        text = out.read().decode("utf-8", "replace")[-20_000:]
        return Ended(os.waitstatus_to_exitcode(how), text, seconds, killed, used.ru_utime + used.ru_stime)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import torch

    import slm_exp.pipeline.run
    import slm_exp.reporting.summary
    import slm_exp.reporting.sweep
    import slm_exp.tables.build
    from slm_exp.cli import cache, compare, export, main, plan, report, run, sweep, tables  # noqa: F401
    from slm_exp.launch.compose import prepare_hydra
    from slm_exp.models.tiny import Tiny

    if os.environ.get("SLM_EXP_FAULTS"):  # runs that are attacked evaluate
        import slm_exp.evaluation.backends.harness  # noqa: F401

    torch.set_num_threads(1)
    prepare_hydra()
    plt.figure().canvas.draw()
    _ = Tiny().open(torch.device("cpu"), Path("unused")).model  # what a run imports late
    with open(0, encoding="utf-8") as requests:
        for line in requests:
            answers.write(json.dumps(_carry_out(json.loads(line))) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
