"""Each score against a few lines of plain arithmetic."""

from __future__ import annotations

import pytest
import torch

from slm_exp.core.cost import Tokens
from slm_exp.core.registry import available
from slm_exp.core.types import MergePlan
from slm_exp.engine.runner import BlockRunner
from slm_exp.models.layouts import FAMILIES
from slm_exp.models.sizes import SMOLLM2, sizes_of
from slm_exp.width.base import WidthTask
from slm_exp.width.inputs import EPSILON, InputStats, layer_importance
from slm_exp.width.pruner import PROJECTIONS

HEADS, KV, PER = 4, 2, 8


@pytest.fixture
def small(make_tiny):
    return make_tiny(layers=2)


@pytest.fixture
def found(small, tokens):
    def go(name, **fields):
        task = WidthTask(small, tokens, MergePlan(2).slots, 0.2, 3, n_dense=2)
        return available("width")[name](**fields).scores(task, lambda i, s: None).layers

    return go


def weights(handle, i):
    """The seven matrices of a layer by their last name, float64."""
    return {n.split(".")[-2][0 if "self" in n else slice(None)]: p.double() for n, p in
            handle.layers[i].named_parameters() if "proj" in n}  # fmt: skip


def by_unit(line_sums, n):
    return line_sums.view(n, -1).sum(1)


def inputs_of(handle, tokens, name):
    """[N, T, C] float64 entering a projection of every layer, by plain hooks on a plain forward pass."""
    seen = []
    hooks = [layer.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0].double()))
             for layer in handle.layers]  # fmt: skip
    with torch.no_grad():
        handle.model(torch.as_tensor(tokens.tokens_NT).long())
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("norm", [1, 2])
def test_magnitude(found, small, norm):
    for i, scores in enumerate(found("magnitude", norm=norm)):
        w = {k: v.abs() ** norm for k, v in weights(small, i).items()}
        torch.testing.assert_close(scores.query_H, by_unit(w["q"].sum(1) + w["o"].sum(0), HEADS))
        torch.testing.assert_close(scores.kv_K, by_unit(w["k"].sum(1) + w["v"].sum(1), KV))
        torch.testing.assert_close(
            scores.channel_F, w["gate_proj"].sum(1) + w["up_proj"].sum(1) + w["down_proj"].sum(0)
        )
        group = scores.query_H[:2].sum() + scores.kv_K[0]
        assert scores.group_K()[0] == pytest.approx(float(group)), "query heads 0 and 1 belong to key-value head 0"


@pytest.mark.parametrize("taylor", ["param_first", "param_second", "param_mix", "vectorize"])
def test_taylor(found, small, tokens, taylor):
    got = found("llm_pruner", taylor=taylor)
    model, ids = small.model, torch.as_tensor(tokens.tokens_NT).long()
    model.requires_grad_(True)
    each = []
    for row in ids:  # the library's own loss and backward
        model.zero_grad()
        model(row[None], labels=row[None]).loss.backward()
        each.append({n: p.grad.clone() for n, p in model.named_parameters()})
    model.zero_grad()
    model.requires_grad_(False)
    for i, scores in enumerate(got):
        s = {}
        for name, p in small.layers[i].named_parameters():
            grads = torch.stack([g[f"model.layers.{i}.{name}"] for g in each])
            w, g, h = p.double(), grads.mean(0).double(), grads.square().mean(0).double()
            s[name.split(".")[-2]] = {
                "param_first": (w * g).abs(), "param_second": w**2 * h,
                "param_mix": (w * g - 0.5 * w**2 * h).abs(), "vectorize": w * g,
            }[taylor]  # fmt: skip

        def lines(name, dim, s=s):
            sums = s[name].sum(dim)
            return sums.abs() if taylor == "vectorize" else sums  # signs count within a line, there only

        close = {"rtol": 2e-3, "atol": 1e-9}
        query = by_unit(lines("q_proj", 1) + lines("o_proj", 0), HEADS)
        torch.testing.assert_close(scores.query_H, query, **close)
        torch.testing.assert_close(scores.kv_K, by_unit(lines("k_proj", 1) + lines("v_proj", 1), KV), **close)
        channel = lines("gate_proj", 1) + lines("up_proj", 1) + lines("down_proj", 0)
        torch.testing.assert_close(scores.channel_F, channel, **close)


def test_flap(found, small, tokens):
    scores = found("flap")
    for name, pick in (("self_attn.o_proj", "query_H"), ("mlp.down_proj", "channel_F")):
        for i, x in enumerate(inputs_of(small, tokens, name)):
            x = x.flatten(0, 1)
            w = small.layers[i].get_submodule(name).weight.double()
            raw = ((x - x.mean(0)) ** 2).mean(0) * (w**2).sum(0)
            if pick == "query_H":
                raw = raw**2
            z = (raw - raw.mean()) / raw.std(correction=0)
            torch.testing.assert_close(getattr(scores[i], pick), z.view(HEADS, -1).mean(1) if pick == "query_H" else z,
                                       rtol=1e-4, atol=1e-5)  # fmt: skip


def test_wanda_without_what_lies_below_being_pruned(found, small, tokens):
    scores = found("wanda_sp", sequential=False)
    for name, pick in (("self_attn.o_proj", "query_H"), ("mlp.down_proj", "channel_F")):
        for i, x in enumerate(inputs_of(small, tokens, name)):
            raw = small.layers[i].get_submodule(name).weight.double().abs().mean(0) * x.flatten(0, 1).norm(dim=0)
            torch.testing.assert_close(getattr(scores[i], pick), by_unit(raw, HEADS) if pick == "query_H" else raw,
                                       rtol=1e-5, atol=1e-6)  # fmt: skip


def test_wanda_sees_the_pruned_layers_below(small, tokens):
    """Its second layer's scores are those of a model whose first layer lost its units already."""
    from slm_exp.merging.width import apply_width

    cfg = available("width")["wanda_sp"](uniform=False, ratios=[0.5, 0])
    task = WidthTask(small, tokens, MergePlan(2).slots, 0.25, n_dense=2)
    narrow = apply_width(small, cfg.decide(task))
    one_pass = available("width")["wanda_sp"](sequential=False)
    expected = one_pass.scores(WidthTask(narrow, tokens, MergePlan(2).slots, 0.25, n_dense=2), lambda i, s: None)
    shapes = cfg.plan_sizes(small, task.slots, 2, 0.25)
    from slm_exp.merging.sizes import select

    got = cfg.scores(task, lambda i, s: select(s, shapes[i])).layers[1]
    dense = cfg.scores(task, lambda i, s: None).layers[1]
    x = inputs_of(narrow, tokens, "mlp.down_proj")[1]
    raw = small.layers[1].mlp.down_proj.weight.double().abs().mean(0) * x.flatten(0, 1).norm(dim=0)
    torch.testing.assert_close(got.channel_F, raw, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(dense.channel_F, raw, rtol=1e-3)
    assert len(expected.layers) == 2


def test_minitron(found, small, tokens):
    scores = found("minitron")
    for name, pick in (("self_attn.o_proj", "query_H"), ("mlp.down_proj", "channel_F")):
        for i, x in enumerate(inputs_of(small, tokens, name)):
            channel = x.abs().mean(1).square().sum(0)
            expected = by_unit(channel, HEADS).sqrt() if pick == "query_H" else channel.sqrt()
            torch.testing.assert_close(getattr(scores[i], pick), expected, rtol=1e-5, atol=1e-6)


def test_random_is_another_one_for_another_seed(small, tokens):
    def draw(seed):
        task = WidthTask(small, tokens, MergePlan(2).slots, 0.2, seed, n_dense=2)
        return available("width")["random"]().scores(task, lambda i, s: None).layers[0].channel_F

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_ecoflap_importance_is_the_difference_of_two_losses(small, tokens):
    """One matrix checked by hand; the layer sums over its seven."""
    got = layer_importance(small, tokens, [0, 1], 2, seed=5)
    assert len(got) == 2
    assert min(got) > 0
    assert layer_importance(small, tokens, [0, 1], 2, seed=5) == got
    total, ids = 0.0, torch.as_tensor(tokens.tokens_NT[:2]).long()
    layer = small.layers[1]
    for m, name in enumerate(f"{p}.weight" for p in small.layout.projections):
        p = layer.get_parameter(name)
        own = p.clone()
        z = torch.randn(p.shape, generator=torch.Generator().manual_seed(5 * 1_000_003 + 101 + m))
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                p.copy_(own + sign * EPSILON * z)
                losses.append([float(small.model(row[None], labels=row[None]).loss) for row in ids])
                p.copy_(own)
        total += sum(abs(a - b) for a, b in zip(*losses, strict=True)) / (2 * EPSILON)
    assert got[1] == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("layers", [None, [2, 4]])
def test_ecoflap_looks_at_the_chosen_layers_alone_and_its_cost_is_known(layers, make_tiny, tokens, monkeypatch):
    """Block forwards over the calibration set, as counted and as `slm plan` expects them."""
    handle, chosen, done = make_tiny(layers=5), list(range(*(layers or (0, 5)))), []
    block = BlockRunner.block

    def counted(self, slot, h_NTD):
        done.append(len(h_NTD) / len(tokens.tokens_NT))
        return block(self, slot, h_NTD)

    monkeypatch.setattr(BlockRunner, "block", counted)
    every = layer_importance(handle, tokens, range(5), 2, seed=3)
    assert layer_importance(handle, tokens, chosen, 2, seed=3) == [every[i] for i in chosen]
    cfg = available("width")["flap"](uniform=False, allocation="ecoflap", layers=layers)
    done.clear()
    cfg.decide(WidthTask(handle, tokens, MergePlan(5).slots, 0.2, 3, n_dense=5))
    assert sum(done) == (14 * sum(5 - i for i in chosen) + max(chosen)) / 2 + 5, "2 of 4 samples, then the scores"
    sizes, shape = sizes_of(SMOLLM2).with_layers(5), Tokens(*tokens.tokens_NT.shape)
    work, narrowed = cfg.cost(sizes, 5, shape), 2 * 5 + 5
    assert work.blocks / sizes.block_flops(shape.total, shape.t) - narrowed == pytest.approx(sum(done))
    assert work.head == pytest.approx(len(chosen) * 14 * sizes.head_flops(shape.total) / 2)
    assert {len(layout.projections) for layout in FAMILIES.values() if layout.layerwise} == {PROJECTIONS}


def test_moments_add_up_over_batches():
    x = torch.randn(5, 7, 3)
    whole, parts = InputStats.of(x), InputStats.of(x[:2])
    parts.add(InputStats.of(x[2:]))
    flat = x.double().flatten(0, 1)
    torch.testing.assert_close(parts.variance_C, flat.var(0, correction=0))
    torch.testing.assert_close(parts.mean_C, flat.mean(0))
    torch.testing.assert_close(parts.norm_C, whole.norm_C)
    torch.testing.assert_close(parts.mean_abs_square_C, whole.mean_abs_square_C)


def test_ecoflap_ratios_keep_what_matters():
    from slm_exp.width.pruner import ecoflap_ratios

    ratios = ecoflap_ratios([1.0, 3.0, 0.0, 100.0], 0.2)
    assert sum(ratios) == pytest.approx(0.8)
    assert max(ratios) <= 0.3 + 1e-9
    assert min(ratios) >= -1e-9
    assert ratios[3] < ratios[1] < ratios[0] < ratios[2]
    assert ecoflap_ratios([0.0, 0.0], 0.2) == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize(("importance", "ratio", "ratios"), [
    ([1, 1, 2, 0], 0.2, [0.2, 0.2, 0.1, 0.3]),  # every layer keeps .7, and .4 is shared in proportion
    ([0, 0, 0, 1], 0.2, [0.8 / 3] * 3 + [0.0]),  # one is whole with .3; what it cannot take goes to the others
    ([3, 1], 0.95, [0.925, 0.975]),  # the floor is zero: more than everything cannot go
])  # fmt: skip
def test_ecoflap_by_hand(importance, ratio, ratios):
    from slm_exp.width.pruner import ecoflap_ratios

    assert ecoflap_ratios(importance, ratio) == pytest.approx(ratios)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_minitron_ranks_the_streams_channels_by_what_the_layers_norms_give(family, make_tiny, tokens):
    handle = make_tiny(family, layers=2)
    task = WidthTask(handle, tokens, MergePlan(2).slots, 0.3, n_dense=2)
    got = available("width")["minitron"](hidden_size=24).scores(task, lambda i, s: None).hidden_D
    expected = torch.zeros(32, dtype=torch.float64)
    for norm in ("self_attn.q_proj", "mlp.gate_proj"):  # each takes in what its norm gives
        for x in inputs_of(handle, tokens, norm):
            expected += x.abs().mean(1).square().sum(0).sqrt()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
