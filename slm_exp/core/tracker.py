"""What a computation needs of a tracker."""

from __future__ import annotations

from typing import Any, Protocol


class SectionLog(Protocol):
    """Takes parts of the record while they come to be known."""

    def log(self, section: dict[str, Any]) -> None:
        """A part of the record, by the names of its sections."""
