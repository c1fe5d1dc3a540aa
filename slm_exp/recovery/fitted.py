"""What recoveries that are fitted in closed form share: the tokens they are fitted on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slm_exp.calibration.fit import FitSettings
from slm_exp.core.errors import ConfigError, DataError
from slm_exp.core.together import Together
from slm_exp.core.types import CalibrationTokens
from slm_exp.engine.batches import Row
from slm_exp.models.base import ModelHandle
from slm_exp.models.sizes import Sizes
from slm_exp.recovery.base import Recovery, RecoveryTask, token_rows
from slm_exp.recovery.cuts import needs_dense_stream


@dataclass
class Fitted(FitSettings, Recovery):
    """A recovery by regression, without training. Every fifth sequence is held out: the whole model is judged there."""

    through_norms: ClassVar[bool] = False
    """Whether it can change a projection whose output passes a norm."""

    def refuses(self, others: Together) -> str | None:
        return needs_dense_stream(others)

    def check_data(self, dense: ModelHandle) -> None:
        if dense.layout.no_refit and not self.through_norms:
            raise ConfigError(f"recovery={self.name}: {dense.layout.family} layers cannot be refitted by regression: "
                              f"{dense.layout.no_refit}. Take recovery=lora or another trained recovery.")
        self.fit_source().check(dense)

    def memory(self, sizes: Sizes, width: float) -> float:
        """The dense stream at the cuts, in float64: before, after, and what is added."""
        return 4 * 8 * self.n_samples * self.seq_len * sizes.hidden

    def draw(self, task: RecoveryTask) -> CalibrationTokens:
        """The tokens to fit on: none from a document that the plan was found with, where documents are known. Raises
        DataError: too few or too short texts."""
        tokens = self.fit_source().draw(task.dense, task.seed, task.tokens)
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
