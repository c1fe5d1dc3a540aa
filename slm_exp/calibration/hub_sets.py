"""Data sets on the Hugging Face hub: `calibration=bookcorpus` (the papers' set), `c4` (web text), `wikitext2`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from slm_exp.calibration.documents import Document, documents
from slm_exp.calibration.text import HubText
from slm_exp.core.registry import register
from slm_exp.core.text import pieces, read_field


@register("calibration", "bookcorpus")
@dataclass
class BookCorpus(HubText):
    """BookCorpus, lower-case and tokenised, one sentence a row; only rows of at least `seq_len` tokens count.

    The hub's loading script no longer runs (datasets >= 4), so the first of the ten parquet files that the hub made
    of it is read, and of that the first million rows. The released SLM code draws such rows from the whole set.
    """

    repo: ClassVar[str] = "bookcorpus/bookcorpus"
    file: ClassVar[str] = "plain_text/train/0000.parquet"
    revision: ClassVar[str | None] = "refs/convert/parquet"
    rows: ClassVar[int | None] = 1_000_000


@register("calibration", "c4")
@dataclass
class C4(HubText):
    """The first validation shard of C4 (en): about 45,000 documents, a download of 40 MB."""

    repo: ClassVar[str] = "allenai/c4"
    file: ClassVar[str] = "en/c4-validation.00000-of-00008.json.gz"


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
