"""Attention and MLP channels by one knapsack: the elimination, the set, the plan, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.models import new_task

from slm_exp.core.errors import ConfigError, DataError
from slm_exp.core.registry import available
from slm_exp.core.types import CalibrationTokens, MergePlan
from slm_exp.engine.ridge import eliminated
from slm_exp.launch.compose import compose_run
from slm_exp.merging.sizes import costs_of
from slm_exp.merging.surgery import apply_plan
from slm_exp.methods.from_plan import FromPlan
from slm_exp.methods.joint import Joint
from slm_exp.search.joint import Price, cheapest
from slm_exp.search.scoring import ScoringEngine

FIT = {"fit_samples": 4, "fit_seq_len": 32}


def test_the_inputs_go_that_the_refitted_map_misses_least() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=generator, dtype=torch.float64)
    x[:, 6] = x[:, 2] + 0.01 * x[:, 6]  # either can stand for the other
    w = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    w[5] = 0.001
    left = {len(stay): (stay, part) for stay, part in eliminated(x.T @ x, w, 1, 4, ridge=1e-6)}
    assert sorted(left) == [4, 5, 6, 7]
    gone = set(range(8)) - set(left[6][0].tolist())
    assert 5 in gone
    assert len(gone & {2, 6}) == 1
    stay, part = left[6]
    best = torch.linalg.lstsq(x[:, stay], x @ w).solution
    torch.testing.assert_close(part, best, rtol=1e-3, atol=1e-4)
    errors = {pair: float((x @ w - x[:, list(pair)] @ torch.linalg.lstsq(x[:, list(pair)], x @ w).solution).norm())
              for pair in itertools.combinations(range(8), 7)}
    assert tuple(left[7][0].tolist()) == min(errors, key=errors.__getitem__)


def test_the_set_is_the_cheapest_of_its_size() -> None:
    order, generator = tuple(range(48)), torch.Generator().manual_seed(0)
    prices = {i: Price(None if i == 0 else float(a), float(h), float(h + m), order)
              for i, (a, h, m) in enumerate(torch.rand(3, 3, generator=generator))}
    gain = lambda c: 160 * c.attention + 10 * c.channels  # noqa: E731
    choices = cheapest(prices, 900, gain, step=16, wide=64)
    size = lambda some: sum(160 * a + 10 * c for _, a, c in some)  # noqa: E731
    cost = lambda some: sum(prices[i].mlp(c, 32) * (c > 0) + (prices[i].attention or 0.0) * a for i, a, c in some)  # noqa: E731
    every = [[(i, a, c) for a in ((False,) if i == 0 else (False, True)) for c in (0, 16, 32, 48)] for i in prices]
    enough = [some for some in itertools.product(*every) if size(some) >= 900]
    assert size(choices) >= 900
    assert cost(choices) == pytest.approx(min(map(cost, enough)))
    with pytest.raises(ValueError, match="less"):
        cheapest(prices, 9000, gain, step=16, wide=64)


def test_prices_between_those_measured_grow() -> None:
    price = Price(0.1, 0.2, 1.0, tuple(range(48)))
    values = [price.mlp(gone, 32) for gone in range(0, 49, 8)]
    assert values == sorted(values)
    assert (values[0], values[4], values[6]) == (0, pytest.approx(0.2), pytest.approx(1.0))


def test_the_plan_has_the_size_and_is_replayed_from_its_file(
    make_tiny: Any, tokens: CalibrationTokens, tmp_path: Path
) -> None:
    dense = make_tiny()
    task = new_task(dense, tokens)
    plan = Joint(target_layers=5, **FIT).plan(task)
    costs, shape = costs_of(dense), dense.config
    layer = costs.attention(shape.num_attention_heads, shape.num_key_value_heads) + 64 * costs.channel
    compressed = apply_plan(dense, plan)
    assert plan.width is not None
    gone = sum(64 - c for c in plan.width.sizes.channels) * costs.channel
    gone += len(plan.sublayers) * (layer - 64 * costs.channel)
    assert 3 * layer <= gone < 3 * layer + 8 * costs.channel
    assert plan.width.sizes.channels[0] == plan.width.sizes.channels[-1] == 64
    assert compressed.n_params < dense.n_params
    plan.save(tmp_path)
    again = FromPlan(path=str(tmp_path)).plan(new_task(dense, tokens))
    assert apply_plan(dense, again).digest == compressed.digest
    assert MergePlan.load(tmp_path) == plan


def test_a_killed_search_goes_on_where_it_was(
    make_tiny: Any, tokens: CalibrationTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    distance = ScoringEngine.distance
    monkeypatch.setattr(ScoringEngine, "distance", lambda *a: calls.append(a) or distance(*a))
    method = Joint(target_layers=6, **FIT)
    whole = method.plan(new_task(make_tiny(), tokens, cache=tmp_path / "a"))
    asked = len(calls)
    assert asked == 3 * 6

    def dies(*a: Any) -> float:
        if len(calls) == asked + 7:
            raise KeyboardInterrupt
        calls.append(a)
        return distance(*a)

    monkeypatch.setattr(ScoringEngine, "distance", dies)
    with pytest.raises(KeyboardInterrupt):
        method.plan(new_task(make_tiny(), tokens, cache=tmp_path / "b"))
    monkeypatch.setattr(ScoringEngine, "distance", lambda *a: calls.append(a) or distance(*a))
    resumed = method.plan(new_task(make_tiny(), tokens, cache=tmp_path / "b"))
    assert resumed.effect() == whole.effect()
    assert len(calls) == asked + 7 + (asked - 6)  # two layers were known
    method.plan(new_task(make_tiny(), tokens, cache=tmp_path / "b"))
    assert len(calls) == asked + 7 + (asked - 6)


def test_what_cannot_be_is_refused(make_tiny: Any, tokens: CalibrationTokens, tmp_path: Path) -> None:
    for fields, message in (
        ({}, "method=joint takes a size: set exactly one"),
        ({"target_layers": 6, "steps": 3}, "method.steps = 3; expected a whole number >= 4"),
        ({"target_layers": 6, "screen_dtype": "int8"}, "method.screen_dtype = int8"),
        ({"target_layers": 6, "compensate": "magnitude"}, "method.compensate"),
    ):
        with pytest.raises(ConfigError, match=message):
            Joint(**fields)
    with pytest.raises(ConfigError, match=r"method.target_layers = 2; expected 4.* layers' worth .* at most go from"):
        Joint(target_layers=2, **FIT).check_model(make_tiny())
    with pytest.raises(ConfigError, match=r"gpt2 layers cannot be narrowed"):
        Joint(target_layers=6, **FIT).check_model(make_tiny(family="gpt2"))
    with pytest.raises(ConfigError, match=r"method.fit_path = .*none.npy"):
        Joint(target_layers=6, fit_path=str(tmp_path / "none.npy")).check_data(make_tiny())
    for more, message in (("width=flap", "width = flap; expected none with method=joint"),
                          ("similarity.after=reconstruct", "similarity.after = reconstruct; expected null with"),
                          ("method.threshold=0.9", "method.threshold = 0.9; expected null")):
        with pytest.raises(ConfigError, match=message):
            compose_run(["model=tiny", "experiment=best", "method.target_layers=6", "similarity=token_cosine", more])
    assert compose_run(["experiment=best", "method.target_ratio=0.2"]).recovery.layers == "sublayers"
    np.save(tmp_path / "same.npy", tokens.tokens_NT)
    with pytest.raises(DataError, match="4 of the 4 calibration sequences have text in common"):
        Joint(target_layers=6, fit_path=str(tmp_path / "same.npy")).plan(new_task(make_tiny(), tokens))
    assert available("method")["joint"] is Joint
