"""Maps of low rank in the place of removed sublayers: within the budget, in their place, nearer to the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.models import random_tokens, tiny
from builders.runs import tiny_run

from slm_exp.core.errors import ConfigError
from slm_exp.core.types import MergePlan, Sublayer
from slm_exp.merging.surgery import apply_plan
from slm_exp.recovery.base import RecoveryTask, with_tensors
from slm_exp.recovery.bypass import Bypass
from slm_exp.recovery.bypasses import gaps, reduced
from slm_exp.recovery.chain import Chain

A, M = "attention", "mlp"


@pytest.fixture
def fit(tmp_path: Path) -> str:
    np.save(tmp_path / "fit.npy", np.random.default_rng(1).integers(0, 256, (40, 24)))
    return str(tmp_path / "fit.npy")


def last_state(handle: Any) -> torch.Tensor:
    ids = torch.from_numpy(np.random.default_rng(9).integers(0, 256, (16, 24)))
    with torch.no_grad():
        return handle.model.model(ids, use_cache=False).last_hidden_state


def recovered(recovery: Any, plan: MergePlan, folder: Path, family: str = "llama") -> Any:
    dense = tiny(family)
    task = RecoveryTask(apply_plan(dense, plan), dense, plan, random_tokens(), folder)
    found = recovery.recover(task)
    return task, found, with_tensors(task.handle, found, {"recovery": recovery.identity()})


@pytest.mark.parametrize(("plan", "places"), [
    (MergePlan(8, dropped=(3, 4)), [(2, [6, 7, 8, 9])]),
    (MergePlan(8, dropped=(0, 1)), []),
    (MergePlan(8, dropped=(6, 7)), [(5, [12, 13, 14, 15])]),
    (MergePlan(8, sublayers=(Sublayer(2, M), Sublayer(5, A))), [(2, [5]), (4, [10])]),
    (MergePlan(8, sublayers=(Sublayer(2, M), Sublayer(3, A))), [(2, [5, 6])]),
    (MergePlan(8, dropped=(3,), sublayers=(Sublayer(2, M), Sublayer(4, A))), [(2, [5, 6, 7, 8])]),
    (MergePlan(8, groups=((2, 4),), rule="top_layer", dropped=(4,)), [(2, [8, 9])]),
    (MergePlan(8, sublayers=(Sublayer(0, A), Sublayer(7, M))), [(7, [15])]),
])
def test_maps_stand_where_the_sublayers_ran(plan: MergePlan, places: list[tuple[int, list[int]]]) -> None:
    assert [(gap.position, list(gap.halves)) for gap in gaps(plan)] == places


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("plan", [
    MergePlan(8, dropped=(3, 4)), MergePlan(8, dropped=(7,)), MergePlan(8, sublayers=(Sublayer(2, M), Sublayer(5, A)))])
def test_it_is_nearer_to_the_dense_model_on_unseen_tokens(plan: MergePlan, family: str, fit: str, tmp_path: Path
                                                          ) -> None:
    task, found, model = recovered(Bypass(path=fit, budget=0.2), plan, tmp_path, family)
    dense = last_state(task.dense)
    off = [float((last_state(h) - dense).norm()) for h in (task.handle, model)]
    assert off[1] < off[0]
    assert all(step["errors"][1] < step["errors"][0] for step in found.report["layers"])


def test_parameters_stay_within_the_budget_and_more_of_them_explain_more(fit: str, tmp_path: Path) -> None:
    plan = MergePlan(8, dropped=(3, 4))
    errors = []
    for budget in (0.05, 0.1, 0.2):
        task, found, model = recovered(Bypass(path=fit, budget=budget), plan, tmp_path)
        added, removed = model.n_params - task.handle.n_params, task.dense.n_params - task.handle.n_params
        assert 0.8 * budget * removed < added <= budget * removed
        assert {step["kind"] for step in found.report["layers"]} == {A, M}
        errors.append(found.report["layers"][-1]["errors"][1])
    assert errors == sorted(errors, reverse=True)


def test_a_map_of_full_input_is_cut_to_the_best_of_its_rank() -> None:
    x, change = torch.randn(200, 12).double(), torch.randn(12, 9).double()
    down, up = reduced(x.T @ x, change, 4)
    u, s, v = torch.linalg.svd(x @ change, full_matrices=False)
    torch.testing.assert_close(x @ down @ up.T, u[:, :4] * s[:4] @ v[:4])


def test_after_a_refit_a_cut_has_one_map_behind_it(tmp_path: Path) -> None:
    few = np.random.default_rng(1).integers(0, 256, (4, 24))  # so that the refit succeeds on a random model
    np.save(tmp_path / "few.npy", np.tile(few, (10, 1)))
    fit = str(tmp_path / "few.npy")
    chain = Chain(steps=[{"name": "reconstruct", "path": fit}, {"name": "bypass", "path": fit, "budget": 0.2}])
    _, found, _ = recovered(chain, MergePlan(8, dropped=(3, 4)), tmp_path)
    (only,) = found.report["steps"][1]["layers"]
    assert (only["layer"], only["original"], only["kind"]) == (2, [4, 5], M)
    _, alone, _ = recovered(Bypass(path=fit, budget=0.2), MergePlan(8, dropped=(3, 4)), tmp_path)
    assert len(alone.report["layers"]) == 4
    assert only["rank"] == min(16, sum(step["rank"] for step in alone.report["layers"]))


def test_what_is_removed_below_the_lowest_layer_gets_none(fit: str, tmp_path: Path) -> None:
    _, found, _ = recovered(Bypass(path=fit), MergePlan(8, dropped=(0, 1)), tmp_path)
    assert not found.tensors


def test_a_run_saves_and_checks_a_checkpoint_with_its_own_code(tmp_path: Path) -> None:
    record = tiny_run(tmp_path / "run", "method=first", "method.target_layers=6", "method.protect_first=1",
                      "recovery=bypass", "recovery.n_samples=20", "recovery.seq_len=48", "save_model=true")
    assert record["recovery"]["whole_model"]["kept"]
    assert (tmp_path / "run" / "model" / "modeling_layerwise.py").is_file()


def test_bad_settings_and_families_without_code_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"recovery.budget = 1.5; expected a share > 0 and <= 1"):
        Bypass(budget=1.5)
    with pytest.raises(ConfigError, match="recovery=bypass puts maps behind layers, for which gpt2 models"):
        Bypass().check_data(tiny("gpt2"))
