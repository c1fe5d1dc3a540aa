"""TensorBoard: event files in the run's folder, `tensorboard/` (`tensorboard --logdir outputs`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from slm_exp.core.files import JsonObject
from slm_exp.core.registry import register
from slm_exp.runs.tracking.base import Tracker, Tracking, flat, mirrored, provenance


@register("tracking", "tensorboard")
@dataclass
class TensorBoard(Tracking):
    """Mirrors the record to event files: metrics by record path, one step a row; texts, config and tables as text.

    Every run has files of its own, and TensorBoard names it by their folder, so project, group and run_name are texts.
    """

    package: ClassVar[str] = "tensorboard"

    def opened(self, record: JsonObject, folder: Path) -> Tracker:
        from torch.utils.tensorboard import SummaryWriter

        tracker = _TensorBoardTracker(SummaryWriter(str(folder / "tensorboard"), purge_step=0))  # earlier rows go
        about = {"name": self.display_name(record), "group": self.group or record.get("group"),
                 "project": self.project, "tags": ", ".join(self.tags) or None}
        tracker.log({"run": about, "config": provenance(record)})
        return tracker


class _TensorBoardTracker(Tracker):
    """Mirrors to one open event file."""

    def __init__(self, writer: Any) -> None:
        self._writer, self._step = writer, 0

    def close(self, failed: bool) -> None:
        mirrored("TensorBoard", self._writer.close)

    def log(self, section: JsonObject) -> None:
        """Numbers as scalars of one step, texts and flags as text."""

        def send() -> None:
            for name, value in flat(section).items():
                if isinstance(value, (str, bool)):
                    self._writer.add_text(name, str(value), self._step)
                else:
                    self._writer.add_scalar(name, value, self._step)
            self._writer.flush()

        mirrored("TensorBoard", send)
        self._step += 1

    def image(self, name: str, path: Path) -> None:
        def send() -> None:
            import numpy as np
            from PIL import Image

            self._writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), self._step, dataformats="HWC")

        mirrored("TensorBoard", send)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
        mirrored("TensorBoard", lambda: self._writer.add_text(name, text, self._step))
