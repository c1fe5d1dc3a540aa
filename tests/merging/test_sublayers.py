"""Removed sublayers: zeros in an ordinary checkpoint, layers without both halves gone, nothing counted as removed."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slm_exp.core.errors import PlanError
from slm_exp.core.types import MergePlan, Sublayer
from slm_exp.merging.surgery import apply_plan, zeroed, zeroed_note

PLAN = MergePlan(8, dropped=(1,), sublayers=(
    Sublayer(0, "mlp"), Sublayer(3, "attention"), Sublayer(5, "mlp"), Sublayer(5, "attention"),
    Sublayer(7, "attention")))  # fmt: skip


def run(model: Any, tokens: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.as_tensor(tokens.tokens_NT).long(), use_cache=False).logits


def with_biases(handle: Any) -> Any:
    """The same Llama with a bias in every projection, none of them zero: one that stays would show."""
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(handle.config)
    config.attention_bias = config.mlp_bias = True
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) / 5
    return replace(handle, config=config, load_model=lambda: model)


def test_a_layer_that_loses_both_halves_is_a_dropped_layer() -> None:
    assert PLAN.dropped == (1, 5)
    assert PLAN.sublayers == (Sublayer(0, "mlp"), Sublayer(3, "attention"), Sublayer(7, "attention"))
    assert MergePlan.from_json(json.loads(json.dumps(PLAN.to_json()))) == PLAN


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sublayers": (Sublayer(8, "mlp"),)}, "layer 8 without mlp lies outside a model of 8 layers"),
        ({"sublayers": (Sublayer(2, "mlp"),), "dropped": (2,)}, "layer 2 without mlp and dropped layer 2 overlap"),
        ({"sublayers": (Sublayer(2, "mlp"),), "groups": ((1, 3),)}, r"layer 2 without mlp and group \[1, 3\) overlap"),
    ],
)
def test_plans_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        MergePlan(8, **fields)


@pytest.mark.parametrize("family", ["llama", "llama with biases", "mistral", "qwen2", "qwen3"])
def test_the_model_is_the_dense_one_whose_halves_add_nothing(family: str, make_tiny: Any, tokens: Any) -> None:
    dense = make_tiny(family.split()[0])
    if "biases" in family:
        dense = with_biases(dense)
    before = {name: p.clone() for name, p in dense.model.state_dict().items()}
    small = apply_plan(dense, PLAN).model
    assert all(torch.equal(before[name], p) for name, p in dense.model.state_dict().items())
    hooks = [dense.layers[i].register_forward_hook(
        lambda m, args, out: (args[0], *out[1:]) if isinstance(out, tuple) else args[0]) for i in (1, 5)]
    hooks += [dense.layers[0].mlp.register_forward_hook(lambda m, args, out: torch.zeros_like(out))]
    hooks += [dense.layers[i].self_attn.register_forward_hook(
        lambda m, args, out: (torch.zeros_like(out[0]), *out[1:])) for i in (3, 7)]
    expected = run(dense.model, tokens)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(run(small, tokens), expected, atol=1e-5, rtol=1e-5)
    assert len(small.model.layers) == small.config.num_hidden_layers == 6


def test_what_is_removed_is_what_is_gone(make_tiny: Any) -> None:
    dense = make_tiny("qwen2")
    small = apply_plan(dense, PLAN)
    layer = dense.layers[0]
    gone = 2 * sum(p.numel() for p in layer.parameters())
    assert dense.n_params - small.n_params == gone
    assert dense.n_params - sum(p.numel() for p in small.model.parameters()) == gone
    attention, mlp = (sum(p.numel() for p in part.parameters()) for part in (layer.self_attn, layer.mlp))
    assert dense.sublayer_params == ({"attention": attention, "mlp": mlp},) * dense.n_layers
    assert zeroed(small, PLAN) == zeroed(apply_plan(make_tiny("qwen2"), PLAN), PLAN) == 2 * attention + mlp
    (note,) = zeroed_note(dense, PLAN)
    assert note.startswith("2 attention and 1 mlp sublayers are zeroed: ")
    assert zeroed_note(dense, MergePlan(8, dropped=(1,))) == ()
    assert small.digest != dense.digest != apply_plan(dense, MergePlan(8, sublayers=(Sublayer(3, "mlp"),))).digest


def test_only_the_outputs_are_new_tensors(make_tiny: Any) -> None:
    dense = make_tiny()
    small = apply_plan(dense, MergePlan(8, sublayers=(Sublayer(3, "attention"), Sublayer(4, "mlp")))).model
    own = {p.data_ptr() for p in dense.model.parameters()}
    new = {name for name, p in small.named_parameters() if p.data_ptr() not in own}
    assert new == {"model.layers.3.self_attn.o_proj.weight", "model.layers.4.mlp.down_proj.weight"}
    assert all(not p.any() for name, p in small.named_parameters() if name in new)


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "slm_exp" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids, expected = torch.load(sys.argv[2], weights_only=True)
with torch.inference_mode():
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    out = model.generate(ids[:1, :8], max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    slow = model.generate(ids[:1, :8], max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0,
                          use_cache=False)
assert out.shape == (1, 14) and torch.equal(out, slow)
print("same")
"""


def test_the_checkpoint_is_an_ordinary_one(make_tiny: Any, tokens: Any, tmp_path: Path) -> None:
    """Reloaded by plain transformers in a process that does not know slm_exp: same logits, and it generates."""
    small = apply_plan(make_tiny("qwen2"), PLAN).model
    small.save_pretrained(tmp_path / "model")
    ids = torch.as_tensor(tokens.tokens_NT).long()
    torch.save((ids, run(small, tokens)), tmp_path / "expected.pt")
    arguments = [sys.executable, "-c", PLAIN, str(tmp_path / "model"), str(tmp_path / "expected.pt")]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
    assert done.stdout.strip() == "same", done.stderr[-2000:]
