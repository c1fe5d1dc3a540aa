from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from slm_exp.calibration.documents import Document, documents
from slm_exp.calibration.text import HubText
from slm_exp.core.registry import register
from slm_exp.core.text import pieces, read_field


@register("calibration", "wikitext2")
@dataclass
class WikiText2(HubText):
    """WikiText-2 (raw), training part. Its rows are lines, so they are joined and cut anew, as a .txt file is."""

    repo: ClassVar[str] = "Salesforce/wikitext"
    file: ClassVar[str] = "wikitext-2-raw-v1/train-00000-of-00001.parquet"
    revision: ClassVar[str | None] = "b08601e04326c79dfdd32d625aee71d232d685c3"

    def read_hub(self) -> Iterator[Document]:
        rows = (text for _, text in read_field(self.fetch(), self.field, "calibration.field"))
        return documents(enumerate(pieces(rows, 16 * self.seq_len)), self.name)
