"""Magnitude compensation: the factor, the function it leaves, and plans that carry it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders.models import new_task

from slm_exp.core import registry
from slm_exp.core.types import Compensation, Cut, MergePlan
from slm_exp.merging.surgery import apply_plan
from slm_exp.methods.base import Selection
from slm_exp.search.compensation import ratio
from slm_exp.search.task import PlanTask
from slm_exp.similarity.layers import layer_similarity

METHODS = registry.available("method")


def states_of(model: Any, tokens: Any) -> list[torch.Tensor]:
    """Entering every layer, then the last layer's output, by hooks."""
    seen: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs.get("hidden_states", *args)),
                                             with_kwargs=True) for layer in model.model.layers]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    logits(model, tokens)
    for hook in hooks:
        hook.remove()
    return seen


def logits(model: Any, tokens: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.as_tensor(tokens.tokens_NT).long(), use_cache=False).logits


def published_alpha(high: torch.Tensor, low: torch.Tensor) -> float:
    """Mean over samples and channels of the ratio of mean absolute values over tokens."""
    alphas = [(high[n].abs().mean(0) / low[n].abs().mean(0)).mean() for n in range(len(high))]
    return float(torch.stack(alphas).mean())


def cut(model: Any, start: int, stop: int, alpha: float) -> None:
    """The published way, in place: everything below the cut times alpha, embeddings too (the head must not be tied)."""
    for layer in model.model.layers[:start]:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            for p in module.parameters():
                p.data *= alpha
    model.model.embed_tokens.weight.data *= alpha
    del model.model.layers[start:stop]
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = len(model.model.layers)


def test_one_cut_is_the_published_function(make_tiny: Any, tokens: Any) -> None:
    """Scaling everything below by alpha and everything above by 1 / alpha give the same logits (untied head)."""
    handle = make_tiny(tied=False)
    states = states_of(handle.model, tokens)
    alpha = published_alpha(states[6], states[3])
    model = copy.deepcopy(handle.model)
    cut(model, 3, 6, alpha)
    plan = METHODS["angular"](target_layers=5, compensate="magnitude", protect_first=3, protect_last=2).plan(
        new_task(handle, tokens))
    assert plan.dropped == (3, 4, 5)
    assert plan.compensation is not None
    assert plan.compensation.cuts == (Cut(3, 6, pytest.approx(alpha, rel=1e-5)),)  # type: ignore[arg-type]
    ours = logits(apply_plan(handle, plan).model, tokens)
    torch.testing.assert_close(ours, logits(model, tokens), atol=2e-4, rtol=1e-3)
    plain = logits(apply_plan(handle, MergePlan(8, dropped=plan.dropped)).model, tokens)
    assert not torch.allclose(ours, plain, atol=1e-2)


def test_tied_embeddings_and_biases_come_out_the_same(make_tiny: Any, tokens: Any) -> None:
    """The reference unties the head first: the published scaling of tied embeddings would scale the logits too."""
    handle = make_tiny("llama", tied=True)
    for layer in handle.layers:  # a bias in each output projection, as Llama's attention_bias and mlp_bias give
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.bias = torch.nn.Parameter(torch.randn(32, generator=torch.Generator().manual_seed(1)) / 5, False)
    plan = METHODS["last"](target_layers=6, protect_last=2, compensate="magnitude").plan(new_task(handle, tokens))
    assert plan.dropped == (4, 5)
    reference = copy.deepcopy(handle.model)
    reference.lm_head.weight = torch.nn.Parameter(reference.lm_head.weight.detach().clone(), False)
    cut(reference, 4, 6, plan.compensation.cuts[0].alpha)  # type: ignore[union-attr]
    built = apply_plan(handle, plan).model
    torch.testing.assert_close(logits(built, tokens), logits(reference, tokens), atol=2e-4, rtol=1e-3)
    assert built.lm_head.weight.data_ptr() == built.model.embed_tokens.weight.data_ptr()
    assert torch.equal(built.model.embed_tokens.weight, handle.model.model.embed_tokens.weight)


def test_every_cut_is_measured_on_the_model_compensated_below_it(task: PlanTask, tokens: Any) -> None:
    """Cut by cut on real models, bottom to top, each alpha from the model as it then is."""
    made = METHODS["random"](target_layers=4, compensate="magnitude").finished(task, Selection((1, 4, 5, 7)))
    model = copy.deepcopy(task.handle.model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), False)
    alphas, gone = [], 0
    for start, stop in ((1, 2), (4, 6)):
        start, stop = start - gone, stop - gone
        states = states_of(model, tokens)
        alphas.append(published_alpha(states[stop], states[start]))
        cut(model, start, stop, alphas[-1])
        gone += stop - start
    cut(model, 4, 5, 1.0)  # nothing is above the last layer: the final norm undoes any factor
    assert made.compensation is not None
    found = [(c.start, c.stop, c.alpha) for c in made.compensation.cuts]
    assert found == [(1, 2, pytest.approx(alphas[0], rel=1e-4)), (4, 6, pytest.approx(alphas[1], rel=1e-4))]
    built = apply_plan(task.handle, made).model
    torch.testing.assert_close(logits(built, tokens), logits(model, tokens), atol=5e-4, rtol=2e-3)


@pytest.mark.parametrize("name", ["slm", "shortgpt", "laco", "cka_patch", "last"])
def test_any_method_compensates_and_its_score_is_of_the_model_it_builds(name: str, task: PlanTask, tokens: Any) -> None:
    task = replace(task, layer_similarity=layer_similarity(task.handle, tokens, task.kernel, task.similarity))
    size = {"threshold": 0.8} if name == "slm" else {"target_layers": 5}
    plain = METHODS[name](**size).plan(task)
    plan = METHODS[name](**size, compensate="magnitude").plan(task)
    assert (plan.groups, plan.dropped) == (plain.groups, plain.dropped)
    assert plan.compensation is not None
    assert plain.compensation is None
    assert plan.effect() != plain.effect() or not plan.compensation.cuts
    assert MergePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    with torch.no_grad():
        ids = torch.as_tensor(tokens.tokens_NT).long()
        dense, short = (h.model.model(ids, use_cache=False).last_hidden_state
                        for h in (task.handle, apply_plan(task.handle, plan, task.rule)))
    assert plan.final_score == pytest.approx(task.similarity.against(dense, task.kernel)(short), abs=1e-5)
    if name == "last":
        assert plan.compensation.cuts == ()


def test_a_merged_group_is_brought_to_the_size_its_layers_gave(task: PlanTask, tokens: Any) -> None:
    method = METHODS["shortgpt"](target_layers=7, protect_first=3, protect_last=3, merge=True, compensate="magnitude")
    plan = method.plan(task)
    assert plan.groups == ((3, 5),)
    assert plan.compensation is not None
    merged = apply_plan(task.handle, MergePlan(8, plan.groups, rule="top_layer"), task.rule)
    alpha = published_alpha(states_of(task.handle.model, tokens)[5], states_of(merged.model, tokens)[4])
    assert plan.compensation.cuts == (Cut(3, 5, pytest.approx(alpha, rel=1e-4)),)  # type: ignore[arg-type]


def test_half_precision_weights_are_scaled_in_float32_and_keep_their_dtype(make_tiny: Any, tokens: Any) -> None:
    handle = make_tiny(dtype="bfloat16")
    plan = MergePlan(8, dropped=(2,), compensation=Compensation("magnitude", (Cut(2, 3, 3.0),)))
    built = apply_plan(handle, plan)
    for at, layer in enumerate(built.layers):
        own = handle.layers[at if at < 2 else at + 1]
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            want = own.get_parameter(name)
            want = want if at < 2 else (want.float() / 3).bfloat16()
            assert torch.equal(layer.get_parameter(name), want)
        assert layer.self_attn.q_proj.weight is own.self_attn.q_proj.weight


def test_a_channel_without_signal_says_nothing() -> None:
    full, short = torch.full((1, 4, 3), 6.0), torch.full((1, 4, 3), 2.0)
    short[..., 1] = 0
    full[..., 2] = 0
    assert ratio(full, short) == 3
    assert ratio(full, torch.zeros_like(short)) == 1


def test_the_digest_tells_compensated_models_apart(tiny_handle: Any) -> None:
    def digest(alpha: float | None) -> str:
        cuts = None if alpha is None else Compensation("magnitude", (Cut(2, 3, alpha),))
        return apply_plan(tiny_handle, MergePlan(8, dropped=(2,), compensation=cuts)).digest

    assert len({digest(None), digest(1.5), digest(1.6)}) == 3
