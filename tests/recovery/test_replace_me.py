"""ReplaceMe: the published least squares, folded into the MLP below the cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.models import random_tokens, tiny

from slm_exp.core.errors import ConfigError
from slm_exp.core.registry import available
from slm_exp.core.types import MergePlan, Sublayer
from slm_exp.engine.ridge import held_out
from slm_exp.merging.surgery import apply_plan
from slm_exp.recovery.base import RecoveryTask, with_tensors
from slm_exp.recovery.replace_me import ReplaceMe

PLANS = {
    "removed": MergePlan(8, dropped=(3, 4)),
    "the lowest": MergePlan(8, dropped=(0, 1)),
    "the top": MergePlan(8, dropped=(7,)),
    "merged": MergePlan(8, groups=((2, 5),), rule="mean"),
    "sublayers": MergePlan(8, sublayers=(Sublayer(2, "mlp"), Sublayer(5, "attention"))),
}


@pytest.fixture
def fitted(tmp_path: Path) -> Any:
    ids = np.random.default_rng(1).integers(0, 256, (40, 24))
    np.save(tmp_path / "fit.npy", ids)

    def go(plan: MergePlan, dense: Any = None, **fields: Any) -> Any:
        dense = dense or tiny()
        rule: Any = available("merge_rule")["mean"]()
        handle = apply_plan(dense, plan, rule)
        task = RecoveryTask(handle, dense, plan, random_tokens(), tmp_path)
        recovery = ReplaceMe(path=str(tmp_path / "fit.npy"), **fields)
        found = recovery.recover(task)
        fit = torch.from_numpy(ids)[~held_out(40)]
        return task, found, with_tensors(handle, found, {"recovery": recovery.identity()}), fit

    return go


def states(model: Any, ids: torch.Tensor, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(what goes into, what comes out of) a module."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad(), model.get_submodule(module).register_forward_hook(
            lambda m, args, out: seen.append((args[0], out[0] if isinstance(out, tuple) else out))):
        model(ids)
    return seen[0]


def test_the_map_solves_the_published_normal_equations(fitted: Any) -> None:
    task, found, model, ids = fitted(PLANS["removed"])
    assert set(found.tensors) == {"model.layers.2.mlp.down_proj.weight"}
    (_, h), (y, _) = (states(task.dense.model, ids, f"model.layers.{i}") for i in (2, 5))
    m = states(task.dense.model, ids, "model.layers.2.mlp")[1]
    t = torch.linalg.lstsq(m.double().flatten(0, 1), (y + m - h).double().flatten(0, 1)).solution
    new = states(model.model, ids, "model.layers.2")[1]
    torch.testing.assert_close(new.double(), (h - m) + m.double() @ t, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", PLANS)
def test_the_stream_after_the_cut_is_nearer_on_the_tokens_of_the_fit(name: str, fitted: Any) -> None:
    _, found, *_ = fitted(PLANS[name])
    assert found.report["layers"]
    for layer in found.report["layers"]:
        before, after = layer["errors"]
        assert after < before
    assert all(("down_proj" in n or "o_proj" in n) for n in found.tensors)


def test_biases_are_mapped_and_a_wide_ridge_pulls_to_zero(fitted: Any) -> None:
    dense = tiny("gpt2")
    for p in dense.model.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    _, found, model, ids = fitted(PLANS["removed"], dense)
    assert {n.rpartition(".")[2] for n in found.tensors} == {"weight", "bias"}
    after = states(model.model, ids, "transformer.h.2")[1]
    wanted = states(dense.model, ids, "transformer.h.4")[1]
    before = states(dense.model, ids, "transformer.h.2")[1]
    assert (after - wanted).norm() < (before - wanted).norm()
    _, nothing, *_ = fitted(PLANS["removed"], dense, alpha=1e9)
    assert max(t.abs().max() for t in nothing.tensors.values()) < 1e-6


def test_a_negative_ridge_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"recovery.alpha = -1; expected a number >= 0"):
        ReplaceMe(alpha=-1)
