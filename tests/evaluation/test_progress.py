"""What is shown of work that goes on: lines in the log where there is no terminal, one line where there is."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest

from slm_exp.engine import progress as module
from slm_exp.engine.progress import Work, advancing, showing, ticking


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    return clock


def lines(clock: Clock, caplog: pytest.LogCaptureFixture, step_s: float, disable: bool = False) -> list[str]:
    with caplog.at_level(logging.INFO, logger="slm_exp"), showing(Work("evaluate")):
        with advancing("perplexity news", 400, "chunk", disable) as advance:
            for _ in range(100):
                clock.now += step_s
                advance(4)
    return [record.getMessage() for record in caplog.records]


def test_every_30_s_a_line_says_what_is_done_and_left(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    found = lines(clock, caplog, step_s=2.0)
    assert found[0] == "evaluate: perplexity news: 64 of 400 chunks, about 2 min 48 s left"
    assert len(found) == 200 // 32
    done = [int(re.findall(r"(\d+) of 400 chunks, about", line)[0]) for line in found]
    assert done == sorted(set(done))


def test_a_short_one_says_nothing_nor_one_that_is_not_to_be_shown(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    assert lines(clock, caplog, step_s=0.1) == []
    assert lines(clock, caplog, step_s=2.0, disable=True) == []


def test_work_that_nobody_counts_says_so_far(clock: Clock) -> None:
    work = Work("load")
    clock.now += 45
    assert work.text == "load: 45 s so far"
    with ticking("search", None) as tick:
        tick("0.9 without layer 4")
        assert module._now[-1].text == "search: 1 models, 0.00 s so far; 0.9 without layer 4"
    assert module._now == []


def test_a_terminal_has_one_line_and_keeps_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", shown)
    with showing(Work("plan")), ticking("candidates", 28, "model") as tick:
        for _ in range(7):
            tick("0.9053")
        line = module._line()
    assert len(line.rows) == 1  # type: ignore[union-attr]
    assert "7 of 28 models" in str(line.columns[2]._cells[0])  # type: ignore[union-attr]
    assert shown.getvalue().rstrip().endswith("\x1b[2K")  # erased
