"""What every family's layout promises. A new file in models/families is covered on arrival.

Models are random, with every norm, bias, gate and router of its own and activations large enough that each constant of
the config moves the logits: what the engine would leave out shows.
"""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from builders.models import new_task
from transformers import AutoConfig, AutoModelForCausalLM

from slm_exp.core.errors import ConfigError
from slm_exp.core.registry import available
from slm_exp.core.types import MergePlan, Sublayer
from slm_exp.engine.gradients import layer_gradients
from slm_exp.engine.head_loss import next_token_loss
from slm_exp.engine.ridge import changed, held_out, moments, ridge_step
from slm_exp.engine.runner import BlockRunner, Slot
from slm_exp.evaluation.backends.shared import Shared, growing, takes_shared
from slm_exp.merging.sharing import shared_copy
from slm_exp.merging.surgery import apply_plan
from slm_exp.models.handle import ModelHandle
from slm_exp.models.layout import COMMON
from slm_exp.models.layouts import FAMILIES, layout_for
from slm_exp.models.tiny import random_weights
from slm_exp.search.refit import Refits

every_family = pytest.mark.parametrize("family", FAMILIES)
RULES = {name: rule for name, rule in available("merge_rule").items() if not rule.fits}  # weights alone
N = 8
BASE = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": N, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 257, "bos_token_id": 256,
    "eos_token_id": 257,
}  # fmt: skip
LOUD = {  # where a family has the field: a value at which it says something
    "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 4, "final_logit_softcapping": 5.0,
    "query_pre_attn_scalar": 4, "embedding_multiplier": 2.0, "residual_multiplier": 0.7, "logits_scaling": 0.5,
    "attention_multiplier": 0.5, "logit_scale": 0.5, "norm_topk_prob": True, "use_qkv_bias": True,
    "attention_bias": True, "mlp_bias": True, "no_rope_layers": [1, 1, 0, 1] * 2,
}  # fmt: skip
VARIED = {  # another value, and how far the logits must move from it
    "sliding_window": 4, "max_window_layers": 2, "use_sliding_window": False, "final_logit_softcapping": 2.0,
    "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 16, "embedding_multiplier": 1.0, "logits_scaling": 1.0,
    "residual_multiplier": 1.0, "attention_multiplier": 1.0, "logit_scale": 1.0, "norm_topk_prob": False,
    "num_experts_per_tok": 1, "no_rope_layers": [1, 0, 1, 0] * 2, "use_parallel_residual": None,
    "scale_attn_weights": False, "hidden_act": "relu", "hidden_activation": "relu", "activation_function": "gelu",
    "rope_parameters": None, "layer_types": None, "rms_norm_eps": 0.5, "layer_norm_eps": 0.5, "norm_epsilon": 0.5,
    "layer_norm_epsilon": 0.5,
}  # fmt: skip
SHAPES = {  # they decide which tensors there are: `LayerLayout.check`
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "use_bias", "qkv_bias", "enable_bias",
    "use_qkv_bias", "ffn_dim", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "num_experts",
    "num_local_experts", "moe_intermediate_size", "shared_expert_intermediate_size", "tie_word_embeddings",
    "word_embed_proj_dim", "max_position_embeddings",
}  # fmt: skip
INERT = {  # of training, generation and heads that causal models have not; or read only where another field is unset
    "initializer_range", "init_std", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout",
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "classifier_dropout", "dropout", "layerdrop",
    "residual_dropout", "embedding_dropout", "router_aux_loss_coef", "router_jitter_noise", "pretraining_tp",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "is_decoder", "original_max_position_embeddings", "no_rope_layer_interval", "reorder_and_upcast_attn",
}  # fmt: skip
BASIC = {"architectures", "chunk_size_feed_forward", "dtype", "id2label", "label2id", "is_encoder_decoder",
         "output_hidden_states", "problem_type", "return_dict", "transformers_version"}  # fmt: skip


def own_fields(family: str) -> set[str]:
    return {f.name for f in dataclasses.fields(type(AutoConfig.for_model(family)))} - BASIC


def loud_config(family: str, **fields):
    """A config whose every constant says something; with `fields` in place of some."""
    layout, own = FAMILIES[family], own_fields(family)
    about = {k: v for k, v in LOUD.items() if k in own and k not in layout.fixed}
    if "sliding_window" in own and "layer_types" in own and layout.window == "whole":
        about["layer_types"] = ["sliding_attention", "full_attention"] * (N // 2)
    about = {**BASE, **about, **layout.tiny, **fields}
    return AutoConfig.for_model(family, **copy.deepcopy(about))


def loud(family: str, config=None, seed: int = 0, **fields) -> ModelHandle:
    config = config or loud_config(family, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    random_weights(model, seed)
    for name, p in model.named_parameters():
        if "gate.weight" in name:
            p *= 3  # routers that decide
    layout = layout_for(config)
    layout.check(model)

    handle = ModelHandle(family, config, layout, f"{family}{seed}", torch.device("cpu"), lambda: model, lambda: None)
    _ = handle.model
    return handle


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def by_parts(handle: ModelHandle, ids, slots=None):
    """The logits as the engine has them: embedding, layers one by one, norm, head."""
    runner = BlockRunner(handle, ids)
    h = runner.embed()
    for slot in slots or [Slot(i) for i in range(handle.n_layers)]:
        h = runner.block(slot, h)
    return runner.logits(runner.finish(h).flatten(0, 1)).view(*ids.shape, -1)


@pytest.fixture
def ids(tokens):
    return torch.as_tensor(tokens.tokens_NT).long()


def close(a, b, atol=1e-5):
    assert (a - b).abs().max() <= atol * max(1.0, float(b.abs().max())), float((a - b).abs().max())


@every_family
def test_the_parts_are_where_it_says(family):
    handle = loud(family)
    layout, model = handle.layout, handle.model
    assert layout_for(handle.config) is layout is FAMILIES[family]
    assert layout.family == family
    assert len(handle.layers) == handle.n_layers == N
    assert model.get_submodule(layout.decoder) is model.get_decoder()
    assert model.get_submodule(layout.final_norm).weight.shape == (32,)
    for name in layout.projections:
        assert handle.layers[0].get_submodule(name).weight.ndim == 2, name
    assert layout.attention_width(handle.layers[0]) == 32


@every_family
def test_running_the_parts_is_running_the_model(family, ids):
    handle = loud(family)
    close(by_parts(handle, ids), logits(handle.model, ids))


@every_family
def test_no_field_of_the_config_is_unaccounted_for(family):
    """A field that neither a tensor's shape shows, nor a test moves, nor the layout refuses, would be ignored."""
    layout = FAMILIES[family]
    known = {*VARIED, *SHAPES, *INERT, *layout.fixed, layout.same_size, *layout.per_layer_config, *layout.layer_bounds}
    assert own_fields(family) - known == set()
    listed = {*COMMON, *layout.fields, *layout.fixed, *layout.per_layer_config, *layout.layer_bounds, layout.same_size}
    assert own_fields(family) - listed == set()
    assert set(layout.fields) <= own_fields(family)


def other_value(family: str, field: str, config):
    value = VARIED[field]
    if field == "rope_parameters":
        rope = copy.deepcopy(config.rope_parameters)
        for part in [p for p in rope.values() if isinstance(p, dict)] or [rope]:
            part["rope_theta"] = 50.0
            if "partial_rotary_factor" in part:
                part["partial_rotary_factor"] /= 2 if part["partial_rotary_factor"] > 0.25 else 0.5
        return rope
    if field == "layer_types":
        return [*reversed(config.layer_types)]
    if field == "activation_function":
        return "gelu" if config.activation_function == "relu" else "relu"
    if field == "use_parallel_residual":
        return not config.use_parallel_residual
    return value


VARIATIONS = [(family, field) for family in FAMILIES for field in sorted(own_fields(family) & set(VARIED))
              if field not in FAMILIES[family].fixed]  # fmt: skip


@pytest.mark.parametrize(("family", "field"), VARIATIONS)
def test_every_constant_moves_the_logits_and_the_engine_follows(family, field, ids):
    config = loud_config(family)
    if field == "layer_types" and len(set(config.layer_types)) == 1:
        pytest.skip("one kind of attention")
    if field == "sliding_window" and not FAMILIES[family].window:
        pytest.skip("read by no module of this family")
    if field == "use_sliding_window" and not FAMILIES[family].window:
        pytest.skip("read by no module of this family")
    before = logits(loud(family).model, ids)
    fields = {field: other_value(family, field, config)}
    if field in ("max_window_layers", "use_sliding_window"):
        fields["layer_types"] = None
    handle = loud(family, **fields)
    after = logits(handle.model, ids)
    assert (after - before).abs().max() > 1e-2
    close(by_parts(handle, ids), after)


@every_family
def test_an_unknown_field_is_refused_by_name_and_value(family, monkeypatch):
    from slm_exp.core.errors import ArchitectureError
    from slm_exp.models import layouts

    config = loud_config(family)
    field = next(iter(sorted(set(FAMILIES[family].fields) & set(VARIED) - COMMON)), None)
    if field is None:
        pytest.skip("no field of its own that has another value")
    blind = dataclasses.replace(FAMILIES[family], fields=tuple(f for f in FAMILIES[family].fields if f != field))
    monkeypatch.setitem(layouts.FAMILIES, family, blind)
    setattr(config, field, VARIED[field] if getattr(type(config), field, None) != VARIED[field] else LOUD.get(field))
    with pytest.raises(ArchitectureError, match=rf"{field} = .* is unknown to the {family} layout"):
        layout_for(config)


@every_family
@pytest.mark.parametrize("rule", RULES)
def test_prefix_reuse_scores_the_model_that_surgery_makes(family, rule, ids):
    """Merged, removed and halved layers, from the states of the dense pass up."""
    dense, merge = loud(family), RULES[rule]()
    plan = MergePlan(N, groups=((3, 6),), dropped=(1,), sublayers=(Sublayer(0, "attention"), Sublayer(7, "mlp")),
                     rule=rule)  # fmt: skip
    short = apply_plan(dense, plan, merge)
    merged = merge.merge(dense.layout, list(dense.layers[3:6]))
    slots = [Slot(0, without=frozenset({"attention"})), Slot(2), Slot(3 + merged.host, merged.weights), Slot(6),
             Slot(7, without=frozenset({"mlp"}))]  # fmt: skip
    close(by_parts(dense, ids, slots), logits(short.model, ids))


@every_family
def test_a_scale_multiplies_what_a_layer_adds(family, ids):
    from slm_exp.merging.sharing import scaled_outputs

    handle = loud(family)
    runner = BlockRunner(handle, ids, fuse=False)
    if handle.layout.family not in ("gpt_neox", "cohere"):  # side by side: both add to the layer's input
        slots = [frozenset({"mlp"}), frozenset({"attention"})]
    else:
        slots = [frozenset()]
    h = runner.embed()
    weights = scaled_outputs(handle.layout, handle.layers[2], {}, 0.5)
    for without in slots:
        whole, half = (runner.block(Slot(2, w, without=without), h) - h for w in ({}, weights))
        assert whole.abs().max() > 1e-2
        close(half, whole / 2)


@every_family
def test_a_refit_takes_away_what_a_projection_can(family, ids):
    """Ridge regression of each output projection finds a change that was made to it: at once, or, where a norm stands
    behind it, in a few steps and the gain's at once."""
    handle = loud(family)
    layout = handle.layout
    long = torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(1))
    runner = BlockRunner(handle, long, fuse=False)
    h = runner.embed()
    layer, held_N = handle.layers[1], held_out(len(long))
    kind = "mlp" if layout.fitted["mlp"] else "attention"
    (module,) = layout.fitted[kind]
    without = frozenset({"attention"} if kind == "mlp" else {"mlp"})
    dense = runner.block(Slot(1, without=without), h)
    norm = layout.norm_behind(module)
    bends = [(module, 4 if norm else 1, 0.1 if norm else 1e-2), *([(norm, 1, 1e-2)] if norm else [])]
    for bent_module, steps, limit in bends:
        weight = layer.get_parameter(f"{bent_module}.weight")
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * weight.std()
        weights = {f"{bent_module}.weight": weight + 0.3 * noise}
        off = (runner.block(Slot(1, weights, without=without), h) - dense).norm()
        for _ in range(steps):
            fit, held = moments(runner, Slot(1, weights, without=without), bent_module, h, dense, held_N)
            step = ridge_step(fit, held, [1e-9])
            assert step is not None
            weights |= changed(layout, layer, bent_module, weights, step[0])
        again = runner.block(Slot(1, weights, without=without), h)
        assert (again - dense).norm() < limit * off


@every_family
def test_a_refit_leaves_removed_what_was_removed(family, tokens, tmp_path):
    from slm_exp.recovery.base import RecoveryTask
    from slm_exp.recovery.reconstruct import Reconstruct

    dense = loud(family)
    np.save(tmp_path / "fit.npy", np.random.default_rng(1).integers(0, 256, (10, 32)))
    fit = str(tmp_path / "fit.npy")
    plan = MergePlan(N, sublayers=(Sublayer(2, "attention"), Sublayer(5, "mlp")))
    for recovery in (Reconstruct(path=fit), Reconstruct(path=fit, attention=False)):
        task = RecoveryTask(apply_plan(dense, plan), dense, plan, tokens, tmp_path)
        found = recovery.recover(task).tensors
        assert found
        gone = tuple(f"{dense.layout.layer_list}.{i}.{module}." for i, kind in ((2, "attention"), (5, "mlp"))
                     for module in dense.layout.outputs[kind])
        assert not [name for name in found if name.startswith(gone)]
    scored = new_task(dense, tokens, similarity="token_cosine", after="reconstruct", fit_path=fit)
    for kind in ("attention", "mlp"):
        slot = Slot(2, without=frozenset({kind}), refit=(2, 3))
        found = Refits(scored).weights(slot, {})
        assert not [name for name in found if name.startswith(tuple(f"{m}." for m in dense.layout.outputs[kind]))]


@every_family
def test_losses_and_gradients_are_those_of_the_models_own_logits(family, ids):
    handle = loud(family)
    model = handle.model.requires_grad_(True)
    out = model(ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    name = next(iter(handle.layout.projections))
    wanted = {i: layer.get_parameter(f"{name}.weight").grad.clone() for i, layer in enumerate(handle.layers)}
    model.zero_grad()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    ours = next_token_loss(model, batch)
    ours.backward()
    close(ours.detach(), loss.detach(), 1e-5)
    for i, layer in enumerate(handle.layers):
        close(layer.get_parameter(f"{name}.weight").grad, wanted[i], 1e-4)
    model.zero_grad()
    model.requires_grad_(False)
    runner = BlockRunner(handle, ids, fuse=False)
    states = [runner.embed()]
    for i in range(N):
        states.append(runner.block(Slot(i), states[-1]))
    for i, found in layer_gradients(runner, states):
        close(found[f"{name}.weight"][1], wanted[i], 1e-4)


@every_family
def test_lora_trains_the_layouts_projections(family, ids, tmp_path):
    from types import SimpleNamespace

    from slm_exp.recovery.lora import Lora

    handle = loud(family)
    task = SimpleNamespace(handle=handle, plan=MergePlan(N, sublayers=(Sublayer(0, "attention"),)), folder=tmp_path)
    lora = Lora(dropout=0.0)
    peft = lora.student(task).eval()
    adapted = {name for name, module in peft.get_base_model().named_modules() if hasattr(module, "lora_A")}
    wanted = {f"{handle.layout.layer_list}.{i}.{p}" for i in range(N) for p in handle.layout.projections}
    assert adapted == wanted - {f"{handle.layout.layer_list}.0.{handle.layout.o}"}
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    merged = lora.result(task, peft)
    about = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] is None
    plain = shared_copy(handle.model, merged)
    after = logits(peft, ids)
    assert (after - logits(handle.model, ids)).abs().max() > 1e-3
    close(logits(plain, ids), after, 1e-4)


@pytest.mark.parametrize("family", [name for name, layout in FAMILIES.items() if layout.experts])
def test_lora_reaches_routed_experts_where_asked(family, ids, tmp_path):
    from types import SimpleNamespace

    from slm_exp.recovery.lora import Lora

    handle = loud(family)
    removed = Sublayer(1, "mlp")
    task = SimpleNamespace(handle=handle, plan=MergePlan(N, sublayers=(removed,)), folder=tmp_path)
    with pytest.raises(ConfigError, match=r"recovery.dropout = 0.1; expected 0 with recovery.experts=true"):
        Lora(dropout=0.1, experts=True)
    lora = Lora(dropout=0.0, experts=True)
    peft = lora.student(task).eval()
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    merged = lora.result(task, peft)
    experts = {name for name in merged if ".experts." in name}
    assert experts == {f"{handle.layout.layer_list}.{i}.mlp.experts.{part}" for i in range(N) if i != 1
                       for part in ("gate_up_proj", "down_proj")}  # fmt: skip
    after = logits(peft, ids)
    others = {name: t for name, t in merged.items() if name not in experts}
    assert (after - logits(shared_copy(handle.model, others), ids)).abs().max() > 1e-3
    close(logits(shared_copy(handle.model, merged), ids), after, 1e-4)


def test_a_family_without_experts_refuses_to_adapt_them():
    from slm_exp.recovery.lora import Lora

    with pytest.raises(ConfigError, match=r"recovery.experts = True; expected false: llama has no routed experts"):
        Lora(dropout=0.0, experts=True).check_data(loud("llama"))


@every_family
def test_width_is_pruned_or_refused_with_the_reason(family, tokens, ids):
    from slm_exp.merging.width import apply_width
    from slm_exp.methods.slm import SLM
    from slm_exp.width.base import WidthTask
    from slm_exp.width.magnitude import Magnitude

    handle = loud(family)
    pruner = Magnitude(ratio=0.4)
    if handle.layout.no_width:
        with pytest.raises(ConfigError, match=rf"width = magnitude: {family} layers are not narrowed: .+"):
            pruner.check_model(handle, SLM())
        return
    pruner.check_model(handle, SLM())
    slots = MergePlan(N).slots
    narrow = apply_width(handle, pruner.decide(WidthTask(handle, tokens, slots, 0.4, n_dense=N)))
    assert narrow.n_params < handle.n_params
    narrow.layout.check(narrow.model)
    again = AutoModelForCausalLM.from_config(copy.deepcopy(narrow.config), dtype=torch.float32).eval()
    again.load_state_dict(narrow.model.state_dict())
    close(logits(narrow.model, ids), logits(again, ids))
    if not handle.layout.layerwise:
        with pytest.raises(ConfigError, match=r"width.uniform = False; expected true with layers of"):
            Magnitude(ratio=0.4, uniform=False).check_model(handle, SLM())


@every_family
@pytest.mark.parametrize("tied", [True, False])
def test_a_shorter_model_saves_and_reloads_as_itself(family, tied, ids, tmp_path):
    rule = RULES["top_layer"]()
    dense = loud(family, tie_word_embeddings=tied)
    short = apply_plan(dense, MergePlan(N, groups=((3, 6),), dropped=(1,), rule="top_layer"), rule)
    short.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    wanted = logits(short.model, ids)
    close(logits(again, ids), wanted, 1e-6)
    assert layout_for(again.config) is dense.layout
    numbers = {m.layer_idx for layer in dense.layout.layers(again) for m in layer.modules() if hasattr(m, "layer_idx")}
    ours = {m.layer_idx for layer in short.layers for m in layer.modules() if hasattr(m, "layer_idx")}
    assert ours == numbers
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    kept, saved = short.model.config.to_dict(), again.config.to_dict()
    assert {k for k in kept if saved.get(k) != kept[k]} <= {"_name_or_path"}
    for name in dense.layout.per_layer_config:
        values = getattr(dense.config, name, None)
        if values is not None:
            assert getattr(again.config, name) == [values[i] for i in (0, 2, 5, 6, 7)], name
    assert short.n_params == again.num_parameters()
    cache, steps = None, []
    with torch.no_grad():
        for part in ids.split([20, 1, 1, 10], 1):
            out = again(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    close(torch.cat(steps, 1), wanted, 1e-4)
    texts = [again.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), do_sample=False, max_new_tokens=6,
                            use_cache=cached, pad_token_id=0) for cached in (True, False)]  # fmt: skip
    assert torch.equal(*texts)


@every_family
def test_tokens_shared_by_rows_are_seen_as_if_each_row_had_read_them(family, ids):
    """Two rows of unlike length after one beginning, then one more token of each from the cache."""
    own = own_fields(family)
    whole = {"use_sliding_window": False, "layer_types": ["full_attention"] * N} if "layer_types" in own else {
        "sliding_window": None}  # fmt: skip
    model = loud(family, **{k: v for k, v in whole.items() if k in own}).model
    assert takes_shared(model) == (family != "stablelm")  # transformers cannot give it another attention
    if not takes_shared(model):
        return
    first, row, other = ids[0, :12].tolist(), ids[1, :7].tolist(), ids[2, :4].tolist()
    shared, cache = Shared.reading(model, torch.tensor([first])), growing()
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    at = (mask.cumsum(-1) - 1).clamp(min=0) + len(first)
    with torch.no_grad(), shared.before_all(model):
        for tokens, mask_, positions in (
            (torch.tensor([row[:6], [0] * 3 + other[:3]]), mask[:, :-1], at[:, :-1]),
            (torch.tensor([row[6:], other[3:]]), mask, at[:, -1:]),
        ):
            got = model(tokens, attention_mask=mask_, position_ids=positions, past_key_values=cache,
                        use_cache=True).logits  # fmt: skip
    for i, tail in enumerate((row, other)):
        close(got[i, -1], logits(model, torch.tensor([first + tail]))[0, -1], 1e-4)
