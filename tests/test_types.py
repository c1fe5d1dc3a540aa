"""The plan: what it may say, and that it survives the disk."""

import json

import pytest

from slm_exp.core.errors import PlanError
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


def test_effect_ignores_how_a_plan_was_found():
    a = MergePlan(6, ((1, 3),), rule="mean", threshold=0.8, final_score=0.9)
    b = MergePlan(6, ((1, 3),), rule="mean", threshold=0.7, final_score=0.8)
    assert a.effect() == b.effect()
    assert a.effect() != MergePlan(6, ((1, 4),), rule="mean").effect()
    assert MergePlan(6, rule="mean").effect() == MergePlan(6, rule="keep_low").effect()
