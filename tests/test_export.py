"""`slm export`: the file means the plan's own model, read by mergekit's rules written plainly."""

import json

import pytest
import torch
import yaml
from builders.models import keeps_first

from slm_exp.cli import export
from slm_exp.core.errors import ConfigError, PlanError, SlmError
from slm_exp.core.registry import available
from slm_exp.core.types import Compensation, Cut, MergePlan, Sublayer
from slm_exp.merging.surgery import apply_plan
from slm_exp.runs.mergekit import mergekit
from slm_exp.runs.record import write_record

PLANS = {
    "removal": MergePlan(8, dropped=(2, 3, 6)),
    "top_gone": MergePlan(8, dropped=(0, 7)),
    "sublayers": MergePlan(8, dropped=(1,), sublayers=(Sublayer(3, "mlp"), Sublayer(5, "attention"))),
    "compensated": MergePlan(8, dropped=(2, 3), compensation=Compensation("magnitude", (Cut(2, 4, 1.25),))),
    **{rule: MergePlan(8, ((1, 3), (4, 7)), rule=rule)
       for rule in ("keep_top", "keep_low", "top_layer", "mean", "sum_of_deltas")},
}  # fmt: skip


def setting(value, name):
    """A parameter as mergekit resolves it for a tensor: a number, or the first filter that the name contains."""
    if not isinstance(value, list):
        return value
    return next(c["value"] for c in value if c.get("filter") is None or c["filter"] in name)


def record_of(folder, config):
    """The record of a finished run of these settings."""
    write_record(folder, {"run_id": "a", "status": "finished", "config": config})


def layers_of(state):
    return 1 + max(int(n.split(".")[2]) for n in state if n.startswith("model.layers."))


def passthrough(document, models):
    out, at = {}, 0
    for part in document["slices"]:
        (source,) = part["sources"]
        state = models[source["model"]]
        for i in range(*source["layer_range"]):
            for name, t in state.items():
                if name.startswith(f"model.layers.{i}."):
                    new = name.replace(f"layers.{i}.", f"layers.{at}.", 1)
                    out[new] = t * setting(source.get("parameters", {}).get("scale", 1.0), new)
            at += 1
    return out | {n: t for n, t in models["DENSE"].items() if ".layers." not in n}


def linear(document, models):
    states = [(models[m["model"]], m["parameters"]["weight"]) for m in document["models"]]
    return {name: sum(setting(weight, name) * state[name] for state, weight in states) for name in states[0][0]}


def carried_out(text, dense):
    models = {"DENSE": dense.model.state_dict()}
    for document in yaml.safe_load_all(text):
        made = {"passthrough": passthrough, "linear": linear}[document["merge_method"]](document, models)
        models[document.get("name", "RESULT")] = made
    return models["RESULT"]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", PLANS)
def test_the_file_means_the_plan(name, family, make_tiny):
    plan, dense = PLANS[name], make_tiny(family)
    rule = available("merge_rule")[plan.rule]() if plan.rule else None
    ours = apply_plan(dense, plan, rule).model.state_dict()
    theirs = carried_out(mergekit(plan, "DENSE", "float32"), dense)
    assert set(ours) == set(theirs)
    exact = name not in ("mean", "sum_of_deltas")
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]) if exact else torch.allclose(tensor, theirs[key], atol=1e-6), key


def test_removal_is_one_document_and_merging_several(tmp_path, capsys):
    PLANS["removal"].save(tmp_path)
    assert export.main([str(tmp_path), "--model", "owner/name"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# mergekit-yaml FILE FOLDER\n")
    (document,) = yaml.safe_load_all(text)
    assert [s["sources"][0]["layer_range"] for s in document["slices"]] == [[0, 2], [4, 6], [7, 8]]
    out = tmp_path / "merge.yaml"
    PLANS["top_layer"].save(tmp_path)
    assert export.main([str(tmp_path / "plan.json"), "--model", "owner/name", "--out", str(out)]) == 0
    assert out.read_text().startswith("# mergekit-multi")
    assert [d.get("name") for d in yaml.safe_load_all(out.read_text())] == ["lowest", "top", None]


def test_a_runs_record_names_model_and_dtype(tmp_path, capsys):
    PLANS["removal"].save(tmp_path)
    record_of(tmp_path, {"model": {"name": "hf", "path": "owner/name", "dtype": "bfloat16"}})
    assert export.main([str(tmp_path)]) == 0
    document = yaml.safe_load(capsys.readouterr().out)
    assert document["dtype"] == "bfloat16"
    assert document["slices"][0]["sources"][0]["model"] == "owner/name"


@pytest.mark.parametrize("name", ["smollm2_135m", "gemma3_270m", "qwen2_5_coder_0_5b"])
def test_a_run_of_a_converted_model_names_that_models_copy(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PLANS["removal"].save(tmp_path)
    record_of(tmp_path, {"model": {"name": name}, "cache": {"dir": str(tmp_path)}})
    own = available("model")[name]().converted(tmp_path)
    for other in ("0" * 16, "f" * 16):
        (tmp_path / "model" / other).mkdir(parents=True)
        (tmp_path / "model" / other / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="--model is missing"):
        export.main([str(tmp_path)])
    own.mkdir()
    (own / "config.json").write_text("{}")
    assert export.main([str(tmp_path)]) == 0
    assert f"model: {own}" in capsys.readouterr().out
    record_of(tmp_path, {"model": {"name": name}})
    with pytest.raises(ConfigError, match="--model is missing"):
        export.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (MergePlan(8, width=keeps_first([1], [1], [8], method="flap")), "width=flap"),
        (MergePlan(8, ((1, 3),)), "expected one of keep_low"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(plan, said, tmp_path, capsys):
    plan.save(tmp_path)
    assert export.main([str(tmp_path), "--model", "x"]) == 1
    assert said in capsys.readouterr().err


def test_layers_of_two_attention_kinds_and_other_sizes_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(
        {"num_hidden_layers": 8, "layer_types": ["full_attention", "sliding_attention"]}))  # fmt: skip
    with pytest.raises(PlanError, match="layer_types"):
        mergekit(PLANS["removal"], str(tmp_path), None)
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 9}))
    with pytest.raises(PlanError, match="has 9"):
        mergekit(PLANS["removal"], str(tmp_path), None)


def test_a_recovered_run_and_a_plan_without_a_model_are_refused(tmp_path, capsys):
    PLANS["removal"].save(tmp_path)
    with pytest.raises(ConfigError, match="--model is missing"):
        export.main([str(tmp_path)])
    record_of(tmp_path, {"recovery": {"name": "lora"}})
    assert export.main([str(tmp_path), "--model", "x"]) == 1
    assert "recovery=lora" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="there is no"):
        export.main([str(tmp_path / "nowhere.json"), "--model", "x"])
    (tmp_path / "record.json").write_text('{"a": 1}')  # whether a recovery followed is not known
    with pytest.raises(SlmError, match=r"record\.json cannot be read"):
        export.main([str(tmp_path), "--model", "x"])


def test_every_registered_rule_is_either_expressed_or_refused_by_name(tmp_path):
    for name in available("merge_rule"):
        plan = MergePlan(8, ((1, 4),), rule=name)
        try:
            assert "slices" in mergekit(plan, "x", None)
        except PlanError as error:
            assert name in str(error)  # noqa: PT017
