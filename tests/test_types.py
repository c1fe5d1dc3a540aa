"""The plan: what it may say, and that it survives the disk."""

import json

import pytest

from slm_exp.core.errors import PlanError
from slm_exp.core.files import read_json
from slm_exp.core.types import Group, MergePlan, Trial


def test_slots_keep_order_and_fold_groups():
    plan = MergePlan(8, groups=((2, 5),), dropped=(6,))
    assert plan.slots == (Group(0, 1), Group(1, 2), Group(2, 5), Group(5, 6), Group(7, 8))
    assert plan.n_layers_out == 5


def test_a_plan_that_says_nothing_keeps_every_layer():
    assert [g.start for g in MergePlan(3).slots] == [0, 1, 2]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"groups": ((0, 3), (2, 4))}, r"\[2, 4\).*overlap.*layer 2"),
        ({"groups": ((0, 2),), "dropped": (1,)}, "overlap at layer 1"),
        ({"groups": ((3, 9),)}, "outside a model of 6"),
        ({"groups": ((3, 4),)}, "holds one layer"),
        ({"dropped": tuple(range(6))}, "leaves none"),
        ({"dropped": (-1,)}, "outside"),
    ],
)
def test_contradictions_are_refused(kwargs, message):
    with pytest.raises(PlanError, match=message):
        MergePlan(6, **kwargs)


def test_plan_survives_the_disk(tmp_path):
    plan = MergePlan(6, ((1, 3),), (4,), "slm", "mean", "cka", 0.8, None, 0.93, trace=(Trial(1, 2, 0.95, True),),
                     evaluations=1, block_forwards=10, notes=("said",))
    plan.save(tmp_path)
    assert MergePlan.load(tmp_path) == plan
    on_disk = json.loads((tmp_path / "plan.json").read_text())
    assert on_disk["groups"] == [[1, 3]]
    assert on_disk["trace"] == [{"low": 1, "high": 2, "score": 0.95, "accepted": True}]


def test_groups_dropped_and_rule_suffice():
    plan = MergePlan.from_json({"n_layers": 6, "groups": [[1, 3]], "rule": "mean"})
    assert plan.slots[1] == (1, 3)


def test_unknown_field_is_named():
    with pytest.raises(PlanError, match="grups"):
        MergePlan.from_json({"n_layers": 6, "grups": []})


@pytest.mark.parametrize(("text", "message"), [
    ('{"n_layers": 1000000000}', "n_layers = 1000000000; expected a whole number from 1 to 10000"),
    ('{"n_layers": 1e30}', r"n_layers = 1e\+30; expected a whole number"),
    ('{"n_layers": true}', "n_layers = True; expected a whole number"),
    ('{"n_layers": 8, "groups": [[0, 1000000000000000000000000000000]]}', "outside a model of 8 layers"),
    ('{"n_layers": 8, "groups": [[0, 2.5]]}', r"groups\[0\]\[1\] = 2\.5; expected a whole number"),
    ('{"n_layers": 8, "groups": [[0, 2, 4]]}', r"groups\[0\] = \[0, 2, 4\]"),
    ('{"n_layers": 8, "dropped": [true]}', r"dropped\[0\] = True; expected a whole number"),
    ('{"n_layers": 8, "sublayers": [{"layer": 2.9, "kind": "mlp"}]}', r"sublayers\[0\]\.layer = 2\.9; expected"),
    ('{"n_layers": 8, "sublayers": [{"layer": 2, "kind": "norm"}]}', r"kind = 'norm'; expected attention or mlp"),
    ('{"n_layers": 8, "sublayers": [{"layer": 2}]}', r"sublayers\[0\] has no kind"),
    ('{"n_layers": 8, "final_score": NaN}', "final_score = nan; expected a finite number"),
    ('{"n_layers": 8, "rule": 3}', "rule = 3; expected text"),
    ('{"n_layers": 8, "trace": [{"low": 1, "high": 2, "score": 0.5}]}', r"trace\[0\] has no accepted"),
    ('{"n_layers": 8, "target": {"asked": true, "complete": true}}', r"target\.asked = True; expected a whole number"),
    ("[]", "it = .*; expected a mapping"),
])  # fmt: skip
def test_a_field_that_is_wrong_is_named_with_its_value(text, message):
    with pytest.raises(PlanError, match=f"^[^\n]*{message}[^\n]*$"):
        MergePlan.from_json(json.loads(text))


@pytest.mark.parametrize(("cuts", "message"), [
    ([(500, 900, 1.5)], r"layers 500\.\.899 is of no cut of this plan.*cuts below the top: 2\.\.3, 5\.\.5, 6\.\.7\.$"),
    ([(2, 3, 1.5)], "is of no cut"),
    ([(2, 4, 1.5), (2, 4, 1.5)], "or of one twice"),
    ([(9, 10, 1.5)], "is of no cut"),  # the final norm undoes any factor: it would be recorded and ignored
    ([(2, 4, 1e308)], r"alpha = 1e\+308; expected a number from"),
    ([(2, 4, 0.0)], r"layers 2\.\.3 has alpha = 0;"),
    ([(2, 4, 1e6), (5, 6, 1e6), (6, 8, 1e6)], r"layers 6\.\.7 has alpha = 1e\+06"),
])  # fmt: skip
def test_a_compensation_is_carried_out_or_refused(cuts, message):
    data = {"n_layers": 10, "dropped": [2, 3, 9], "sublayers": [{"layer": 5, "kind": "mlp"}], "groups": [[6, 8]],
            "compensation": {"kind": "magnitude", "cuts": [{"start": 2, "stop": 4, "alpha": 1.25}]}}  # fmt: skip
    good = MergePlan.from_json(data)
    assert good.scales == (1, 1, 0.8, 0.8, 0.8, 0.8)
    data["compensation"]["cuts"] = [dict(zip(("start", "stop", "alpha"), cut, strict=True)) for cut in cuts]
    with pytest.raises(PlanError, match=message):
        MergePlan.from_json(data)


@pytest.mark.parametrize(("text", "message"), [
    ("[" * 200_000 + "]" * 200_000, "nested"),
    ('{"width": ' + '{"a": ' * 60 + "1" + "}" * 61, "nested more than 50 deep"),
    ('{"n_layers": 8, "n_layers": 9}', "the key 'n_layers' stands twice"),
    ('{"width": {"a": 1e999}}', "too large"),
    ('{"width": {"a": -Infinity}}', "-Infinity is no number of JSON"),
    ("{", "Expecting"),
    ("9" * 5000, "digits"),
])  # fmt: skip
def test_json_that_is_refused_before_anything_looks_at_it(text, message, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "plan.json")


def test_a_plan_keeps_its_shape_on_disk():
    """Key for key what earlier versions wrote: their plans and records are read, and ours by them."""
    cut, size = {"start": 1, "stop": 3, "alpha": 1.25}, {"n_layers": 5, "params": 9, "ratio_removed": 0.1,
        "flops_per_token": 2.5, "latency_s": 0.5, "best_final_score": 0.9, "threshold": [0.5, 0.6]}  # fmt: skip
    target = {"asked": 5, "complete": True, "layers": 5, "threshold": [0.5, 0.6],
              "neighbours": [{"threshold": 0.4, "n_layers": 4, "final_score": 0.8}], "sizes": [size],
              "depth": 0.1, "share": 0.5}  # fmt: skip
    data = {
        "n_layers": 6, "groups": [[1, 3]], "dropped": [], "method": "slm", "rule": "mean", "similarity": "cka",
        "threshold": 0.55, "target": target, "final_score": 0.9, "sublayers": [{"layer": 4, "kind": "mlp"}],
        "width": {"method": "flap", "sizes": {"heads": [], "kv_heads": [], "channels": [], "hidden": 1},
                  "kept": {"query_heads": [], "kv_heads": [], "channels": []}},
        "compensation": {"kind": "magnitude", "cuts": [cut]},
        "trace": [{"low": 1, "high": 2, "score": 0.9, "accepted": True}], "evaluations": 1, "block_forwards": 8,
        "notes": ["said"],
    }  # fmt: skip
    assert json.dumps(MergePlan.from_json(data).to_json()) == json.dumps(data)


def test_effect_ignores_how_a_plan_was_found():
    a = MergePlan(6, ((1, 3),), rule="mean", threshold=0.8, final_score=0.9)
    b = MergePlan(6, ((1, 3),), rule="mean", threshold=0.7, final_score=0.8)
    assert a.effect() == b.effect()
    assert a.effect() != MergePlan(6, ((1, 4),), rule="mean").effect()
    assert MergePlan(6, rule="mean").effect() == MergePlan(6, rule="keep_low").effect()
