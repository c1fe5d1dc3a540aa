"""Learned gates: what they multiply, what they find, every budget, and a kill that costs nothing but time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders.models import new_task

from slm_exp.core.errors import ConfigError
from slm_exp.core.registry import available
from slm_exp.core.types import MergePlan
from slm_exp.engine import training
from slm_exp.merging.surgery import apply_plan
from slm_exp.search import gates
from slm_exp.search.evolution import plan_without
from slm_exp.search.greedy import Unit

UNITS = [Unit(i, kind) for i in range(4) for kind in ("attention", "mlp")]


def plan_of(handle: Any, tokens: Any, folder: Path | None = None, **fields: Any) -> MergePlan:
    method: Any = available("method")["gates"](**{"steps": 12, "batch_share": 0.5, **fields})
    method.check()
    method.check_model(handle)
    return method.plan(new_task(handle, tokens, cache=folder))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral"])
def test_a_gate_is_its_sublayer_there_or_gone(family: str, make_tiny: Any, tokens: Any) -> None:
    """Of families that have a norm behind their sublayers, other modules, and experts."""
    handle, ids = make_tiny(family=family, layers=4), torch.as_tensor(tokens.tokens_NT).long()
    gated = gates.Gated(handle, UNITS)
    off = {Unit(1, "mlp"), Unit(2, "attention")}
    with torch.no_grad():
        dense = handle.model(ids).logits
        torch.testing.assert_close(gated.model(ids).logits, dense)
        gated._gates_U = torch.tensor([float(u not in off) for u in UNITS])
        wanted = apply_plan(handle, plan_without(4, off)).model(ids).logits
        torch.testing.assert_close(gated.model(ids).logits, wanted, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(wanted, dense, atol=1e-4)
        torch.testing.assert_close(handle.model(ids).logits, dense)
    assert [name for name, _ in gated.named_parameters()] == ["log_odds_U"]


def test_what_does_nothing_is_what_goes(make_tiny: Any, tokens: Any) -> None:
    handle = make_tiny(layers=6, seed=3)
    for i, name in ((1, "mlp.down_proj"), (3, "self_attn.o_proj"), (4, "mlp.down_proj")):
        handle.layers[i].get_submodule(name).weight.data.mul_(1e-3)
    plan = plan_of(handle, tokens, target_sublayers=3, steps=60)
    assert {(s.layer, s.kind) for s in plan.sublayers} == {(1, "mlp"), (3, "attention"), (4, "mlp")}
    assert all(-1 <= t.score <= 0 for t in plan.trace)
    assert len(plan.trace) == 12


@pytest.mark.parametrize("size", [{"target_flops": 0.7}, {"target_ratio": 0.3}, {"target_sublayers": 3},
                                  {"target_layers": 4}])
def test_every_budget_is_met_exactly(size: Any, make_tiny: Any, tokens: Any) -> None:
    plan = plan_of(make_tiny(layers=6, seed=3), tokens, **size)
    if "target_layers" in size:
        assert (plan.n_layers_out, plan.sublayers) == (4, ())
    elif "target_sublayers" in size:
        assert len(plan.sublayers) == 3
    elif "target_flops" in size:
        assert plan.target.budget.reached <= 0.7 * plan.target.budget.dense * (1 + 1e-6)
    assert plan.target.complete
    assert plan.block_forwards > 12 * 3 * 6 * 0.5


def test_a_killed_learning_goes_on_to_the_same_gates(
    make_tiny: Any, tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "EVERY", 4)
    whole = plan_of(make_tiny(layers=4), tokens, tmp_path / "whole", target_sublayers=2)
    steps: list[float] = []
    loss, draw = gates.next_token_loss, gates.Gated.draw

    def stops(model: Any) -> None:
        draw(model)
        if len(steps) == 9:
            raise KeyboardInterrupt
        steps.append(1)

    monkeypatch.setattr(gates.Gated, "draw", stops)
    with pytest.raises(KeyboardInterrupt):
        plan_of(make_tiny(layers=4), tokens, tmp_path / "killed", target_sublayers=2)
    left = [*(tmp_path / "killed").rglob("checkpoint-4")]
    assert left
    assert sum(f.stat().st_size for f in left[0].rglob("*") if f.is_file()) < 200_000  # no copy of the model
    monkeypatch.setattr(gates.Gated, "draw", draw)
    went_on: list[Any] = []
    monkeypatch.setattr(training, "last_checkpoint", lambda folder, find=training.last_checkpoint: (
        went_on.append(find(folder)) or went_on[-1]))
    again = plan_of(make_tiny(layers=4), tokens, tmp_path / "killed", target_sublayers=2)
    assert went_on[0].name == "checkpoint-4"
    assert again == whole
    monkeypatch.setattr(gates, "next_token_loss", lambda *a: pytest.fail("learned again"))
    assert plan_of(make_tiny(layers=4), tokens, tmp_path / "killed", target_sublayers=2) == whole
    assert not [*(tmp_path / "killed").rglob("checkpoint-*")]
    assert loss is not gates.next_token_loss


def test_settings_that_cannot_work_are_refused(make_tiny: Any, tokens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"steps": 0}, {"batch_share": 0.0}, {"pressure": 0.0}, {"lr": -1.0}):
        with pytest.raises(ConfigError, match=f"method.{next(iter(wrong))} = "):
            plan_of(make_tiny(), tokens, target_layers=6, **wrong)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", "2")
    method: Any = available("method")["gates"](target_layers=6)
    assert "2 processes" in method.refuses(None)
