"""Narrow models: which rows go where, biases, the residual stream, and checkpoints of layers of different widths."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from slm_exp.core.errors import ArchitectureError, PlanError
from slm_exp.core.registry import available
from slm_exp.core.types import MergePlan
from slm_exp.core.widths import WidthDecision, pack_floats, pack_indices, unpack_floats, unpack_indices
from slm_exp.merging.surgery import apply_plan
from slm_exp.merging.width import apply_width
from slm_exp.methods.slm import SLM
from slm_exp.models.hf import HF
from slm_exp.runs import checkpoint
from slm_exp.runs.card import model_card
from slm_exp.runs.checkpoint import save_checkpoint
from slm_exp.runs.schema import Record
from slm_exp.width.base import WidthTask

TOP = available("merge_rule")["top_layer"]()


def decide(name: str, handle: Any, tokens: Any, ratio: float, slots: Any = None, **fields: Any) -> WidthDecision:
    cfg = available("width")[name](ratio=ratio, **fields)
    if slots is None:
        cfg.check_model(handle, SLM())
    n_dense = 8 if slots else handle.n_layers
    task = WidthTask(handle, tokens, slots or MergePlan(handle.n_layers).slots, ratio, n_dense=n_dense)
    return cfg.decide(task)


def run(handle: Any, tokens: Any) -> torch.Tensor:
    with torch.inference_mode():
        return handle.model(torch.as_tensor(tokens.tokens_NT).long()).logits


def keeping(n_layers: int, query: list[int], kv: list[int], full_channels: int = 64) -> dict[str, Any]:
    """A decision that removes heads only."""
    every = pack_indices(range(full_channels), full_channels)
    return {
        "method": "by hand", "ratio": 0.1, "order": "after", "reached": 0.1,
        "sizes": {"heads": [len(query)] * n_layers, "kv_heads": [len(kv)] * n_layers,
                  "channels": [full_channels] * n_layers, "hidden": 32},
        "kept": {"query_heads": [query] * n_layers, "kv_heads": [kv] * n_layers, "channels": [every] * n_layers},
    }  # fmt: skip


@pytest.mark.parametrize(("query", "kv"), [([2, 3], [1]), ([0, 1], [0]), ([1, 2], [0, 1]), ([0, 3], [0, 1])])
def test_every_query_head_stays_with_its_key_value_head(query, kv, make_tiny, tokens):
    """A wide model whose other heads write nothing gives the same; heads differ, so only the right rows do."""
    handle = make_tiny(layers=2)
    with torch.no_grad():
        for layer in handle.layers:
            gone = [h * 8 + c for h in range(4) if h not in query for c in range(8)]
            layer.self_attn.o_proj.weight[:, gone] = 0
    narrow = apply_width(handle, WidthDecision.from_json(keeping(2, query, kv)))
    own, wide = narrow.layers[0].self_attn, handle.layers[0].self_attn
    for at, h in enumerate(query):
        assert torch.equal(own.q_proj.weight[8 * at : 8 * at + 8], wide.q_proj.weight[8 * h : 8 * h + 8])
        assert torch.equal(own.o_proj.weight[:, 8 * at : 8 * at + 8], wide.o_proj.weight[:, 8 * h : 8 * h + 8])
    for at, k in enumerate(kv):
        assert torch.equal(own.v_proj.weight[8 * at : 8 * at + 8], wide.v_proj.weight[8 * k : 8 * k + 8])
    torch.testing.assert_close(run(narrow, tokens), run(handle, tokens), rtol=1e-5, atol=1e-4)
    assert own.num_key_value_groups == len(query) // len(kv)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_channels_beyond_what_a_short_float_can_count(dtype, make_tiny):
    """bfloat16 has every whole number up to 256, float16 up to 2048."""
    handle = make_tiny(layers=1, hidden=1056, dtype=dtype)
    decision = keeping(1, [0, 1, 2, 3], [0, 1], full_channels=2112)
    stay = [c for c in range(2112) if c % 7]
    decision["kept"]["channels"] = [pack_indices(stay, 2112)]
    decision["sizes"] |= {"channels": [len(stay)], "hidden": 1056}
    own, wide = apply_width(handle, WidthDecision.from_json(decision)).layers[0].mlp, handle.layers[0].mlp
    assert torch.equal(own.down_proj.weight, wide.down_proj.weight[:, stay])
    assert torch.equal(own.gate_proj.weight, wide.gate_proj.weight[stay])


def test_the_biases_of_flap_make_up_for_the_mean(make_tiny, tokens):
    """With inputs that hardly vary, the compensated layer's output is nearer than the bare one's; in general too."""
    handle = make_tiny(layers=3)
    with_bias = apply_width(handle, decide("flap", handle, tokens, 0.45))
    without = apply_width(handle, decide("flap", handle, tokens, 0.45, compensate=False))
    assert with_bias.config.attention_bias
    assert with_bias.config.mlp_bias
    assert not without.config.attention_bias

    def first_layer_error(narrow):
        ids = torch.as_tensor(tokens.tokens_NT).long()
        with torch.inference_mode():
            dense = handle.model(ids, output_hidden_states=True).hidden_states[1]
            return float((narrow.model(ids, output_hidden_states=True).hidden_states[1] - dense).norm())

    assert first_layer_error(with_bias) < 0.999 * first_layer_error(without)
    attention = with_bias.layers[0].self_attn
    assert attention.q_proj.bias.abs().max() == 0, "biases that the switch brings and nobody needs are zero"
    assert attention.o_proj.bias.abs().max() > 0


def test_the_bias_is_the_weight_times_the_mean_of_what_goes(make_tiny, tokens):
    handle = make_tiny(layers=1)
    seen = []
    hook = handle.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0].double()))
    run(handle, tokens)
    hook.remove()
    width = decide("flap", handle, tokens, 0.3)
    gone = sorted(set(range(64)) - set(width.channels(0)))
    mean = seen[0].flatten(0, 1).mean(0)[gone]
    expected = handle.layers[0].mlp.down_proj.weight.double()[:, gone] @ mean
    got = apply_width(handle, width).layers[0].mlp.down_proj.bias
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_narrower_residual_stream(make_tiny, tokens):
    handle = make_tiny("qwen3", layers=3)
    width = decide("minitron", handle, tokens, 0.4, hidden_size=24)
    narrow = apply_width(handle, width)
    stay = unpack_indices(width.hidden)
    assert len(stay) == narrow.config.hidden_size == 24
    assert torch.equal(narrow.model.model.embed_tokens.weight, handle.model.model.embed_tokens.weight[:, stay])
    assert narrow.model.lm_head.weight is narrow.model.model.embed_tokens.weight
    assert torch.equal(narrow.model.model.norm.weight, handle.model.model.norm.weight[stay])
    assert narrow.layers[0].self_attn.q_norm.weight.shape == (8,)
    assert torch.isfinite(run(narrow, tokens)).all()
    assert sum(p.numel() for p in narrow.model.parameters()) == narrow.n_params
    # channels that are zero everywhere they are written are no loss but for the norms' mean
    assert abs(width.reached - 0.4) < 0.03


def test_depth_and_width_in_one_plan_and_either_order(make_tiny, tokens):
    handle = make_tiny(layers=6)
    depth = MergePlan(6, ((3, 5),), (1,), rule="top_layer")
    merged = apply_plan(handle, depth, TOP)
    after = replace(depth, width=decide("magnitude", merged, tokens, 0.4, depth.slots))
    before = replace(depth, width=decide("magnitude", handle, tokens, 0.4, order="before"))
    for plan in (after, before):
        plan = MergePlan.from_json(json.loads(json.dumps(plan.to_json())))
        narrow = apply_plan(handle, plan, TOP)
        assert narrow.n_layers == len(narrow.layers) == 4
        assert torch.isfinite(run(narrow, tokens)).all()
    assert apply_plan(handle, after, TOP).digest == apply_width(merged, after.width).digest
    assert apply_plan(handle, before, TOP).digest != apply_plan(handle, after, TOP).digest


def test_a_merged_layer_is_narrowed_if_all_it_stands_for_is_in_the_range(make_tiny, tokens):
    handle = make_tiny(layers=8)
    depth = MergePlan(8, ((1, 3), (4, 6)), (7,), rule="top_layer")  # slots 0 | 1-2 | 3 | 4-5 | 6
    merged = apply_plan(handle, depth, TOP)
    for layers in ([2, 7], [2, 8]):  # the dense model's top layer is gone, and counts all the same
        width = decide("random", merged, tokens, 0.2, depth.slots, uniform=False, layers=layers, allocation="equal")
        assert [c < 64 for c in width.sizes.channels] == [False, False, True, True, True]
    with pytest.raises(PlanError, match=r"width.layers = \[1, 2\) holds no whole layer of the 5 that are left, of 8"):
        available("width")["random"](uniform=False, layers=[1, 2], allocation="equal").decide(
            WidthTask(merged, tokens, depth.slots, 0.05, n_dense=8)
        )


def test_llm_pruner_leaves_the_published_layers_alone(make_tiny, tokens):
    handle = make_tiny(layers=8)
    width = decide("llm_pruner", handle, tokens, 0.05, uniform=False)
    assert [c < 64 for c in width.sizes.channels] == [False] * 4 + [True] * 2 + [False] * 2


def test_a_decision_for_another_model_is_refused(make_tiny, tokens):
    handle = make_tiny(layers=3)
    width = decide("random", handle, tokens, 0.3)
    with pytest.raises(PlanError, match="the plan's width is for 3 layers; tiny-llama has 4"):
        apply_width(make_tiny(layers=4), width)
    with pytest.raises(PlanError, match="query heads of layer 0, the highest 3; expected 2 of tiny-llama's 2"):
        apply_width(make_tiny(layers=3, heads=2, kv_heads=2), WidthDecision.from_json(keeping(3, [2, 3], [1])))


def test_subsets_and_numbers_survive_packing():
    assert unpack_indices(pack_indices([0, 7, 8, 20], 21)) == [0, 7, 8, 20]
    assert unpack_indices(pack_indices([], 3)) == []
    values = torch.randn(5)
    assert torch.equal(torch.tensor(unpack_floats(pack_floats(values.tolist()))), values)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_layers_of_different_widths_reload_by_their_own_code_alone(family, make_tiny, tokens, tmp_path):
    """Verified in a fresh process with plain transformers; then by this package without running the folder's code."""
    handle = make_tiny(family, layers=3, tied=family == "llama")
    width = decide("magnitude", handle, tokens, 0.35, uniform=False, allocation="score")
    assert not width.uniform
    narrow = apply_width(handle, width)
    plan = MergePlan(3, width=width)
    verified = save_checkpoint(narrow, tmp_path / "model", plan, tokens)
    assert verified["logits_off"] <= 1e-5
    assert (tmp_path / "model" / "modeling_layerwise.py").is_file()
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Layers have widths of their own" in card
    assert "trust_remote_code=True" in card.split("## Use")[1]

    again = HF(path=str(tmp_path / "model")).open(torch.device("cpu"), tmp_path)
    assert again.layout is handle.layout
    assert again.n_params == narrow.n_params
    assert torch.equal(run(again, tokens), run(narrow, tokens))
    shorter = apply_plan(again, MergePlan(3, dropped=(1,)))
    assert [p.shape for p in shorter.layers[1].parameters()] == [p.shape for p in narrow.layers[2].parameters()]
    assert torch.isfinite(run(shorter, tokens)).all()
    with pytest.raises(ArchitectureError, match="layers of different widths already"):
        decide("random", again, tokens, 0.1)
    plain = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path / 'model')!r})"
    ran = subprocess.run([sys.executable, "-P", "-c", plain], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ran.returncode != 0
    assert "trust_remote_code=True" in ran.stderr


def test_uniform_widths_with_biases_reload_as_an_ordinary_llama(make_tiny, tokens, tmp_path):
    handle = make_tiny(layers=2)
    narrow = apply_width(handle, decide("flap", handle, tokens, 0.45))
    assert save_checkpoint(narrow, tmp_path / "model", MergePlan(2), tokens)["logits_off"] <= 1e-5
    about = json.loads((tmp_path / "model" / "config.json").read_text())
    assert about["model_type"] == "llama"
    assert about["attention_bias"]
    assert about["head_dim"] == 8
    assert "auto_map" not in about


def test_the_card_of_an_ordinary_narrow_model(make_tiny, tokens, monkeypatch):
    monkeypatch.setattr(checkpoint, "verify_checkpoint", lambda *a: {})
    handle = make_tiny(layers=2)
    width = decide("random", handle, tokens, 0.4)
    card = model_card(apply_width(handle, width), MergePlan(2, width=width), Record())
    assert f"Width pruned by random, after the layers: {width.reached:.1%} of the decoder layers' parameters" in card
    assert "trust_remote_code" not in card
