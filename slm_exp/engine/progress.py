"""How far a search is: a bar on a terminal, a line in the log now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

log = logging.getLogger(__name__)

LOG_EVERY_S = 20.0


@contextmanager
def ticking(what: str, total: int | None, unit: str = "model") -> Iterator[Callable[..., None]]:
    """Show how many of `total` models (None: nobody knows) are done. Yields a function to call after each, with what is
    known by then, and how many are done where that is not one more."""
    done, logged = 0, time.monotonic()

    def tick(about: str = "", at: int | None = None) -> None:
        nonlocal done, logged
        step = 1 if at is None else at - done
        done += step
        bar.set_postfix_str(about, refresh=False)
        bar.update(step)
        if bar.disable and time.monotonic() - logged > LOG_EVERY_S:
            logged = time.monotonic()
            log.info("%s: %d%s %ss, %s", what, done, "" if total is None else f" of {total}", unit, about)

    with tqdm(total=total, desc=what, unit=unit, disable=not sys.stderr.isatty()) as bar:
        yield tick
