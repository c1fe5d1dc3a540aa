"""What recoveries that are fitted in closed form share: the tokens they are fitted on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slm_exp.calibration.fit import FitSource
from slm_exp.core.errors import ConfigError, DataError, require
from slm_exp.core.registry import Fields
from slm_exp.core.together import Together
from slm_exp.core.types import CalibrationTokens
from slm_exp.engine.batches import Row
from slm_exp.models.base import ModelHandle
from slm_exp.models.sizes import Sizes
from slm_exp.recovery.base import Recovery, RecoveryTask, token_rows
from slm_exp.recovery.cuts import needs_dense_stream

CALLED = (("calibration.", "recovery."), ("calibration=", "recovery, as in calibration="))


@dataclass
class Fitted(Recovery):
    """A recovery by regression, without training. Every fifth sequence is held out: the whole model is judged there."""

    through_norms: ClassVar[bool] = False
    """Whether it can change a projection whose output passes a norm."""

    path: str | None = None
    """Tokens to fit on: a .npy file [N, T], or texts as in calibration=jsonl; null is calibration=mixture."""
    field: str = "text"
    """Name of the text field."""
    n_samples: int = 64
    """Sequences; of a .npy file all are taken."""
    seq_len: int = 256
    """Tokens per sequence."""

    def check(self) -> None:
        require(self.n_samples >= 2, "recovery.n_samples", self.n_samples, "a whole number >= 2",
                "One sequence at least is held out.")
        require(self.seq_len >= 2, "recovery.seq_len", self.seq_len, "a whole number >= 2")

    def identity(self) -> Fields:
        sizes = ("n_samples", "seq_len", "field", "path")  # of the source: a token file decides them itself
        out = {name: value for name, value in super().identity().items() if name not in sizes}
        return {**out, "tokens": self._source().identity()}

    def refuses(self, others: Together) -> str | None:
        return needs_dense_stream(others)

    def check_data(self, dense: ModelHandle) -> None:
        if dense.layout.no_refit and not self.through_norms:
            raise ConfigError(f"recovery={self.name}: {dense.layout.family} layers cannot be refitted by regression: "
                              f"{dense.layout.no_refit}. Take recovery=lora or another trained recovery.")
        self._source().check(dense)

    def lengths(self) -> dict[str, int]:
        return self._source().lengths()

    def _source(self) -> FitSource:
        return FitSource(self.path, self.n_samples, self.seq_len, self.field, CALLED)

    def memory(self, sizes: Sizes, width: float) -> float:
        """The dense stream at the cuts, in float64: before, after, and what is added."""
        return 4 * 8 * self.n_samples * self.seq_len * sizes.hidden

    def draw(self, task: RecoveryTask) -> CalibrationTokens:
        """The tokens to fit on: none from a document that the plan was found with, where documents are known. Raises
        DataError: too few or too short texts."""
        tokens = self._source().draw(task.dense, task.seed, task.tokens)
        if len(tokens.tokens_NT) < 2:
            raise DataError(f"{tokens.source}: 1 sequence; recovery={self.name} holds one out and fits on the others.")
        return tokens

    def judged_on(self, task: RecoveryTask) -> list[Row]:
        from slm_exp.engine.ridge import held_out

        tokens_NT = self.draw(task).tokens_NT
        return token_rows(tokens_NT[held_out(len(tokens_NT)).numpy()])


def require_maps(name: str, dense: ModelHandle) -> None:
    """Raise ConfigError where there is no code for maps behind this family's layers."""
    if not dense.layout.layerwise:
        raise ConfigError(f"recovery={name} puts maps behind layers, for which {dense.layout.family} models have no "
                          "code here. Take recovery=reconstruct or replace_me.")
