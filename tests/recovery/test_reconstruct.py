"""The closed-form refit: exact where it can be, never worse on tokens held out, and only where something was cut."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.models import keeps_first

from slm_exp.core.errors import ConfigError, DataError
from slm_exp.core.registry import available
from slm_exp.core.types import CalibrationTokens, Compensation, Cut, MergePlan, Sublayer
from slm_exp.engine import ridge
from slm_exp.engine.ridge import Moments, Rows, ridge_step, token_weights
from slm_exp.merging.surgery import apply_plan
from slm_exp.recovery.base import RecoveryTask, token_rows, with_tensors
from slm_exp.recovery.cuts import beside_cuts, stream_scales
from slm_exp.recovery.judged import judged, mean_loss
from slm_exp.recovery.reconstruct import Reconstruct

PLANS = {
    "merged": MergePlan(8, groups=((2, 4), (5, 7)), rule="top_layer"),
    "removed": MergePlan(8, dropped=(3, 4)),
    "the lowest removed": MergePlan(8, dropped=(0, 1)),
    "the top removed": MergePlan(8, dropped=(7,)),
    "sublayers": MergePlan(8, sublayers=(Sublayer(2, "mlp"), Sublayer(5, "attention"))),
    "compensated": MergePlan(8, dropped=(3, 4), compensation=Compensation("magnitude", (Cut(3, 5, 1.3),))),
}


@pytest.fixture
def ids_file(tmp_path: Path) -> str:
    np.save(tmp_path / "fit.npy", np.random.default_rng(1).integers(0, 256, (20, 24)))
    return str(tmp_path / "fit.npy")


@pytest.fixture
def refit(make_tiny: Any, tokens: CalibrationTokens, tmp_path: Path) -> Any:
    def go(recovery: Reconstruct, plan: MergePlan, dense: Any = None) -> Any:
        dense = dense or make_tiny()
        rule = available("merge_rule")["top_layer"]()
        task = RecoveryTask(apply_plan(dense, plan, rule), dense, plan, tokens, tmp_path)
        found = recovery.recover(task)
        return task, found, with_tensors(task.handle, found, {"recovery": recovery.identity()})

    return go


def last_state(handle: Any) -> torch.Tensor:
    ids = torch.from_numpy(np.random.default_rng(9).integers(0, 256, (16, 24)))
    with torch.no_grad():
        return handle.model.model(ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("name", PLANS)
def test_the_repaired_model_is_nearer_to_the_dense_one_on_unseen_tokens(name: str, refit: Any, ids_file: str) -> None:
    task, found, refitted = refit(Reconstruct(path=ids_file), PLANS[name])
    dense = last_state(task.dense)
    off = [float((last_state(h) - dense).norm()) for h in (task.handle, refitted)]
    assert off[1] < off[0]
    for step in found.report["layers"]:
        assert step["errors"] == sorted(step["errors"], reverse=True)


@pytest.mark.parametrize("name", [*PLANS, "narrowed"])
def test_sublayer_by_sublayer_it_is_nearer_too_and_nothing_below_the_first_cut_changes(
    name: str, refit: Any, ids_file: str
) -> None:
    plans = PLANS | {"narrowed": MergePlan(8, width=keeps_first([4] * 8, [2] * 8, [64, 64, 64, 40, 64, 64, 48, 64]))}
    first, sublayers = {"merged": (2, 8), "removed": (2, 7), "the lowest removed": (0, 12), "the top removed": (6, 1),
                        "sublayers": (2, 10), "compensated": (2, 7), "narrowed": (3, 10)}[name]  # fmt: skip
    recovery = Reconstruct(path=ids_file, layers="sublayers", ridges=[0.01, 0.1, 1, 10])
    task, found, refitted = refit(recovery, plans[name])
    dense = last_state(task.dense)
    off = [float((last_state(h) - dense).norm()) for h in (task.handle, refitted)]
    assert off[1] < off[0]
    steps = found.report["layers"]
    assert all(step["errors"][1] <= step["errors"][0] for step in steps)
    assert {step["layer"] for step in steps} == {*range(first, task.handle.n_layers)}
    assert len(steps) == sublayers
    assert all(n.endswith(("mlp.down_proj.weight", "self_attn.o_proj.weight")) for n in found.tensors)


def test_in_its_own_units_an_input_is_pulled_to_zero_no_matter_how_loud_it_is() -> None:
    """The same inputs in other units, the map's weights in theirs: what the change does is the same."""
    generator = torch.Generator().manual_seed(0)
    x, r = (torch.randn(50, n, generator=generator, dtype=torch.float64) for n in (6, 2))
    loud = x * torch.tensor([0.3, 1.0, 1.0, 1.0, 4.0, 1.0], dtype=torch.float64)
    for own_units, same in ((True, True), (False, False)):
        done = []
        for inputs in (x, loud):
            sums = Moments.empty(6, 2, torch.device("cpu"))
            sums.add(inputs, r, torch.ones(50))
            change = sums.solve(0.5 * sums.scale, own_units)
            assert change is not None
            done.append(inputs @ change)
        assert torch.allclose(*done, rtol=0, atol=0.01 * float(done[0].abs().max())) == same


def test_passes_in_bfloat16_find_what_float32_finds(refit: Any, ids_file: str) -> None:
    off = {}
    for passes_in in ("float32", "bfloat16"):
        task, found, refitted = refit(Reconstruct(path=ids_file, layers="sublayers", passes_in=passes_in),
                                      PLANS["removed"])
        assert {t.dtype for t in found.tensors.values()} == {torch.float32}
        off[passes_in] = float((last_state(refitted) - last_state(task.dense)).norm())
    assert off["bfloat16"] == pytest.approx(off["float32"], rel=0.05)
    assert off["bfloat16"] != off["float32"]


def test_sublayer_by_sublayer_the_last_fit_is_on_all_tokens(refit: Any, ids_file: str) -> None:
    recovery = Reconstruct(path=ids_file, layers="sublayers")
    task, _, _ = refit(recovery, PLANS["removed"])
    assert recovery.judged_on(task) == token_rows(task.tokens.tokens_NT)
    held = Reconstruct(path=ids_file).judged_on(task)
    ids = np.load(ids_file)
    assert [row["input_ids"] for row in held] == ids[4::5].tolist()
    _, nothing, _ = refit(recovery, MergePlan(8))
    assert not nothing.tensors


def test_only_output_projections_beside_cuts_change(refit: Any, ids_file: str) -> None:
    task, found, refitted = refit(Reconstruct(path=ids_file), PLANS["merged"])
    names = {f"model.layers.{i}.{p}.weight" for i in (2, 4) for p in ("mlp.down_proj", "self_attn.o_proj")}
    assert set(found.tensors) == names
    before = dict(task.handle.model.named_parameters())
    for name, p in refitted.model.named_parameters():
        assert (p is before[name]) == (name not in names)
    _, found, _ = refit(Reconstruct(path=ids_file, attention=False), PLANS["merged"])
    assert set(found.tensors) == {n for n in names if "mlp" in n}


def test_a_plan_that_cuts_nothing_changes_nothing(refit: Any, ids_file: str) -> None:
    task, found, refitted = refit(Reconstruct(path=ids_file), MergePlan(8))
    assert not found.tensors
    assert refitted is task.handle


def test_a_removed_sublayer_stays_removed(refit: Any, ids_file: str) -> None:
    _, found, refitted = refit(Reconstruct(path=ids_file), PLANS["sublayers"])
    assert set(found.tensors) == {"model.layers.2.self_attn.o_proj.weight", "model.layers.5.mlp.down_proj.weight"}
    assert not refitted.model.model.layers[2].mlp.down_proj.weight.any()


def test_biases_are_refitted_where_a_layer_has_them(refit: Any, ids_file: str, make_tiny: Any) -> None:
    dense = make_tiny()
    for layer in dense.layers:
        layer.mlp.down_proj.bias = torch.nn.Parameter(0.1 * torch.randn(32), requires_grad=False)
    _, found, _ = refit(Reconstruct(path=ids_file, attention=False, passes=1), PLANS["removed"], dense)
    assert set(found.tensors) == {"model.layers.2.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.bias"}


def test_removing_a_layer_that_did_nothing_changes_nothing(refit: Any, ids_file: str, make_tiny: Any) -> None:
    dense = make_tiny(layers=4)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        dense.layers[2].get_submodule(name).weight.data.zero_()
    _, found, _ = refit(Reconstruct(path=ids_file), MergePlan(4, dropped=(2,)), dense)
    assert max(found.report["layers"][0]["errors"]) < 1e-10


def test_layers_beside_cuts_and_the_streams_after_them() -> None:
    assert {name: beside_cuts(plan, "cuts") for name, plan in PLANS.items()} == {
        "merged": [2, 4], "removed": [2], "the lowest removed": [0], "the top removed": [6], "sublayers": [2, 5],
        "compensated": [2]}
    assert beside_cuts(PLANS["merged"], "all") == [2, 3, 4, 5]
    assert beside_cuts(MergePlan(8), "all") == []
    narrowed = MergePlan(8, width=keeps_first([1] * 8, [1] * 8, [8] * 8))
    assert beside_cuts(narrowed, "cuts") == [*range(8)]
    assert stream_scales(PLANS["compensated"]) == pytest.approx([1, 1, 1 / 1.3, 1 / 1.3, 1 / 1.3, 1 / 1.3])


def test_ridge_regression_from_batches_is_that_of_all_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    x, r = torch.randn(90, 6, generator=generator), torch.randn(90, 3, generator=generator)
    w = torch.rand(90, generator=generator)
    fit, held = Moments.empty(6, 3, torch.device("cpu")), Moments.empty(6, 3, torch.device("cpu"))
    for rows in torch.arange(60).split(7):
        fit.add(x[rows], r[rows], w[rows])
    r[60:] = x[60:] @ torch.linalg.lstsq(x[:60], r[:60]).solution  # so that a change helps
    held.add(x[60:], r[60:], w[60:])
    found = ridge_step(fit, held, [0.01])
    assert found is not None
    change, _, error = found
    a = (x[:60] * w[:60, None]).double().T @ x[:60].double()
    a += 0.01 * a.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(change, torch.linalg.solve(a, (x[:60] * w[:60, None]).double().T @ r[:60].double()),
                               rtol=1e-5, atol=1e-6)
    left = (r[60:].double() - x[60:].double() @ change).square().sum(1) @ w[60:].double()
    assert error == pytest.approx(float(left), rel=1e-6)


@pytest.mark.parametrize("own_units", [False, True])
def test_tile_by_tile_and_judged_by_rows_the_change_is_the_same(monkeypatch: Any, own_units: bool) -> None:
    """Many inputs take no second matrix, few held-out tokens none at all."""
    generator = torch.Generator().manual_seed(0)
    x, r = torch.randn(40, 11, generator=generator), torch.randn(40, 3, generator=generator)
    w = torch.rand(40, generator=generator)
    found = []
    for tile, judge in ((1024, Moments.empty(11, 3, torch.device("cpu"))), (3, Rows())):
        monkeypatch.setattr(ridge, "TILE", tile)
        fit = Moments.empty(11, 3, torch.device("cpu"))
        fit.add(x[:30], r[:30], w[:30])
        before = fit.xx_CC.clone()
        assert fit.solve(-2 * fit.scale) is None  # not definite
        found.append([fit.solve(ridge_ * fit.scale, own_units) for ridge_ in (1e-3, 1.0)])
        torch.testing.assert_close(fit.xx_CC, before, rtol=1e-15, atol=1e-15)
        judge.add(x[30:], r[30:], w[30:])
        found[-1].append(judge.error(found[-1][1]))
        fit.join(judge)
        found[-1] += [judge.rr, fit.rr, fit.solve(fit.scale, own_units)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_tokens_of_outlying_norm_count_as_much_as_all_others_together() -> None:
    states = torch.randn(6, 20, 8, generator=torch.Generator().manual_seed(0))
    square = states.double().square().sum(-1)
    torch.testing.assert_close(token_weights(states), token_weights(states, "relative"))
    states[2, 0] *= 200
    states[4, 7] *= 3000
    share = token_weights(states, "class", rows=4) * states.double().square().sum(-1)
    few = torch.zeros(6, 20, dtype=torch.bool)
    few[2, 0] = few[4, 7] = True
    assert float(share[few].sum()) == pytest.approx(float(share[~few].sum()))
    torch.testing.assert_close(share[few], share[few].mean().expand(2))
    torch.testing.assert_close(token_weights(states)[~few], 1 / square[~few])
    assert token_weights(states, "equal").unique().tolist() == [1]


def test_a_state_that_arises_inside_the_cut_is_not_forgotten(refit: Any, make_tiny: Any, tmp_path: Path) -> None:
    """Layer 4 makes the state of one token a thousand times larger, where later layers look for it."""
    dense = make_tiny()
    ids = np.random.default_rng(1).integers(1, 256, (30, 24))
    ids[:, 0] = 0
    np.save(tmp_path / "fit.npy", ids)
    model = dense.model.model
    model.embed_tokens.weight.data[0] = 0
    model.embed_tokens.weight.data[0, 0] = 5.0
    model.embed_tokens.weight.data[1:, 0] = 0
    mlp = model.layers[4].mlp
    for part in (mlp.gate_proj, mlp.up_proj):
        part.weight.data[0] = 0
        part.weight.data[0, 0] = 3.0
    mlp.down_proj.weight.data[:, 0] = 0
    mlp.down_proj.weight.data[1, 0] = 100.0
    off = {}
    for weighting in ("class", "relative"):
        recovery = Reconstruct(path=str(tmp_path / "fit.npy"), weighting=weighting)
        _, _, refitted = refit(recovery, MergePlan(8, dropped=(4,)), dense)
        with torch.no_grad():
            states = [h.model.model(torch.from_numpy(ids), use_cache=False, output_hidden_states=True).hidden_states[-2]
                      for h in (dense, refitted)]
        off[weighting] = float((states[1] - states[0])[:, 0].norm() / states[0][:, 0].norm())
    assert off["class"] < off["relative"]


def test_no_change_where_none_helps_on_the_tokens_held_out() -> None:
    generator = torch.Generator().manual_seed(0)
    fit, held = Moments.empty(6, 3, torch.device("cpu")), Moments.empty(6, 3, torch.device("cpu"))
    x, r = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
    fit.add(x, r, torch.ones(8))
    held.add(x, -r, torch.ones(8))
    assert ridge_step(fit, held, [1e-3, 1.0]) is None


def test_the_fit_shares_no_document_with_the_plan(make_tiny: Any, tmp_path: Path) -> None:
    dense, plan = make_tiny(), PLANS["removed"]
    tokens = available("calibration")["bundled"](n_samples=4, seq_len=32).draw(dense, 0)
    task = RecoveryTask(apply_plan(dense, plan), dense, plan, tokens, tmp_path)
    drawn = Reconstruct(n_samples=8, seq_len=32).draw(task)
    assert drawn.tokens_NT.shape == (8, 32)
    documents = [{name.rpartition("@")[0] for name in t.sample_ids} for t in (tokens, drawn)]
    assert not documents[0] & documents[1]
    assert Reconstruct(n_samples=8, seq_len=32).draw(task).digest == drawn.digest


def test_texts_that_are_enough_at_the_start_are_enough_after_the_search(make_tiny: Any, tmp_path: Path) -> None:
    """A source takes more than it is asked for only where it shares documents with the calibration."""
    dense, plan = make_tiny(), PLANS["removed"]
    texts = tmp_path / "own.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{i} " * 40}) + "\n" for i in range(8)))
    reconstruct = Reconstruct(n_samples=8, seq_len=32, path=str(texts))
    reconstruct.check_data(dense)
    for source, left in (("bundled", 8), ("jsonl", 4)):
        path = {"path": str(texts)} if source == "jsonl" else {}
        calibration: Any = available("calibration")[source](n_samples=4, seq_len=32, **path)
        task = RecoveryTask(apply_plan(dense, plan), dense, plan, calibration.draw(dense, 0), tmp_path)
        assert len(dataclasses.replace(reconstruct, n_samples=left).draw(task).tokens_NT) == left
    with pytest.raises(DataError, match="4 texts have at least 32 tokens and are not calibrated on; 8 are wanted"):
        reconstruct.draw(task)


@pytest.mark.parametrize(("fields", "message"), [
    ({"n_samples": 1}, "recovery.n_samples = 1; expected a whole number >= 2"),
    ({"passes": 0}, "recovery.passes = 0; expected"),
    ({"passes": 2, "layers": "sublayers"}, "recovery.passes = 2; expected null or 1"),
    ({"ridges": []}, "recovery.ridges = "),
    ({"passes_in": "float16"}, "recovery.passes_in = float16; expected one of bfloat16, float32"),
    ({"layers": "some"}, "recovery.layers = some; expected one of all, cuts, sublayers"),
    ({"weighting": "relativ"}, "Did you mean relative"),
])  # fmt: skip
def test_bad_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Reconstruct(**fields)


def test_bad_data_is_refused_before_weights_load(make_tiny: Any, tmp_path: Path) -> None:
    dense = make_tiny()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"words": "too few"}\n')
    for fields, error, message in (
        ({"path": str(tmp_path / "none.npy")}, ConfigError, "recovery.path = .*none.npy: there is no such file"),
        ({"path": str(tmp_path / "none.jsonl")}, ConfigError, "no such file"),
        ({"path": str(rows)}, DataError, "no field 'text'; it has words"),
        ({"seq_len": 50_000}, DataError, "Lower recovery.n_samples or recovery.seq_len"),
    ):
        with pytest.raises(error, match=message):
            Reconstruct(**fields).check_data(dense)
    assert not dense.loaded


@pytest.mark.slow
@pytest.mark.parametrize("layers", [range(11, 19), range(10, 18), range(12, 20), range(4, 12), range(8, 12)],
                         ids=lambda layers: f"{layers[0]}-{layers[-1]}")
def test_ranges_that_begin_or_end_where_the_huge_state_arises(
    layers: range, smol_handle: Any, shared_data: Path, tmp_path: Path
) -> None:
    """Layer 11 of SmolLM2 raises the first token's norm from 140 to 23,500. Fitted relative to the norm alone, cutting
    11 to 18 went from a perplexity of 395 to 60,928."""
    trial, plan = shared_data / "trial", MergePlan(30, dropped=tuple(layers))
    tokens = available("calibration")["tokens"](path=str(trial / "wt2valid_10x128.npy")).draw(smol_handle, 0)
    task = RecoveryTask(apply_plan(smol_handle, plan), smol_handle, plan, tokens, tmp_path)
    np.save(tmp_path / "fit.npy", np.load(trial / "wt2valid_24x256.npy"))
    found = judged(Reconstruct(path=str(tmp_path / "fit.npy"), passes=1), task)
    assert found.report["whole_model"]["kept"]
    rows = token_rows(np.load(trial / "wt2test_24x256.npy")[:8])
    model = with_tensors(task.handle, found, {"recovery": {}}).model
    assert mean_loss(model, rows) < mean_loss(task.handle.model, rows) - 0.5


@pytest.mark.slow
def test_real_weights_recover_more_than_in_the_first_trial(smol_handle: Any, shared_data: Path, tmp_path: Path) -> None:
    """Perplexity of wt2test_24x256 with 3 layers merged: 55.0 before, 46.0 in the trial."""
    plan = MergePlan(30, groups=((14, 16), (25, 28)), rule="top_layer")
    rule = available("merge_rule")["top_layer"]()
    trial = shared_data / "trial"
    tokens = available("calibration")["tokens"](path=str(trial / "wt2valid_10x128.npy")).draw(smol_handle, 0)
    task = RecoveryTask(apply_plan(smol_handle, plan, rule), smol_handle, plan, tokens, tmp_path)
    found = Reconstruct(path=str(trial / "wt2valid_24x256.npy")).recover(task)
    from slm_exp.evaluation.perplexity import perplexity

    ids = np.load(trial / "wt2test_24x256.npy").astype("int64")
    assert perplexity(with_tensors(task.handle, found, {"recovery": {}}).model, ids, 8, "wt2test") < 46.0
