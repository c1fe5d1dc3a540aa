"""sleb, shortened_ppl, llm_drop, blockpruner and finercut against plain references; sublayer sizes and refusals."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.models import new_task

from slm_exp.core.errors import ConfigError, PlanError
from slm_exp.core.registry import available
from slm_exp.core.types import MergePlan, Sublayer
from slm_exp.engine.runner import BlockRunner
from slm_exp.merging.surgery import apply_plan

METHODS = available("method")
KINDS = ("attention", "mlp")


def plan_of(handle: Any, tokens: Any, name: str, folder: Path | None = None, **fields: Any) -> MergePlan:
    method: Any = METHODS[name](**fields)
    method.check_model(handle)
    return method.plan(new_task(handle, tokens, cache=folder))


def reduced(units: list[Any]) -> MergePlan:
    """A model of 8 layers without some layers (numbers) or sublayers ((number, kind))."""
    halves = tuple(Sublayer(*u) for u in units if isinstance(u, tuple))
    return MergePlan(8, dropped=tuple(u for u in units if isinstance(u, int)), sublayers=halves)


def logits(handle: Any, tokens: Any, units: list[Any]) -> torch.Tensor:
    with torch.inference_mode():
        model = apply_plan(handle, reduced(units)).model
        return model(torch.as_tensor(tokens.tokens_NT).long(), use_cache=False).logits.double()


def loss(handle: Any, tokens: Any, units: list[Any]) -> float:
    targets = torch.as_tensor(tokens.tokens_NT).long()[:, 1:].flatten()
    found = logits(handle, tokens, units)[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(found, targets))


def brute_force(cost: Any, units: list[Any], n: int) -> tuple[list[Any], list[float]]:
    """The greedy order with every candidate built as a model of its own, and all costs in the order of scoring."""
    removed: list[Any] = []
    seen: list[float] = []
    for _ in range(n):
        costs = {u: cost([*removed, u]) for u in units if u not in removed}
        seen += costs.values()
        removed.append(min(costs, key=lambda u: costs[u]))
    return removed, seen


def effect(plan: MergePlan) -> tuple[Any, Any]:
    return plan.dropped, plan.sublayers


def halves(layers: range) -> list[tuple[int, str]]:
    return [(i, kind) for i in layers for kind in KINDS]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_sleb_is_brute_force_between_the_ends(family: str, make_tiny: Any, tokens: Any) -> None:
    handle = make_tiny(family, seed=2)
    order, costs = brute_force(lambda units: loss(handle, tokens, units), list(range(1, 7)), 3)
    plan = plan_of(handle, tokens, "sleb", target_layers=5)
    assert effect(plan) == effect(reduced(order))
    assert [-t.score for t in plan.trace] == pytest.approx(costs, abs=1e-5)
    assert [t.accepted for t in plan.trace].count(True) == 3
    taken = [t.low for t in plan.trace if t.accepted]
    left = list(range(8))
    assert [left.pop(p) for p in taken] == order  # positions in the model at that moment


def test_sleb_tries_its_ends_where_asked(tiny_handle: Any, tokens: Any) -> None:
    tried = [t.low for t in plan_of(tiny_handle, tokens, "sleb", target_layers=7).trace]
    free = plan_of(tiny_handle, tokens, "sleb", target_layers=7, protect_first=0, protect_last=0)
    assert tried == list(range(1, 7))
    assert [t.low for t in free.trace] == list(range(8))
    assert -free.trace[7].score == pytest.approx(loss(tiny_handle, tokens, [7]), abs=1e-5)


def test_sleb_scores_a_layer_once_per_state_and_counts_what_it_ran(
    tiny_handle: Any, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    block = BlockRunner.block
    monkeypatch.setattr(BlockRunner, "block", lambda self, slot, h: ran.append(slot) or block(self, slot, h))
    plan = plan_of(tiny_handle, tokens, "sleb", target_layers=6)
    assert plan.evaluations == len(plan.trace) == 6 + 5  # the last one taken is the final model
    assert plan.block_forwards == len(ran)
    assert plan.block_forwards < 8 + 6 * 7 + 5 * 6


def test_progress_is_shown_where_there_is_no_terminal(
    tiny_handle: Any, tokens: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("slm_exp.engine.progress.LOG_EVERY_S", -1)
    with caplog.at_level(logging.INFO, "slm_exp"):
        plan = plan_of(tiny_handle, tokens, "sleb", target_layers=6)
    lines = [record.message for record in caplog.records if record.message.startswith("sleb")]
    assert len(lines) == 6 + 5
    assert lines[0].startswith("sleb, part 1: 1 of 6 models, about ")
    assert lines[0].endswith(f" left; {-plan.trace[0].score:.4f} without layer 1")


@pytest.mark.parametrize("plus", [True, False])
def test_shortened_ppl_ranks_each_layer_alone(plus: bool, make_tiny: Any, tokens: Any) -> None:
    handle = make_tiny(layers=8, seed=4)
    fields = {} if plus else {"protect_first": 0, "protect_last": 0}
    n, layers = (1, range(4, 6)) if plus else (3, range(8))
    costs = {i: loss(handle, tokens, [i]) for i in layers}
    plan = plan_of(handle, tokens, "shortened_ppl", target_layers=8 - n, **fields)
    assert plan.dropped == tuple(sorted(sorted(costs, key=lambda i: costs[i])[:n]))
    assert [-t.score for t in plan.trace] == pytest.approx(list(costs.values()), abs=1e-5)


def in_and_out(handle: Any, tokens: Any) -> dict[Any, float]:
    """Mean cosine of the states entering and leaving every layer and sublayer of the dense model."""
    states: dict[str, Any] = {}
    hooks = []
    for i, layer in enumerate(handle.layers):
        hooks += [
            layer.register_forward_pre_hook(lambda m, args, i=i: states.update({f"{i}": args[0]})),
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda m, args, i=i: states.update({f"{i} between": args[0]})),
        ]
    hooks.append(handle.model.model.norm.register_forward_pre_hook(lambda m, args: states.update({"8": args[0]})))
    with torch.inference_mode():
        handle.model(torch.as_tensor(tokens.tokens_NT).long(), use_cache=False)
    for hook in hooks:
        hook.remove()

    def cos(a: str, b: str) -> float:
        return float(torch.nn.functional.cosine_similarity(states[a], states[b], dim=-1).mean())

    out: dict[Any, float] = {i: cos(f"{i}", f"{i + 1}") for i in range(8)}
    out |= {(i, "attention"): cos(f"{i}", f"{i} between") for i in range(8)}
    return out | {(i, "mlp"): cos(f"{i} between", f"{i + 1}") for i in range(8)}


@pytest.mark.parametrize("unit", ["layer", "attention", "mlp", "joint"])
def test_llm_drop_takes_the_highest_cosines(unit: str, make_tiny: Any, tokens: Any) -> None:
    handle = make_tiny("qwen2", seed=1)
    cosines = in_and_out(handle, tokens)
    parts = {"layer": list(range(8)), "joint": halves(range(8))}.get(unit) or [(i, unit) for i in range(8)]
    expected = sorted(parts, key=lambda u: -cosines[u])[:4]
    asked = {"target_layers": 4} if unit == "layer" else {"target_sublayers": 4}
    plan = plan_of(handle, tokens, "llm_drop", unit=unit, **asked)
    assert effect(plan) == effect(reduced(expected))
    assert [t.score for t in plan.trace] == pytest.approx([cosines[u] for u in parts], abs=1e-5)
    assert plan.target is not None
    assert plan.target.layers == plan.n_layers_out


def test_llm_drop_reads_its_unit_off_the_target() -> None:
    assert METHODS["llm_drop"](target_layers=4).identity()["unit"] == "layer"  # type: ignore[call-arg]
    assert METHODS["llm_drop"](target_sublayers=4).identity()["unit"] == "attention"  # type: ignore[call-arg]


def test_blockpruner_is_brute_force_over_all_sublayers(make_tiny: Any, tokens: Any) -> None:
    handle = make_tiny(layers=8, seed=5)
    order, costs = brute_force(lambda units: loss(handle, tokens, units), halves(range(8)), 3)
    plan = plan_of(handle, tokens, "blockpruner", target_sublayers=3)
    assert effect(plan) == effect(reduced(order))
    assert [-t.score for t in plan.trace] == pytest.approx(costs, abs=1e-5)
    assert plan.evaluations == 16 + 15 + 14


def js(a: torch.Tensor, b: torch.Tensor) -> float:
    p, q = a.softmax(-1), b.softmax(-1)
    m = (p + q) / 2
    return float(((p * (p / m).log() + q * (q / m).log()).sum(-1) / 2).mean())


def test_finercut_is_brute_force_above_the_first_two_fifths(make_tiny: Any, tokens: Any) -> None:
    handle = make_tiny(layers=8, seed=6)
    dense = logits(handle, tokens, [])
    order, costs = brute_force(lambda units: js(dense, logits(handle, tokens, units)), halves(range(3, 8)), 3)
    plan = plan_of(handle, tokens, "finercut", target_sublayers=3)
    assert effect(plan) == effect(reduced(order))  # 6 of 16 sublayers are 37.5 %, the seventh would be 43.75 %
    assert [-t.score for t in plan.trace] == pytest.approx(costs, rel=1e-3, abs=1e-5)


def test_finercut_goes_below_once_nothing_is_left_above(tiny_handle: Any, tokens: Any) -> None:
    plan = plan_of(tiny_handle, tokens, "finercut", target_sublayers=11)
    assert plan.dropped[-5:] == (3, 4, 5, 6, 7)
    assert plan.sublayers[0].layer < 3


def test_finercut_by_perplexity_with_nothing_excluded_is_blockpruner(tiny_handle: Any, tokens: Any) -> None:
    cut = plan_of(tiny_handle, tokens, "finercut", target_sublayers=3, metric="perplexity", exclude_first=0)
    assert effect(cut) == effect(plan_of(tiny_handle, tokens, "blockpruner", target_sublayers=3))


@pytest.mark.parametrize("name", ["llm_drop", "blockpruner", "finercut"])
def test_everything_but_one_sublayer_can_go(name: str, make_tiny: Any, tokens: Any) -> None:
    handle = make_tiny(layers=3)
    fields = {"unit": "joint"} if name == "llm_drop" else {}
    plan = plan_of(handle, tokens, name, target_sublayers=5, **fields)
    assert len(plan.dropped) == 2
    assert len(plan.sublayers) == 1
    with pytest.raises(ConfigError, match=r"method\.target_sublayers = 6; expected 1 to 5 for tiny-llama"):
        plan_of(handle, tokens, name, target_sublayers=6, **fields)


@pytest.mark.parametrize("name", ["llm_drop", "blockpruner", "finercut"])
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.28])
def test_a_ratio_is_met_to_half_a_sublayer(name: str, ratio: float, make_tiny: Any, tokens: Any) -> None:
    handle = make_tiny()
    layer = handle.layers[0]
    sizes = {kind: sum(p.numel() for p in part.parameters()) / handle.n_params
             for kind, part in (("attention", layer.self_attn), ("mlp", layer.mlp))}
    plan = plan_of(handle, tokens, name, target_ratio=ratio)
    gone = sum(sizes[half.kind] for half in plan.sublayers) + len(plan.dropped) * sum(sizes.values())
    assert abs(gone - ratio) <= max(sizes.values()) / 2
    assert plan.target is not None
    assert plan.target.asked == ratio


def test_a_killed_search_goes_on_where_it_was(
    make_tiny: Any, tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plan_of(make_tiny(), tokens, "sleb", target_layers=5)
    left = 60
    block = BlockRunner.block

    def killed(self: Any, slot: Any, h: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return block(self, slot, h)

    with monkeypatch.context() as patch:
        patch.setattr(BlockRunner, "block", killed)
        with pytest.raises(KeyboardInterrupt):
            plan_of(make_tiny(), tokens, "sleb", tmp_path, target_layers=5)
    ran = []
    monkeypatch.setattr(BlockRunner, "block", lambda self, slot, h: ran.append(slot) or block(self, slot, h))
    assert plan_of(make_tiny(), tokens, "sleb", tmp_path, target_layers=5) == whole
    assert 8 < len(ran) < whole.block_forwards - 30


@pytest.mark.parametrize("name", ["sleb", "shortened_ppl", "llm_drop", "blockpruner", "finercut"])
def test_weights_are_whole_after_an_exception(
    name: str, tiny_handle: Any, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {key: p.clone() for key, p in tiny_handle.model.state_dict().items()}
    calls = 0
    block = BlockRunner.block

    def failing(self: Any, slot: Any, h: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 11:
            raise MemoryError
        return block(self, slot, h)

    monkeypatch.setattr(BlockRunner, "block", failing)
    asked = {"target_sublayers": 3} if hasattr(METHODS[name], "target_sublayers") else {"target_layers": 6}
    with pytest.raises(MemoryError):
        plan_of(tiny_handle, tokens, name, **asked)
    assert all(torch.equal(before[key], p) for key, p in tiny_handle.model.state_dict().items())
    assert all("forward" not in m.__dict__ for m in tiny_handle.model.modules())


def test_a_model_that_only_overflows_is_refused(tiny_handle: Any, tokens: Any) -> None:
    tiny_handle.layers[0].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(PlanError, match="not a finite number"):
        plan_of(tiny_handle, tokens, "sleb", target_layers=7)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("sleb", {"threshold": 0.9}, r"method\.threshold = 0\.9; expected null: method=sleb takes a size"),
        ("sleb", {}, r"exactly one of method\.target_layers or method\.target_ratio"),
        ("blockpruner", {"target_layers": 5}, r"method\.target_layers = 5; expected null.*removes sublayers"),
        ("blockpruner", {"target_sublayers": 0}, r"method\.target_sublayers = 0; expected null or a whole number >= 1"),
        ("blockpruner", {"target_sublayers": 2, "target_ratio": 0.1}, r"exactly one of method\.target_sublayers or"),
        ("blockpruner", {"target_sublayers": 2, "merge": True}, r"method\.merge = True; expected false"),
        ("finercut", {"target_sublayers": 2, "metric": "l1"}, r"method\.metric = .?l1"),
        ("finercut", {"target_sublayers": 2, "exclude_first": 2}, r"method\.exclude_first = 2; expected a share"),
        ("llm_drop", {"target_sublayers": 2, "unit": "head"}, r"method\.unit = .?head"),
        ("llm_drop", {"target_sublayers": 2, "unit": "layer"}, r"method\.target_sublayers = 2.*method\.unit=layer"),
        ("llm_drop", {"target_layers": 2, "unit": "mlp"}, r"method\.target_layers = 2.*method\.unit=mlp"),
        ("llm_drop", {"target_sublayers": 2, "merge": True}, r"method\.merge = True; expected false"),
    ],
)
def test_settings_that_are_refused_at_once(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        METHODS[name](**fields)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("sleb", {"target_layers": 1}, r"method\.target_layers = 1; expected 2 to 8"),
        ("shortened_ppl", {"target_layers": 5}, r"method\.target_layers = 5; expected 6 to 8"),
        ("blockpruner", {"target_sublayers": 16}, r"method\.target_sublayers = 16; expected 1 to 15"),
        ("blockpruner", {"target_ratio": 0.99}, r"method\.target_ratio = 0\.99; .*all 16 that may go are 0\."),
        ("blockpruner", {"target_ratio": 0.001}, r"method\.target_ratio = 0\.001; the smallest sublayer is"),
        ("llm_drop", {"target_sublayers": 9}, r"method\.target_sublayers = 9; expected 1 to 8"),
        ("llm_drop", {"target_ratio": 0.5, "unit": "attention"}, r"method\.target_ratio = 0\.5; .*all 8 that may go"),
    ],
)
def test_sizes_out_of_reach_are_refused_before_weights_load(
    name: str, fields: dict[str, Any], message: str, make_tiny: Any
) -> None:
    handle = make_tiny()
    method: Any = METHODS[name](**fields)
    with pytest.raises(ConfigError, match=message):
        method.check_model(handle)
    assert not handle.loaded


def test_what_is_zeroed_is_told(make_tiny: Any, tokens: Any) -> None:
    handle = make_tiny()
    plan = plan_of(handle, tokens, "llm_drop", target_sublayers=3)
    size = 3 * sum(p.numel() for p in handle.layers[0].self_attn.parameters())
    assert plan.notes[-1].startswith(f"3 attention sublayers are zeroed: {size / 1e6:.3g} M parameters "
                                     f"({size / handle.n_params:.1%}) could be left out")
    assert apply_plan(handle, plan).n_params == handle.n_params


def test_a_run_states_what_is_removed_and_what_is_only_zeroed(run: Any, tmp_path: Path) -> None:
    record = run("method=llm_drop", "method.target_sublayers=3")
    plan, params = record["plan"], record["params"]
    assert [half["kind"] for half in plan["sublayers"]] == ["attention"] * 3
    assert record["layers"] == {"before": 8, "after": 8}
    assert params["before"] == params["after"]
    assert 0 < params["zeroed"] < params["before"]
    dense, small = record["costs"]["dense"], record["costs"]["compressed"]
    assert small["bytes"] == dense["bytes"] == 4 * params["before"]  # the file keeps the zeros, which take no operation
    assert dense["flops_per_token"] - small["flops_per_token"] >= 2 * params["zeroed"]
    assert any("3 attention sublayers are zeroed" in warning for warning in record["warnings"])
    assert not any("removes nothing" in warning for warning in record["warnings"])
    page = (tmp_path / "run" / "report.html").read_text()
    layers = ", ".join(str(half["layer"]) for half in plan["sublayers"])
    assert f"Attention of layers {layers} removed." in page
    assert f"layer {plan['sublayers'][0]['layer']} kept without its attention" in page
