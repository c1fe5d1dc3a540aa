"""`calibration=jsonl`: texts of your own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from slm_exp.calibration.documents import Document
from slm_exp.calibration.text import TextCalibration
from slm_exp.core.errors import require
from slm_exp.core.registry import register
from slm_exp.models.base import ModelHandle


@register("calibration", "jsonl")
@dataclass
class JsonLines(TextCalibration):
    """A local file or folder: JSON lines (also .gz) or parquet with `field`, or plain text."""

    def check(self) -> None:
        super().check()
        require(bool(self.path), "calibration.path", self.path, "a file or folder of JSON lines",
                "For example calibration.path=texts.jsonl calibration.field=text.")

    def documents(self, handle: ModelHandle) -> tuple[str, Iterable[Document]]:
        assert self.path is not None
        return self.path, self.read_local(self.path)
