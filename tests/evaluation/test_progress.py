"""What a long measurement says before and while it runs, where there is no terminal."""

from __future__ import annotations

import logging

import pytest

from slm_exp.engine import progress as bars
from slm_exp.evaluation import progress as module
from slm_exp.evaluation.progress import duration, progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(bars, "time", clock)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    return clock


def lines(
    clock: Clock, caplog: pytest.LogCaptureFixture, step_s: float, steps: int, disable: bool = False
) -> list[str]:
    with caplog.at_level(logging.INFO, logger="slm_exp"):
        with progress("perplexity news", steps * 4, "chunk", disable) as advance:
            for _ in range(steps):
                clock.now += step_s
                advance(4)
    return [record.getMessage() for record in caplog.records]


def test_a_long_one_says_how_long_and_how_far(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    first, *others = lines(clock, caplog, step_s=2.0, steps=100)
    assert first == "perplexity news: 400 chunks, about 3 min"
    assert others[0].startswith("perplexity news: 44 of 400 chunks, about ")
    assert others[0].endswith("3 min left")
    assert others[-1].endswith(" s left")
    assert 5 <= len(others) <= 10  # one in 20 to 30 seconds


def test_the_last_line_says_how_long_it_took(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    assert lines(clock, caplog, step_s=2.0, steps=11)[-1] == "perplexity news: 44 of 44 chunks, done in 22 s"


def test_a_short_one_says_nothing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    assert lines(clock, caplog, step_s=0.1, steps=100) == []


def test_nor_one_that_is_not_to_be_shown(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    assert lines(clock, caplog, step_s=2.0, steps=100, disable=True) == []


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 89.4, 90, 3600)] == ["0 s", "89 s", "2 min", "60 min"]
