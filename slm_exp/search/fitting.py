"""What candidates are fitted on before they are scored: tokens of their own, and the dense model's states on them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from slm_exp.calibration.fit import shared_sequences
from slm_exp.core.errors import DataError
from slm_exp.core.types import CalibrationTokens, FittedFile, Group, MergePlan
from slm_exp.engine.runner import BlockRunner
from slm_exp.merging.fitted import pack, unpack
from slm_exp.merging.rules.base import FittingRule
from slm_exp.search.inputs import SearchInputs


def disjoint(tokens: CalibrationTokens, scored: CalibrationTokens, who: str, setting: str) -> CalibrationTokens:
    """Tokens to fit on as they are. Raises DataError: they are too few, or share text with those that are scored on.

    Args:
        who: fits on them, for messages.
        setting: names them.
    """
    if len(tokens.tokens_NT) < 2:
        raise DataError(f"{tokens.source}: 1 sequence; {who} fits on some and chooses the ridge on others.")
    if twice := shared_sequences(scored, tokens):
        raise DataError(f"{tokens.source}: {twice} of the {len(scored.tokens_NT)} calibration sequences have text in "
                        f"common with it. A score on tokens of the fit rewards overfitting: give other tokens by "
                        f"{setting} or calibration.")
    return tokens


class Fits(ABC):
    """What is fitted on tokens of its own, to the dense model's states.

    Memory: those states, [N, T, D] float32 for every layer.
    """

    def __init__(self, task: SearchInputs) -> None:
        self.task = task

    @property
    @abstractmethod
    def tokens(self) -> CalibrationTokens:
        """Those to fit on. Raises DataError as `disjoint`."""

    @cached_property
    def runner(self) -> BlockRunner:
        """Runs the library's layers, into which one can look."""
        return BlockRunner(self.task.handle, self.tokens.tokens_NT, torch.float32, fuse=False)

    @cached_property
    def states(self) -> list[Tensor]:
        """Entering layers 0..L-1, and the last one's output."""
        return BlockRunner(self.task.handle, self.tokens.tokens_NT, torch.float32).states()


class Windows(Fits):
    """What windows become by a merge rule that fits, none fitted twice; or what the file beside a plan says.

    Memory: as `Fits`, and every window's layer.
    """

    @property
    def _rule(self) -> FittingRule:
        assert isinstance(self.task.rule, FittingRule)
        return self.task.rule

    @cached_property
    def tokens(self) -> CalibrationTokens:
        """Those to fit on. Raises DataError as `disjoint`."""
        return disjoint(self._rule.draw(self.task), self.task.tokens, f"merge_rule={self.task.rule.name}",
                        "merge_rule.path")

    @property
    def digest(self) -> str | None:
        """Of what the layers come from: a file's contents, or the tokens; None where nothing is fitted."""
        if not self.task.rule.fits:
            return None
        return self.task.fitted.sha256 if self.task.fitted else self.tokens.digest

    def block_forwards(self, windows: int) -> int:
        """Of the dense pass over the fitting tokens, in passes over those that are scored on; what fitting itself
        takes is the rule's (`MergeRule.cost`)."""
        if not windows or self.task.fitted:
            return 0
        return math.ceil(self.tokens.tokens_NT.size / self.task.tokens.tokens_NT.size * self.task.handle.n_layers)

    def weights(self, group: Group) -> dict[str, Tensor]:
        """The merged layer's parameters that differ from its host's. Cost: see `FittingRule.fit`, once."""
        fits = self.task.fits
        if self.task.fitted and not fits:
            fits |= unpack(self.task.fitted)
        if group not in fits:
            fits[group] = self._rule.fit(self.runner, group, self.states[group.start], self.states[group.stop])
        return fits[group]

    def file(self, plan: MergePlan) -> FittedFile:
        """What lies beside a plan."""
        return self.task.fitted or pack({group: self.weights(group) for group in plan.groups})
