"""Tiny models, tokens, and the tasks that methods get. The same names are fixtures in conftest.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from slm_exp.core.cache.store import StageStore
from slm_exp.core.registry import available
from slm_exp.core.types import CalibrationTokens
from slm_exp.core.widths import KeptUnits, WidthDecision, WidthSizes, pack_indices
from slm_exp.models.base import ModelHandle
from slm_exp.models.tiny import Tiny
from slm_exp.search.task import PlanTask
from slm_exp.similarity.layers import layer_similarity


def tiny(family: str = "llama", **fields: Any) -> ModelHandle:
    """A random model on the CPU; `fields` as in `model=tiny`, e.g. layers=4, tied=False, seed=3."""
    return Tiny(family=family, **fields).open(torch.device("cpu"), Path("unused"))


def random_tokens(n: int = 4, length: int = 32, seed: int = 0) -> CalibrationTokens:
    """[n, length] random bytes."""
    ids = np.random.default_rng(seed).integers(0, 256, (n, length)).astype("int32")
    return CalibrationTokens(ids, "random", tuple(f"random:{i}" for i in range(n)))


def new_task(handle: ModelHandle, tokens: CalibrationTokens, rule: str = "top_layer", *, kernel: str = "linear",
             similarity: str = "flat_cosine", matrix: bool = False, cache: Path | None = None,
             **fields: Any) -> PlanTask:  # fmt: skip
    """What a method gets.

    Args:
        matrix: with the layer similarity matrix.
        cache: the folder of the stage cache; None keeps nothing.
        fields: settings of the similarity.
    """
    parts: Any = available("similarity")[similarity](**fields), available("kernel")[kernel]()
    score, gram = parts
    layers = layer_similarity(handle, tokens, gram, score) if matrix else None
    merge_rule: Any = available("merge_rule")[rule]()
    return PlanTask(handle, tokens, score, gram, merge_rule, layers, StageStore(cache))


def keeps_first(
    heads: list[int], kv_heads: list[int], channels: list[int], hidden: int = 32, **fields: Any
) -> WidthDecision:
    """Every layer keeps its lowest units, so many of each kind; `fields` are the decision's others."""
    kept = KeptUnits(query_heads=[[*range(n)] for n in heads], kv_heads=[[*range(n)] for n in kv_heads],
                     channels=[pack_indices(range(n), max(channels)) for n in channels])
    return WidthDecision(sizes=WidthSizes(heads=heads, kv_heads=kv_heads, channels=channels, hidden=hidden), kept=kept,
                         **fields)
