"""Scores after a refit: those of the model refitted and built, on tokens it was not fitted on, and gone when off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.models import new_task

from slm_exp.core.errors import ConfigError, DataError
from slm_exp.core.registry import available
from slm_exp.core.types import CalibrationTokens, Group, MergePlan, Sublayer
from slm_exp.launch.compose import compose_run
from slm_exp.merging.sharing import shared_copy
from slm_exp.merging.surgery import apply_plan
from slm_exp.search.refit import Refits, with_refits
from slm_exp.search.scoring import ScoringEngine, slots_of
from slm_exp.search.state import Candidate
from slm_exp.search.task import PlanTask

RUN = ["model=tiny", "evaluation=none", "tracking=none"]
AFTER = ["similarity=token_cosine", "similarity.after=reconstruct"]
PLANS = {
    "merged": MergePlan(8, groups=((2, 4), (5, 7)), rule="top_layer"),
    "removed": MergePlan(8, dropped=(3, 4)),
    "the lowest removed": MergePlan(8, dropped=(0, 1)),
    "halves": MergePlan(8, sublayers=(Sublayer(2, "mlp"), Sublayer(5, "attention"))),
}


@pytest.fixture
def make_task(make_tiny: Any, tokens: CalibrationTokens, tmp_path: Path) -> Any:
    np.save(tmp_path / "fit.npy", np.random.default_rng(1).integers(0, 256, (20, 24)))

    def go(handle: Any = None, name: str = "token_cosine", **fields: Any) -> PlanTask:
        fields = {"after": "reconstruct", "fit_path": str(tmp_path / "fit.npy")} | fields
        return new_task(handle or make_tiny(), tokens, similarity=name, cache=tmp_path / "cache", **fields)

    return go


def built_score(task: PlanTask, plan: MergePlan) -> float:
    """The plain procedure: build the model, put the refitted weights in, run both."""
    compressed = apply_plan(task.handle, plan, task.rule)
    refits = Refits(task)
    new = {}
    for i, slot in enumerate(with_refits(slots_of(plan, task.rule), plan.n_layers)):
        if slot.refit:
            own = dict(compressed.layers[i].named_parameters()) if slot.merged else {}
            found = refits.weights(slot, own)
            new |= {f"model.layers.{i}.{name}": t for name, t in found.items() if t is not own.get(name)}
    model = shared_copy(compressed.model, new)
    ids = torch.as_tensor(task.tokens.tokens_NT).long()
    with torch.inference_mode():
        last, dense = (m.model(ids, use_cache=False).last_hidden_state for m in (model, task.handle.model))
    assert new
    return task.similarity.against(dense, task.kernel)(last)


@pytest.mark.parametrize("name", PLANS)
def test_a_score_is_that_of_the_model_refitted_and_built(name: str, make_task: Any) -> None:
    task, plan = make_task(), PLANS[name]
    models = ScoringEngine(task)
    slots = slots_of(plan, task.rule)
    score = models.score(slots)
    assert score == pytest.approx(built_score(task, plan), abs=1e-5)
    assert score > ScoringEngine(make_task(after=None, fit_path=None)).score(slots)
    models.commit(slots[:3])
    assert ScoringEngine(task).score(slots) == score  # from the store


def test_the_sliding_search_scores_the_same_models(make_task: Any) -> None:
    task = make_task()
    scorer = ScoringEngine(task, top=6)
    candidate = Candidate(2, 3, (Group(5, 7),))
    assert scorer.score(candidate) == pytest.approx(built_score(task, PLANS["merged"]), abs=1e-5)
    share = 20 * 24 / (4 * 32)
    assert scorer.block_forwards == 8 + candidate.blocks(8) + int(np.ceil(share * (8 + 2)))


def test_a_cut_is_refitted_once_for_all_candidates_that_have_it(
    make_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    refit = Refits.fit
    monkeypatch.setattr(Refits, "fit", lambda self, slot, weights: asked.append(slot) or refit(self, slot, weights))
    models = ScoringEngine(make_task())
    for gone in ((3,), (5,), (3, 5)):
        models.loss(slots_of(MergePlan(8, dropped=gone), models.task.rule))
    assert [slot.refit for slot in asked] == [(2, 4), (4, 6)]


def test_which_layers_take_over() -> None:
    rule = available("merge_rule")["top_layer"]()
    found = {name: [(i, s.refit) for i, s in enumerate(with_refits(slots_of(plan, rule), 8)) if s.refit]
             for name, plan in PLANS.items()}
    assert found == {"merged": [(2, (2, 4)), (4, (5, 7))], "removed": [(2, (2, 5))],
                     "the lowest removed": [(0, (0, 3))], "halves": [(2, (2, 3)), (5, (5, 6))]}
    assert not any(s.refit for s in with_refits(slots_of(MergePlan(8), rule), 8))


def test_an_option_that_is_off_leaves_no_trace() -> None:
    plain, on = compose_run([*RUN, "similarity=token_cosine"]), compose_run([*RUN, *AFTER])
    assert set(plain.similarity.identity()) == {"name", "estimator", "batch", "skip_first_token"}
    assert plain.plan_identity()["similarity"] == {"name": "token_cosine"}
    assert plain.run_id == compose_run([*RUN, "similarity=token_cosine", "similarity.fit_samples=3"]).run_id
    assert on.run_id not in (plain.run_id, compose_run([*RUN, *AFTER, "similarity.fit_samples=3"]).run_id)
    assert on.matrix_identity() == plain.matrix_identity()
    assert on.plan_identity() != plain.plan_identity()


@pytest.mark.parametrize(("overrides", "message"), [
    (["similarity.after=reconstruct"], r"similarity.after = reconstruct; expected null with similarity=flat_cosine.*"
                                       "token_cosine"),
    (["similarity=token_cosine", "similarity.after=lora"], "similarity.after = lora; expected one of reconstruct"),
    (["similarity=token_cosine", "similarity.fit_path=x.npy"], "fit_path = x.npy; expected null without"),
    ([*AFTER, "similarity.fit_path=x.npy"], "similarity.fit_path = x.npy: there is no such file"),
    ([*AFTER, "method.compensate=magnitude"], r"null with a compensated plan \(method.compensate\)"),
])  # fmt: skip
def test_what_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run([*RUN, *overrides]).run_id  # noqa: B018 - reads the contents of files


def test_tokens_of_the_fit_may_not_be_scored_on(make_task: Any, tokens: CalibrationTokens, tmp_path: Path) -> None:
    rows = np.random.default_rng(2).integers(0, 256, (6, 48))
    rows[4, 9:41] = tokens.tokens_NT[2]
    np.save(tmp_path / "same.npy", rows)
    models = ScoringEngine(make_task(fit_path=str(tmp_path / "same.npy")))
    with pytest.raises(DataError, match=r"1 of the 4 calibration sequences .* rewards overfitting"):
        models.score(slots_of(PLANS["removed"], models.task.rule))
    assert not models.task.handle.loaded


def test_the_plan_says_so_and_a_run_without_the_refit_is_warned() -> None:
    assert any("Add recovery=reconstruct" in m for m in compose_run([*RUN, *AFTER]).advice())
    assert not compose_run([*RUN, *AFTER, "recovery=reconstruct"]).advice()


def test_a_greedy_baseline_chooses_by_it(make_task: Any) -> None:
    task = make_task()
    plan = available("method")["sleb"](target_layers=6).plan(task)  # type: ignore[attr-defined]
    assert plan.final_score == pytest.approx(ScoringEngine(task).score(slots_of(plan, task.rule)))
    assert any("refitted" in n for n in plan.notes)


def test_a_compensated_plan_says_so_once(make_task: Any) -> None:
    plan = available("method")["slm"](threshold=-1.0, compensate="magnitude").plan(make_task())  # type: ignore[attr-defined]
    assert plan.compensation
    assert sum("refitted" in n for n in plan.notes) == 1
