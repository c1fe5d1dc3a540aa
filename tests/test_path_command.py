"""`slm path` and sizes asked for: against single runs, interrupted, and called wrongly. Random tiny models."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders.models import new_task
from builders.runs import QUICK, tiny_config, tiny_run

from slm_exp.cli.main import main as slm
from slm_exp.cli.path import main
from slm_exp.core.errors import ConfigError, PlanError, StageError
from slm_exp.core.registry import available
from slm_exp.methods.slm import SLM
from slm_exp.models.base import ModelHandle
from slm_exp.pipeline import run as pipeline
from slm_exp.reporting.budgets import BUDGETS
from slm_exp.reporting.staircase import fronts
from slm_exp.search.path import Path as ThresholdPath
from slm_exp.search.path import PathPlan, follow
from slm_exp.search.scoring import ScoringEngine
from slm_exp.search.task import PlanTask

ROOT = Path(__file__).resolve().parents[1]
WIDE = "method.threshold_range=[-1.0,1.0]"


@pytest.fixture
def task(tiny_handle: Any, tokens: Any, tmp_path: Path) -> PlanTask:
    return new_task(tiny_handle, tokens, cache=tmp_path / "cache")


def path_of(task: PlanTask, low: float = -1, high: float = 1) -> tuple[ThresholdPath, ScoringEngine]:
    start = SLM().start(task.handle.n_layers)
    scorer = ScoringEngine(task, top=start.high)
    return follow(scorer, start, task.handle.n_layers, low, high), scorer


COMBINATIONS = [
    *((rule, "flat_cosine", "linear") for rule, kind in available("merge_rule").items() if not kind.fits),  # type: ignore[attr-defined]
    *(("top_layer", similarity, "linear") for similarity in available("similarity")),
    *(("mean", "cka", kernel) for kernel in available("kernel")),
]


@pytest.mark.parametrize(("rule", "similarity", "kernel"), COMBINATIONS)
def test_the_path_agrees_with_single_searches_for_any_rule_score_and_kernel(
    rule: str, similarity: str, kernel: str, task: PlanTask
) -> None:
    task = replace(
        task, rule=available("merge_rule")[rule](), similarity=available("similarity")[similarity](),
        kernel=available("kernel")[kernel](),
    )  # type: ignore[arg-type]  # fmt: skip
    path, scorer = path_of(task)
    assert path.evaluations == scorer.evaluations
    assert (path.plans[0].low, path.plans[-1].high) == (-1, 1)
    for plan in path.plans:
        inside = [plan.low, (plan.low + plan.high) / 2, math.nextafter(plan.high, -1)]
        for threshold in inside:
            single = SLM(threshold=threshold).plan(task)
            assert single.groups == tuple(sorted(plan.groups)), threshold
            assert single.final_score == plan.final_score


def test_the_command_writes_what_the_contract_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([*QUICK, WIDE, f"cache.dir={tmp_path / 'c'}", f"hydra.run.dir={out}"]) == 0
    path = json.loads((out / "path.json").read_text())
    assert path["range"] == [-1, 1]
    assert path["unknown"] == []
    plans = path["plans"]
    assert (plans[0]["threshold_low"], plans[-1]["threshold_high"]) == (-1, 1)
    assert all(a["threshold_high"] == b["threshold_low"] for a, b in itertools.pairwise(plans))
    assert all(a["groups"] != b["groups"] for a, b in itertools.pairwise(plans))
    for plan in plans:
        assert plan["n_layers"] == 8 - sum(stop - start - 1 for start, stop in plan["groups"])
    assert plans[-1]["final_score"] == 1
    sizes = {size["n_layers"]: size for size in path["sizes"]}
    assert set(sizes) == {plan["n_layers"] for plan in plans}
    assert sizes[8]["ratio_removed"] == 0
    for n, size in sizes.items():
        assert size["best_final_score"] == max(p["final_score"] for p in plans if p["n_layers"] == n)
        assert size["latency_s"] > 0
    flops = [sizes[n]["flops_per_token"] for n in sorted(sizes)]
    assert flops == sorted(flops)
    assert all(size["bytes"] == 4 * size["params"] for size in path["sizes"])
    for budget in BUDGETS:
        front = [s for s, best in zip(path["sizes"], fronts(path["sizes"])[budget], strict=True) if best]
        scores = [s["best_final_score"] for s in sorted(front, key=lambda s: s[budget])]
        assert scores == sorted(set(scores))  # what costs more is better
        for size in path["sizes"]:  # and every size is matched by one on the front that costs no more
            assert any(s[budget] <= size[budget] and s["best_final_score"] >= size["best_final_score"] for s in front)
    for picture in ("path.png", "budgets.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    page = (out / "path.md").read_text()
    assert page in capsys.readouterr().out
    assert page.count("\n| ") == len(plans) + len(sizes) + 2
    # one run at a threshold in the middle of the path makes that plan, from the same scores
    middle = plans[len(plans) // 2]
    threshold = (middle["threshold_low"] + middle["threshold_high"]) / 2
    record = tiny_run(tmp_path / "run", f"method.threshold={threshold}", cache=tmp_path / "c")
    assert record["plan"]["groups"] == middle["groups"]
    assert record["plan"]["final_score"] == middle["final_score"]


def test_a_budget_ends_it_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, computed = ScoringEngine.compute, []
    monkeypatch.setattr(
        ScoringEngine, "compute", lambda self, slots, *more: computed.append(slots) or compute(self, slots, *more)
    )
    call = [*QUICK, WIDE, f"cache.dir={tmp_path / 'c'}", f"hydra.run.dir={tmp_path / 'out'}"]
    assert main([*call, "method.max_evaluations=5"]) == 1
    part = json.loads((tmp_path / "out" / "path.json").read_text())
    assert part["evaluations"] == len(computed) == 5
    pieces = [[p["threshold_low"], p["threshold_high"]] for p in part["plans"]] + part["unknown"]
    pieces.sort()
    assert (pieces[0][0], pieces[-1][1]) == (-1, 1)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
    error = capsys.readouterr().err
    assert "method.max_evaluations = 5 ended the path" in error
    assert f"[{part['unknown'][0][0]:.4f}, " in error
    assert main(call) == 0
    whole = json.loads((tmp_path / "out" / "path.json").read_text())
    assert whole["unknown"] == []
    assert len(computed) == len(set(computed)) == whole["evaluations"]


def test_a_killed_path_resumes_with_every_score_it_had(tmp_path: Path) -> None:
    """SIGKILL in the middle; what is computed afterwards are the scores that were missing."""
    arguments = [*QUICK, "model.layers=14", WIDE, f"cache.dir={tmp_path / 'c'}", f"hydra.run.dir={tmp_path / 'out'}"]
    command = [sys.executable, "-m", "slm_exp.cli", "path", *arguments]
    journals = lambda: list((tmp_path / "c").rglob("journal.jsonl"))  # noqa: E731
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (journals() and journals()[0].read_bytes().count(b"\n") > 20):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "path.json").exists()
    before = journals()[0].read_bytes().count(b"\n")
    assert main(arguments) == 0
    path = json.loads((tmp_path / "out" / "path.json").read_text())
    after = journals()[0].read_bytes().count(b"\n")
    assert before > 20
    assert after <= path["evaluations"] + 1  # one line may be torn


@pytest.mark.parametrize(("overrides", "message"), [
    (["method.threshold_range=[0.9,0.8]"], "method.threshold_range"),
    (["method.treshold_range=[0.8,0.9]"], "threshold_range"),
    (["merge_rule=top"], "merge_rule"),
    (["hydra.run.dir=/proc/nowhere"], "/proc/nowhere"),
])  # fmt: skip
def test_wrong_calls_are_refused_before_weights_load(
    overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ModelHandle, "model", property(lambda self: pytest.fail("its weights were loaded")))
    assert slm(["path", *QUICK, *overrides]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown




@pytest.mark.parametrize(("words", "name"), [
    (["hydra.run.dir=TMP/a", "hydra.run.dir=TMP/b"], "b"), (["hydra.run.dir='TMP/o\\'brien, v2'"], "o'brien, v2"),
    (['hydra.run.dir="TMP/it\'s"'], "it's"),
])  # fmt: skip
def test_the_folder_is_the_one_that_hydra_reads(
    words: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Path]()
    monkeypatch.setattr("slm_exp.cli.path.check_writable", asked.append)
    monkeypatch.setattr("slm_exp.cli.follow.follow_and_write", lambda cfg, out, wanted: 0)
    assert main([*QUICK, *(word.replace("TMP", str(tmp_path)) for word in words)]) == 0
    assert asked == [tmp_path / name]
    with pytest.raises(ConfigError, match=r"hydra\.run\.dir='open"):
        main([*QUICK, "hydra.run.dir='open"])


def test_every_size_is_the_best_plan_of_that_size(task: PlanTask) -> None:
    path, _ = path_of(task)
    for layers in range(2, 9):
        of_size = [p for p in path.plans if p.n_layers == layers]
        if not of_size:
            continue
        best: PathPlan = max(of_size, key=lambda p: p.final_score)
        plan = SLM(target_layers=layers, threshold_range=[-1, 1]).plan(task)
        assert plan.groups == tuple(sorted(best.groups))
        assert plan.final_score == best.final_score
        target = plan.target
        assert target is not None
        assert (target.asked, target.complete, target.layers) == (layers, True, layers)
        assert target.threshold == (best.low, best.high)
        assert plan.threshold is not None
        assert SLM(threshold=plan.threshold).plan(task).groups == plan.groups
        at = path.plans.index(best)
        beside = [path.plans[i] for i in (at - 1, at + 1) if 0 <= i < len(path.plans)]
        assert [n.n_layers for n in target.neighbours or ()] == [p.n_layers for p in beside]
        sizes = {size.n_layers: size for size in target.sizes or ()}
        assert sizes.keys() >= {layers, *(p.n_layers for p in beside)}
        assert sizes[layers].best_final_score == best.final_score
        costs = [sizes[n].flops_per_token for n in sorted(sizes)]
        assert costs == sorted(set(costs))
        assert all(size.latency_s > 0 for size in sizes.values())


def run_tiny(tmp_path: Path, *overrides: str) -> dict[str, Any]:
    cfg = tiny_config(tmp_path / "c", *overrides)
    return pipeline.run(cfg, tmp_path / cfg.run_id)


def test_a_ratio_is_the_nearest_number_of_layers(tmp_path: Path) -> None:
    record = run_tiny(tmp_path, WIDE, "method.target_ratio=0.35")  # a tiny layer is 11.2 %
    assert record["layers"] == {"before": 8, "after": 5}
    assert record["plan"]["target"]["asked"] == 0.35
    assert record["params"]["ratio_removed"] == pytest.approx(0.337, abs=1e-3)
    assert record["plan"]["groups"] == run_tiny(tmp_path, WIDE, "method.target_layers=5")["plan"]["groups"]


def test_a_budget_marks_the_size_incomplete_or_names_what_was_met(task: PlanTask) -> None:
    sized = {"target_layers": 6, "threshold_range": [-1, 1]}
    whole = SLM(**sized).plan(task)
    first_size = next(n for n in range(1, whole.evaluations + 1) if finds(sized, n, task))
    assert first_size > 1
    for budget in range(1, first_size):
        with pytest.raises(PlanError, match=f"method.max_evaluations = {budget} ended the search"):
            SLM(**sized, max_evaluations=budget).plan(task)
    plans = [SLM(**sized, max_evaluations=n).plan(task) for n in range(first_size, whole.evaluations + 1)]
    assert all(plan.n_layers_out == 6 for plan in plans)
    for budget, plan in enumerate(plans, first_size):
        assert plan.evaluations <= budget
    complete = [plan.target.complete for plan in plans if plan.target]
    assert complete == sorted(complete)
    assert complete[-1]
    assert plans[-1].groups == whole.groups


def finds(sized: dict[str, Any], budget: int, task: PlanTask) -> bool:
    try:
        SLM(**sized, max_evaluations=budget).plan(task)
    except PlanError:
        return False
    return True


def test_a_size_that_no_threshold_in_the_range_gives_fails_the_run_and_names_others(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"no threshold in \[0.99, 1\) leaves 3 of 8 layers.*method.threshold_range"):
        run_tiny(tmp_path, "method.threshold_range=[0.99,1.0]", "method.target_layers=3")
    (record,) = [json.loads(p.read_text()) for p in tmp_path.glob("*/record.json")]
    assert record["status"] == "failed"
    assert record["error"]["stage"] == "plan"


@pytest.mark.parametrize(("override", "message"), [
    ("method.target_layers=1", r"method.target_layers = 1; expected 2 to 8"),
    ("method.target_layers=9", r"method.target_layers = 9; expected 2 to 8"),
    ("method.target_ratio=0.95", r"method.target_ratio = 0.95.*nearest is 0.675 \(2 of 8 layers left\)"),
])  # fmt: skip
def test_sizes_out_of_reach_are_refused_before_weights_load(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slm_exp.models.base import ModelHandle

    monkeypatch.setattr(ModelHandle, "model", property(lambda self: pytest.fail("weights were loaded")))
    with pytest.raises((ConfigError, StageError), match=message):
        run_tiny(tmp_path, override)
