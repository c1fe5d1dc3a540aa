"""Settings of width pruning: what is refused, how a target is shared, and whole runs."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from builders.runs import QUICK, tiny_run

from slm_exp.core.errors import ConfigError, StageError
from slm_exp.core.registry import available
from slm_exp.core.types import CalibrationTokens
from slm_exp.core.widths import WidthDecision
from slm_exp.launch.compose import compose_run
from slm_exp.merging.sizes import Costs, Shape, allocate_by_score, attention_shapes, costs_of, fit, full_shape, legal
from slm_exp.merging.width import apply_width
from slm_exp.methods.cka_patch import segments
from slm_exp.methods.slm import SLM
from slm_exp.similarity.layers import layer_similarity

SMALL = ("calibration.n_samples=2", "method.threshold=0.5")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["width=flap", "width.ratio=1.5"], "width.ratio = 1.5; expected null or a share"),
        (["width=flap", "width.order=between"], "width.order = between; expected one of after, before"),
        (["width=flap", "width.layers=[2,5]"], "width.layers = .2, 5.; expected null with width.uniform=true"),
        (["width=flap", "width.uniform=false", "width.layers=[5,2]"], "two layer numbers"),
        (["width=flap", "width.counts=merged"], "width.counts = merged; expected dense with width.uniform=true"),
        (["width=flap", "width.uniform=false", "width.counts=mergd"], "width.counts = mergd.*Did you mean merged"),
        (["width=flap", "width.uniform=false", "width.order=before"], "Merging needs layers of one shape"),
        (["width=flap", "width.ratio=0.2", "width.share=0.5"], "set at most one of width.ratio, width.share"),
        (["width=flap", "width.share=0.5"], "a part of method.target_ratio, which is not set"),
        (["width=magnitude", "width.norm=3"], "width.norm = 3; expected 1 or 2"),
        (["width=llm_pruner", "width.taylor=param_frist"], "Did you mean param_first"),
        (["width=none", "width.order=before"], "width.order = before; expected after with width=none"),
        (["width=wanda"], "width = wanda; expected one of .*wanda_sp"),
        (["width=minitron", "width.uniform=false", "width.hidden_size=64"], "width.hidden_size = 64"),
    ],
)
def test_bad_settings_are_refused_while_composing(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose_run([*QUICK, *SMALL, *overrides])


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_biases_that_no_config_carries_are_refused_by_name(family, make_tiny):
    handle = make_tiny(family)
    wanted = "mlp_bias .* mlp.down_proj" if family == "qwen3" else "attention_bias .* self_attn.o_proj"
    with pytest.raises(ConfigError, match=f"{family} has no {wanted}.* width.compensate=false"):
        available("width")["flap"]().check_model(handle, SLM())
    available("width")["flap"](compensate=False).check_model(handle, SLM())
    assert not handle.loaded


def test_gradients_of_quantised_weights_are_refused(make_tiny):
    handle = make_tiny()
    handle.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ConfigError, match=r"width=llm_pruner needs gradients, and tiny-llama is quantised.*magnitude"):
        available("width")["llm_pruner"]().check_model(handle, SLM())
    assert not handle.loaded


def test_too_large_ratios_are_refused_by_layer(make_tiny):
    ratios = [0.0, 0.0, 0.97, 0.1]
    with pytest.raises(ConfigError, match=r"width\.ratios\[2\] = 0\.97: expected at most 0\.\d+ .* no attention head"):
        available("width")["random"](uniform=False, ratios=ratios).check_model(make_tiny(layers=4), SLM())


def test_sizes_of_smollm2():
    """9 heads in 3 groups of head_dim 64, hidden 576, 1536 channels: what ratio 0.2 snaps to, by hand."""
    full = Shape(9, 3, 1536)
    costs = Costs(query=2 * 64 * 576, kv=2 * 64 * 576, channel=3 * 576, fixed=2 * 576)
    whole = costs.size(full)
    assert whole == 3_540_096
    groups = attention_shapes(full, "kv_groups")
    assert groups == [(3, 1), (6, 2), (9, 3)]
    assert attention_shapes(full, "within_groups") == [(3, 3), (6, 3), (9, 3)]
    shape = fit(full, costs, 0.8 * costs.attention(9, 3), 0.8 * whole, groups)
    assert shape == Shape(6, 2, 1296)
    assert 1 - costs.size(shape) / whole == pytest.approx(0.20045, abs=1e-5)


def test_llama_wants_heads_that_divide_its_hidden_size():
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=8, intermediate_size=64)
    full = full_shape(config)
    assert [h for h, k in attention_shapes(full, "kv_groups") if legal(config, Shape(h, k, 64))] == [1, 2, 4, 8]


def test_score_allocation_takes_the_lowest_wherever_they_are():
    import torch

    from slm_exp.merging.sizes import LayerScores

    def layer(level):
        return LayerScores(torch.full((4,), 10.0 * level), torch.zeros(2), torch.arange(64.0) + 100 * level)

    full, costs = Shape(4, 2, 64), Costs(query=100, kv=100, channel=10, fixed=0)
    got = allocate_by_score({0: layer(1.0), 1: layer(5.0)}, full, costs, "kv_groups", 320, "per_parameter")
    assert got == {0: Shape(2, 1, 64), 1: Shape(4, 2, 64)}, "a group of layer 0 scores .067 a parameter"
    as_given = allocate_by_score({0: layer(1.0), 1: layer(50.0)}, full, costs, "kv_groups", 460, "as_given")
    assert as_given[1] == full
    assert as_given[0] == Shape(2, 1, 48)
    least = allocate_by_score({0: layer(1.0), 1: layer(5.0)}, full, costs, "kv_groups", 10**6, "standardised")
    assert set(least.values()) == {Shape(2, 1, 8)}, "one group and one block stay"


@pytest.fixture
def run(tmp_path):
    return lambda *overrides, folder="run": tiny_run(tmp_path / folder, *SMALL, *overrides)


def test_layers_can_be_counted_in_the_merged_model(run, make_tiny):
    """8 layers, 6 left: [2, 26) of the merged model are positions 2 to 4, whatever they stand for."""
    depth = ("method.threshold=null", "method.target_layers=6", "width=llm_pruner", "width.uniform=false",
             "width.ratio=0.2", "width.layers=[2,26]")  # fmt: skip
    merged = run(*depth, "width.counts=merged")
    channels = merged["plan"]["width"]["sizes"]["channels"]
    assert [c < max(channels) for c in channels] == [False, False, True, True, True, False]
    with pytest.raises(ConfigError, match=r"width.layers = .2, 26.; expected a range within the model's 8 layers"):
        available("width")["llm_pruner"](uniform=False, layers=[2, 26]).check_model(make_tiny(layers=8), SLM())
    dense = compose_run([*QUICK, *depth[2:5], "method.threshold=1.0"])
    assert "counts" not in dense.width.identity()  # run_ids of before the setting stay
    assert compose_run([*QUICK, *depth, "width.counts=merged"]).width.identity()["counts"] == "merged"


@pytest.mark.parametrize("order", ["after", "before"])
def test_width_and_depth_in_one_run(run, order, tmp_path):
    overrides = ("method.threshold=0.9", "width=wanda_sp", "width.ratio=0.3", f"width.order={order}")
    record = run(*overrides)
    plan = record["plan"]
    assert plan["width"]["order"] == order
    assert plan["width"]["method"] == "wanda_sp"
    n_layers = 8 if order == "before" else record["layers"]["after"]
    assert len(plan["width"]["sizes"]["channels"]) == n_layers
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == plan
    names = [s["name"] for s in record["stages"]]
    assert (names.index("width") < names.index("plan")) == (order == "before")
    assert any("of the decoder layers' parameters removed, 0.3000 requested" in w for w in record["warnings"])
    again = run(*overrides, folder="again")
    assert {s["name"] for s in again["stages"] if s["cached"]} >= {"width", "plan", "evaluate"}
    assert again["plan"] == plan
    replayed = run("method=from_plan", "method.threshold=null", f"method.path={tmp_path / 'run'}", folder="replay")
    assert replayed["params"]["after"] == record["params"]["after"]
    assert replayed["plan"]["final_score"] == pytest.approx(plan["final_score"], abs=1e-6)
    assert plan["final_score"] < 0.999


def test_two_widths_are_refused(run, tmp_path):
    run("width=random")
    with pytest.raises(ConfigError, match="has width pruning already"):
        run("width=random", "method=from_plan", "method.threshold=null", f"method.path={tmp_path / 'run'}", folder="no")


@pytest.mark.parametrize("method", ["blockpruner", "llm_drop"])
def test_a_share_with_sublayers_at_zero_is_refused(method):
    asked = [*QUICK, "method.threshold=null", "method.target_ratio=0.2", "width=magnitude", "width.share=0.5"]
    with pytest.raises(ConfigError, match=rf"width.share = 0.5 with method={method}: method.target_ratio counts"):
        compose_run([*asked, f"method={method}"])
    compose_run([*asked, "method=llm_drop", "method.unit=layer"])


SHARED = ("method.threshold=null", "method.target_ratio=0.4", "width=magnitude", "width.share=0.5",
          "model.hidden=64", "model.heads=8", "model.kv_heads=4")  # fmt: skip


@pytest.mark.parametrize("order", ["after", "before"])
def test_a_target_is_shared_out(run, order, make_tiny):
    """Whoever comes second meets the rest: width in steps of 8 channels, depth in whole layers of what is left."""
    record = run(*SHARED, f"width.order={order}")
    dense = make_tiny(hidden=64, heads=8, kv_heads=4)
    target, sizes = record["plan"]["target"], record["plan"]["width"]["sizes"]
    one = Shape(*(sizes[name][0] for name in ("heads", "kv_heads", "channels")))
    step = (costs_of(dense).size(one) if order == "before" else 8 * costs_of(dense).channel * 8) / dense.n_params
    removed = record["params"]["ratio_removed"]
    assert abs(removed - 0.4) <= step / 2 + 1e-3
    assert (target["asked"], target["share"], target["layers"]) == (0.4, 0.5, record["layers"]["after"])
    layer = costs_of(dense).size(full_shape(dense.config)) / dense.n_params
    gone = 8 - record["layers"]["after"]
    if order == "after":
        assert target["depth"] == pytest.approx(0.2)
        assert abs(gone * layer - 0.2) <= layer / 2
    else:  # of the model that width left
        narrowed = dense.n_params * (1 - 8 * layer) + 8 * costs_of(dense).size(one)
        assert target["depth"] == pytest.approx(1 - 0.6 * dense.n_params / narrowed)
        assert record["plan"]["width"]["ratio"] == pytest.approx(0.2 / (8 * layer))


def test_a_share_is_checked_on_what_depth_will_work_on(make_tiny):
    """With order=before that is the narrower model, known by its shapes: no weights load."""
    handle = make_tiny(hidden=64, heads=8, kv_heads=4)

    def check(target, share, order="before", **fields):
        width = available("width")["magnitude"](share=share, order=order)
        method = available("method")["random"](target_ratio=target, **fields)
        width.check_model(handle, method)
        width.check_depth(method, handle)

    check(0.5, 0.6, protect_first=4)  # depth alone could not take half with 4 of 8 layers protected
    with pytest.raises(ConfigError, match=r"width.share = 0.05 of method.target_ratio = 0.5 leaves 0.4\d+ to depth: "
                                          r"method.target_ratio = 0.4\d+; expected .* nearest"):
        check(0.5, 0.05, protect_first=6)
    with pytest.raises(ConfigError, match=r"leaves nothing to depth: width removes 0.1\d+ .* Lower width.share"):
        check(0.1, 0.99)
    for order in ("before", "after"):
        with pytest.raises(ConfigError, match=r"width.share = 0.98 of method.target_ratio = 0.95 is about .* of the "
                                              r"decoder layers: width.ratio = .* no attention head"):
            check(0.95, 0.98, order)
    assert not handle.loaded


def test_a_narrower_stream_counts_embeddings_too(make_tiny):
    """Minitron's hidden size takes parameters outside the layers, which are no longer to be found inside them."""
    handle = make_tiny(hidden=64, heads=8, kv_heads=8, vocab=600)
    width = available("width")["minitron"](share=0.9, hidden_size=48)
    method = available("method")["last"](target_ratio=0.5)
    outside = 601 * 64 / 4  # a quarter of the embedding and of the last norm
    ratio = width.ratio_for(method, handle, handle)
    layers = 8 * costs_of(handle).size(full_shape(handle.config))
    assert ratio * layers + outside == pytest.approx(0.5 * handle.n_params)


def test_patches_are_those_of_the_model_that_is_cut(run, make_tiny, tmp_path):
    """cka_patch on a narrower model looks at that one's layers; similarity.npz stays the dense model's."""
    record = run("method=cka_patch", "method.threshold=null", "method.target_layers=5", "width=random",
                 "width.ratio=0.5", "width.order=before")  # fmt: skip
    plan, tokens = record["plan"], CalibrationTokens(np.load(tmp_path / "run" / "calibration_tokens.npy"), "")
    dense = make_tiny()
    similarity, kernel = available("similarity")["flat_cosine"](), available("kernel")["linear"]()
    matrices = [layer_similarity(h, tokens, kernel, similarity).matrix_LL for h in
                (dense, apply_width(dense, WidthDecision.from_json(plan["width"])))]  # fmt: skip
    saved = np.load(tmp_path / "run" / "similarity.npz")["matrix"]
    np.testing.assert_allclose(saved, matrices[0], atol=1e-5)

    def inside(matrix):
        return [float(matrix[a:b, a:b][np.triu_indices(b - a, 1)].mean()) for a, b in plan["groups"]]

    assert [t["score"] for t in plan["trace"]] == pytest.approx(inside(matrices[1]), abs=1e-4)
    assert inside(matrices[0]) != pytest.approx(inside(matrices[1]), abs=1e-3)
    assert [list(r) for r in segments(matrices[1][:7, :7], 4) if r[1] - r[0] > 1] == plan["groups"]


@pytest.mark.parametrize(("order", "stage"), [("after", "width"), ("before", "merge")])
def test_a_failure_while_scoring_the_narrow_model_has_a_stage(order, stage, run, tmp_path, monkeypatch):
    def failing(*args):
        raise MemoryError("no room")

    monkeypatch.setattr("slm_exp.width.score.narrowed_score", failing)
    with pytest.raises(StageError, match=f"stage '{stage}' failed"):
        run("width=random", f"width.order={order}")
    error = json.loads((tmp_path / "run" / "record.json").read_text())["error"]
    assert error == {"type": "MemoryError", "message": "no room", "stage": stage}


def test_a_run_end_to_end(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "slm_exp", *QUICK, "width=magnitude", "width.ratio=0.2", "method.threshold=0.9",
         f"cache.dir={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'run'}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["plan"]["width"]["ratio"] == 0.2
    about = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert about["intermediate_size"] == record["plan"]["width"]["sizes"]["channels"][0] < 64
