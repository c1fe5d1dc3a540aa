"""Values of trial models: right, computed once, resumed, and counted."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.models import new_task

from slm_exp.core.registry import available
from slm_exp.core.types import Group, MergePlan, Sublayer
from slm_exp.engine.runner import BlockRunner, Slot
from slm_exp.engine.vocabulary import prediction_distance
from slm_exp.merging.surgery import apply_plan
from slm_exp.search.scoring import ScoringEngine, entry_key, slots_of
from slm_exp.search.state import Candidate
from slm_exp.search.task import PlanTask

ATTENTION, MLP = frozenset({"attention"}), frozenset({"mlp"})


def make_task(handle: Any, tokens: Any, folder: Path | None = None, rule: str = "mean") -> PlanTask:
    return new_task(handle, tokens, rule, cache=folder)


@pytest.fixture
def models(tiny_handle: Any, tokens: Any) -> ScoringEngine:
    return ScoringEngine(make_task(tiny_handle, tokens))


PLANS = [
    MergePlan(8),
    MergePlan(8, dropped=(0, 7)),
    MergePlan(8, dropped=(3,), sublayers=(
        Sublayer(2, "mlp"), Sublayer(4, "attention"), Sublayer(4, "mlp"), Sublayer(6, "attention"))),
    MergePlan(8, groups=((2, 5),), dropped=(6,), sublayers=(Sublayer(0, "attention"),), rule="mean"),
]


@pytest.mark.parametrize("rule", sorted(available("merge_rule")))
def test_a_candidate_is_called_in_the_journal_as_its_model_is(rule: str) -> None:
    """So that scores can be looked up without an engine, see `SearchState.replay`."""
    candidate = Candidate(2, 3, (Group(5, 7),))
    slots = slots_of(MergePlan(8, ((2, 4), (5, 7))), available("merge_rule")[rule]())  # type: ignore[arg-type]
    assert entry_key(slots) == candidate.key(8)
    others = [slots_of(plan, available("merge_rule")[rule]()) for plan in PLANS]  # type: ignore[arg-type]
    assert len({entry_key(model) for model in (slots, *others)}) == 5


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_values_are_those_of_the_model_built(family: str, plan: MergePlan, make_tiny: Any, tokens: Any) -> None:
    task = make_task(make_tiny(family, tied=family != "llama"), tokens)
    models, model = ScoringEngine(task), apply_plan(task.handle, plan, task.rule).model
    ids = torch.as_tensor(tokens.tokens_NT).long()
    with torch.inference_mode():
        last = model.model(ids, use_cache=False).last_hidden_state
        dense = task.handle.model.model(ids, use_cache=False).last_hidden_state
        loss = float(model(ids, labels=ids).loss)
    score = task.similarity.against(dense, task.kernel)(last)
    slots = slots_of(plan, task.rule)
    models.commit((*models.dense[:2], *models.dense[5:]))
    for base in (models.dense, slots, (*models.dense[:6], models.dense[7])):
        fresh = ScoringEngine(task)
        fresh.commit(base)
        for these in (models, fresh):
            assert these.score(slots) == pytest.approx(score, abs=1e-5)
            assert these.loss(slots) == pytest.approx(loss, abs=1e-5)


def test_dense_states_enter_each_layer(tiny_handle: Any, tokens: Any, models: ScoringEngine) -> None:
    ids = torch.as_tensor(tokens.tokens_NT).long()
    with torch.inference_mode():
        expected = tiny_handle.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert len(models.dense_states) == 9
    for ours, theirs in zip(models.dense_states[:8], expected[:8], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    last = models.runner.finish(models.dense_states[8])  # the library's last entry is after the final norm
    torch.testing.assert_close(last, expected[8], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_slot_without_a_half_is_the_layer_whose_half_adds_nothing(
    family: str, fuse: bool, make_tiny: Any, tokens: Any
) -> None:
    handle = make_tiny(family)
    runner = BlockRunner(handle, tokens.tokens_NT, fuse=fuse)
    h, layer = runner.embed(), handle.layers[3]
    mid = runner.block(Slot(3, without=MLP), h)
    torch.testing.assert_close(runner.block(Slot(3), h) - mid, layer.mlp(layer.post_attention_layernorm(mid)),
                               atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(runner.block(Slot(3, without=ATTENTION), h),
                               h + layer.mlp(layer.post_attention_layernorm(h)), atol=1e-5, rtol=1e-4)


def test_a_half_left_out_is_not_computed(tiny_handle: Any, tokens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = BlockRunner(tiny_handle, tokens.tokens_NT)
    h = runner.embed()
    runner.block(Slot(3), h)
    if not runner.fused[3]:
        pytest.skip("no fused block on this CPU")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    runner.block(Slot(3, without=ATTENTION), h)


@pytest.mark.parametrize("without", [{"attention", "mlp"}, {"norm"}])
def test_a_slot_keeps_a_half_at_least(without: set[str]) -> None:
    with pytest.raises(ValueError, match="a slot may be without one of attention, mlp"):
        Slot(3, without=frozenset(without))


def test_only_what_differs_from_the_base_runs(models: ScoringEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Slot] = []
    block = BlockRunner.block
    monkeypatch.setattr(BlockRunner, "block", lambda self, slot, h: ran.append(slot) or block(self, slot, h))
    without = {j: (*models.dense[:j], *models.dense[j + 1 :]) for j in range(8)}

    def run(value: Any, slots: Any) -> list[int]:
        ran.clear()
        value(slots)
        return [slot.host for slot in ran]

    assert run(models.loss, models.dense) == list(range(8))  # the dense pass
    assert run(models.loss, without[5]) == [6, 7]
    assert run(models.loss, without[5]) == []  # known
    assert run(models.score, without[5]) == [6, 7]
    assert run(models.loss, without[7]) == []  # the states entering layer 7 are all it takes
    models.commit(without[5])
    assert run(models.loss, tuple(s for s in without[5] if s.host != 6)) == [7]  # states entering 6 are still known
    assert run(models.loss, tuple(s for s in without[5] if s.host != 7)) == [6]  # 6 of the new base runs once
    assert run(models.score, tuple(s for s in without[5] if s.host != 7)) == []
    assert run(models.loss, tuple(s for s in without[5] if s.host != 2)) == [3, 4, 6, 7]
    assert models.block_forwards == 8 + 2 + 2 + 0 + 1 + 1 + 0 + 4
    assert models.evaluations == 6
    models.loss((*models.dense[:7], Slot(7, without=MLP)))
    assert models.block_forwards == 18 + math.ceil(2 + 0.5)  # from the states entering 5: layers 5, 6, half of 7


def test_what_is_in_the_store_is_not_computed_and_counts_all_the_same(
    make_tiny: Any, tokens: Any, tmp_path: Path
) -> None:
    def values(handle: Any) -> tuple[Any, ...]:
        models = ScoringEngine(make_task(handle, tokens, tmp_path))
        out = [models.loss(slots_of(plan, models.task.rule)) for plan in PLANS]
        models.commit(slots_of(PLANS[1], models.task.rule))
        out += [models.score(slots_of(plan, models.task.rule)) for plan in PLANS]
        return out, models.block_forwards, models.evaluations

    first, again = values(make_tiny()), make_tiny()
    assert values(again) == first
    assert not again.loaded


def test_models_that_differ_never_share_a_value(tiny_handle: Any, tokens: Any, tmp_path: Path) -> None:
    group = slots_of(PLANS[3], available("merge_rule")["mean"]())
    seen = set()
    for rule in ("mean", "keep_low"):
        models = ScoringEngine(make_task(tiny_handle, tokens, tmp_path, rule))
        seen.add(models.loss(group))
    scaled = tuple(replace(slot, scale=0.5) for slot in group)
    other = tuple(replace(slot, without=MLP) if slot.without else slot for slot in group)
    seen |= {models.loss(scaled), models.loss(other), models.score(group)}
    weights = {"mlp.down_proj.weight": torch.zeros(32, 64)}
    halved = (*models.dense[:4], Slot(4, weights), *models.dense[5:])
    assert halved == models.dense  # weights are not compared ...
    assert models.loss(halved) != models.loss(models.dense)  # ... and still told apart
    seen |= {models.loss(halved), models.loss(models.dense)}
    assert len(seen) == 7


def test_a_model_that_predicts_no_numbers_costs_infinity(tiny_handle: Any, tokens: Any, tmp_path: Path) -> None:
    tiny_handle.layers[6].mlp.down_proj.weight.data[0, 0] = float("nan")
    for _ in range(2):  # computed, and from the store
        models = ScoringEngine(make_task(tiny_handle, tokens, tmp_path))
        assert models.loss(models.dense) == math.inf
        assert math.isfinite(models.loss((*models.dense[:6], models.dense[7])))


def test_the_loss_is_a_mean_over_the_whole_vocabulary_in_any_pieces(
    models: ScoringEngine, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slm_exp.engine import vocabulary

    ids = torch.as_tensor(tokens.tokens_NT).long()
    with torch.inference_mode():
        logits = models.task.handle.model(ids, use_cache=False).logits.double()
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    last = models.runner.finish(models.dense_states[-1])
    assert vocabulary.mean_loss(models.runner, last) == pytest.approx(float(plain), abs=1e-6)
    monkeypatch.setattr(vocabulary, "WORDS", 100)
    monkeypatch.setattr(vocabulary, "PIECE", 700)
    assert vocabulary.mean_loss(models.runner, last) == pytest.approx(float(plain), abs=1e-6)


def test_distances_of_predictions_by_their_definitions(models: ScoringEngine, tokens: Any) -> None:
    slots = (*models.dense[:4], *models.dense[5:])
    ids = torch.as_tensor(tokens.tokens_NT).long()
    reduced = apply_plan(models.task.handle, MergePlan(8, dropped=(4,))).model
    with torch.inference_mode():
        a, b = (m(ids, use_cache=False).logits.double().flatten(0, 1) for m in (models.task.handle.model, reduced))
    p, q = a.softmax(-1), b.softmax(-1)

    def kl(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x * (x.log() - y.log())).sum(-1)

    m = (p + q) / 2
    angle = torch.nn.functional.cosine_similarity(a, b).arccos() / math.pi
    plain = {"js": (kl(p, m) + kl(q, m)) / 2, "kl": kl(p, q), "angular": angle, "norm": (a - b).norm(dim=-1)}
    dense = models.runner.finish(models.dense_states[-1])
    for kind, expected in plain.items():
        distance = partial(prediction_distance, models.runner, dense, kind=kind)
        assert models.measure(slots, kind, distance) == pytest.approx(float(expected.mean()), rel=1e-4), kind
        assert distance(dense) == pytest.approx(0, abs=1e-3), kind


def test_js_of_predictions_that_share_no_word_is_log_2(models: ScoringEngine) -> None:
    from slm_exp.engine.vocabulary import DISTANCES

    p = torch.full((1, 300), -1e4)
    q = p.clone()
    p[0, 3] = q[0, 7] = 1e4
    assert float(DISTANCES["js"](p, q)) == pytest.approx(math.log(2), abs=1e-6)
