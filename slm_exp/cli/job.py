"""One job of a pool, `python -m slm_exp.cli.job PARENT_PID [overrides]`: a run that dies with its launcher."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
from typing import Any

from slm_exp.cli.run import main as run
from slm_exp.core.runtime import die_with


class Terminated(SystemExit):
    """The job got SIGTERM, from its launcher or by hand."""

    def __str__(self) -> str:
        return "stopped by SIGTERM"


def _terminated(signum: int, frame: Any) -> None:
    raise Terminated(128 + signum)  # unwinds: the record says failed, W&B closes


def main(argv: list[str]) -> int:
    """Run the command line after the parent's pid. Exit status as of a single run."""
    die_with(int(argv[0]))
    signal.signal(signal.SIGTERM, _terminated)
    faulthandler.enable()
    with contextlib.suppress(OSError):  # when memory runs out the kernel shall take a job, not the launcher
        with open("/proc/self/oom_score_adj", "w") as f:
            f.write("500")
    return run(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
