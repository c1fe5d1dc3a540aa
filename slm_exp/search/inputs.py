"""What scores of trial models depend on, and by which key they are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from slm_exp.core.cache.code import Code
from slm_exp.core.cache.store import Inputs, StageStore
from slm_exp.core.types import CalibrationTokens, FittedFile, Group, LayerSimilarity
from slm_exp.kernels.base import Kernel
from slm_exp.merging.rules.base import MergeRule
from slm_exp.models.base import ModelHandle
from slm_exp.similarity.base import Similarity

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SearchInputs:
    """The model to be cut, what it is judged by, and where results are kept."""

    handle: ModelHandle
    tokens: CalibrationTokens
    similarity: Similarity
    kernel: Kernel
    rule: MergeRule
    layer_similarity: LayerSimilarity | None
    store: StageStore
    seed: int = 0
    fitted: FittedFile | None = None
    """Where a given plan's merged layers lie; None where the rule fits them, if it does."""
    fits: dict[Group, dict[str, Tensor]] = field(default_factory=dict, compare=False, repr=False)
    """What windows have become so far, by a rule that fits: copies of a task share it."""


SCORED_BY = Code(("core/types.py", "core/widths.py", "models", "merging", "search", "engine", "similarity", "kernels",
                  "calibration/fit.py"))
"""What computes the values of trial models."""


def journal_of(store: StageStore, inputs: Inputs) -> Path | None:
    """The folder of the journal with these inputs; None where nothing is kept."""
    return store.entry("scores", inputs, SCORED_BY) if store.folder else None


def journal_inputs(value: str, *, model: str, device: str, tokens: str, similarity: Similarity, kernel: Kernel,
                   rule: MergeRule | None, fit: str | None, dtype: str | None = None,
                   fitted: str | None = None) -> Inputs:
    """What the journal of one kind of value depends on (see `journal_of`). Needs no weights.

    Args:
        value: `score` (by the similarity), `samples` (every sample's), `loss`, or another name.
        model, tokens, fit: digests; `fit` of the tokens of the refit, None without `similarity.after`.
        device: its type, e.g. `cpu`.
        rule: that merges; None for models in which nothing is merged.
        dtype: computed in, where it is not the model's own.
        fitted: digest of what the rule fits on, or has fitted; None of one that does not.
    """
    if (similarity.after is None) != (fit is None):
        raise ValueError(f"similarity.after = {similarity.after}, and the digest of the tokens of the fit is {fit}.")
    out: Inputs = {"value": value, "model": model, "device": device, "tokens": tokens, "computed_in": dtype,
                   "rule": rule and rule.identity(), "after": similarity.after, "fit": fit}
    if fitted is not None:
        out["fitted"] = fitted
    if value in ("score", "samples"):
        out["similarity"] = similarity.score_identity()
        if similarity.uses_kernel():
            out |= {"similarity": similarity.identity(), "kernel": kernel.identity()}
    return out
