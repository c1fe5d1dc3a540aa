"""`merge_rule=regression`: a layer fitted on tokens of its own, its file beside the plan, replayed bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.models import new_task, random_tokens, tiny
from builders.runs import QUICK, tiny_run

from slm_exp.core.errors import ConfigError, DataError, PlanError
from slm_exp.core.registry import available
from slm_exp.core.types import FITTED, FittedFile, Group, MergePlan
from slm_exp.engine.ridge import held_out, token_weights
from slm_exp.engine.runner import BlockRunner, Slot
from slm_exp.launch.compose import compose_run
from slm_exp.merging.fitted import pack, unpack
from slm_exp.merging.rules.regression import Regression
from slm_exp.merging.surgery import apply_plan
from slm_exp.runs.mergekit import check as expressible

FIT = ("merge_rule=regression", "merge_rule.n_samples=6", "merge_rule.seq_len=24", "merge_rule.steps=3")
WINDOW = Group(2, 5)


@pytest.fixture
def ids(tmp_path: Path) -> str:
    np.save(tmp_path / "fit.npy", np.random.default_rng(3).integers(0, 256, (20, 24)))
    return str(tmp_path / "fit.npy")


def error(handle: Any, weights: dict[str, torch.Tensor], ids: str) -> float:
    """Of the stream after a layer in place of the window, on the sequences held out."""
    tokens = np.load(ids)
    runner = BlockRunner(handle, tokens, torch.float32, fuse=False)
    states = runner.states()
    wanted = states[WINDOW.stop]
    held = held_out(len(tokens))
    off = (runner.block(Slot(WINDOW.start, weights), states[WINDOW.start]) - wanted).double().square().sum(-1)
    return float((token_weights(wanted) * off)[held].sum())


def fitted(handle: Any, ids: str, **fields: Any) -> dict[str, torch.Tensor]:
    rule, tokens = Regression(path=ids, **fields), np.load(ids)
    runner = BlockRunner(handle, tokens, torch.float32, fuse=False)
    states = runner.states()
    return rule.fit(runner, WINDOW, states[WINDOW.start], states[WINDOW.stop])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_it_is_nearer_than_every_rule_and_inner_projections_help(family: str, ids: str) -> None:
    handle = tiny(family)
    layers = list(handle.layers[slice(*WINDOW)])
    by_rule = [error(handle, rule().merge(handle.layout, layers).weights, ids)  # type: ignore[call-arg]
               for name, rule in available("merge_rule").items() if name in ("keep_low", "mean")]
    outputs = error(handle, fitted(handle, ids, sweeps=0), ids)
    whole = fitted(handle, ids, sweeps=1, steps=8)
    assert error(handle, whole, ids) < outputs < min(by_rule)
    assert set(whole) <= set(handle.layout.matrices) | {f"{m}.bias" for m in handle.layout.projections}
    before = {n: p.clone() for n, p in handle.model.state_dict().items()}
    assert all(torch.equal(a, b) for a, b in zip(before.values(), handle.model.state_dict().values(), strict=True))
    assert all(torch.equal(t, again) for t, again in zip(whole.values(), fitted(handle, ids, steps=8).values(),
                                                         strict=True))


def test_a_window_of_layers_that_do_nothing_but_one_is_that_one(ids: str) -> None:
    handle = tiny()
    for i in (3, 4):
        for name in handle.layout.outputs["attention"] + handle.layout.outputs["mlp"]:
            handle.layers[i].get_submodule(name).weight.data.zero_()
    low = {n: p for n, p in handle.layers[2].named_parameters() if n in handle.layout.matrices}
    assert all(torch.equal(t, low[n]) for n, t in fitted(handle, ids).items())


def test_a_run_leaves_the_file_and_from_plan_replays_it(tmp_path: Path) -> None:
    record = tiny_run(tmp_path / "run", "method.threshold=0.5", *FIT)
    plan = MergePlan.load(tmp_path / "run")
    assert plan.groups
    assert plan.fitted is not None
    assert record["plan"]["fitted"] == {"file": FITTED, "sha256": plan.fitted.sha256}
    assert record["files"][FITTED]["sha256"] == plan.fitted.sha256
    again = tiny_run(tmp_path / "again", "method=from_plan", f"method.path={tmp_path / 'run'}", "save_model=true")
    assert again["plan"]["fitted"] == record["plan"]["fitted"]
    assert again["plan"]["final_score"] == pytest.approx(record["plan"]["final_score"], abs=1e-6)
    assert not (tmp_path / "again" / "model" / FITTED).exists()  # readers of checkpoints take any safetensors
    cached = tiny_run(tmp_path / "cached", "method.threshold=0.5", *FIT, "seed=0", "tracking=none")
    assert (tmp_path / "cached" / FITTED).read_bytes() == (tmp_path / "run" / FITTED).read_bytes()
    assert cached["run_id"] == record["run_id"] != again["run_id"]
    rule: Any = Regression()
    built = apply_plan(tiny(), plan, rule).model
    group = plan.groups[0]
    own = unpack(plan.fitted)[group]
    at = plan.slots.index(group)
    assert all(torch.equal(built.model.layers[at].get_parameter(n), t) for n, t in own.items())


def test_a_file_that_is_not_the_plans_is_refused_before_anything_runs(tmp_path: Path) -> None:
    layers = {Group(3, 5): {"mlp.up_proj.weight": torch.zeros(8, 8)}}
    MergePlan(8, ((3, 5),), rule="regression", fitted=pack(layers)).save(tmp_path)
    replayed = [*QUICK, "method=from_plan", f"method.path={tmp_path}"]
    cfg = compose_run(replayed)
    with pytest.raises(ConfigError, match=r"3-5.mlp.up_proj.weight is \(8, 8\); expected \(\d+, 32\) for a layer"):
        cfg.method.check_model(tiny())
    (tmp_path / FITTED).write_bytes(b"other")
    with pytest.raises(ConfigError, match=r"fitted.file = fitted.safetensors: sha256 .* made with"):
        compose_run(replayed)
    (tmp_path / FITTED).unlink()
    with pytest.raises(ConfigError, match=r"it cannot be read beside the plan .* Take the folder of the run"):
        compose_run(replayed)
    data = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**data, "fitted": {"file": "../x", "sha256": "0"}}))
    with pytest.raises(ConfigError, match=r"fitted.file = '../x'; expected the name of a file beside the plan"):
        compose_run(replayed)
    (tmp_path / "plan.json").write_text(json.dumps({k: v for k, v in data.items() if k != "fitted"}))
    with pytest.raises(ConfigError, match=r"fitted of the plan in method.path = None; expected a file"):
        compose_run(replayed)


def test_a_plan_without_its_layers_is_not_built_and_mergekit_has_no_such_rule() -> None:
    rule: Any = Regression()
    with pytest.raises(PlanError, match="names no file with them"):
        apply_plan(tiny(), MergePlan(8, ((3, 5),), rule="regression"), rule)
    with pytest.raises(PlanError, match="rule = 'regression': expected one of"):
        expressible(MergePlan(8, ((3, 5),), rule="regression"), "nowhere")


def test_fitted_and_scored_on_different_tokens(ids: str) -> None:
    task = new_task(tiny(), replace(random_tokens(), tokens_NT=np.load(ids)[:4].astype("int32")))
    task = replace(task, rule=Regression(path=ids))
    with pytest.raises(DataError, match=r"4 of the 4 calibration sequences have text in common .* merge_rule.path"):
        task.engine.score(MergePlan(8, ((3, 5),)))


def test_every_window_is_fitted_once(ids: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[Any] = []
    fit = Regression.fit
    monkeypatch.setattr(Regression, "fit", lambda self, runner, window, *rest: (
        fits.append(window), fit(self, runner, window, *rest))[1])
    task = replace(new_task(tiny(), random_tokens()), rule=Regression(path=ids, steps=2))
    plan = available("method")["slm"](threshold=0.3).plan(task)  # type: ignore[call-arg, attr-defined]
    assert plan.groups
    assert len(fits) == len(set(fits))
    assert FittedFile.of(plan.fitted.read()) == plan.fitted


@pytest.mark.parametrize(("field", "message"), [
    ("n_samples=1", r"merge_rule.n_samples = 1; expected a whole number >= 2"),
    ("ridges=[]", r"merge_rule.ridges = \[\]; expected one or more numbers"),
    ("path=nowhere.npy", r"merge_rule.path = nowhere.npy"),
])  # fmt: skip
def test_bad_settings_are_refused(field: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run([*QUICK, "merge_rule=regression", f"merge_rule.{field}"]).run_id  # noqa: B018
