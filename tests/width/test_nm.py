"""N:M masks: which weights stay, that nothing gets smaller, and that a recovery keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.runs import tiny_config

from slm_exp.core.errors import ConfigError, PlanError
from slm_exp.core.types import CalibrationTokens, MergePlan, Sublayer
from slm_exp.core.widths import WidthDecision
from slm_exp.engine.runner import BlockRunner, Slot
from slm_exp.merging.nm import mask_of
from slm_exp.merging.surgery import apply_plan, zeroed
from slm_exp.methods.slm import SLM
from slm_exp.models.base import ModelHandle
from slm_exp.pipeline.run import run
from slm_exp.recovery.base import RecoveryTask
from slm_exp.recovery.full import Full
from slm_exp.width.base import WidthTask
from slm_exp.width.nm import NM


def decide(dense: ModelHandle, tokens: CalibrationTokens, **fields: Any) -> WidthDecision:
    cfg = NM(**fields)
    cfg.check_model(dense, SLM())
    return cfg.decide(WidthTask(dense, tokens, MergePlan(dense.n_layers).slots, 0.0, n_dense=dense.n_layers))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "phi3"])
def test_of_every_m_inputs_the_n_that_count_most_stay(family: str, n: int, m: int, make_tiny: Any,
                                                      tokens: CalibrationTokens) -> None:
    dense = make_tiny(family, layers=3)
    before = {name: p.clone() for name, p in dense.model.named_parameters()}
    made = decide(dense, tokens, n=n, m=m)
    assert WidthDecision.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert decide(dense, tokens, n=n, m=m) == made
    plan = MergePlan(3, width=made)
    small = apply_plan(dense, plan)
    assert all(torch.equal(before[name], p) for name, p in dense.model.named_parameters())
    assert (small.n_params, small.config.to_dict()) == (dense.n_params, dense.config.to_dict())
    zeros = 0
    for layer, was in zip(small.layers, dense.layers, strict=True):
        for name in dense.layout.projections:
            weight, full = layer.get_parameter(f"{name}.weight"), was.get_parameter(f"{name}.weight")
            assert ((weight != 0).view(len(weight), -1, m).sum(-1) == n).all()
            assert torch.equal(weight[weight != 0], full[weight != 0])
            zeros += int((weight == 0).sum())
    assert zeroed(small, plan) == zeros


def test_scores_are_weights_times_the_norm_of_what_flows_in(make_tiny: Any, tokens: CalibrationTokens) -> None:
    dense = make_tiny(layers=2)
    small = apply_plan(dense, MergePlan(2, width=decide(dense, tokens)))
    runner = BlockRunner(dense, tokens.tokens_NT, fuse=False)
    h_NTD = runner.embed()
    first = dense.layers[0].input_layernorm(h_NTD).flatten(0, 1).double().norm(dim=0)
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = dense.layers[0].self_attn.get_submodule(name).weight
        scores = (weight.double().abs() * first).view(len(weight), -1, 4)
        kept = scores >= scores.kthvalue(3, dim=-1, keepdim=True).values
        assert torch.equal(small.layers[0].self_attn.get_submodule(name).weight != 0, kept.view(weight.shape))
    # the second layer looks at what the masked first one gives
    masked = BlockRunner(small, tokens.tokens_NT, fuse=False).block(Slot(0), h_NTD)
    second = dense.layers[1].input_layernorm(masked).flatten(0, 1).double().norm(dim=0)
    weight = dense.layers[1].self_attn.q_proj.weight
    assert torch.equal(small.layers[1].self_attn.q_proj.weight != 0, mask_of(weight, second, 2, 4))


def test_wrong_patterns_are_refused(make_tiny: Any, tokens: CalibrationTokens) -> None:
    for fields, wanted in (({"n": 4}, r"width\.n = 4; expected 1 to 3"), ({"m": 1, "n": 1}, r"width\.m = 1"),
                           ({"order": "before"}, r"width\.order = before")):
        with pytest.raises(ConfigError, match=wanted):
            NM(**fields)
    with pytest.raises(ConfigError, match=r"width\.m = 5; expected a divisor of .* hidden size, 32"):
        decide(make_tiny(), tokens, m=5)
    for family in ("mixtral", "gpt2"):
        with pytest.raises(ConfigError, match="not masked"):
            decide(make_tiny(family), tokens)
    plan = MergePlan(2, width=decide(make_tiny(layers=2), tokens))
    with pytest.raises(PlanError, match="expected"):
        apply_plan(make_tiny(layers=2, hidden=64), plan).model  # noqa: B018


@pytest.mark.parametrize("masked", ["keep", "decay"])
def test_a_recovery_keeps_the_mask(masked: str, make_tiny: Any, tokens: CalibrationTokens, tmp_path: Path) -> None:
    dense = make_tiny(layers=3)
    plan = MergePlan(3, sublayers=(Sublayer(1, "mlp"),), width=decide(dense, tokens))
    small = apply_plan(dense, plan)
    file = tmp_path / "texts.jsonl"
    words = np.random.default_rng(0).integers(97, 123, (12, 40))
    file.write_text("".join(json.dumps({"text": bytes(row.tolist()).decode()}) + "\n" for row in words))
    cfg = Full(data="jsonl", path=str(file), seq_len=16, max_steps=4, batch_size=2, micro_batch_size=2, held_out=4,
               warmup_steps=0, lr=1e-2, checkpoint_every=2, masked=masked)
    done = cfg.recover(RecoveryTask(small, dense, plan, tokens, tmp_path))
    moved = 0
    for name, was in small.model.named_parameters():
        if ".layers." in name and name.endswith("proj.weight"):
            new = done.tensors.get(name, was)
            assert not new[was == 0].any(), name
            moved += int((new != was).sum())
    assert moved
    assert ("masked" in cfg.identity()) == (masked == "decay")  # off leaves no trace


def test_a_run_says_zeroed_and_never_smaller(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path / "cache", "method=shortgpt", "method.target_layers=3", "width=nm")
    record = run(cfg, tmp_path / "run")
    params = record["params"]
    layer = (params["before"] - params["after"]) / (record["layers"]["before"] - 3)
    assert params["zeroed"] > 0.4 * 3 * layer
    assert record["plan"]["width"]["reached"] == 0.0
    again = tiny_config(tmp_path / "cache", "method=from_plan", f"method.path={tmp_path / 'run' / 'plan.json'}")
    assert run(again, tmp_path / "again")["plan"]["width"]["mask"] == record["plan"]["width"]["mask"]
