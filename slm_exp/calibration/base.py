"""The `calibration` group: draw N sequences of T tokens, the same ones every time for a seed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from slm_exp.core.cost import Tokens
from slm_exp.core.errors import require
from slm_exp.core.registry import Component
from slm_exp.core.types import CalibrationTokens
from slm_exp.models.base import ModelHandle


@dataclass
class Calibration(Component, ABC):
    """Settings every source of calibration tokens shares."""

    n_samples: int = 10
    """Sequences (N)."""
    seq_len: int = 128
    """Tokens per sequence (T)."""
    seed: int | None = None
    """Which documents and crops; null follows the run's seed."""
    path: str | None = None
    """File or repo id, where the source needs one."""
    field: str = "text"
    """Name of the text field."""
    add_bos: bool = False
    """Put the tokenizer's BOS token first in every sequence."""

    def check(self) -> None:
        self.at_least(1, "n_samples")
        self.at_least(2, "seq_len")
        require(self.seed is None or 0 <= self.seed < 2**63, "calibration.seed", self.seed,
                "null or a whole number >= 0 and < 2^63")

    def in_force(self) -> list[str]:
        return ["calibration.seed: the run's seed"] if self.seed is None and not self.reads_ids else []

    reads_ids: ClassVar[bool] = False
    """Whether the tokens are read from a file as they are, which takes no tokenizer."""

    def shape(self) -> Tokens:
        """Sequences and tokens of each, before they are drawn."""
        return Tokens(self.n_samples, self.seq_len)

    def lengths(self) -> dict[str, int]:
        """The longest sequence, by the setting that says so."""
        return {f"calibration.{'path' if self.reads_ids else 'seq_len'}": self.shape().t}

    def check_source(self) -> None:
        """Raise where the texts can only be had from a hub that does not answer; call before weights load."""

    def check_data(self, dense: ModelHandle) -> None:
        """Refuse what is known to lack tokens, or to have others than this model's, by the model's config and a look
        at local files. Called before weights load, and with no tokenizer to ask.

        Raises:
            ConfigError / DataError: as `draw`.
        """

    def check_model(self, dense: ModelHandle) -> None:
        """Likewise, by the model's tokenizer where that is cheap."""

    @abstractmethod
    def draw(self, handle: ModelHandle, seed: int) -> CalibrationTokens:
        """Draw the tokens; `seed` is the run's and yields to the source's own. Raises DataError: too few or too short
        texts, ids outside the vocabulary, file or network missing."""
