"""How long a measurement will take: said in the log once that is known, then every now and then."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from slm_exp.engine.progress import ticking

log = logging.getLogger(__name__)

MEASURED_S = 1.0
"""Work timed before the total is estimated."""
WRITING_S = 10.0
"""The same for generation, whose first step reads the prompts and says nothing of the others."""
LONG_S = 30.0
"""What takes longer is announced."""


@contextmanager
def progress(what: str, total: int, unit: str, disable: bool = False, measured_s: float | None = None
             ) -> Iterator[Callable[[int], None]]:  # fmt: skip
    """A bar on a terminal; elsewhere a line in the log with the estimated time, then lines with done and time left.

    Yields a function to call with how many more units are done, at least every few seconds.
    """
    started, done, announced = time.monotonic(), 0, sys.stderr.isatty()
    if disable:
        yield lambda more: None
        return
    with ticking(what, total, unit) as tick:

        def advance(more: int) -> None:
            nonlocal done, announced
            done += more
            elapsed = time.monotonic() - started
            whole = elapsed * total / max(done, 1)
            if not announced and elapsed >= (measured_s or MEASURED_S):
                announced = True
                if whole >= LONG_S:
                    log.info("%s: %d %ss, about %s", what, total, unit, duration(whole))
            left = f"about {duration(whole - elapsed)} left" if done < total else f"done in {duration(elapsed)}"
            tick(left, at=done)

        yield advance


def duration(seconds: float) -> str:
    """`40 s`, `3 min`."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
