from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slm_exp.calibration.text import HubText
from slm_exp.core.registry import register


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
