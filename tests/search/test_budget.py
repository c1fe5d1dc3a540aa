"""Budgets of operations and time: what a model's parts cost, and that plans keep within what was asked."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from builders.models import new_task

from slm_exp.core.errors import ConfigError
from slm_exp.core.timing import Checked, Kind, LatencyTable, Narrow, Times
from slm_exp.core.types import CalibrationTokens, MergePlan, Sublayer
from slm_exp.engine.latency import measure
from slm_exp.methods.blockpruner import BlockPruner
from slm_exp.methods.evopress import EvoPress
from slm_exp.methods.joint import Joint
from slm_exp.methods.shortgpt import ShortGPT
from slm_exp.methods.slm import SLM
from slm_exp.search.budget import flops_costs, latency_costs, parse_latency
from slm_exp.search.knapsack import Option, cheapest


def at(seconds: float) -> Times:
    return Times(median=seconds, q1=seconds, q3=seconds)


def table(n_layers: int, mlp: float = 3.0, attention: float = 2.0) -> LatencyTable:
    """Layers of one kind, an MLP of half the width at three quarters of the whole one's time."""
    kind = Kind(layers=[*range(n_layers)], attention=at(attention), mlp=[
        Narrow(channels=32, share=0.5, seconds=at(0.75 * mlp)), Narrow(channels=64, share=1.0, seconds=at(mlp))])
    return LatencyTable(device="a desk", threads=1, dtype="float32", batch=1, length=128, phase="decode", clock="none",
                        rounds=1, kinds=[kind], rest=at(10.0), checks=[Checked(layers=1, predicted=1, measured=1)])


def test_a_dense_model_costs_what_its_sizes_say(make_tiny: Any) -> None:
    dense = make_tiny()
    assert flops_costs(dense, 64, "prefill").dense == pytest.approx(dense.sizes.flops_per_token(64))
    more = flops_costs(dense, 64, "decode").dense - flops_costs(dense, 64, "prefill").dense
    assert more == pytest.approx(8 * 4 * dense.sizes.query * (65 - 32.5))  # 64 before it and itself, not half of them


def test_a_plan_costs_the_sum_of_what_it_leaves() -> None:
    costs = latency_costs(table(8))
    plan = MergePlan(8, ((2, 4),), dropped=(5,), sublayers=(Sublayer(6, "attention"), Sublayer(7, "mlp")))
    assert costs.dense == 10 + 8 * 5
    assert costs.of(plan) == 10 + 6 * 5 - 2 - 3
    assert costs.of(plan) == costs.without([(3, "attention"), (3, "mlp"), (5, "attention"), (5, "mlp"),
                                            (6, "attention"), (7, "mlp")])
    assert [costs.narrow(0, share) for share in (0, 0.25, 0.5, 0.75, 1)] == [0, 1.125, 2.25, 2.625, 3]


@pytest.mark.parametrize(("asked", "layers"), [("35s", None), ("35000ms", 5), ("34999ms", 4), ("70%", 5), ("99%", 7)])
def test_as_many_layers_stay_as_fit(asked: str, layers: int | None, make_tiny: Any) -> None:
    if layers is None:
        with pytest.raises(ConfigError, match=r"target_latency = 35s; expected milliseconds \(20ms\)"):
            ShortGPT(target_latency=asked)
        return
    method = ShortGPT(target_latency=asked).timed(table(8))
    assert method.layers_left(make_tiny()) == layers
    assert ShortGPT(target_latency=asked).layers_left(make_tiny()) is None  # before the table is there


def test_what_cannot_be_met_is_refused_with_the_nearest(make_tiny: Any) -> None:
    dense = make_tiny()
    with pytest.raises(ConfigError, match=r"target_flops = 0\.01; .* nearest is 0\.188 \(1 of 8 layers\)"):
        ShortGPT(target_flops=0.01).check_model(dense)
    with pytest.raises(ConfigError, match=r"nearest is 1\.2e\+04ms \(all 16 sublayers .* a layer is 5e\+03ms"):
        BlockPruner(target_latency="9000ms").timed(table(8)).check_model(dense)
    with pytest.raises(ConfigError, match="nothing would be removed"):
        ShortGPT(target_latency="50000ms").timed(table(8)).check_model(dense)
    for settings in ({"target_flops": 0.5, "target_latency": "80%"}, {"target_flops": 0.5, "target_layers": 4}):
        with pytest.raises(ConfigError, match=r"set at most one of method\.target_layers"):
            ShortGPT(**settings)
    with pytest.raises(ConfigError, match=r"method.length = 64; expected no such setting without method.target_flops"):
        ShortGPT(target_layers=4, length=64)


@pytest.mark.parametrize("asked", ["20", "", "ms", "-3ms", "0%", "100%", "nanms", "20 s"])
def test_a_latency_has_a_unit_and_a_size(asked: str) -> None:
    with pytest.raises(ConfigError, match="The unit is required"):
        parse_latency(asked)


def test_an_option_that_is_off_leaves_no_trace() -> None:
    off = {"target_flops", "target_latency", "batch", "length", "phase"}
    assert not off & set(ShortGPT(target_layers=4).identity())
    assert ShortGPT(target_flops=0.5).identity()["phase"] == "prefill"
    assert ShortGPT(target_latency="9ms").identity()["phase"] == "decode"


METHODS: dict[str, Any] = {
    "layers": ShortGPT, "path": SLM, "sublayers": BlockPruner,
    "pairs": lambda **size: EvoPress(tied=False, starts=2, children=2, survivors=1, generations=1, **size),
    "widths": lambda **size: Joint(fit_samples=4, fit_seq_len=32, steps=8, **size),
}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("size", [{"target_flops": 0.7}, {"target_latency": "70%"}])
def test_every_kind_of_plan_keeps_within_its_budget(
    kind: str, size: dict[str, Any], make_tiny: Any, tokens: CalibrationTokens
) -> None:
    dense = make_tiny()
    method = METHODS[kind](**size)
    method = method.timed(table(8)) if "target_latency" in size else method
    plan = method.plan(new_task(dense, tokens))
    budget = method.budget(dense)
    assert plan.target.asked in size.values()
    assert plan.target.budget == budget.reached(plan)
    assert MergePlan.from_json(plan.to_json()) == plan
    reached, limit = plan.target.budget.reached, plan.target.budget.limit
    assert reached <= limit * (1 + 1e-6)
    assert limit < reached + budget.costs.layer(0)  # a layer more would not fit


def test_the_cheapest_set_is_that_of_all_sets() -> None:
    draw = random.Random(0)
    for _ in range(20):
        parts = [[Option(0.0, 0.0), *(Option(draw.random(), draw.random()) for _ in range(2))] for _ in range(6)]
        need = 0.6 * sum(max(o.gain for o in part) for part in parts)
        every = [some for some in itertools.product(*parts) if sum(o.gain for o in some) >= need]
        found = [part[i] for part, i in zip(parts, cheapest(parts, need), strict=True)]
        assert sum(o.gain for o in found) >= need * (1 - 1e-6)
        assert sum(o.price for o in found) == pytest.approx(min(sum(o.price for o in some) for some in every))
    assert cheapest(parts, 0.0) == [0] * 6
    with pytest.raises(ValueError, match="less"):
        cheapest(parts, 100.0)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_units_are_timed_by_kind_and_width_and_add_up(phase: str, make_tiny: Any, tmp_path: Any) -> None:
    dense = make_tiny("qwen2", sliding_window=16, layers=4)
    state = torch.random.get_rng_state()
    found = measure(dense, "float32", 2, 24, phase)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not dense.loaded
    assert [kind.layers for kind in found.kinds] == [[0, 1], [2, 3]]
    assert [[n.channels for n in kind.mlp] for kind in found.kinds] == [[16, 32, 48, 64]] * 2
    assert all(times.q1 <= times.median <= times.q3 and times.median > 0 for kind in found.kinds
               for times in (kind.attention, *(n.seconds for n in kind.mlp)))
    assert [check.layers for check in found.checks] == [1, 2, 3, 4]
    assert found.checks[-1].predicted == pytest.approx(latency_costs(found).dense)
    found.save(tmp_path)
    assert LatencyTable.load(tmp_path) == found
    assert LatencyTable.load(tmp_path).digest == found.digest
