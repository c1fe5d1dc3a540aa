"""The search against its slow twin: same candidates, same scores, same groups, same weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.models import new_task
from released import search as released_search

from slm_exp.core import registry
from slm_exp.merging.surgery import apply_plan
from slm_exp.methods.slm import SLM

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"sliding_window": 5},
    "qwen3": {"sliding_window": 5},
}


def thresholds(model: Any, tokens_NT: Any, rule: str, n: int, seed: int) -> list[float]:
    """Thresholds that decide something: halfway between scores that the plain search meets."""
    scores = sorted({s for *_, s in released_search(model, tokens_NT, 2.0, rule).scores})
    scores += [s for *_, s in released_search(model, tokens_NT, scores[len(scores) // 2], rule).scores]
    middles = [(a + b) / 2 for a, b in zip(sorted(scores), sorted(scores)[1:], strict=False) if b - a > 1e-4]
    return random.Random(seed).sample(middles, min(n, len(middles)))


def compare(handle: Any, tokens: Any, rule: str, threshold: float, scores_within: float = 1e-5) -> None:
    plain = released_search(handle.model, tokens.tokens_NT, threshold, rule)
    plan = SLM(threshold=threshold, commit_open_window=False).plan(new_task(handle, tokens, rule))
    assert [tuple(g) for g in plan.groups] == sorted(plain.groups)
    # the released loop also scores every committed model again, as a window of one layer
    asked = [(low, high, s) for low, high, s in plain.scores if low < high]
    assert [(t.low, t.high) for t in plan.trace] == [(low, high) for low, high, _ in asked]
    for ours, (*_, theirs) in zip(plan.trace, asked, strict=True):
        assert ours.score == pytest.approx(theirs, abs=scores_within)
        assert ours.accepted == (theirs > threshold)
    repeated = [s for low, high, s in plain.scores if low == high]
    assert plan.final_score == pytest.approx(repeated[-1] if repeated else 1.0, abs=scores_within)
    assert plan.block_forwards < plain.layers_run

    merged = apply_plan(handle, plan, registry.available("merge_rule")[rule]()).model.state_dict()
    theirs = plain.model.state_dict()
    assert merged.keys() == theirs.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", ["top_layer", "sum_of_deltas", "mean", "keep_low", "keep_top"])
def test_same_search_as_the_plain_procedure(family: str, rule: str, make_tiny: Any, tokens: Any) -> None:
    handle = make_tiny(family, layers=7, seed=len(rule), **FAMILIES[family])
    for threshold in thresholds(handle.model, tokens.tokens_NT, rule, 2, seed=len(family)):
        compare(handle, tokens, rule, threshold)


def test_plain_procedure_counts_what_the_released_loop_executes(make_tiny: Any, tokens: Any) -> None:
    """Nothing passes: L-2 candidates of two layers, each a model of L-1 layers, after one dense pass."""
    handle = make_tiny(layers=6)
    plain = released_search(handle.model, tokens.tokens_NT, 2.0)
    assert len(plain.scores) == 4
    assert plain.layers_run == 6 + 4 * 5


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "groups"), [
    ("top_layer", [(14, 16), (25, 28)]),
    ("sum_of_deltas", [(14, 16), (22, 24), (26, 28)]),
])  # fmt: skip
def test_real_weights_give_the_published_groups(rule: str, groups: list[tuple[int, int]], shared_data: Path) -> None:
    """SmolLM2-135M, 10 x 128 tokens of WikiText-2, threshold 0.9."""
    import numpy as np

    from slm_exp.core.cache.store import default_cache_dir
    from slm_exp.core.types import CalibrationTokens

    file = shared_data / "trial" / "wt2valid_10x128.npy"
    if not file.is_file():
        pytest.skip(f"no {file}")
    model = registry.available("model")["smollm2_135m"]()
    handle = model.open(torch.device("cpu"), Path(default_cache_dir()))  # type: ignore[attr-defined]
    tokens = CalibrationTokens(np.load(file), str(file))
    plan = SLM(threshold=0.9, commit_open_window=False).plan(new_task(handle, tokens, rule))
    assert [tuple(g) for g in plan.groups] == groups
    assert plan.evaluations == 28
    if rule == "top_layer":
        assert plan.block_forwards == 399
        assert plan.final_score == pytest.approx(0.905, abs=1e-3)
        compare(handle, tokens, rule, 0.9, scores_within=1e-4)
