"""The threshold path on real weights, against single searches that share nothing with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders.models import new_task

from slm_exp.core.types import CalibrationTokens
from slm_exp.methods.slm import SLM
from slm_exp.search.path import follow
from slm_exp.search.scoring import ScoringEngine

RELEASED = 832
"""Block forwards of one released search of 30 layers at threshold 0.9."""


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["top_layer", "mean"])
def test_single_searches_end_where_the_path_says(smol_handle, rule, tmp_path: Path) -> None:
    words = smol_handle.tokenizer(Path("README.md").read_text())["input_ids"][: 4 * 32]
    tokens = CalibrationTokens(np.array(words, dtype="int32").reshape(4, 32), "readme", tuple("abcd"))
    task = new_task(smol_handle, tokens, rule, cache=tmp_path)
    start = SLM().start(30)
    scorer = ScoringEngine(task, top=start.high)
    path = follow(scorer, start, 30, 0.88, 0.95)
    assert path.complete
    assert len(path.plans) > 3
    assert scorer.block_forwards <= 0.45 * RELEASED * len(path.plans)
    alone = new_task(smol_handle, tokens, rule)
    for plan in path.plans[:: max(1, len(path.plans) // 5)]:
        for threshold in (plan.low, (plan.low + plan.high) / 2):
            single = SLM(threshold=threshold).plan(alone)
            assert single.groups == tuple(sorted(plan.groups)), threshold
            assert single.final_score == pytest.approx(plan.final_score, abs=1e-6)
