"""Layer-level baselines, each against a few lines of plain arithmetic on a tiny model, and what they share."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.models import new_task

from slm_exp.core import registry
from slm_exp.core.errors import ConfigError, PlanError
from slm_exp.core.types import MergePlan
from slm_exp.launch.compose import compose_run
from slm_exp.merging.surgery import apply_plan
from slm_exp.methods.base import Baseline, Method, merged_runs
from slm_exp.methods.cka_patch import segments
from slm_exp.methods.from_plan import DEFAULT_RULE
from slm_exp.search.task import PlanTask

METHODS = registry.available("method")
BASELINES = sorted(  # joint counts parameters and has a file of tests
    name for name, kind in METHODS.items()
    if issubclass(kind, Baseline) and kind.targets == Baseline.targets and kind.narrows is Method.narrows
)


@pytest.fixture
def task(tiny_handle: Any, tokens: Any) -> PlanTask:
    return new_task(tiny_handle, tokens, matrix=True)


def states_of(handle: Any, tokens: Any) -> list[torch.Tensor]:
    """The states entering every layer and the last layer's output before the final norm, by hooks on the library."""
    seen: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs.get("hidden_states", *args)),
                                             with_kwargs=True) for layer in handle.layers]
    hooks.append(handle.model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    with torch.no_grad():
        handle.model(torch.as_tensor(tokens.tokens_NT).long(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [h.double() for h in seen]


def last_state(handle: Any, tokens: Any) -> torch.Tensor:
    with torch.no_grad():
        return handle.model.model(torch.as_tensor(tokens.tokens_NT).long(), use_cache=False).last_hidden_state


def smallest(scores: Any, n: int, layers: Any = range(8)) -> tuple[int, ...]:
    return tuple(sorted(sorted(layers, key=lambda i: float(scores[i]))[:n]))


@pytest.mark.parametrize("n", [1, 3, 7])
def test_shortgpt_drops_the_layers_that_turn_the_states_least(n: int, task: PlanTask) -> None:
    h = states_of(task.handle, task.tokens)
    influence = [1 - torch.nn.functional.cosine_similarity(a, b, dim=-1).mean() for a, b in itertools.pairwise(h)]
    plan = METHODS["shortgpt"](target_layers=8 - n).plan(task)
    assert plan.dropped == smallest(influence, n)
    assert [t.score for t in plan.trace] == pytest.approx([1 - float(x) for x in influence], abs=1e-6)
    assert plan.block_forwards <= 8 + 8 - n


def test_shortgpt_sees_the_last_layer_before_the_final_norm(tiny_handle: Any, tokens: Any) -> None:
    """A last layer that does nothing has influence 0, whatever the final norm's gains do to its output."""
    last = tiny_handle.layers[-1]
    for module in (last.self_attn.o_proj, last.mlp.down_proj):
        module.weight.data.zero_()
    tiny_handle.model.model.norm.weight.data[::2] *= -30
    plan = METHODS["shortgpt"](target_layers=7).plan(new_task(tiny_handle, tokens, matrix=True))
    assert plan.dropped == (7,)
    assert plan.final_score == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("n", range(1, 8))
def test_angular_drops_the_run_whose_ends_are_most_alike(n: int, task: PlanTask) -> None:
    """All window ends are looked at, those of the run that starts at 0 and of the one that ends at the top too."""
    last = [h[:, -1] for h in states_of(task.handle, task.tokens)]
    distance = [
        torch.nn.functional.cosine_similarity(last[low], last[low + n], dim=-1).clamp(-1, 1).arccos().mean() / torch.pi
        for low in range(8 - n + 1)
    ]
    plan = METHODS["angular"](target_layers=8 - n).plan(task)
    low = int(np.argmin(distance))
    assert plan.dropped == tuple(range(low, low + n))
    assert [t.score for t in plan.trace] == pytest.approx([1 - float(d) for d in distance], abs=1e-6)


@pytest.mark.parametrize("where", [0, 6])
def test_angular_reaches_both_ends(where: int, tiny_handle: Any, tokens: Any) -> None:
    for layer in tiny_handle.layers[where : where + 2]:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight.data.zero_()
    plan = METHODS["angular"](target_layers=6).plan(new_task(tiny_handle, tokens, matrix=True))
    assert plan.dropped == (where, where + 1)


def gradients(handle: Any, tokens: Any) -> list[dict[str, torch.Tensor]]:
    """|w dL/dw| of every layer by plain autograd over one batch, on a copy."""
    model = copy.deepcopy(handle.model).requires_grad_(True)
    ids = torch.as_tensor(tokens.tokens_NT).long()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return [{n: (p * p.grad).detach().abs() for n, p in layer.named_parameters()} for layer in model.model.layers]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_taylor_is_the_sum_of_absolute_products_with_the_gradient_of_all_samples(
    family: str, make_tiny: Any, tokens: Any
) -> None:
    """Signed sums cancel: over the samples, before the absolute value, they must; over the weights they must not."""
    handle = make_tiny(family)
    task = new_task(handle, tokens, matrix=True)
    salience = [sum(float(x.sum()) for n, x in layer.items() if n.endswith("weight"))
                for layer in gradients(handle, tokens)]
    plan = METHODS["shortened_taylor"](target_layers=5, protect_first=0, protect_last=0).plan(task)
    assert [t.score for t in plan.trace] == pytest.approx(salience, rel=1e-4)
    assert plan.dropped == smallest(salience, 3)
    assert METHODS["shortened_taylor"](target_layers=7).plan(task).dropped == smallest(salience, 1, (4, 5))
    assert all(p.grad is None and not p.requires_grad for p in handle.model.parameters())


def test_magnitude_is_the_sum_of_absolute_weights(task: PlanTask) -> None:
    size = [sum(float(p.double().abs().sum()) for p in layer.parameters()) for layer in task.handle.layers]
    plan = METHODS["shortened_magnitude"](target_layers=5, protect_first=0, protect_last=0).plan(task)
    assert [t.score for t in plan.trace] == pytest.approx(size)
    assert plan.dropped == smallest(size, 3)
    assert METHODS["shortened_magnitude"](target_layers=6).plan(task).dropped == (4, 5)


def test_biases_do_not_count(make_tiny: Any, tokens: Any) -> None:
    task = new_task(make_tiny("qwen2"), tokens, matrix=True)
    scores = {}
    for name in ("shortened_magnitude", "shortened_taylor"):
        method = METHODS[name](target_layers=7, protect_first=0, protect_last=0)
        scores[name] = [t.score for t in method.plan(task).trace]
    task.handle.layers[2].self_attn.q_proj.bias.data += 100
    again = METHODS["shortened_magnitude"](target_layers=7, protect_first=0, protect_last=0).plan(task)
    assert [t.score for t in again.trace] == scores["shortened_magnitude"]


def collapse(task: PlanTask, size: int, interval: int, threshold: float, n_remove: int) -> tuple[list[list[int]], list]:
    """LaCo's loop on whole models: layers as lists of original ones, every candidate built and run."""
    dense = last_state(task.handle, task.tokens).flatten(1).double()
    layers, seen = [[i] for i in range(8)], []
    low = 8 - 1 - min(size, n_remove + 1)
    while low >= 0 and len(layers) > 8 - n_remove:
        width = min(size, len(layers) - (8 - n_remove) + 1, len(layers) - low)
        trial = [*layers[:low], [i for x in layers[low : low + width] for i in x], *layers[low + width :]]
        passed = False
        if width > 1:
            groups = tuple((x[0], x[-1] + 1) for x in trial if len(x) > 1)
            built = apply_plan(task.handle, MergePlan(8, groups), task.rule)
            other = last_state(built, task.tokens).flatten(1).double()
            score = float(torch.nn.functional.cosine_similarity(dense, other, dim=1).mean())
            passed = score > threshold
            seen.append((low, low + width - 1, score, passed))
        if passed:
            layers = trial
        low -= interval if passed else 1
    return layers, seen


@pytest.mark.parametrize(("n", "window", "interval"), [(1, 7, 1), (5, 3, 1), (3, 2, 2)])
def test_laco_is_its_loop_at_the_highest_threshold_that_reaches_the_size(
    n: int, window: int, interval: int, task: PlanTask
) -> None:
    plan = METHODS["laco"](target_layers=8 - n, window=window, interval=interval).plan(task)
    threshold = plan.target.threshold - 1e-6  # type: ignore[union-attr, operator]  # a hair below the best rejected score
    layers, seen = collapse(task, window, interval, threshold, n)
    assert [list(g) for g in plan.groups] == [[x[0], x[-1] + 1] for x in layers if len(x) > 1]
    assert [(t.low, t.high, t.accepted) for t in plan.trace] == [(a, b, ok) for a, b, _, ok in seen]
    assert [t.score for t in plan.trace] == pytest.approx([s for *_, s, _ in seen], abs=1e-5)
    for higher in (threshold + 2e-5, threshold + 1e-2):
        assert len(collapse(task, window, interval, higher, n)[0]) > 8 - n


def test_laco_says_when_its_steps_cannot_reach_a_size(task: PlanTask) -> None:
    from slm_exp.core.errors import PlanError

    with pytest.raises(PlanError, match=r"leave . of 8 layers at least.*method.interval=1"):
        METHODS["laco"](target_layers=2, window=2, interval=5).plan(task)


def scatter(alike: np.ndarray, run: range) -> float:
    return sum(1 - alike[i, j] for i, j in itertools.combinations(run, 2)) / len(run)


@pytest.mark.parametrize("n", range(1, 8))
def test_patches_are_the_segmentation_of_least_scatter(n: int) -> None:
    """Against every way to cut 8 items into n runs."""
    for seed in range(5):
        x = np.random.default_rng(seed).normal(size=(8, 12)).cumsum(0)
        alike = (x @ x.T) / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(x, axis=1))
        found = segments(alike, n)
        cuts = [(0, *c, 8) for c in itertools.combinations(range(1, 8), n - 1)]
        best = min(cuts, key=lambda c: sum(scatter(alike, range(a, b)) for a, b in itertools.pairwise(c)))
        assert found == list(itertools.pairwise(best))


def test_cka_patch_takes_its_windows_from_the_matrix(task: PlanTask) -> None:
    matrix = np.eye(8, dtype=np.float32)
    for a, b in ((1, 4), (5, 7)):
        matrix[a:b, a:b] = 0.9
    np.fill_diagonal(matrix, 1)
    task = replace(task, layer_similarity=replace(task.layer_similarity, matrix_LL=matrix))  # type: ignore[type-var]
    plan = METHODS["cka_patch"](target_layers=5).plan(task)
    assert plan.groups == ((1, 4), (5, 7))
    assert (plan.rule, plan.dropped) == ("top_layer", ())
    assert [t.score for t in plan.trace] == pytest.approx([0.9, 0.9])
    removed = METHODS["cka_patch"](target_layers=5, merge=False).plan(task)
    assert (removed.dropped, removed.groups, removed.rule) == ((2, 3, 6), (), "")
    keep_low = registry.available("merge_rule")["keep_low"]()
    same = METHODS["cka_patch"](target_layers=5).plan(replace(task, rule=keep_low))
    assert same.final_score == pytest.approx(removed.final_score, abs=1e-6)


def test_an_equal_matrix_merges_the_lowest_layers(task: PlanTask) -> None:
    alike = replace(task.layer_similarity, matrix_LL=np.ones((8, 8), np.float32))  # type: ignore[type-var]
    assert METHODS["cka_patch"](target_layers=5).plan(replace(task, layer_similarity=alike)).groups == ((0, 4),)


def test_random_follows_the_seed_and_first_and_last_do_what_they_say(task: PlanTask) -> None:
    drawn = {seed: METHODS["random"](target_layers=5).plan(replace(task, seed=seed)).dropped for seed in range(20)}
    assert len(set(drawn.values())) > 5
    assert set().union(*drawn.values()) == set(range(8))
    assert METHODS["random"](target_layers=5).plan(replace(task, seed=3)).dropped == drawn[3]
    for seed in range(10):
        run = METHODS["random"](target_layers=5, contiguous=True).plan(replace(task, seed=seed)).dropped
        assert run == (run[0], run[0] + 1, run[0] + 2)
    assert METHODS["first"](target_layers=5).plan(task).dropped == (0, 1, 2)
    assert METHODS["last"](target_layers=5).plan(task).dropped == (5, 6, 7)
    assert METHODS["last"](target_layers=5, protect_last=2).plan(task).dropped == (3, 4, 5)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(("first", "last"), [(0, 3), (4, 0), (3, 2)])
def test_protected_layers_stay_and_the_size_is_the_one_asked(first: int, last: int, name: str, task: PlanTask) -> None:
    for n in (1, 3 - METHODS[name].keeps_one):  # type: ignore[attr-defined]
        method = METHODS[name](target_layers=8 - n, protect_first=first, protect_last=last)
        plan = method.plan(task)
        touched = set(plan.dropped).union(*(range(g.start, g.stop) for g in plan.groups))
        assert plan.n_layers_out == 8 - n
        assert touched <= set(range(first, 8 - last))
        assert plan.target is not None
        assert (plan.target.asked, plan.target.complete, plan.target.layers) == (8 - n, True, 8 - n)
        assert (plan.method, plan.similarity, plan.threshold) == (name, "flat_cosine", None)


@pytest.mark.parametrize("name", BASELINES)
def test_nothing_to_remove_is_a_plan_too(name: str, task: PlanTask) -> None:
    plan = METHODS[name](target_layers=8).plan(task)
    assert (plan.n_layers_out, plan.final_score) == (8, pytest.approx(1))


@pytest.mark.parametrize("name", BASELINES)
def test_a_ratio_is_of_parameters(name: str, task: PlanTask) -> None:
    handle = task.handle
    share = sum(p.numel() for p in handle.layers[0].parameters()) / handle.n_params
    plan = METHODS[name](target_ratio=2.3 * share).plan(task)
    assert plan.n_layers_out == 6
    assert plan.target.layers == 6  # type: ignore[union-attr]


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(("settings", "message"), [
    ({}, "method={name} takes a size: set exactly one of method.target_layers or method.target_ratio.*got none"),
    ({"threshold": 0.9}, "method.threshold = 0.9; expected null.*Set method.target_layers or method.target_ratio"),
    ({"target_layers": 5, "target_ratio": 0.1}, "at most one"),
    ({"target_layers": 5, "protect_last": -1}, "method.protect_last = -1"),
    ({"target_layers": 5, "compensate": "magnitud"}, "method.compensate = magnitud.*Did you mean magnitude"),
])  # fmt: skip
def test_bad_settings_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.format(name=name)):
        METHODS[name](**settings)


@pytest.mark.parametrize("name", BASELINES)
def test_sizes_out_of_reach_are_refused_before_weights_load(name: str, make_tiny: Any) -> None:
    handle = make_tiny()
    for settings, message in (
        ({"target_layers": 9}, "method.target_layers = 9; expected . to 8"),
        ({"target_layers": 3, "protect_first": 4, "protect_last": 0}, "expected [45] to 8.*protect_first=4"),
        ({"target_ratio": 0.97}, r"target_ratio = 0.97.*nearest is"),
    ):
        with pytest.raises(ConfigError, match=message):
            METHODS[name](**settings).check_model(handle)
    assert not handle.loaded


def test_taylor_refuses_quantised_weights(make_tiny: Any) -> None:
    handle = make_tiny()
    handle.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ConfigError, match=r"method = shortened_taylor.*quantised"):
        METHODS["shortened_taylor"](target_layers=6).check_model(handle)
    assert not handle.loaded


def test_weights_are_whole_after_an_exception_in_the_middle(task: PlanTask, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {n: p.clone() for n, p in task.handle.model.state_dict().items()}
    import slm_exp.engine.gradients as gradients_module

    calls: list[int] = []

    def failing(value: Any) -> Any:
        calls.append(1)
        if len(calls) > 60:
            raise RuntimeError("out of memory")
        return value.clone() if isinstance(value, torch.Tensor) else value

    monkeypatch.setattr(gradients_module, "ordinary", failing)
    with pytest.raises(RuntimeError):
        METHODS["shortened_taylor"](target_layers=6).plan(task)
    assert all(torch.equal(before[n], p) for n, p in task.handle.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in task.handle.model.parameters())


@pytest.mark.parametrize(("dropped", "groups"), [
    ((), ()),
    ((3,), ((2, 4),)),
    ((3, 4), ((2, 5),)),
    ((1, 3), ((0, 2), (2, 4))),
    ((0,), ((0, 2),)),
    ((0, 1), ((0, 3),)),
    ((0, 2), ((0, 3),)),  # 1 is wanted by both
    ((0, 2, 4), ((0, 3), (3, 5))),
    ((0, 1, 3, 4, 7), ((0, 5), (6, 8))),
    ((7,), ((6, 8),)),
])  # fmt: skip
def test_runs_merge_into_the_layer_below(dropped: Any, groups: Any) -> None:
    assert merged_runs(dropped, 8) == groups


@pytest.mark.parametrize(("dropped", "groups"), [
    ((3,), ((2, 4),)),
    ((2, 3), ((2, 5),)),
    ((2, 5), ((2, 4), (4, 6))),
    ((2, 4), ((2, 5),)),  # 3 is wanted by both
])  # fmt: skip
def test_protected_layers_are_not_merged(dropped: Any, groups: Any) -> None:
    assert merged_runs(dropped, 8, range(2, 6)) == groups


@pytest.mark.parametrize(("free", "dropped"), [((2, 6), (2, 3, 4, 5)), ((2, 8), range(2, 8)), ((0, 6), range(6))])
def test_merging_needs_a_layer_that_is_not_protected(free: Any, dropped: Any, make_tiny: Any) -> None:
    with pytest.raises(PlanError, match=r"method\.merge = True.*method\.protect_first or method\.protect_last"):
        merged_runs(dropped, 8, range(*free))
    handle = make_tiny()
    with pytest.raises(ConfigError, match=r"protect_first=.*method\.merge=true one more stays"):
        METHODS["random"](target_layers=8 - len(dropped), merge=True, protect_first=free[0],
                          protect_last=8 - free[1]).check_model(handle)
    assert not handle.loaded


def test_a_method_leaves_its_protected_layers_out_of_the_merge(task: PlanTask) -> None:
    for p in task.handle.layers[4].parameters():
        p.data.mul_(0.5)  # so that 4 goes; of 4 and 5, which are not protected
    plan = METHODS["shortened_magnitude"](target_layers=7, merge=True).plan(task)
    assert plan.groups == ((4, 6),)


def test_merging_leaves_as_many_layers_as_removing() -> None:
    for n in range(8):
        for dropped in itertools.combinations(range(8), n):
            assert MergePlan(8, merged_runs(dropped, 8)).n_layers_out == 8 - n


@pytest.mark.parametrize("name", ["shortgpt", "angular", "random"])
def test_merging_with_keep_low_is_removing(name: str, task: PlanTask) -> None:
    """The kept layer below each run is the group's lowest; a run at the very bottom has none below."""
    settings = {"target_layers": 5, "protect_first": 1}
    removed = METHODS[name](**settings).plan(task)
    for rule in ("keep_low", "mean"):
        other = replace(task, rule=registry.available("merge_rule")[rule]())
        merged = METHODS[name](**settings, merge=True).plan(other)
        assert merged.n_layers_out == 5
        assert (merged.dropped, merged.rule) == ((), rule)
        alike = merged.final_score == pytest.approx(removed.final_score, abs=1e-6)
        assert alike == (rule == "keep_low")


def test_plans_of_removal_are_shared_between_rules() -> None:
    def plan_of(*overrides: str) -> Any:
        return compose_run(["model=tiny", "tracking=none", "method=shortgpt", "method.target_layers=5",
                            *overrides]).plan_identity()

    assert plan_of() == plan_of("merge_rule=mean")
    assert plan_of("method.merge=true") != plan_of("method.merge=true", "merge_rule=mean")
    assert plan_of() != plan_of("method.merge=true")
    assert plan_of() != plan_of("method.compensate=magnitude")
    quick = ["model=tiny", "tracking=none", "method=shortgpt", "method.target_layers=5", "merge_rule=mean"]
    assert compose_run(quick).advice() == ["merge_rule=mean plays no part: method=shortgpt merges nothing."]
    assert compose_run([*quick, "method.merge=true"]).advice() == []


def written(folder: Path, **plan: Any) -> str:
    data = {"n_layers": 8, **plan}
    path = folder / f"plan-of-{data['n_layers']}.json"
    path.write_text(json.dumps({k: v for k, v in data.items() if (k, v) != ("n_layers", None)}))
    return str(path)


def test_a_plan_is_replayed_whole(task: PlanTask, tmp_path: Path) -> None:
    made = METHODS["shortgpt"](target_layers=5, compensate="magnitude").plan(task)
    made.save(tmp_path)
    replayed = METHODS["from_plan"](path=str(tmp_path)).plan(task)
    assert replayed.effect() == made.effect()
    assert replayed.final_score == pytest.approx(made.final_score, abs=1e-6)
    assert "replays a plan of method=shortgpt" in replayed.notes[0]
    assert replayed.threshold is None
    assert replayed.target is None


def test_the_plans_rule_is_used_and_another_refused(tmp_path: Path) -> None:
    quick = ["model=tiny", "tracking=none", "method=from_plan",
             f"method.path={written(tmp_path, groups=[[2, 4]], rule='mean')}"]
    assert compose_run(quick).merge_rule.name == "mean"
    assert compose_run([*quick, "merge_rule=mean"]).run_id == compose_run(quick).run_id
    with pytest.raises(ConfigError, match=r"merge_rule = keep_top; expected mean, by which the plan merges"):
        compose_run([*quick, "merge_rule=keep_top"])
    written(tmp_path, dropped=[3], rule="mean")
    assert compose_run([*quick, "merge_rule=keep_top"]).merge_rule.name == "keep_top"  # nothing to merge
    written(tmp_path, groups=[[2, 4]])
    assert compose_run([*quick, "merge_rule=keep_top"]).merge_rule.name == "keep_top"  # the plan names none
    written(tmp_path, groups=[[2, 4]], rule="meen")
    with pytest.raises(ConfigError, match=r"rule of the plan in method.path = meen"):
        compose_run(quick)
    assert compose_run(["model=tiny", "tracking=none"]).merge_rule.name == DEFAULT_RULE


def test_a_plan_is_known_by_what_it_does(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()

    def identity(folder: str, **plan: Any) -> Any:
        return METHODS["from_plan"](path=written(tmp_path / folder, **plan)).identity()

    same = identity("a", dropped=[3], rule="mean")
    assert identity("b", dropped=[3], method="shortgpt", final_score=0.5) == same
    assert identity("b", dropped=[4]) != same
    cuts = {"kind": "magnitude", "cuts": [{"start": 3, "stop": 4, "alpha": 1.5}]}
    assert identity("b", dropped=[3], compensation=cuts) != same


@pytest.mark.parametrize(("contents", "message"), [
    (None, "there is no"),
    ("{", "is none"),
    ("[]", "is none"),
    ('{"groups": [[1, 1]]}', "outside a model"),
    ('{"dropped": [-1]}', "outside a model"),
    ('{"n_layers": 8, "grups": []}', "has the key 'grups'; expected n_layers, groups.* Did you mean groups"),
    ('{"n_layers": 8, "dropped": [9]}', "outside a model of 8"),
    ('{"n_layers": 8, "groups": [3]}', "is none"),
    ('{"n_layers": 8, "compensation": {"kind": "x", "cuts": []}}', "compensation.kind = 'x'; expected magnitude"),
    ('{"n_layers": 8, "compensation": {"kind": "magnitude", "cuts": [{"start": 2}]}}',
     r"compensation.cuts\[0\] has no"),
    ('{"n_layers": 8, "compensation": {"kind": "magnitude", "cuts": [{"start": 2, "stop": 3, "alpha": 0}]}}',
     "layers 2..2 has alpha = 0"),
])  # fmt: skip
def test_files_that_are_no_plans_are_refused(contents: str | None, message: str, tmp_path: Path) -> None:
    if contents is not None:
        (tmp_path / "plan.json").write_text(contents)
    with pytest.raises(ConfigError, match=rf"method.path = .*{message}"):
        METHODS["from_plan"](path=str(tmp_path))


def test_a_plan_for_another_depth_is_refused_before_weights_load(tmp_path: Path, make_tiny: Any) -> None:
    handle = make_tiny(layers=6)
    with pytest.raises(ConfigError, match=r"expected a plan for the 6 layers of tiny-llama. This one is for 8"):
        METHODS["from_plan"](path=written(tmp_path, dropped=[3])).check_model(handle)
    for plan, where in (({"groups": [[1, 3], [4, 7]], "rule": "mean"}, r"group \[4, 7\)"),
                        ({"dropped": [6]}, "dropped layer 6"), ({"dropped": list(range(6))}, "leaves none")):
        message = rf"method.path = .*expected a plan for tiny-llama: .*{where}.* of 6 layers"
        with pytest.raises(ConfigError, match=message):
            METHODS["from_plan"](path=written(tmp_path, n_layers=None, **plan)).check_model(handle)
    assert not handle.loaded


@pytest.mark.parametrize("plan", [
    {"groups": [[2, 5]], "dropped": [6], "rule": "mean"}, {"groups": [], "dropped": [7]},
    {"sublayers": [{"layer": 7, "kind": "mlp"}]}, {"width": "WIDTH"},
])  # fmt: skip
def test_groups_dropped_and_rule_suffice(plan: Any, tmp_path: Path, task: PlanTask) -> None:
    """How many layers there are, the model knows: the plan and the run_id are those of the file that says it too."""
    plan = {"width": WIDTH} if "width" in plan else plan
    if plan.get("rule"):
        task = replace(task, rule=registry.available("merge_rule")["mean"]())
    bare, whole = (METHODS["from_plan"](path=written(tmp_path, n_layers=n, **plan)) for n in (None, 8))
    bare.check_model(task.handle)
    assert bare.identity() == whole.identity()
    assert bare.plan(task) == whole.plan(task)


WIDTH = {
    "order": "after", "sizes": {"heads": [2] * 8, "kv_heads": [1] * 8, "channels": [8] * 8, "hidden": 32},
    "kept": {"query_heads": [[0, 1]] * 8, "kv_heads": [[0]] * 8, "channels": ["/w=="] * 8},
}  # fmt: skip


@pytest.mark.parametrize(("width", "message"), [
    ({"order": "after"}, "width has no sizes; it has order"),
    ({**WIDTH, "kept": {"query_heads": [[0, 1]] * 8, "kv_heads": [[0]] * 8}}, r"width\.kept has no channels"),
    ({**WIDTH, "kept": {**WIDTH["kept"], "kv_heads": [[2]] * 8}}, "key-value heads of layer 0, the highest 2"),
    ({**WIDTH, "sizes": {**WIDTH["sizes"], "heads": [2] * 7}}, r"width\.sizes\.kv_heads = 8 layers; expected 7"),
])  # fmt: skip
def test_a_plan_with_a_bad_width_is_refused_before_weights_load(
    width: Any, message: str, tmp_path: Path, make_tiny: Any
) -> None:
    handle = make_tiny()
    METHODS["from_plan"](path=written(tmp_path, width=WIDTH)).check_model(handle)
    with pytest.raises(ConfigError, match=rf"method\.path = .*json; .*{message}"):
        METHODS["from_plan"](path=written(tmp_path, width=width)).check_model(handle)
    assert not handle.loaded


def test_a_plan_narrowed_before_takes_no_new_compensation(tmp_path: Path) -> None:
    METHODS["from_plan"](path=written(tmp_path, width=WIDTH), compensate="magnitude")
    with pytest.raises(ConfigError, match=r"method\.compensate = magnitude; expected null: the plan in method\.path"):
        METHODS["from_plan"](path=written(tmp_path, width={**WIDTH, "order": "before"}), compensate="magnitude")


@pytest.mark.parametrize("recovery", ["reconstruct", "feature_distill"])
def test_a_plan_that_changes_the_stream_is_refused_where_streams_are_compared(recovery: str, tmp_path: Path) -> None:
    quick = ["model=tiny", "tracking=none", "method=from_plan", f"recovery={recovery}"]
    compose_run([*quick, f"method.path={written(tmp_path, width=WIDTH)}"])
    narrow_stream = {**WIDTH, "hidden": "/w==", "sizes": {**WIDTH["sizes"], "hidden": 8}}
    with pytest.raises(ConfigError, match=rf"method\.path = .*hidden size; recovery={recovery}"):
        compose_run([*quick, f"method.path={written(tmp_path, width=narrow_stream)}"])


@pytest.mark.parametrize(("settings", "message"), [
    ({}, "method.path = ''; expected a plan.json"),
    ({"path": "x", "target_layers": 5}, "method.target_layers = 5; expected null"),
    ({"path": "x", "threshold": 0.5}, "method.threshold = 0.5; expected null"),
])  # fmt: skip
def test_from_plan_takes_a_path_and_no_size(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        METHODS["from_plan"](**settings)
