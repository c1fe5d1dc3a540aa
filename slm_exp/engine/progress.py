"""How far a search is: a bar on a terminal, a line in the log now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from slm_exp.search.state import SearchState
    from slm_exp.search.threshold import Step

log = logging.getLogger(__name__)

LOG_EVERY_S = 20.0


class Progress:
    """Layers left below the window, last score, groups so far. Writes to stderr."""

    def __init__(self, start: SearchState, what: str) -> None:
        from tqdm import tqdm

        self.start = start
        self.what = what
        self.bar: Any = tqdm(
            total=max(0, start.low - start.floor + 1), desc=what, unit="layer", disable=not sys.stderr.isatty()
        )
        self.logged = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def show(self, step: Step) -> None:
        """One decision was made."""
        state = step.next.close()
        groups = " ".join(f"{g.start}..{g.stop - 1}" for g in state.groups) or "none"
        about = f"layers {step.state.low}..{step.state.high} score {step.score:.4f}, merged {groups}"
        self.bar.n = self.start.low - step.next.low
        self.bar.set_postfix_str(about, refresh=True)
        if self.bar.disable and time.monotonic() - self.logged > LOG_EVERY_S:
            self.logged = time.monotonic()
            log.info("%s: %s", self.what, about)


@contextmanager
def ticking(what: str, total: int, unit: str = "model") -> Iterator[Callable[..., None]]:
    """Show how many of `total` models are done: a bar on a terminal, a line in the log now and then elsewhere.

    Yields a function to call after each, with what is known by then, and how many are done where that is not one more.
    """
    from tqdm import tqdm

    done, logged = 0, time.monotonic()

    def tick(about: str = "", at: int | None = None) -> None:
        nonlocal done, logged
        step = 1 if at is None else at - done
        done += step
        bar.set_postfix_str(about, refresh=False)
        bar.update(step)
        if bar.disable and time.monotonic() - logged > LOG_EVERY_S:
            logged = time.monotonic()
            log.info("%s: %d of %d %ss, %s", what, done, total, unit, about)

    with tqdm(total=total, desc=what, unit=unit, disable=not sys.stderr.isatty()) as bar:
        yield tick
