"""Layers that stay in their files: the same numbers, one pass over the file, few layers in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders.models import new_task, random_tokens
from builders.streams import both, saved

from slm_exp.core.errors import CheckpointError
from slm_exp.core.registry import available
from slm_exp.core.types import MergePlan
from slm_exp.merging.surgery import apply_plan
from slm_exp.methods.base import Method
from slm_exp.models.base import ModelHandle
from slm_exp.models.layouts import FAMILIES
from slm_exp.models.streaming import StreamedLayers, parameter, shells
from slm_exp.search.greedy import Unit, without
from slm_exp.search.path import follow
from slm_exp.search.scoring import ScoringEngine

IDS = torch.arange(24)[None]
SIZES: dict[str, dict[str, Any]] = {"slm": {"threshold": 0.6}, "blockpruner": {"target_sublayers": 2},
                                    "finercut": {"target_sublayers": 2}}
METHODS = [name for name, kind in available("method").items()
           if name != "from_plan" and kind.needs_resident is Method.needs_resident]


def logits(handle: ModelHandle) -> torch.Tensor:
    with torch.inference_mode():
        return handle.model(IDS, use_cache=False).logits


def in_memory(layers: torch.nn.ModuleList) -> list[int]:
    return [i for i, layer in enumerate(shells(layers)) if not any(p.is_meta for p in layer.parameters())]


def passes(handle: ModelHandle) -> float:
    layers = handle.layers
    assert isinstance(layers, StreamedLayers)
    return layers.residence.passes


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_logits_in_one_pass(tmp_path: Path, family: str) -> None:
    resident, streamed = both(saved(tmp_path, family, layers=4))
    assert torch.equal(logits(streamed), logits(resident))
    assert passes(streamed) == 1.0
    assert in_memory(streamed.layers) == [3]
    for name, p in resident.layers[1].named_parameters():  # read by itself, or with its layer
        assert torch.equal(parameter(streamed.layers, 1, name), p)
    for i in (0, 2, 1, 3):
        assert all(torch.equal(a, b) for a, b in zip(streamed.layers[i].parameters(), resident.layers[i].parameters(),
                                                     strict=True))
        assert in_memory(streamed.layers) == [i]


def test_bfloat16_files_are_widened_as_the_loader_does(tmp_path: Path) -> None:
    resident, streamed = both(saved(tmp_path, layers=3, dtype="bfloat16"))
    assert resident.model.dtype == streamed.model.dtype == torch.float32
    assert torch.equal(logits(streamed), logits(resident))
    assert streamed.n_params == resident.n_params
    assert streamed.digest == resident.digest


@pytest.mark.parametrize("method", METHODS)
def test_every_method_decides_the_same(tmp_path: Path, method: str) -> None:
    plans = []
    for handle in both(saved(tmp_path, layers=9)):
        member: Any = available("method")[method](**SIZES.get(method, {"target_layers": 7}))
        plans.append(member.plan(new_task(handle, random_tokens(2, 16), matrix=True)))
    assert plans[0] == plans[1]


@pytest.mark.parametrize("rule", [n for n, rule in available("merge_rule").items() if not rule().needs_resident()])
def test_every_rule_decides_and_merges_the_same(tmp_path: Path, rule: str) -> None:
    resident, streamed = both(saved(tmp_path, layers=6))
    plans = []
    for handle in (resident, streamed):
        task = new_task(handle, random_tokens(2, 16), rule)
        plans.append(available("method")["slm"](threshold=0.3).plan(task))  # type: ignore[attr-defined]
    assert plans[0] == plans[1]
    assert plans[0].groups
    plan = MergePlan(6, ((1, 4),), (5,), rule=rule)  # type: ignore[arg-type]
    short, merged = (apply_plan(h, plan, task.rule) for h in (resident, streamed))
    assert short.digest == merged.digest
    assert torch.equal(logits(merged), logits(short))
    again = apply_plan(streamed, plan, task.rule)  # made while a layer is in memory: it is not copied
    assert in_memory(again.layers) == in_memory(streamed.layers) == []


def test_one_pass_methods_take_one(tmp_path: Path) -> None:
    saved(tmp_path, layers=8)
    free = {"protect_first": 0, "protect_last": 0}
    for method, fields in (("shortgpt", {}), ("angular", {}), ("shortened_magnitude", free)):
        handle = both(tmp_path)[1]
        task = new_task(handle, random_tokens(2, 16))
        available("method")[method](target_layers=6, **fields).choose(task, 2)  # type: ignore[attr-defined]
        assert passes(handle) == 1.0, method
    handle = both(tmp_path)[1]
    new_task(handle, random_tokens(2, 16), matrix=True)
    assert passes(handle) == 1.0


def test_candidates_of_a_greedy_step_share_a_pass(tmp_path: Path) -> None:
    resident, streamed = both(saved(tmp_path, layers=8))
    engines = [ScoringEngine(new_task(h, random_tokens(2, 16))) for h in (resident, streamed)]
    models = [without(engines[0].dense, Unit(i)) for i in range(1, 7)]
    for step in range(2):  # after a commit the states of what was committed come with the same pass
        before = passes(streamed)
        found = [list(engine.losses(models)) for engine in engines]
        assert found[0] == found[1]
        assert passes(streamed) - before <= 2 - step
        for engine in engines:
            engine.commit(models[2])
        models = [without(engines[0].dense, Unit(3)), *(without(models[2], Unit(i)) for i in (1, 2, 4, 5) if not step)]
    assert engines[0].block_forwards == engines[1].block_forwards


def test_both_sides_of_a_split_share_a_pass(tmp_path: Path) -> None:
    resident, streamed = both(saved(tmp_path, layers=7))
    start = available("method")["slm"]().start(7)  # type: ignore[attr-defined]
    found, spent = [], []
    for handle, together in ((resident, False), (streamed, False), (both(tmp_path)[1], True)):
        engine = ScoringEngine(new_task(handle, random_tokens(2, 16)), top=start.high)
        found.append(follow(engine, start, 7, -1, 1, foresee=engine.foresee if together else None))
        spent.append(0.0 if handle is resident else passes(handle))
    assert found[0] == found[1] == found[2]
    assert spent[2] <= spent[1] - 2


def test_a_layer_that_is_not_there_is_named(tmp_path: Path) -> None:
    handle = both(saved(tmp_path, layers=3))[1]
    layers = handle.layers
    assert isinstance(layers, StreamedLayers)
    files = layers.residence.files
    del files.layers[2]["mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"lack model\.layers\.2\.mlp\.up_proj\.weight"):
        layers[2]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_real_weights_decide_the_same(smol_handle: ModelHandle, method: str) -> None:
    """Whole plans: layers, every score of the trace, the final score, and how many block forwards it took."""
    few = {"starts": 4, "children": 4, "generations": 2} if method == "evopress" else {}
    member: Any = available("method")[method](**SIZES.get(method, {"target_layers": 28}) | few)
    tokens = random_tokens(2, 16)
    plans = [member.plan(new_task(handle, tokens, matrix=method == "cka_patch"))
             for handle in (smol_handle, smol_handle.stream())]
    assert plans[0] == plans[1]
    assert plans[0].n_layers_out < 30 or plans[0].sublayers
