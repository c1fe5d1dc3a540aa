"""Surgery: what a plan says, nothing else, and the dense model stays as it is."""

from __future__ import annotations

import pytest
import torch

from slm_exp.core.errors import PlanError
from slm_exp.core.registry import available
from slm_exp.core.types import MergePlan
from slm_exp.merging.surgery import apply_plan
from slm_exp.models.layouts import FAMILIES

RULES = {name: rule for name, rule in available("merge_rule").items() if not rule.fits}  # weights alone
GROUPS = ((1, 3), (4, 7))  # slots: 0, 1..2, 3, 4..6, 7


def plan(rule: str = "", **fields) -> MergePlan:
    return MergePlan(8, **{"groups": GROUPS, "rule": rule, **fields})


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.fixture
def ids(tokens):
    return torch.as_tensor(tokens.tokens_NT).long()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_that_changes_nothing_gives_the_same_model(make_tiny, family, ids):
    dense = make_tiny(family)
    same = apply_plan(dense, MergePlan(8))
    assert same.digest == dense.digest
    assert torch.equal(logits(same.model, ids), logits(dense.model, ids))
    assert same.model is not dense.model
    for name, tensor in same.model.state_dict().items():
        assert tensor.data_ptr() == dense.model.state_dict()[name].data_ptr(), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", RULES)
def test_projections_are_combined_and_the_rest_is_the_lowest_layers(make_tiny, family, name):
    dense, rule = make_tiny(family), RULES[name]()
    merged = apply_plan(dense, plan(name), rule).layers[3]  # of 4, 5, 6
    sources = dense.layers[4:7]
    matrices = set(dense.layout.matrices)
    vectors = sources[2] if rule.whole_layer else sources[0]
    for at, tensor in merged.named_parameters():
        wanted = rule.combine([s.get_parameter(at) for s in sources]) if at in matrices else vectors.get_parameter(at)
        assert torch.equal(tensor, wanted), at


@pytest.mark.parametrize("name", RULES)
def test_the_dense_model_stays_as_it_is_and_only_combined_tensors_are_new(make_tiny, name, ids):
    dense = make_tiny("qwen2", sliding_window=8)
    before = {k: v.clone() for k, v in dense.model.state_dict().items()}
    config = dense.model.config.to_json_string()
    short = apply_plan(dense, plan(name, dropped=(0,)), RULES[name]())
    _ = short.model
    assert dense.model.config.to_json_string() == config
    assert [layer.self_attn.layer_idx for layer in dense.layers] == list(range(8))
    assert all(torch.equal(before[k], v) for k, v in dense.model.state_dict().items())
    owned = {v.data_ptr() for v in dense.model.state_dict().values()}
    new = {k for k, v in short.model.state_dict().items() if v.data_ptr() not in owned}
    combined = {f"model.layers.{i}.{p}.weight" for i in (0, 2) for p in dense.layout.projections}
    assert new == (combined if name in ("mean", "sum_of_deltas") else set())


@pytest.mark.parametrize("name", RULES)
def test_everything_that_counts_layers_is_renumbered(make_tiny, name):
    """Layers 0..3 of 8 attend fully, 4..7 locally; the group 2..5 takes the kind of the layer that gives q and k."""
    dense, rule = make_tiny("qwen3", sliding_window=8), RULES[name]()
    dense.config.mlp_layer_types = ["dense"] * 8
    dense.model.config.mlp_layer_types = ["dense"] * 8
    short = apply_plan(dense, MergePlan(8, groups=((2, 6),), dropped=(0,), rule=name), rule)
    kinds = ["full_attention", "sliding_attention" if rule.attention_from == "top" else "full_attention",
             "sliding_attention", "sliding_attention"]  # fmt: skip
    for config in (short.config, short.model.config):
        assert config.num_hidden_layers == 4
        assert config.layer_types == kinds
        assert config.max_window_layers == kinds.count("full_attention")
        assert config.mlp_layer_types == ["dense"] * 4
    attention = [layer.self_attn for layer in short.layers]
    assert [a.layer_idx for a in attention] == [0, 1, 2, 3]
    assert [a.layer_type for a in attention] == kinds
    assert [a.sliding_window for a in attention] == [8 if k == "sliding_attention" else None for k in kinds]
    configs = {id(m.config) for m in short.model.modules() if hasattr(m, "config")}
    assert configs == {id(short.model.config)}


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_without_weights_are_right(make_tiny, family):
    dense = make_tiny(family)
    short = apply_plan(dense, plan("mean"), RULES["mean"]())
    n = short.n_params
    assert not short.loaded
    assert not dense.loaded
    assert short.n_layers == 5
    layer = sum(p.numel() for p in dense.layers[0].parameters())
    assert n == dense.n_params - 3 * layer == sum(p.numel() for p in short.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_with_the_cache_as_without(make_tiny, family, ids):
    window = 8 if FAMILIES[family].window else None
    short = apply_plan(make_tiny(family, sliding_window=window), plan("mean", dropped=(3,)), RULES["mean"]())
    with_cache, without = (
        short.model.generate(
            ids[:2], attention_mask=torch.ones_like(ids[:2]), do_sample=False, max_new_tokens=10, use_cache=cached
        )
        for cached in (True, False)
    )
    assert torch.equal(with_cache, without)
    assert with_cache.shape == (2, 42)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", RULES)
def test_the_search_saw_this_model(make_tiny, family, name, tokens):
    """The states the search scores a plan by, from overridden weights, are those of the model surgery makes."""
    from slm_exp.engine.runner import BlockRunner, Slot

    dense, rule = make_tiny(family, sliding_window=8 if FAMILIES[family].window else None), RULES[name]()
    short = apply_plan(dense, plan(name, dropped=(7,)), rule)
    runner = BlockRunner(dense, tokens.tokens_NT)
    h = runner.embed()
    for start, stop in plan(name, dropped=(7,)).slots:
        if stop - start == 1:
            slot = Slot(start)
        else:
            merged = rule.merge(dense.layout, list(dense.layers[start:stop]))
            slot = Slot(start + merged.host, merged.weights)
        h = runner.block(slot, h)
    with torch.no_grad():
        ours = short.model.get_decoder()(torch.as_tensor(tokens.tokens_NT).long(), use_cache=False).last_hidden_state
    torch.testing.assert_close(runner.finish(h), ours, rtol=0, atol=2e-5)


def test_a_replayed_plan_gives_the_same_model(make_tiny):
    asked = plan("sum_of_deltas", dropped=(3,), threshold=0.9, final_score=0.95, notes=("found somehow",))
    rule = RULES["sum_of_deltas"]()
    one = apply_plan(make_tiny(), asked, rule)
    two = apply_plan(make_tiny(), MergePlan.from_json({"n_layers": 8, "groups": [[1, 3], [4, 7]], "dropped": [3],
                                                       "rule": "sum_of_deltas"}), rule)  # fmt: skip
    assert one.digest == two.digest
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, two.model.state_dict()[name]), name


def test_digest_follows_the_effect(make_tiny):
    dense = make_tiny()
    digests = {
        apply_plan(base, p, RULES[p.rule]() if p.rule else None).digest
        for base, p in (
            (dense, plan("mean")),
            (dense, plan("top_layer")),
            (dense, plan("mean", dropped=(0,))),
            (dense, MergePlan(8, dropped=(0,))),
            (make_tiny(seed=1), plan("mean")),
            (dense, MergePlan(8)),
        )
    }
    assert len(digests) == 6


def test_what_it_is_made_of_goes_with_it(make_tiny):
    dense = make_tiny()
    short = apply_plan(dense, plan("mean"), RULES["mean"]())
    assert (short.name, short.note, short.random) == (dense.name, dense.note, True)
    assert short.lineage["base_digest"] == dense.digest
    assert short.lineage["plan"]["groups"] == [[1, 3], [4, 7]]
    assert short.tokenizer is dense.tokenizer
    twice = apply_plan(short, MergePlan(5, dropped=(0,)))
    assert twice.n_layers == len(twice.layers) == 4


@pytest.mark.parametrize(
    ("bad", "rule", "message"),
    [
        (MergePlan(9, dropped=(0,)), None, r"the plan is for a model of 9 layers; tiny-llama has 8"),
        (plan("mean"), None, r"the plan merges 2 groups, which takes a merge rule"),
        (plan("mean"), "top_layer", r"made with merge_rule=mean, not top_layer"),
    ],
)
def test_plans_that_cannot_be_carried_out(make_tiny, bad, rule, message):
    with pytest.raises(PlanError, match=message):
        apply_plan(make_tiny(), bad, RULES[rule]() if rule else None)


def test_a_device_map_is_renumbered(make_tiny):
    dense = make_tiny()
    dense.model.hf_device_map = {"model.embed_tokens": 0, "lm_head": 0, "model.norm": 1,
                                 **{f"model.layers.{i}": i // 4 for i in range(8)}}  # fmt: skip
    short = apply_plan(dense, plan("top_layer"), RULES["top_layer"]())
    placed = short.model.hf_device_map
    assert [placed[f"model.layers.{i}"] for i in range(5)] == [0, 0, 0, 1, 1]
    assert "model.layers.5" not in placed
    assert placed["model.norm"] == 1
    assert dense.model.hf_device_map["model.layers.7"] == 1
