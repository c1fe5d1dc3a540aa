"""Waiting for jobs that submitit handed to Slurm or to the system, when some of them never answer.

submitit takes a job for alive until it left a result or `sacct` says that it ended. Where accounting is off (or, in
Slurm 22.05, where an array task was cancelled while pending) a job that died would be waited for for ever; and the
first job found dead would end the wait for all others. What has left the queue without a result is dead: `squeue`
always works.
"""

from __future__ import annotations

import contextlib
import getpass
import time
from collections.abc import Iterator
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from slm_exp.core.errors import SlmError
from slm_exp.launch.slurm import queued

LOOK_S = 1.0
QUEUE_S = 10.0
"""Between two looks at the queue; a job missing in two of them, without a result, is dead."""


@contextlib.contextmanager
def every_job_answers() -> Iterator[None]:
    """Inside, submitit's `job.results()` returns for a dead job too: a failed JobReturn that says so."""
    from submitit import Job

    before = Job.results
    Job.results = _results  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Job.results = before  # type: ignore[method-assign]


def _results(job: Any) -> list[JobReturn]:
    missing, looked = 0, 0.0
    while not job.paths.result_pickle.exists():
        time.sleep(LOOK_S)
        if time.monotonic() - looked >= QUEUE_S:
            looked, queued = time.monotonic(), is_queued(job)
            missing = missing + 1 if queued is False else 0
            if missing >= 2 and not job.paths.result_pickle.exists():
                return [_failed(f"job {job.job_id} ended without a result; see {job.paths.stderr}")]
    outcome, result = job._get_outcome_and_result()
    return [result if outcome == "success" else _failed(f"job {job.job_id}: {result}")]


def _failed(message: str) -> JobReturn:
    return JobReturn(status=JobStatus.FAILED, _return_value=SlmError(message))


def is_queued(job: Any) -> bool | None:
    """Whether a job waits or runs; None when that cannot be known now."""
    if type(job).__name__ != "SlurmJob":
        return not job.done()
    states, _ = queued([getpass.getuser()])
    return None if states is None else job.job_id in states
