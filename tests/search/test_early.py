"""Scores that end early: the decisions of whole scores, bounds that hold, costs in fractions, nothing partial kept."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.models import new_task, random_tokens, tiny

from slm_exp.core.cache import journal
from slm_exp.core.cache.journal import Journal
from slm_exp.core.registry import available
from slm_exp.core.types import MergePlan
from slm_exp.engine.runner import BlockRunner
from slm_exp.methods.slm import SLM
from slm_exp.search.early import Bounded, Samples
from slm_exp.search.path import follow
from slm_exp.search.scoring import ScoringEngine
from slm_exp.search.state import Candidate, SearchState
from slm_exp.search.task import PlanTask
from slm_exp.search.threshold import search

BY_SAMPLE = sorted(name for name, member in available("similarity").items() if member.by_sample)


def task_of(similarity: str, rule: str = "mean", cache: Path | None = None) -> PlanTask:
    """A tiny model with samples of very different difficulty."""
    torch.manual_seed(0)
    task = new_task(tiny(), random_tokens(10, 8), rule, cache=cache)
    return replace(task, similarity=available("similarity")[similarity]())


class Recorded:
    """An engine that runs every candidate of a tiny model once and lets searches share what its samples score."""

    def __init__(self, task: PlanTask, error: float = 0.0) -> None:
        self.n_layers, self.engine, self.error = task.handle.n_layers, ScoringEngine(task), error
        self.found: dict[Candidate, Bounded] = {}
        self.forget()

    def forget(self) -> None:
        self.samples = Samples(self.engine.task.tokens)

    def whole(self, candidate: Candidate) -> Bounded:
        if candidate not in self.found:
            self.found[candidate] = self.engine.bounded(candidate, -math.inf)
        return self.found[candidate]

    def value(self, candidate: Candidate, i: int, dtype: str | None) -> float:
        draw = random.Random(f"{candidate}{i}")
        return self.whole(candidate).values[i] + (self.error * draw.uniform(0.5, 1) if dtype else 0)

    def score(self, candidate: Candidate, dtype: str | None = None) -> float:
        n = self.whole(candidate).n
        return math.fsum(self.value(candidate, i, dtype) for i in range(n)) / n

    def bounded(self, candidate: Candidate, threshold: float, dtype: str | None = None) -> Bounded:
        return self.samples.bounded((dtype, candidate), threshold, Journal(None), "", lambda rows: [
            self.value(candidate, i, dtype) for i in rows], lambda share: None)


@pytest.mark.parametrize("similarity", BY_SAMPLE)
def test_a_thousand_thresholds_decide_as_whole_scores_do(similarity: str) -> None:
    engine, start, draw, early = Recorded(task_of(similarity)), SearchState.start(8), random.Random(0), 0
    scores = [step.score for step in search(engine, start, 1.0)]
    for k in range(1000):
        threshold = draw.choice(scores) if k % 10 == 0 else draw.uniform(1.5 * min(scores) - 0.5, 1.0)
        engine.forget()
        whole = search(engine, start, threshold)
        steps = search(engine, start, threshold, early_stop=True)
        assert [(s.state, s.accepted) for s in steps] == [(s.state, s.accepted) for s in whole]
        for step, exact in zip(steps, whole, strict=True):
            early += step.ended_early
            assert exact.score <= step.score <= threshold if step.ended_early else step.score == pytest.approx(
                exact.score, abs=1e-12)
    assert early > 500


@pytest.mark.parametrize("seed", range(20))
def test_screened_and_ended_early_decisions_stay(seed: int) -> None:
    engine, draw = Recorded(task_of("token_cosine"), 10 ** -random.Random(seed).uniform(2, 5)), random.Random(seed)
    start = SearchState.start(8)
    scores = [step.score for step in search(engine, start, 1.0)]
    for _ in range(20):
        threshold = draw.uniform(min(scores) - 0.02, max(scores) + 0.02)
        engine.forget()
        whole = search(engine, start, threshold)
        steps = search(engine, start, threshold, "cheap", early_stop=True)
        assert [(s.state, s.accepted) for s in steps] == [(s.state, s.accepted) for s in whole]


def middle(task: PlanTask) -> float:
    """A threshold at which some candidates pass and others do not."""
    scores = sorted(t.most for t in SLM(threshold=1.0).plan(task).trace)
    return (scores[2] + scores[3]) / 2


@pytest.mark.parametrize("rule", ["top_layer", "mean"])
def test_fractions_are_counted_as_they_run(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task, ran, block = task_of("token_cosine", rule), [], BlockRunner.block
    threshold = middle(task)
    whole = SLM(threshold=threshold).plan(task)
    monkeypatch.setattr(BlockRunner, "block", lambda self, slot, h: ran.append(len(h)) or block(self, slot, h))
    plan = SLM(threshold=threshold, early_stop=True).plan(task)
    assert plan.block_forwards == math.ceil(sum(ran) / 10) < whole.block_forwards
    assert (plan.groups, plan.evaluations) == (whole.groups, whole.evaluations)
    assert plan.final_score == pytest.approx(whole.final_score, abs=1e-6)
    assert [(t.low, t.high, t.accepted) for t in plan.trace] == [(t.low, t.high, t.accepted) for t in whole.trace]
    for trial, exact in zip(plan.trace, whole.trace, strict=True):
        assert (trial.score is None) == (trial.bound is not None)
        assert exact.most <= trial.most + 1e-6
        assert trial.score is not None if trial.accepted else trial.most <= threshold
    assert any(t.score is None for t in plan.trace)
    entries = plan.to_json()["trace"]
    assert all(("bound" in entry) == (entry["score"] is None) for entry in entries)
    assert MergePlan.from_json(plan.to_json()) == plan


def test_no_partial_score_is_kept_and_a_full_store_changes_nothing(tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    threshold = middle(task_of("token_cosine"))
    task = task_of("token_cosine", cache=tmp_path)
    plan = SLM(threshold=threshold, early_stop=True).plan(task)
    kept = [entry for file in tmp_path.rglob(journal.FILE) for entry in journal.read(file.parent)[0].items()]
    assert len(kept) == sum(t.score is not None for t in plan.trace) > 0
    assert all(len(values) == 10 for _, values in kept)
    ran: list[int] = []
    block = BlockRunner.block
    monkeypatch.setattr(BlockRunner, "block", lambda self, slot, h: ran.append(len(h)) or block(self, slot, h))
    again = SLM(threshold=threshold, early_stop=True).plan(replace(task))
    assert again == plan
    assert math.ceil(sum(ran) / 10) < plan.block_forwards


def test_a_path_has_the_same_plans_for_fewer_block_forwards() -> None:
    task, start = task_of("token_cosine"), SearchState.start(8)
    scores = [t.most for t in SLM(threshold=1.0).plan(task).trace]
    whole, early = ScoringEngine(task), ScoringEngine(task)
    low = min(scores)
    path = follow(whole, start, 8, low, 1.0)
    same = follow(early, start, 8, low, 1.0, early_stop=True)
    assert [p.groups for p in same.plans] == [p.groups for p in path.plans]
    assert len(path.plans) > 2
    for a, b in zip(same.plans, path.plans, strict=True):
        assert (a.low, a.high, a.final_score) == pytest.approx((b.low, b.high, b.final_score), abs=1e-6)
    assert early.block_forwards < whole.block_forwards


def test_a_size_is_found_as_without(task: PlanTask) -> None:
    whole = SLM(target_layers=5, threshold_range=[-1, 1]).plan(task)
    plan = SLM(target_layers=5, threshold_range=[-1, 1], early_stop=True).plan(task)
    assert plan.groups == whole.groups
    assert plan.block_forwards <= whole.block_forwards


def test_a_sample_that_is_not_finite_rejects_at_once() -> None:
    ran: list[int] = []

    def run(rows: list[int]) -> list[float]:
        ran.extend(rows)
        return [math.nan if i == 1 else 0.99 for i in rows]

    samples, kept = Samples(random_tokens(10, 8)), Journal(None)
    found = samples.bounded((None, ()), -1.0, kept, "key", run, lambda share: None)
    assert (found.score, ran, kept.entries) == (-1.0, [0, 1], {})


def test_the_hardest_samples_of_the_last_candidate_come_first() -> None:
    values = [0.9, 0.8, 0.1, 0.95, 0.3]
    order: list[list[int]] = []
    run: Callable[[list[int]], list[float]] = lambda rows: order.append(rows) or [values[i] for i in rows]  # noqa: E731
    samples = Samples(random_tokens(5, 8))
    for name in ("first", "second"):
        samples.bounded((name, ()), -math.inf, Journal(None), "key", run, lambda share: None)
    assert [i for rows in order for i in rows] == [0, 1, 2, 3, 4, 2, 4, 1, 0, 3]


def test_a_score_that_no_sample_bounds_is_refused(capfd: Any) -> None:
    from slm_exp.cli.run import main

    overrides = ["model=tiny", "method.early_stop=true", "similarity=cka", "tracking=none"]
    assert main(overrides) == 2
    assert "method.early_stop = true with similarity=cka" in capfd.readouterr().err


def test_a_run_its_page_and_its_table_stand_bounds(tmp_path: Path, capsys: Any) -> None:
    from builders.runs import tiny_run

    from slm_exp.cli.tables import main as tables

    words = ("method.threshold=0.8", "method.early_stop=true")
    record = tiny_run(tmp_path / "runs" / "early", *words)
    bounds = [t["bound"] for t in record["plan"]["trace"] if t["score"] is None]
    assert bounds
    assert record["plan"]["groups"] == tiny_run(tmp_path / "whole", words[0])["plan"]["groups"]
    page = (tmp_path / "runs" / "early" / "report.html").read_text()
    assert all(f"≤ {bound:.5f}" in page for bound in bounds)
    assert f"score at most {bounds[0]:.4f}, rejected" in page
    assert "where one ended early" in page
    assert tables.main(["sweep", str(tmp_path / "runs")], standalone_mode=False) in (0, None)
    assert "| 0.8" in capsys.readouterr().out
