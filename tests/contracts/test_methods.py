"""What every compression method keeps to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.models import new_task

from slm_exp.core import registry
from slm_exp.core.types import MergePlan
from slm_exp.merging.surgery import apply_plan
from slm_exp.search.task import PlanTask

METHODS = sorted(registry.available("method"))


@pytest.fixture
def make_method(tmp_path: Path) -> Any:
    """A method with the settings it cannot do without."""

    def make(name: str) -> Any:
        needed: dict[str, Any] = {}
        if name == "from_plan":
            plan = MergePlan(8, ((3, 5),), rule="top_layer")
            plan.save(tmp_path)
            needed = {"path": str(tmp_path / "plan.json")}
        elif name == "slm":
            needed = {"threshold": 0.99}
        elif "target_layers" not in registry.available("method")[name].targets:
            needed = {"target_sublayers": 3}
        else:
            needed = {"target_layers": 6}  # 8, less the two that the "+" rule of Shortened LLaMA leaves
        if name == "joint":
            needed |= {"fit_samples": 4, "fit_seq_len": 32}
        if name == "gates":
            needed |= {"steps": 40}  # of 200: none of these promises is about what was learned
        return registry.available("method")[name](**needed)

    return make


@pytest.fixture
def task(tiny_handle: Any, tokens: Any) -> PlanTask:
    return new_task(tiny_handle, tokens, matrix=True)


def last_state(model: Any, tokens: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.model(torch.as_tensor(tokens.tokens_NT).long(), use_cache=False).last_hidden_state


@pytest.mark.parametrize("name", METHODS)
def test_a_plan_is_valid_repeatable_and_survives_json(name: str, make_method: Any, task: PlanTask) -> None:
    plan = make_method(name).plan(task)
    assert plan.n_layers == 8
    assert MergePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert make_method(name).plan(task) == plan


@pytest.mark.parametrize("name", METHODS)
def test_weights_are_left_bit_for_bit(name: str, make_method: Any, task: PlanTask) -> None:
    model = task.handle.model
    before = {n: p.clone() for n, p in model.state_dict().items()}
    modules = list(model.modules())
    make_method(name).plan(task)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert list(model.modules()) == modules
    assert all("forward" not in m.__dict__ and not m._forward_hooks and not m._forward_pre_hooks for m in modules)


@pytest.mark.parametrize("name", METHODS)
def test_the_final_score_is_that_of_the_compressed_model(
    name: str, make_method: Any, task: PlanTask, tokens: Any
) -> None:
    plan = make_method(name).plan(task)
    compressed = apply_plan(task.handle, plan, task.rule)
    score = task.similarity.against(last_state(task.handle.model, tokens), task.kernel)
    assert plan.final_score == pytest.approx(score(last_state(compressed.model, tokens)), abs=1e-5)
