"""How far the work is: one line on a terminal, redrawn in place; elsewhere a line in the log every 30 s."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slm_exp.core.format import duration

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger(__name__)

LOG_EVERY_S = 30.0


@dataclass(eq=False)
class Work:
    """Something that goes on: a stage, or a part of it that is counted."""

    what: str
    total: float | None = None
    unit: str = ""
    done: float = 0
    about: str = ""
    """What is known by now."""
    started: float = field(default_factory=lambda: time.monotonic())

    @property
    def text(self) -> str:
        """`plan: 12 of 28 models, about 40 s left; 0.9053 without layer 4`."""
        took = time.monotonic() - self.started
        left = f"{duration(took)} so far"
        if self.total and 0 < self.done < self.total:
            left = f"about {duration(took / self.done * (self.total - self.done))} left"
        count = f"{self.done:.0f}" + ("" if self.total is None else f" of {self.total:.0f}")
        parts = [f"{count} {self.unit}{'' if self.unit == '%' else 's'}"] if self.unit else []
        return f"{self.what}: {', '.join([*parts, left])}" + (f"; {self.about}" if self.about else "")


_now: list[Work] = []
"""What goes on in this process, the innermost last."""
_said = 0.0


@contextmanager
def showing(work: Work) -> Iterator[Work]:
    """Show it while it goes on, in place of what it is a part of."""
    global _said
    with ExitStack() as ends:
        if not _now:
            _said = time.monotonic()
            ends.enter_context(_on_terminal() if sys.stderr.isatty() else _in_log())
        _now.append(work)
        ends.callback(_now.remove, work)
        yield work


@contextmanager
def ticking(what: str, total: float | None, unit: str = "model", disable: bool = False
            ) -> Iterator[Callable[..., None]]:  # fmt: skip
    """Show how many of `total` models (None: nobody knows) are done. Yields a function to call after each, with what is
    known by then, and how many are done, or how many more, where that is not one more."""
    if disable:
        yield lambda *_, **__: None
        return

    def tick(about: str = "", at: float | None = None, more: float = 1) -> None:
        work.done, work.about = work.done + more if at is None else at, about
        _say()

    with showing(Work(what, total, unit)) as work:
        yield tick


@contextmanager
def advancing(what: str, total: int, unit: str, disable: bool = False) -> Iterator[Callable[[int], None]]:
    """`ticking` for work that is done in batches: yields a function to call with how many more units are done."""
    with ticking(what, total, unit, disable) as tick:
        yield lambda more: tick(more=more)


def _say() -> None:
    """Log how far the work is, where it is time and nothing on a terminal shows it."""
    global _said
    if _now and time.monotonic() - _said > LOG_EVERY_S and not sys.stderr.isatty():
        _said = time.monotonic()
        outer, inner = _now[0], _now[-1]
        log.info("%s%s", "" if inner is outer else f"{outer.what}: ", inner.text)


@contextmanager
def _in_log() -> Iterator[None]:
    """A line also where nothing is counted, or one step takes long."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(max(1.0, LOG_EVERY_S / 6)):
            _say()

    threading.Thread(target=watch, daemon=True, name="progress").start()
    try:
        yield
    finally:
        over.set()


@contextmanager
def _on_terminal() -> Iterator[None]:
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), get_renderable=_line, refresh_per_second=4, transient=True,
              redirect_stdout=sys.stdout.isatty()):
        yield


def _line() -> Table | str:
    """The outermost's name, a bar, how far the innermost is."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    if not _now:
        return ""
    outer, inner = _now[0], _now[-1]
    line = Table.grid(padding=(0, 1))
    line.add_column(no_wrap=True)
    line.add_column()
    line.add_column(no_wrap=True, overflow="ellipsis")
    bar = ProgressBar(inner.total or 1, inner.done, width=20, pulse=inner.total is None)
    line.add_row(Text(outer.what, style="bold"), bar,
                 Text(inner.text.removeprefix(f"{outer.what}: ")))
    return line
