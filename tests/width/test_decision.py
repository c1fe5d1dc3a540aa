"""A width decision on disk: the same JSON in and out, and nonsense refused by field, value and what was expected."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from builders.models import keeps_first

from slm_exp.core.cost import Tokens
from slm_exp.core.errors import PlanError
from slm_exp.core.registry import available
from slm_exp.core.types import MergePlan
from slm_exp.core.widths import WidthDecision, pack_floats, pack_indices
from slm_exp.merging.width import apply_width
from slm_exp.models.sizes import SMOLLM2, sizes_of

GOOD: dict[str, Any] = {
    "method": "flap", "ratio": 0.2, "order": "after", "reached": 0.21, "uniform": False,
    "sizes": {"heads": [2, 2], "kv_heads": [1, 1], "channels": [8, 8], "hidden": 32},
    "kept": {"query_heads": [[0, 1], [2, 3]], "kv_heads": [[0], [1]], "channels": ["/w=="] * 2},
    "tokens": "abc", "notes": ["width: a note."],
    "means": {"attention": [pack_floats([0.5] * 16)] * 2, "mlp": [pack_floats([1.0] * 56)] * 2},
}


def changed(where: str, value: Any) -> dict[str, Any]:
    """GOOD with one entry replaced (or taken away: `...`), by its path."""
    out = copy.deepcopy(GOOD)
    *path, last = [int(part) if part.isdigit() else part for part in where.split(".")]
    inner: Any = out
    for part in path:
        inner = inner[part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return out


def test_the_json_is_the_same_in_and_out(tmp_path: Path) -> None:
    whole = MergePlan(2, width=WidthDecision.from_json(GOOD))
    whole.save(tmp_path)
    assert json.dumps(json.loads((tmp_path / "plan.json").read_text())["width"]) == json.dumps(GOOD)
    assert MergePlan.load(tmp_path) == whole
    bare = {k: GOOD[k] for k in ("sizes", "kept")}
    assert WidthDecision.from_json(bare).to_json() == bare
    whole.width.save(tmp_path)  # type: ignore[union-attr]
    assert WidthDecision.load(tmp_path) == whole.width


@pytest.mark.parametrize(("where", "value", "message"), [
    ("sizes.heads.0", True, r"width\.sizes\.heads\[0\] = True; expected a whole number"),
    ("sizes.channels.1", 8.0, r"width\.sizes\.channels\[1\] = 8\.0; expected a whole number"),
    ("kept.kv_heads.0", [False], r"width\.kept\.kv_heads\[0\]\[0\] = False; expected a whole number"),
    ("kept.query_heads.1", [3, 2], r"width\.kept\.query_heads\[1\] = \[3, 2\]; expected numbers .* ascending"),
    ("kept.query_heads.1", [2, 2], r"query_heads\[1\] = \[2, 2\]; expected .* ascending"),
    ("kept.query_heads.1", [-1, 2], r"query_heads\[1\] = \[-1, 2\]; expected numbers from 0"),
    ("kept.kv_heads.1", [], r"kv_heads\[1\] = \[\]; expected .* one at least"),
    ("kept.query_heads.0", [0], r"query_heads\[0\] = 1 units; expected 2, as in sizes"),
    ("kept.channels.1", "??", r"width\.kept\.channels\[1\] = '\?\?'; expected base64"),
    ("kept.channels.1", pack_indices([0], 8), r"channels\[1\] = 1 units; expected 8"),
    ("sizes.kv_heads", [1], r"width\.sizes\.kv_heads = 1 layers; expected 2, as in sizes\.heads"),
    ("means.mlp", [], r"width\.means\.mlp = 0 layers; expected 2"),
    ("means.mlp.0", "/w==", r"width\.means\.mlp\[0\] holds 1 bytes; expected 4 for each number"),
    ("means.attention.0", pack_floats([float("inf")]), r"means\.attention\[0\] = \(inf,\); expected finite"),
    ("hidden", "/w==", r"width\.hidden = 8 channels; expected 32"),
    ("order", "between", r"width\.order = 'between'; expected after or before"),
    ("ratio", "0.2", r"width\.ratio = '0\.2'; expected a number"),
    ("ratio", float("nan"), r"width\.ratio = nan; expected a finite number"),
    ("ratio", 2.0, r"width\.ratio = 2\.0; expected less than 1"),
    ("kept", ..., r"width has no kept; it has method, ratio"),
    ("kept.channels", ..., r"width\.kept has no channels; it has query_heads, kv_heads"),
    ("sizez", {}, r"width has the key 'sizez'; expected method, ratio.* Did you mean sizes"),
])  # fmt: skip
def test_nonsense_is_refused_by_field_and_value(where: str, value: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        MergePlan.from_json({"n_layers": 2, "width": changed(where, value)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("width", [[], "flap", 0, True])
def test_what_is_no_object_is_refused(width: Any) -> None:
    with pytest.raises(PlanError, match=r"width = .*; expected a mapping\."):
        MergePlan.from_json({"n_layers": 2, "width": width})


@pytest.mark.parametrize(("where", "value", "message"), [
    ("kept.query_heads.1", [2, 4], r"2 query heads of layer 1, the highest 4; expected 2 of tiny-llama's 4"),
    ("kept.kv_heads.1", [2], "1 key-value heads of layer 1, the highest 2"),
    ("kept.kv_heads.1", [0], r"query heads \[2, 3\] and key-value heads \[0\] of layer 1; expected as many of each"),
    ("means.mlp.1", pack_floats([1.0] * 55), r"width\.means\.mlp\[1\] has 55 means; expected 56"),
    ("sizes.hidden", 24, "24 channels of the residual stream.* tiny-llama has 32"),
])  # fmt: skip
def test_units_that_the_model_has_not_are_refused(where: str, value: Any, message: str, make_tiny: Any) -> None:
    handle = make_tiny(layers=2)
    apply_width(handle, WidthDecision.from_json(GOOD))
    with pytest.raises(PlanError, match=message):
        apply_width(handle, WidthDecision.from_json(changed(where, value)))
    assert not handle.loaded


def test_a_decision_by_hand_is_a_plan() -> None:
    plan = MergePlan(1, width=keeps_first([2], [1], [16]))
    assert MergePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.effect()["width"]["kept"]["query_heads"] == [[0, 1]]


def test_the_cost_is_in_block_forwards_and_the_size_in_parameters() -> None:
    sizes, tokens = sizes_of(SMOLLM2), Tokens(10, 128)
    block = sizes.block_flops(1280, 128)
    pruners = available("width")
    flap, taylor, none = (pruners[name]() for name in ("flap", "llm_pruner", "none"))
    assert flap.cost(sizes, 20, tokens).blocks == (20 + 2 * 20 + 30) * block  # type: ignore[attr-defined]
    assert taylor.cost(sizes, 20, tokens).blocks == (6 * 20 + 2 * 20 + 30) * block  # type: ignore[attr-defined]
    assert none.cost(sizes, 20, tokens).flops == 0  # type: ignore[attr-defined]
    assert flap.params_removed(sizes, 20, None) == int(0.2 * 20 * sizes.layer)  # type: ignore[attr-defined]
    given: Any = pruners["flap"](uniform=False, ratios=[0.5] * 30)
    assert given.params_removed(sizes, 20, None) == int(0.5 * 20 * sizes.layer)
    assert given.params_removed(sizes, 30, None) == 15 * sizes.layer
    some: Any = pruners["flap"](uniform=False, ratios=[0.5] * 30, layers=[0, 6])
    assert some.params_removed(sizes, 30, None) == 3 * sizes.layer
    shared: Any = pruners["flap"](share=0.5)
    layers = shared.layers_left(sizes, 0.2)
    assert layers == 30 - round(0.1 * sizes.total / sizes.layer)
    removed = (30 - layers) * sizes.layer + shared.params_removed(sizes, layers, 0.2)
    assert removed == pytest.approx(0.2 * sizes.total, abs=1)
