"""Stages are declared once: their keys cover what they read and what computes them; the forecast walks them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slm_exp.core.registry import available
from slm_exp.forecast.walk import Lookup, walk
from slm_exp.launch.compose import compose_run
from slm_exp.methods.base import Method
from slm_exp.pipeline import stages
from slm_exp.pipeline.run import run

TINY = ["model=tiny", "model.layers=5", "calibration.n_samples=2", "calibration.seq_len=24", "tracking=none",
        "evaluation=none", "save_model=false"]  # fmt: skip
INFRASTRUCTURE = ("core/", "pipeline/", "runs/", "launch/", "kernels/__init__.py",
                  "engine/progress.py")
"""What carries values and errors about and computes none."""
COMPUTES = ("core/types.py", "core/widths.py", "core/text.py")
"""But these, which hold values or read them, are declared."""
CONFIGS = {
    "slm": [],
    "reconstruct": ["method=shortgpt", "method.target_layers=4", "recovery=reconstruct", "recovery.n_samples=4",
                    "recovery.seq_len=24"],
    "chain": ["method=shortgpt", "method.target_layers=4", "recovery=chain",
              "recovery.steps=[{name: reconstruct, n_samples: 4, seq_len: 24}]"],
    "regression": ["merge_rule=regression", "merge_rule.n_samples=4", "merge_rule.seq_len=24", "merge_rule.steps=2"],
    "after": ["similarity=token_cosine", "similarity.after=reconstruct", "similarity.fit_samples=4",
              "similarity.fit_seq_len=24"],
    "cka": ["similarity=cka", "kernel=rbf"],
    "width": ["width=llm_pruner", "width.ratio=0.2"],
    "before": ["width=flap", "width.ratio=0.2", "width.order=before"],
    "greedy": ["method=blockpruner", "method.target_sublayers=2"],
    "share": ["method=blockpruner", "method.target_ratio=0.2"],
    "measured": ["method=shortgpt", "method.target_layers=4", "evaluation.corpora.news=heldout:news"],
    "joint": ["method=joint", "method.target_layers=4", "method.fit_samples=4", "method.fit_seq_len=24",
              "recovery=reconstruct", "recovery.n_samples=4", "recovery.seq_len=24", "recovery.layers=sublayers"],
    "latency": ["method=blockpruner", "method.target_latency=70%", "method.length=16"],
    "compensated": ["method=shortgpt", "method.target_layers=3", "method.compensate=magnitude"],
}  # fmt: skip


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Runs of CONFIGS, whose stages are all in one cache."""
    cache = tmp_path_factory.mktemp("stages")
    for name, overrides in CONFIGS.items():
        run(compose_run([*TINY, *overrides, f"cache.dir={cache / 'cache'}"]), cache / name)
    return cache / "cache"


STAGES = [("slm", "calibrate"), ("slm", "similarity"), ("slm", "plan"), ("after", "plan"), ("cka", "plan"),
          ("regression", "plan"), ("joint", "plan"), ("joint", "recover"),
          ("latency", "latency"), ("latency", "plan"), ("greedy", "plan"), ("compensated", "plan"),
          ("width", "width"), ("width", "narrowed_score"),
          ("before", "width"), ("before", "plan"), ("reconstruct", "recover"), ("chain", "held_out"),
          ("measured", "evaluate_dense"), ("measured", "evaluate")]  # fmt: skip


@pytest.fixture(scope="module")
def closures(filled):
    """Of every one of STAGES: the files that ran, and those it declares."""
    jobs = [(stage, [*TINY, *CONFIGS[config], f"cache.dir={filled}"]) for config, stage in STAGES]
    script = Path(__file__).with_name("closure.py")
    ran = subprocess.run([sys.executable, str(script)], input=json.dumps(jobs), capture_output=True, text=True,
                         check=False)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    told = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith('{"used"')]
    return dict(zip(STAGES, told, strict=True))


@pytest.mark.parametrize(("config", "stage"), STAGES)
def test_a_stage_declares_every_file_that_computes_it(closures, config, stage):
    told = closures[config, stage]
    assert len(told["used"]) > 2
    missed = [f for f in told["used"] if f not in told["declared"]
              and (f in COMPUTES or not f.startswith(INFRASTRUCTURE))]
    assert not missed, f"the {stage} stage runs code that its key does not see"


METHODS = [name for name in available("method") if name != "from_plan"]


@st.composite
def configs(draw):
    """Overrides of a small run: any method, scores, rules, widths in both orders, recoveries."""
    method = draw(st.sampled_from(METHODS))
    cls = available("method")[method]
    out = [f"method={method}"]
    if cls.narrows is not Method.narrows:
        return CONFIGS["joint"] + [f"seed={draw(st.integers(0, 1))}"]
    if "target_sublayers" in getattr(cls, "targets", ()):
        out.append("method.target_sublayers=2")
    elif method != "slm" or draw(st.booleans()):
        out.append(f"method.target_layers={draw(st.integers(3, 4))}")
        out += ["method.protect_first=0", "method.protect_last=1"] if method == "slm" else [
            "method.protect_first=0", "method.protect_last=0"]
    else:
        out.append(f"method.threshold={draw(st.sampled_from([0.5, 0.9]))}")
    rule = draw(st.sampled_from(sorted(available("merge_rule"))))
    out += [f"merge_rule={rule}", f"seed={draw(st.integers(0, 1))}"]
    out += CONFIGS["regression"][1:] if rule == "regression" else []
    out += draw(st.sampled_from([[], ["similarity=token_cosine"], ["similarity=cka", "kernel=rbf"], CONFIGS["after"]]))
    out += draw(st.sampled_from([[], ["width=magnitude"], ["width=wanda_sp", "width.order=before"]]))
    recovery = ["recovery=reconstruct", "recovery.n_samples=4", "recovery.seq_len=24"]
    return out + draw(st.sampled_from([[], recovery, CONFIGS["chain"][2:]]))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("forecast")


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(overrides=configs())
def test_the_forecast_names_the_keys_that_the_run_stores(shared, overrides):
    keys_agree(shared, overrides)


def test_the_forecast_names_the_keys_of_a_share_in_sublayers(shared):
    keys_agree(shared, CONFIGS["share"])


def test_the_forecast_reads_the_times_that_a_run_measured(shared, monkeypatch):
    keys_agree(shared, CONFIGS["latency"])
    cfg = compose_run([*TINY, *CONFIGS["latency"], f"cache.dir={shared / 'cache'}"])
    sketch = cfg.model.sketch(Path(cfg.cache.dir), "cpu")
    outline = walk(cfg, sketch, Lookup(Path(cfg.cache.dir)), save_model=False)
    assert (outline.stages["latency"], outline.method.unmeasured) == ("cached", False)
    monkeypatch.setattr("slm_exp.engine.latency.measure", None)  # a forecast measures nothing
    cfg = compose_run([*TINY, *CONFIGS["latency"], "method.batch=2", f"cache.dir={shared / 'cache'}"])
    outline = walk(cfg, sketch, Lookup(Path(cfg.cache.dir)), save_model=False)
    assert (outline.stages["latency"], outline.method.unmeasured) == ("compute", True)


def keys_agree(folder: Path, overrides: list[str]) -> None:
    """Run; then the forecast of the same run must find every stage in the cache, under the keys the run used."""
    cfg = compose_run([*TINY, *overrides, f"cache.dir={folder / 'cache'}"])
    stored: dict[str, str] = {}
    key = stages.Stage.key

    def recorded(self, x, inputs):
        value = key(self, x, inputs)
        stored[self.name] = value
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.Stage, "key", recorded)
        run(cfg, folder / cfg.run_id)
        by_run = dict(stored)
        stored.clear()
        model = cfg.model.sketch(Path(cfg.cache.dir), "cpu")
        outline = walk(cfg, model, Lookup(Path(cfg.cache.dir)), save_model=False)
    assert {name: stored[name] for name in stored if name in by_run} == {n: k for n, k in by_run.items() if n in stored}
    assert set(stored) >= {"calibrate", "similarity", "evaluate_dense", "plan"} - {"evaluate_dense"}
    for stage in ("calibrate", "similarity", "plan"):
        assert outline.stages[stage] == "cached", stage


def test_a_key_field_that_the_forecast_lacks_is_found(tmp_path, monkeypatch):
    """The test above can fail: with a field dropped on the forecast's side the keys part."""
    original = stages.PLAN.inputs
    state = {"running": True}

    def forgetful(x):
        inputs = original(x)
        return inputs if state["running"] else {k: v for k, v in inputs.items() if k != "rule"}

    plan = stages.replace(stages.PLAN, inputs=forgetful)
    monkeypatch.setattr(stages, "PLAN", plan)
    cfg = compose_run([*TINY, f"cache.dir={tmp_path / 'cache'}"])
    run(cfg, tmp_path / "run")
    state["running"] = False
    outline = walk(cfg, cfg.model.sketch(tmp_path, "cpu"), Lookup(tmp_path / "cache"), save_model=False)
    assert outline.stages["plan"] != "cached"
