"""LinearPatch: the published rescaling in a Hadamard basis, as a matrix behind the layer that the checkpoint brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.models import random_tokens, tiny
from builders.runs import QUICK, tiny_run

from slm_exp.core.errors import ConfigError
from slm_exp.core.types import MergePlan
from slm_exp.engine.hadamard import hadamard
from slm_exp.engine.ridge import held_out
from slm_exp.launch.compose import compose_run
from slm_exp.merging.surgery import apply_plan
from slm_exp.recovery.base import RecoveryTask, with_tensors
from slm_exp.recovery.linear_patch import LinearPatch


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 32, 36, 576, 640, 896, 960, 2048, 5120])
def test_hadamard_matrices_are_orthonormal_and_flat(n: int) -> None:
    matrix = hadamard(n)
    some = np.eye(n) if n < 1000 else np.random.default_rng(0).standard_normal((n, 4))
    assert np.allclose(matrix @ (matrix.T @ some), some, atol=1e-12)
    assert np.allclose(abs(matrix), n**-0.5)


def test_an_order_that_is_not_made_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"hidden size = 6; no Hadamard matrix of this order is made here\. x"):
        hadamard(6, "x")


def states(model: Any, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """What enters a layer."""
    seen: list[torch.Tensor] = []
    with torch.no_grad(), model.model.layers[layer].register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True):
        model(ids)
    return seen[0]


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_stream_after_the_cut_is_the_published_one(rotate: bool, family: str, tmp_path: Path) -> None:
    ids = np.random.default_rng(1).integers(0, 256, (10, 24))
    np.save(tmp_path / "fit.npy", ids)
    dense, plan = tiny(family), MergePlan(8, dropped=(3, 4))
    handle = apply_plan(dense, plan)
    recovery = LinearPatch(path=str(tmp_path / "fit.npy"), rotate=rotate)
    found = recovery.recover(RecoveryTask(handle, dense, plan, random_tokens(), tmp_path))
    assert [*found.tensors] == ["model.layers.2.stream_maps.0.whole.weight"]
    model = with_tensors(handle, found, {"recovery": recovery.identity()})
    fit = torch.from_numpy(ids)[~held_out(10)]
    h, y = (states(dense.model, fit, i).double().flatten(0, 1) for i in (3, 5))
    q = torch.from_numpy(hadamard(32)) if rotate else torch.eye(32, dtype=torch.float64)
    patched = h @ q @ torch.diag((y @ q).abs().mean(0) / (h @ q).abs().mean(0)) @ q.T
    torch.testing.assert_close(states(model.model, fit, 3).double().flatten(0, 1), patched, atol=1e-5, rtol=1e-4)
    _, after = found.report["layers"][0]["errors"]
    assert after == pytest.approx(float((y - patched).square().sum() / y.square().sum()), rel=1e-3)
    assert model.n_params == handle.n_params + 32 * 32
    assert type(handle.model.model.layers[2]).__name__ == type(dense.model.model.layers[2]).__name__  # as it was


def test_a_run_saves_and_checks_a_checkpoint_with_its_own_code(tmp_path: Path) -> None:
    record = tiny_run(tmp_path / "run", "method=first", "method.target_layers=6", "recovery=linear_patch",
                      "recovery.n_samples=10", "recovery.seq_len=24", "save_model=true")
    folder = tmp_path / "run" / "model"
    kept = record["recovery"]["whole_model"]["kept"]
    assert (folder / "modeling_layerwise.py").is_file() == kept
    assert ("trust_remote_code=True" in (folder / "README.md").read_text()) == kept
    assert record["params"]["after"] - (32 * 32 if kept else 0) < record["params"]["before"]


def test_families_without_code_and_regressions_after_maps_are_refused() -> None:
    with pytest.raises(ConfigError, match="recovery=linear_patch puts maps behind layers, for which gpt2 models"):
        LinearPatch().check_data(tiny("gpt2"))
    with pytest.raises(ConfigError, match=r"recovery.steps\[1\] = reconstruct; expected no regression after maps"):
        compose_run([*QUICK, "method=first", "method.target_layers=6", "recovery=chain",
                     "recovery.steps=[linear_patch,reconstruct]"])
