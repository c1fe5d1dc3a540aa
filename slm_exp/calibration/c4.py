from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slm_exp.calibration.text import HubText
from slm_exp.core.registry import register


@register("calibration", "c4")
@dataclass
class C4(HubText):
    """The first validation shard of C4 (en): about 45,000 documents, a download of 40 MB."""

    repo: ClassVar[str] = "allenai/c4"
    file: ClassVar[str] = "en/c4-validation.00000-of-00008.json.gz"
