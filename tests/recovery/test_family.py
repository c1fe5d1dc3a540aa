"""One training for every size: shared adapters, the sandwich rule, and what `slm path` writes of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.runs import QUICK
from transformers import AutoModelForCausalLM

from slm_exp.cli.follow import shown
from slm_exp.cli.path import main
from slm_exp.core.errors import ConfigError
from slm_exp.core.registry import available
from slm_exp.core.types import MergePlan
from slm_exp.merging.surgery import apply_plan, hosts
from slm_exp.recovery.base import RecoveryTask, Relative, copy_with
from slm_exp.recovery.families import Students, family_loss
from slm_exp.recovery.family import Family

RULE: Any = available("merge_rule")["top_layer"]()
PLANS = [MergePlan(8, groups, rule="top_layer") for groups in (((5, 7),), ((4, 7),), ((3, 7),), ((1, 3), (3, 7)))]
SHORT = {"data": "bundled", "seq_len": 24, "batch_size": 4, "micro_batch_size": 2, "warmup_steps": 0, "held_out": 4}


def family_of(make_tiny: Any, tokens: Any, folder: Path, plans: list[MergePlan] = PLANS) -> list[Relative]:
    dense = make_tiny(seed=3)
    return [Relative(RecoveryTask(apply_plan(dense, plan, RULE), dense, plan, tokens, folder), tuple(hosts(plan, RULE)))
            for plan in plans]


def batch_of(tokens: Any) -> dict[str, torch.Tensor]:
    ids = torch.as_tensor(tokens.tokens_NT).long()
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def test_a_layer_has_one_adapter_in_every_model_that_has_it(make_tiny: Any, tokens: Any, tmp_path: Path) -> None:
    family = family_of(make_tiny, tokens, tmp_path)
    students = Students(Family(dropout=0.0), 9, family, seed=0)
    assert len(students.own) == 7 * 7 * 2  # layers but 5, projections, halves: no copies
    assert {n for n, p in students.named_parameters()} == {f"own.{i}" for i in range(7 * 7 * 2)}
    layers = [model.get_base_model().model.layers for model in students.models]
    assert layers[0][7 - 1].mlp.up_proj.lora_A["default"].weight is layers[3][3].mlp.up_proj.lora_A["default"].weight
    assert layers[0][5].self_attn.q_proj.lora_B["default"].weight is students.names["6.self_attn.q_proj.lora_B"]
    with torch.no_grad():
        for p in students.own:
            p.normal_(std=0.05)
    loss = family_loss(family[0].task.dense.model, 0.3, 1.0, students.train(), batch_of(tokens))
    loss.backward()
    total = {name: p.grad.clone() for name, p in students.names.items() if p.grad is not None}
    assert set(total) == set(students.names)
    students.zero_grad()
    for number in range(4):  # the mean over the models, one by one
        students._now = [number]
        family_loss(family[0].task.dense.model, 0.3, 1.0, students, batch_of(tokens)).backward()
    for name, p in students.names.items():
        torch.testing.assert_close(p.grad / 4, total[name], atol=1e-6, rtol=1e-4)


def test_every_step_has_the_largest_the_smallest_and_others(make_tiny: Any, tokens: Any, tmp_path: Path) -> None:
    students = Students(Family(), 1, family_of(make_tiny, tokens, tmp_path), seed=0)
    seen = []
    for step in range(20):
        students.at(step / 20)
        assert (students._now[0], students._now[-1], len(students._now)) == (0, 3, 3)
        seen.append(students._now)
    students.at(7 / 20)
    assert students._now == seen[7]  # a resumed training samples the same
    assert {one for now in seen for one in now} == {0, 1, 2, 3}
    assert [students.models.index(m) for m in students.eval().now] == [0, 2, 3]
    assert not any(m.training for m in students.models)


def test_what_is_read_off_is_what_was_trained(make_tiny: Any, tokens: Any, tmp_path: Path) -> None:
    family = family_of(make_tiny, tokens, tmp_path)
    recipe = Family(max_steps=3, lr=1e-2, checkpoint_every=3, **SHORT)
    adapters = recipe.adapters(family)
    assert len(adapters.tensors) == 7 * 7 * 2
    students = Students(recipe, 0, family, seed=0).eval()
    students.take(adapters.tensors)
    ids = batch_of(tokens)["input_ids"]
    for model, one in zip(students.models, family, strict=True):
        new = copy_with(one.task.handle.model, recipe.recovered(one, adapters))
        with torch.no_grad():
            torch.testing.assert_close(new(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(new(ids).logits, one.task.handle.model(ids).logits, atol=1e-3)
    (losses,) = {tuple(losses) for losses in adapters.report["held_out_loss"]}
    assert math.isfinite(losses[1])
    assert list(tmp_path.rglob("checkpoint-*")) == []


def call(tmp_path: Path, *words: str) -> dict[str, Any]:
    """`slm path` with a short training; its path.json."""
    assert main([*QUICK, "method.threshold_range=[-1.0,1.0]", f"cache.dir={tmp_path / 'c'}", "recovery=family",
                 f"hydra.run.dir={tmp_path / 'out'}", "recovery.max_steps=3", "recovery.lr=1e-2",
                 *(f"recovery.{name}={value}" for name, value in SHORT.items()), *words]) == 0
    return json.loads((tmp_path / "out" / "path.json").read_text())  # type: ignore[no-any-return]


def test_the_command_writes_the_curve(tmp_path: Path) -> None:
    path = call(tmp_path)
    sizes = {size["n_layers"] for size in path["sizes"]} - {8}
    assert {int(n) for n in path["recovery"]["sizes"]} == sizes
    for of in path["recovery"]["sizes"].values():
        assert of["kept"] == (of["after"] <= of["before"])
    page = (tmp_path / "out" / "path.md").read_text()
    some = path["recovery"]["sizes"][str(min(sizes))]
    assert f"| {shown(math.exp(some['before']))} | " in page
    assert f"dense {shown(math.exp(path['recovery']['dense']))}" in page
    assert (tmp_path / "out" / "budgets.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "models").exists()


@pytest.mark.slow
def test_any_size_is_saved_as_a_plain_checkpoint_without_training_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    n = sorted(map(int, call(tmp_path)["recovery"]["sizes"]))[2]
    monkeypatch.setattr(Family, "adapters", lambda *a: pytest.fail("trained again"))
    capsys.readouterr()
    call(tmp_path, "--save", str(n))
    folder = tmp_path / "out" / "models" / f"{n}_layers"
    assert str(folder) in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_hidden_layers == n
    assert "Recovered by family" in (folder / "README.md").read_text()
    with pytest.raises(ConfigError, match=r"--save 8; expected sizes of this path: "):
        call(tmp_path, "--save", "8")


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    for words, message in ((["--save", "many"], "--save many"), (["recovery=family", "recovery.processes=2"],
                                                                 "recovery.processes"),
                           (["recovery=family", "recovery.midle=2"], "middle")):
        with pytest.raises(ConfigError, match=message):
            main([*QUICK, *words])
