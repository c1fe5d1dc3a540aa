"""beam and evopress: sets of parts against brute force, greedy methods and the published counts."""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random
from typing import Any

import pytest
from builders.models import new_task
from builders.runs import tiny_config

from slm_exp.core.errors import ConfigError, PlanError
from slm_exp.core.registry import available
from slm_exp.core.types import MergePlan
from slm_exp.forecast.plan import make_plan
from slm_exp.search.budget import flops_costs
from slm_exp.search.evolution import Evolution, beam, plan_without
from slm_exp.search.greedy import Unit
from slm_exp.search.scoring import ScoringEngine

METHODS = available("method")
UNITS = [Unit(i) for i in range(10)]


def plan_of(handle: Any, tokens: Any, name: str, folder: Path | None = None, **fields: Any) -> MergePlan:
    method: Any = METHODS[name](**fields)
    method.check_model(handle)
    return method.plan(new_task(handle, tokens, cache=folder))


def effect(plan: MergePlan) -> tuple[Any, Any]:
    return plan.dropped, plan.sublayers


@pytest.mark.parametrize(("other", "fields"), [
    ("sleb", {"target_layers": 5, "protect_first": 1, "protect_last": 1}), ("blockpruner", {"target_sublayers": 4})])
def test_a_beam_of_one_is_greedy_and_a_wider_one_no_worse(other: str, fields: Any, make_tiny: Any, tokens: Any) -> None:
    handle = make_tiny(seed=3)
    greedy = plan_of(handle, tokens, other, **fields)
    one = plan_of(handle, tokens, "beam", width=1, **fields)
    assert effect(one) == effect(greedy)
    assert max(t.score for t in one.trace[-3:]) == pytest.approx(max(t.score for t in greedy.trace[-3:]))
    wide = plan_of(handle, tokens, "beam", width=3, **fields)
    engine = new_task(handle, tokens).engine
    assert engine.loss(wide) <= engine.loss(one)


def test_a_beam_as_wide_as_all_sets_finds_the_best_of_all() -> None:
    random = Random(0)
    value = {frozenset(c): random.random() for n in range(4) for c in itertools.combinations(UNITS, n)}
    wanted = lambda removed, _: len(removed) < 3  # noqa: E731
    found = beam(UNITS, 1000, value.__getitem__, wanted, lambda parts: None)
    assert value[found.parts] == min(v for parts, v in value.items() if len(parts) == 3)
    assert len(found.trace) == sum(len(parts) > 0 for parts in value)  # each set once
    narrow = beam(UNITS, 1, value.__getitem__, wanted, lambda parts: None)
    assert value[narrow.parts] > value[found.parts]
    with pytest.raises(PlanError, match="every set of 1 parts has a score that is not a finite number"):
        beam(UNITS, 2, lambda parts: float("inf"), wanted, lambda parts: None)


def evolution(**fields: Any) -> Evolution:
    return Evolution(**{"starts": 8, "children": 16, "survivors": 2, "swaps": 3, "generations": 40,
                        "max_evaluations": None, **fields})


def evolve(search: Evolution, seed: int = 0) -> Any:
    """Towards the sets of highest numbers; the quick look is rough."""
    pools = [[Unit(i, "attention") for i in range(10)], [Unit(i, "mlp") for i in range(10)]]
    cost = lambda parts: -float(sum(u.layer for u in parts))  # noqa: E731
    return search.run(pools, [3, 2], lambda parts: cost(parts) // 4, cost, lambda parts: None, Random(seed))


def test_evolution_keeps_the_counts_and_finds_the_best_set() -> None:
    found = evolve(evolution())
    assert {u.layer for u in found.parts if u.kind == "attention"} == {7, 8, 9}
    assert {u.layer for u in found.parts if u.kind == "mlp"} == {8, 9}
    scores = [t.score for t in found.trace if t.accepted]
    assert scores == sorted(scores)  # a parent is replaced by a better one alone
    assert evolve(evolution()) == found


def test_a_budget_ends_an_evolution() -> None:
    short = evolve(evolution(max_evaluations=30))
    assert len(short.trace) < len(evolve(evolution()).trace)
    assert len(short.parts) == 5


@pytest.mark.parametrize("fields", [{"target_layers": 5}, {"target_sublayers": 4}, {"target_ratio": 0.2},
                                    {"target_ratio": 0.2, "tied": False}])  # fmt: skip
def test_evopress_takes_the_size_it_is_asked_and_is_no_worse_than_its_start(
    fields: Any, tiny_handle: Any, tokens: Any
) -> None:
    plan = plan_of(tiny_handle, tokens, "evopress", starts=3, children=4, generations=3, **fields)
    gone = [(i, k) for i in plan.dropped for k in ("attention", "mlp")] + [(s.layer, s.kind) for s in plan.sublayers]
    kinds = [kind for _, kind in gone]
    assert kinds.count("attention") == kinds.count("mlp") > 0
    assert bool(plan.sublayers) <= (fields.get("tied") is False or "target_sublayers" in fields)
    if "target_layers" in fields:
        assert plan.n_layers_out == 5
    if "target_sublayers" in fields:
        assert len(gone) == 4
    closest = new_task(tiny_handle, tokens).engine.distance(plan_without(8, {Unit(i) for i in plan.dropped} | {
        Unit(s.layer, s.kind) for s in plan.sublayers}), "kl")
    assert closest == pytest.approx(-max(t.score for t in plan.trace), abs=1e-6)


def test_a_killed_evolution_goes_on_with_every_score_it_had(
    tiny_handle: Any, tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"target_layers": 5, "starts": 4, "children": 6, "generations": 4}
    whole = plan_of(tiny_handle, tokens, "evopress", **fields)
    compute, count = ScoringEngine.compute, []

    def killed(self: Any, *args: Any) -> float:
        count.append(1)
        if len(count) == 12 and not (tmp_path / "other").exists():
            raise KeyboardInterrupt
        return compute(self, *args)

    monkeypatch.setattr(ScoringEngine, "compute", killed)
    with pytest.raises(KeyboardInterrupt):
        plan_of(tiny_handle, tokens, "evopress", tmp_path / "cache", **fields)
    assert plan_of(tiny_handle, tokens, "evopress", tmp_path / "cache", **fields) == whole
    resumed = len(count) - 12
    count.clear()
    plan_of(tiny_handle, tokens, "evopress", tmp_path / "other", **fields)
    assert resumed == len(count) - 11  # the 11 values it had by then


@pytest.mark.parametrize("objective", ["loss", "kl", "js", "score"])
def test_every_objective_decides(objective: str, tiny_handle: Any, tokens: Any) -> None:
    plan = plan_of(tiny_handle, tokens, "beam", objective=objective, width=2, target_layers=6)
    assert len(plan.dropped) == 2


@pytest.mark.parametrize(("overrides", "message"), [
    (["method=beam", "method.target_layers=5", "method.width=0"], r"method.width = 0; expected a whole number >= 1"),
    (["method=beam", "method.target_layers=5", "method.tied=false"], r"method.target_layers = 5; expected null with"),
    (["method=beam"], "set exactly one of"),
    (["method=evopress", "method.target_sublayers=3"], r"method.target_sublayers = 3; expected an even number"),
    (["method=evopress", "method.target_layers=5", "method.objective=klx"], r"method.objective = klx; expected one of"),
    (["method=evopress", "method.target_layers=5", "method.quick_share=0"], r"method.quick_share = 0.0; expected"),
])  # fmt: skip
def test_bad_settings_are_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, *overrides)


def test_the_forecast_counts_generations_and_widths(tmp_path: Path) -> None:
    def blocks(*overrides: str) -> float:
        words = ["model=smollm2_135m", "evaluation=none", "tracking=none", f"cache.dir={tmp_path}", *overrides]
        (job,) = make_plan(words, tflops=1.0).jobs
        assert not job.problem
        return job.block_forwards or 0

    evo = ["method=evopress", "method.target_layers=22"]
    assert blocks(*evo, "method.generations=10") < blocks(*evo, "method.generations=20") < blocks(*evo)
    gates = ["method=gates", "method.target_flops=0.7"]
    assert 1.9 * blocks(*gates, "method.steps=100") < blocks(*gates, "method.steps=200")
    grown = ["method=beam", "method.target_layers=22"]
    assert 3 * blocks(*grown, "method.width=1") < blocks(*grown, "method.width=4")


@pytest.mark.parametrize("size", [{"target_flops": 0.7}, {"target_ratio": 0.3}, {"target_sublayers": 3},
                                  {"target_layers": 6}])
def test_an_additive_set_is_the_cheapest_of_all_that_take_enough(size: Any, make_tiny: Any, tokens: Any) -> None:
    handle = make_tiny(seed=3, layers=6 if "target_layers" not in size else 8)
    method: Any = METHODS["additive"](**size)
    plan = plan_of(handle, tokens, "additive", **size)
    units, costs, n = method.units(handle.n_layers), None, handle.n_layers
    engine = new_task(handle, tokens).engine
    dense = engine.runner.finish(engine.dense_states[-1]).double()
    moved = {u: engine.measure(plan_without(n, {u}), "moved", lambda x: float(
        (x.double() - dense).square().sum() / dense.square().sum())) for u in units}
    if "target_flops" in size:
        costs = flops_costs(handle, 128, "prefill")
        gain, need = {u: costs.part(u.layer, u.kind) for u in units}, 0.3 * costs.dense
    elif "target_ratio" in size:
        gain = {u: handle.sublayer_params[u.layer][u.kind] for u in units}
        need = 0.3 * handle.n_params
    else:
        gain, need = dict.fromkeys(units, 1), size.get("target_sublayers", 2)
    sets = [s for k in range(len(units)) for s in itertools.combinations(units, k) if sum(map(gain.get, s)) >= need]
    best = min(sum(map(moved.get, s)) for s in sets)
    gone = [u for u in units if u.layer in plan.dropped or (u.layer, u.kind) in {(s.layer, s.kind) for s in
                                                                                 plan.sublayers}]
    assert sum(map(gain.get, gone)) >= need
    assert sum(moved[u] for u in gone) == pytest.approx(best, rel=1e-5)
    assert sorted(-t.score for t in plan.trace) == pytest.approx(sorted(moved.values()), rel=1e-4)
