"""What a multirun shows while it works: one screen on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TextIO

from slm_exp.core.format import duration
from slm_exp.runs.record import read_run
from slm_exp.runs.sweep import FINISHED, Cell, Job, differing

REDRAW_S = 0.5
LINE_EVERY_S = 60.0


class Screen:
    """Shows where the sweep stands, from what the pool reports.

    Args:
        name: of the sweep.
        jobs: every job that is to run now.
        already: how many were finished before.
        out: a terminal is redrawn in place; anything else gets a line per event and one a minute.
        others: of the sweep, known before: a search starts its jobs one by one.
    """

    def __init__(self, name: str, jobs: Sequence[Job], already: int = 0, out: TextIO | None = None,
                 others: Iterable[Job] = ()) -> None:
        self.name, self.already, self.total = name, already, already + len(jobs)
        self.apart = differing(list({job.run_id: job for job in (*others, *jobs)}.values())) if jobs else {}
        self.out = out or sys.stdout
        self.live = self.out.isatty()
        self.running: dict[str, tuple[Job, str, float]] = {}
        self.done: list[Cell] = []
        self.begun = time.monotonic()
        self._drawn = 0
        self._next = 0.0 if self.live else self.begun + LINE_EVERY_S

    def started(self, job: Job, worker: str) -> None:
        self.running[job.run_id] = (job, worker, time.monotonic())
        self._say(f"started  {job.run_id} on {worker}: {self.apart[job.run_id]}")

    def retried(self, job: Job, why: str) -> None:
        self.running.pop(job.run_id, None)
        self._say(f"retry    {job.run_id}: {why}")

    def ended(self, cell: Cell) -> None:
        self.running.pop(cell.job.run_id, None)
        self.done.append(cell)
        took = duration(cell.seconds or 0) + (", from the cache" if cell.from_cache else "")
        how = took if cell.state == FINISHED else cell.why
        self._say(f"{cell.state:<8} {cell.job.run_id} {self.apart[cell.job.run_id]} ({how})")

    def draw(self) -> None:
        """Redraw where it is time. Cheap enough for every turn of a loop."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (REDRAW_S if self.live else LINE_EVERY_S)
        if self.live:
            self._redraw(self._lines(now))
        else:
            self._print("\n".join([self._headline(now), *self._running_lines(now)]))

    def close(self) -> None:
        """Leave the terminal below the last picture."""
        if self.live:
            self._redraw(self._lines(time.monotonic()))

    def _headline(self, now: float) -> str:
        finished = self.already + sum(c.state == FINISHED for c in self.done)
        failed = len(self.done) - (finished - self.already)
        left = self.total - self.already - len(self.done)
        wrong = f", {failed} failed" if failed else ""
        rest = f", about {duration((now - self.begun) / len(self.done) * left)} left" if self.done and left else ""
        return (f"{self.name}: {finished} of {self.total} finished{wrong}, {len(self.running)} running, "
                f"{left - len(self.running)} waiting, {duration(now - self.begun)}{rest}")

    def _running_lines(self, now: float) -> list[str]:
        lines = []
        for job, worker, since in self.running.values():
            run = read_run(job.folder)
            stage = (run.record.stage if run else None) or "starting"
            lines.append(f"  {worker:<6} {duration(now - since):>12}  {stage:<14} {self.apart[job.run_id]}")
        return lines

    def _lines(self, now: float) -> list[str]:
        bad = [f"  {c.state} {c.job.run_id} {self.apart[c.job.run_id]}: {c.why}" for c in self.done
               if c.state != FINISHED]
        size = shutil.get_terminal_size()
        room = max(3, size.lines - 2)
        lines = [self._headline(now), *self._running_lines(now)]
        if bad and len(lines) < room:
            lines += bad[-(room - len(lines)) :]
        return [line[: size.columns - 1] for line in lines[:room]]

    def _redraw(self, lines: list[str]) -> None:
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        self._print(up + "\x1b[J" + "\n".join(lines))
        self._drawn = len(lines)

    def _say(self, line: str) -> None:
        if not self.live:
            self._print(f"[{self.already + len(self.done)}/{self.total}] {line}")

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the reader of a pipe is gone, or its disk is full: the jobs matter more
            print(text, file=self.out, flush=True)
