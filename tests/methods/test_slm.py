"""Sliding layer merging as a method: plans, notes, costs, settings. Its decisions: tests/reference, tests/search."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slm_exp.core import registry
from slm_exp.core.cache import journal
from slm_exp.core.cache.store import StageStore
from slm_exp.core.errors import ConfigError
from slm_exp.core.types import Group
from slm_exp.engine.runner import BlockRunner
from slm_exp.methods.slm import SLM
from slm_exp.search.inputs import journal_inputs, journal_of
from slm_exp.search.scoring import ScoringEngine, Slots
from slm_exp.search.state import Candidate
from slm_exp.search.task import PlanTask


def candidate_of(slots: Slots) -> Candidate:
    window, *above = (slot.merged for slot in slots if slot.merged)
    return Candidate(window.start, window.stop - 1, tuple(reversed(above)))


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Candidate], float]], None]:
    """Replace the model by a function of the candidate."""

    def use(score: Callable[[Candidate], float]) -> None:
        monkeypatch.setattr(ScoringEngine, "compute", lambda self, slots, of, dtype: score(candidate_of(slots)))

    return use


def test_never_similar_merges_nothing(task: PlanTask, scores: Any) -> None:
    scores(lambda candidate: 0.1)
    plan = SLM().plan(task)
    assert plan.groups == ()
    assert plan.final_score == 1.0
    assert plan.threshold == 0.9
    assert [(t.low, t.high) for t in plan.trace] == [(5, 6), (4, 5), (3, 4), (2, 3), (1, 2), (0, 1)]
    # the dense pass, then one merged layer and what stays above: 2, 3, ... 7
    assert plan.block_forwards == 8 + (2 + 3 + 4 + 5 + 6 + 7)
    assert plan.notes == ()


def test_always_similar_merges_all_but_the_top_and_says_what_the_released_code_would_do(
    task: PlanTask, scores: Any
) -> None:
    scores(lambda candidate: 0.95 + candidate.low / 1000)
    plan = SLM().plan(task)
    assert plan.groups == (Group(0, 7),)
    assert plan.final_score == 0.95
    assert plan.block_forwards == 8 + 6 * 2
    assert "layers 0..6 had passed" in plan.notes[0]
    assert "commit_open_window=false" in plan.notes[0]
    released = SLM(commit_open_window=False).plan(task)
    assert released.groups == ()
    assert released.final_score == 1.0
    assert "left as they are" in released.notes[0]
    assert released.trace == plan.trace


def test_a_score_equal_to_the_threshold_does_not_pass(task: PlanTask, scores: Any) -> None:
    scores(lambda candidate: 0.5)
    assert SLM(threshold=0.5).plan(task).groups == ()
    assert SLM(threshold=0.4999999).plan(task).groups == (Group(0, 7),)


def test_a_score_that_is_not_a_number_does_not_pass(task: PlanTask) -> None:
    task.handle.model.model.layers[3].mlp.down_proj.weight.data[:] = float("nan")
    plan = SLM(threshold=-0.5).plan(task)
    assert plan.groups == ()


def test_protected_layers_stay(task: PlanTask, scores: Any) -> None:
    scores(lambda candidate: 1.0)
    assert SLM(protect_first=2, protect_last=3).plan(task).groups == (Group(2, 5),)
    assert SLM(protect_first=7).plan(task).groups == ()


@pytest.mark.parametrize("rule", [n for n, r in registry.available("merge_rule").items() if not r.fits])
def test_block_forwards_are_those_executed(rule: str, task: PlanTask, monkeypatch: pytest.MonkeyPatch) -> None:
    executed = []
    block = BlockRunner.block
    monkeypatch.setattr(BlockRunner, "block", lambda self, *a: executed.append(1) or block(self, *a))
    task = replace(task, rule=registry.available("merge_rule")[rule]())
    every = SLM(threshold=1.0).plan(task)
    middle = sorted(t.score for t in every.trace)[3]
    executed.clear()
    plan = SLM(threshold=middle).plan(task)
    assert plan.groups
    assert plan.block_forwards == len(executed)
    assert plan.evaluations == len(plan.trace)


@pytest.mark.parametrize("similarity", ["flat_cosine", "token_cosine", "angular", "cka"])
def test_every_score_decides(similarity: str, task: PlanTask) -> None:
    task = replace(task, similarity=registry.available("similarity")[similarity]())
    every = SLM(threshold=1.0).plan(task)
    assert every.groups == ()
    best = max(every.trace, key=lambda t: t.score)
    plan = SLM(threshold=best.score - 1e-9).plan(task)
    assert plan.groups
    assert plan.similarity == similarity


def test_weights_are_whole_after_an_exception_in_the_middle(task: PlanTask, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {n: p.clone() for n, p in task.handle.model.state_dict().items()}
    calls = []
    block = BlockRunner.block

    def failing(self: BlockRunner, *args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 20:
            raise RuntimeError("out of memory")
        return block(self, *args)

    monkeypatch.setattr(BlockRunner, "block", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        SLM(threshold=-1).plan(task)
    assert all(torch.equal(before[n], p) for n, p in task.handle.model.state_dict().items())
    assert all("forward" not in m.__dict__ for m in task.handle.model.modules())


def test_a_killed_search_goes_on_from_its_scores(
    task: PlanTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_tiny: Any
) -> None:
    """Also for another threshold, and without loading weights when no score is missing."""
    task = replace(task, store=StageStore(tmp_path))
    compute, computed = ScoringEngine.compute, []

    def dying(self: ScoringEngine, slots: Slots, *more: Any) -> float:
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(candidate_of(slots))
        return compute(self, slots, *more)

    monkeypatch.setattr(ScoringEngine, "compute", dying)
    with pytest.raises(KeyboardInterrupt):
        SLM(threshold=1.0).plan(task)
    first, computed[:] = list(computed), []
    monkeypatch.setattr(
        ScoringEngine, "compute",
        lambda self, slots, *more: computed.append(candidate_of(slots)) or compute(self, slots, *more),
    )
    plan = SLM(threshold=1.0).plan(task)
    assert len(first) == 3
    assert not set(first) & set(computed)
    assert len(first) + len(computed) == len(plan.trace)
    fresh = make_tiny()
    again = SLM(threshold=1.0).plan(replace(task, handle=fresh))
    assert again == plan
    assert not fresh.loaded


@pytest.mark.parametrize("commit", [True, False])
def test_a_plan_is_known_from_the_scores_of_another_threshold(commit: bool, task: PlanTask, tmp_path: Path) -> None:
    """By the key that digests give, without weights: what a forecast does."""
    task = replace(task, store=StageStore(tmp_path))
    every = SLM(threshold=1.0).plan(task)
    inputs = journal_inputs(
        "score", model=task.handle.digest, device="cpu", tokens=task.tokens.digest, similarity=task.similarity,
        kernel=task.kernel, rule=task.rule, fit=None)
    kept, _ = journal.read(journal_of(task.store, inputs))
    assert len(kept) == every.evaluations
    best = max(t.score for t in every.trace)
    low = SLM(threshold=best - 1e-9, commit_open_window=commit)
    assert low.plan_from_scores(8, kept, "top_layer") is None  # candidates above the first group are not known yet
    plan = low.plan(task)
    kept, _ = journal.read(journal_of(task.store, inputs))
    known = low.plan_from_scores(8, kept, "top_layer")
    assert known is not None
    assert known.effect() == plan.effect()
    assert SLM(target_layers=5).plan_from_scores(8, kept, "top_layer") is None


def test_the_key_of_a_journal_needs_the_tokens_of_the_refit(task: PlanTask) -> None:
    after = registry.available("similarity")["token_cosine"](after="reconstruct")
    about: dict[str, Any] = {"model": "m", "device": "cpu", "tokens": "t", "kernel": task.kernel, "rule": task.rule}
    with pytest.raises(ValueError, match="the digest of the tokens of the fit is None"):
        journal_inputs("score", similarity=after, fit=None, **about)
    plain = replace(after, after=None)
    cases = ((after, "a", None), (after, "b", None), (plain, None, None), (plain, None, "bfloat16"))
    keys = [journal_inputs("score", similarity=s, fit=fit, dtype=dtype, **about) for s, fit, dtype in cases]
    assert all(a != b for a, b in itertools.combinations(keys, 2))


def test_scores_of_other_tokens_or_rules_are_not_taken(task: PlanTask, tmp_path: Path) -> None:
    task = replace(task, store=StageStore(tmp_path))
    plan = SLM(threshold=1.0).plan(task)
    other_tokens = replace(task.tokens, tokens_NT=task.tokens.tokens_NT[::-1, ::-1].copy())
    other_rule = registry.available("merge_rule")["mean"]()
    for other in (replace(task, tokens=other_tokens), replace(task, rule=other_rule)):
        assert [t.score for t in SLM(threshold=1.0).plan(other).trace] != [t.score for t in plan.trace]


@pytest.mark.parametrize(("settings", "message"), [
    ({"threshold": 1.5}, "method.threshold = 1.5"),
    ({"threshold_range": [0.9, 0.5]}, "method.threshold_range"),
    ({"threshold_range": [0.5]}, "method.threshold_range"),
    ({"protect_first": -1}, "method.protect_first = -1"),
    ({"max_evaluations": 0}, "method.max_evaluations = 0"),
    ({"screen_dtype": "float16"}, "method.screen_dtype = float16; expected one of bfloat16"),
    ({"threshold": 0.9, "target_layers": 5}, "set at most one"),
])  # fmt: skip
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SLM(**settings)


def test_the_default_threshold_is_the_threshold_it_stands_for() -> None:
    assert SLM().identity() == SLM(threshold=0.9).identity()
    assert SLM().identity() != SLM(threshold=0.8).identity()
    assert SLM(max_evaluations=7).identity() == SLM().identity()
    assert SLM(max_evaluations=7, target_layers=5).identity() != SLM(target_layers=5).identity()


@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="this CPU has no bfloat16 in oneDNN",
)
def test_a_screen_gives_the_same_groups_and_an_exact_final_score(task: PlanTask) -> None:
    """At thresholds between scores, and within 1e-5 of one, where the screened score cannot tell."""
    every = sorted(t.score for t in SLM(threshold=1.0).plan(task).trace)
    middles = [(a + b) / 2 for a, b in itertools.pairwise(every)]
    for threshold in [*middles, *(s + d for s in random.Random(0).sample(every, 2) for d in (-1e-5, 1e-5))]:
        exact = SLM(threshold=threshold).plan(task)
        screened = SLM(threshold=threshold, screen_dtype="bfloat16").plan(task)
        assert screened.groups == exact.groups
        assert screened.final_score == exact.final_score
        assert [(t.low, t.high, t.accepted) for t in screened.trace] == [
            (t.low, t.high, t.accepted) for t in exact.trace
        ]


def test_a_processor_without_bfloat16_scores_in_the_models_own_dtype(task: PlanTask, monkeypatch, caplog) -> None:
    monkeypatch.setattr("slm_exp.search.threshold.has_bfloat16", lambda device: False)
    wanted = SLM(threshold=0.8).plan(task)
    assert SLM(threshold=0.8, screen_dtype="bfloat16").plan(task) == wanted
    assert "method.screen_dtype = bfloat16: the cpu has no instructions for it" in caplog.text
