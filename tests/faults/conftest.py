"""The process that carries out commands, and the table at the end of a run of the attacks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import attack
from server import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Carries out commands in processes of their own."""
    made = Server()
    yield made
    made.close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if attack.FULL or terminalreporter.config.option.verbose > 0:
        for line in attack.report():
            terminalreporter.write_line(line)
