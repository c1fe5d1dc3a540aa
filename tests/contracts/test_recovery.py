"""What every recovery promises. A new one is covered on arrival."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from slm_exp.core.cache.store import StageStore
from slm_exp.core.errors import SlmError
from slm_exp.core.registry import available
from slm_exp.core.types import CalibrationTokens, MergePlan
from slm_exp.merging.maps import PART
from slm_exp.merging.surgery import apply_plan
from slm_exp.models.sizes import LLAMA2_7B, SMOLLM2, sizes_of
from slm_exp.recovery.base import Recovery, RecoveryResult, RecoveryTask, token_rows, with_tensors
from slm_exp.recovery.judged import judged, mean_loss

RECOVERIES = available("recovery")
QUICK = {"n_samples": 10, "seq_len": 24, "cutoff_len": 24, "max_steps": 2, "batch_size": 4, "micro_batch_size": 2,
         "data": "bundled", "warmup_steps": 1, "held_out": 2}  # fmt: skip
QUICK["steps"] = [{"name": "reconstruct", "n_samples": 10, "seq_len": 24},
                  {"name": "lora", **{k: v for k, v in QUICK.items() if k not in ("n_samples", "cutoff_len")}}]
PLAN = MergePlan(8, groups=((4, 6),), dropped=(2,), rule="top_layer")

every_recovery = pytest.mark.parametrize("name", RECOVERIES)


def quick(name: str, **fields: Any) -> Recovery:
    """The member with as little work as its fields allow."""
    kind = RECOVERIES[name]
    known = {k: v for k, v in (QUICK | fields).items() if k in kind.__dataclass_fields__}
    return kind(**known)  # type: ignore[return-value]


def task_of(dense: Any, tokens: CalibrationTokens, folder: Path) -> RecoveryTask:
    compressed = apply_plan(dense, PLAN, available("merge_rule")["top_layer"]())
    return RecoveryTask(compressed, dense, PLAN, tokens, folder)


@pytest.fixture
def task(make_tiny: Any, tokens: CalibrationTokens, tmp_path: Path) -> RecoveryTask:
    return task_of(make_tiny(), tokens, tmp_path / "run")


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


class Solved(NamedTuple):
    """What a recovery made of a task, and both models as they were before: tensors by name, and modules."""

    task: RecoveryTask
    found: RecoveryResult
    before: list[dict[str, torch.Tensor]]
    modules: list[list[torch.nn.Module]]

    @property
    def models(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        return self.task.dense.model, self.task.handle.model


@pytest.fixture(scope="module")
def solved(make_tiny: Any, tokens: CalibrationTokens, tmp_path_factory: pytest.TempPathFactory
           ) -> Callable[..., Solved]:
    """`solved(name)`: carried out once for all tests of a member; they change neither model."""

    @functools.cache
    def solve(name: str, tied: bool = True) -> Solved:
        task = task_of(make_tiny(tied=tied), tokens, tmp_path_factory.mktemp(name))
        models = task.dense.model, task.handle.model
        before, modules = [weights(m) for m in models], [list(m.modules()) for m in models]
        return Solved(task, quick(name).recover(task), before, modules)

    return solve


def go(name: str, task: RecoveryTask, folder: Path | None = None, found: RecoveryResult | None = None) -> Any:
    """(recovered model, report) as the recover stage gives them, from its cache where there is one. `found`: what the
    recovery is known to make of the task."""
    recovery = quick(name)
    identity = {"recovery": recovery.identity(), "tokens": task.tokens.digest, "samples": list(task.tokens.sample_ids)}
    inputs = {**identity, "model": task.handle.digest, "dense": task.dense.digest, "plan": task.plan.effect()}
    store = StageStore(folder if recovery.stored() else None)
    result, _ = store.cached("recover", inputs, RecoveryResult, lambda: found or recovery.recover(task))
    return with_tensors(task.handle, result, identity), result.report


@every_recovery
def test_both_models_are_left_as_they_were(name: str, solved: Callable[..., Solved]) -> None:
    known = solved(name)
    go(name, known.task, found=known.found)[0].model  # noqa: B018 - builds it
    for model, tensors, parts in zip(known.models, known.before, known.modules, strict=True):
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in tensors.items())
        assert list(model.modules()) == parts
        assert not any(p.requires_grad for p in model.parameters())
        assert all(p.grad is None for p in model.parameters())
        assert all(not m._forward_hooks and not m._forward_pre_hooks and not m.training for m in model.modules())
        assert all("forward" not in m.__dict__ for m in model.modules())


@every_recovery
def test_the_same_task_gives_the_same_model(name: str, task: RecoveryTask, solved: Callable[..., Solved]) -> None:
    known = solved(name)
    one = go(name, known.task, found=known.found)[0]
    two = go(name, task)[0]
    assert one.digest == two.digest
    assert all(torch.equal(t, two.model.state_dict()[n]) for n, t in one.model.state_dict().items())


@every_recovery
def test_what_did_not_change_is_shared_and_what_did_is_reported(name: str, solved: Callable[..., Solved]) -> None:
    task, found, *_ = solved(name)
    model, report = go(name, task, found=found)
    before = dict(task.handle.model.named_parameters())
    maps = {n for n in found.tensors if PART in n}  # new ones, behind layers
    assert bool(maps) == quick(name).maps_stream
    assert set(found.tensors) - maps <= set(before)
    for key, p in model.model.named_parameters():
        assert (p is before.get(key)) == (key not in found.tensors)
    assert json.loads(json.dumps(report)) == report
    assert (model.digest != task.handle.digest) == bool(found.tensors)
    assert ("recovery" in model.lineage) == bool(found.tensors)
    assert model.n_params == task.handle.n_params + sum(found.tensors[n].numel() for n in maps)


@every_recovery
@pytest.mark.parametrize("tied", [True, False])
def test_the_checkpoint_is_an_ordinary_one_and_ties_stay(
    name: str, tied: bool, solved: Callable[..., Solved], tokens: CalibrationTokens, tmp_path: Path
) -> None:
    task, found, *_ = solved(name, tied)
    model, _ = go(name, task, found=found)
    assert (model.model.lm_head.weight is model.model.model.embed_tokens.weight) == tied
    model.model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.model.state_dict().items())
    ids = torch.as_tensor(tokens.tokens_NT).long()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.model(ids).logits)


@every_recovery
def test_the_cache_gives_the_same_model_without_work(
    name: str, solved: Callable[..., Solved], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, found, *_ = solved(name)
    first, report = go(name, task, tmp_path / "cache", found)
    if not quick(name).stored():
        return
    monkeypatch.setattr(RECOVERIES[name], "recover", lambda *a: pytest.fail("computed again"))
    again, report_again = go(name, task, tmp_path / "cache")
    assert (again.digest, report_again) == (first.digest, report)
    assert all(torch.equal(t, again.model.state_dict()[n]) for n, t in first.model.state_dict().items())


@every_recovery
def test_other_tensors_are_another_model_and_other_samples_another_task(
    name: str, solved: Callable[..., Solved], tmp_path: Path
) -> None:
    task, found, *_ = solved(name)
    first = go(name, task, tmp_path / "cache", found)[0]
    if not found.tensors:
        return
    other = RecoveryResult({n: t + 1 for n, t in found.tensors.items()}, found.report)
    assert go(name, task, tmp_path / "elsewhere", other)[0].digest != first.digest
    assert go(name, task, tmp_path / "cache", other)[0].digest == first.digest
    elsewhere = replace(task, tokens=replace(task.tokens, sample_ids=("other",)))
    again = go(name, elsewhere, tmp_path / "cache", other)[0]
    assert all(torch.equal(again.model.get_parameter(n), t.to(again.model.dtype)) for n, t in other.tensors.items())


@every_recovery
def test_what_leaves_the_whole_model_worse_is_taken_back(
    name: str, task: RecoveryTask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recovery = quick(name)
    rows = recovery.judged_on(task)
    assert rows
    assert all(set(row) == {"input_ids", "labels"} for row in rows)
    ids = torch.as_tensor(task.tokens.tokens_NT).long()
    with torch.no_grad():
        loss = float(task.handle.model(ids, labels=ids).loss)
    assert mean_loss(task.handle.model, token_rows(task.tokens.tokens_NT)) == pytest.approx(loss, rel=1e-4)
    weight = "model.layers.1.mlp.down_proj.weight"
    before = task.handle.model.get_parameter(weight).detach()
    for tensor, kept in ((before.clone(), True), (before + 1e3, None), (before * float("nan"), False)):
        monkeypatch.setattr(RECOVERIES[name], "recover", lambda *a, t=tensor: RecoveryResult({weight: t}, {"steps": 1}))
        caplog.clear()
        result = judged(recovery, task)
        losses = result.report["whole_model"]
        kept = losses["after"] <= losses["before"] if kept is None else kept
        assert set(result.tensors) == ({weight} if kept else set())
        assert result.report["steps"] == 1
        assert result.report["whole_model"]["kept"] == kept
        assert ("taken back" in caplog.text) == (not kept)


@every_recovery
def test_half_precision_stays_half_precision(name: str, make_tiny: Any, tokens: Any, tmp_path: Path) -> None:
    model, _ = go(name, task_of(make_tiny(dtype="bfloat16"), tokens, tmp_path / "run"))
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
    assert all(p.isfinite().all() for p in model.model.parameters())


@every_recovery
def test_missing_data_is_refused_before_weights_load(name: str, make_tiny: Any, tmp_path: Path) -> None:
    if "path" not in RECOVERIES[name].__dataclass_fields__:
        return
    dense = make_tiny()
    with pytest.raises(SlmError, match=r"recovery\.path = .*nowhere.jsonl"):
        quick(name, data="jsonl", path=str(tmp_path / "nowhere.jsonl")).check_data(dense)
    assert not dense.loaded


@every_recovery
def test_identity_is_json_without_places(name: str, tmp_path: Path) -> None:
    recovery = quick(name)
    if "path" in RECOVERIES[name].__dataclass_fields__:
        np.save(tmp_path / "t.npy", np.zeros((4, 8), dtype="int32"))
        (tmp_path / "t.jsonl").write_text('{"text": "words"}\n')
        recovery = quick(name, data="jsonl", path=str(tmp_path / "t.jsonl"))
    text = json.dumps(recovery.identity())
    assert name in text
    assert str(tmp_path) not in text


@every_recovery
def test_the_cost_grows_with_the_model_and_says_what_it_leaves_out(name: str) -> None:
    sizes = sizes_of(SMOLLM2)
    work, notes = quick(name).cost(sizes, 25)
    assert notes == []
    assert (work.flops > 0) == quick(name).changes_weights
    assert quick(name).cost(sizes.with_layers(60), 50)[0].blocks >= 2 * work.blocks
    assert (quick(name).memory(sizes, 4) > 0) == quick(name).changes_weights
    assert quick(name).memory(sizes_of(LLAMA2_7B), 2) >= quick(name).memory(sizes, 2)
    assert quick(name).wall_clock_limit is None
    if "max_minutes" in RECOVERIES[name].__dataclass_fields__:
        assert quick(name, max_minutes=3.0).wall_clock_limit == 3
        assert quick(name, max_minutes=3.0).cost(sizes, 25)[1] == ["recovery stops after 3 minutes"]


@every_recovery
def test_documented(name: str) -> None:
    assert inspect.getdoc(RECOVERIES[name])
    assert Path(inspect.getfile(RECOVERIES[name])).stem == name


def test_what_is_stored_survives_the_disk(tmp_path: Path) -> None:
    RecoveryResult({"a.b": torch.arange(6.0).view(2, 3).T}, {"steps": 3}).save(tmp_path)
    again = RecoveryResult.load(tmp_path)
    assert torch.equal(again.tensors["a.b"], torch.arange(6.0).view(2, 3).T)
    assert again.report == {"steps": 3}
