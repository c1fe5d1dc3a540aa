"""The Python API: what docs/python.md and the notebooks show, executed; its steps are those of the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import slm_exp
from slm_exp import apply, compose, evaluate, find_plan, load, read_run, read_runs, recover, run
from slm_exp.cli.main import main as slm
from slm_exp.core.errors import ConfigError, DataError, PlanError, SlmError
from slm_exp.core.types import MergePlan
from slm_exp.models.files import no_checkpoint

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
TINY = ("model=tiny", "evaluation=none", "evaluation.corpora.news=heldout:news", "evaluation.ppl_seq_len=32",
        "calibration.n_samples=4", "calibration.seq_len=32", "tracking=none", "runtime=cpu")  # fmt: skip
SMALL_FIT = ("recovery.n_samples=8", "recovery.seq_len=64")


def on_the_tiny_model(code: str) -> str:
    """The same code for a model of 8 layers, whose bundled text is short."""
    code = code.replace("model=smollm2_135m", "model=tiny").replace("target_layers=26", "target_layers=6")
    code = code.replace('"], 26\n', '"], 6\n').replace("FIT = []", f"FIT = {SMALL_FIT}")
    return code.replace('"recovery=reconstruct")', f'"recovery=reconstruct", *{SMALL_FIT})')


@pytest.fixture(scope="module")
def study():
    return load(*TINY, "method.target_layers=6")


def test_importing_the_package_loads_nothing_and_the_names_are_there():
    program = "import sys, slm_exp; print(sorted(set(sys.modules) & {'torch', 'numpy', 'hydra', 'matplotlib'}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert set(slm_exp.__all__) <= set(dir(slm_exp))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        slm_exp.lod  # noqa: B018


def test_no_bar_of_another_package_shows_and_a_notebooks_own_stay(finished_run, tmp_path):
    model, folder = str(finished_run / "model"), str(tmp_path / "run")
    program = f"""
from transformers import AutoModelForCausalLM
from slm_exp import apply, find_plan, load, run
words = ("model=hf", "model.path={model}", *{TINY[1:]!r}, "method.target_layers=2")
study = load(*words)
small = apply(study, find_plan(study))
run(*words, folder={folder!r})
import warnings; warnings.warn("IProgress not found. Please update jupyter and ipywidgets.")  # tqdm's, in a kernel
import sys; print("now its own", file=sys.stderr)
AutoModelForCausalLM.from_pretrained({model!r})
"""
    bare = {k: v for k, v in os.environ.items() if "DISABLE" not in k}
    done = subprocess.run([sys.executable, "-c", program], env=bare, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, own = done.stderr.split("now its own")
    assert "it/s" in own
    assert "it/s" not in ours
    assert "IProgress" not in ours
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_the_pages_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)
    assert len([line for line in blocks[0].splitlines() if line]) <= 11, "an import and ten lines"
    names: dict[str, object] = {}
    for block in blocks:
        exec(on_the_tiny_model(block), names)
    assert isinstance(names["plan"], MergePlan)
    assert len(names["frame"]) == 1


def cells(notebook: Path) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]


def test_the_notebooks_run_on_the_tiny_model(tmp_path):
    """In a process of their own, since one declares a method; each with names of its own, as in a kernel."""
    programs = {path.name: "\n".join(map(on_the_tiny_model, cells(path))) for path in NOTEBOOKS}
    code = "import json, sys\nfor name, text in json.load(sys.stdin).items(): exec(compile(text, name, 'exec'), {})"
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(programs), cwd=tmp_path, capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_on_real_weights(notebook, tmp_path):
    program = "\n".join(cells(notebook))
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_steps_are_those_of_the_run(study, tmp_path):
    once = (*TINY, "method.target_layers=6", "save_model=false")
    finished = run(*once, folder=tmp_path / "run")
    plan = find_plan(study)
    assert finished.plan == plan
    assert finished.record.calibration.digest == study.tokens.digest
    assert np.array_equal(finished.similarity.matrix_LL, study.similarity.matrix_LL)
    assert finished.record.eval.compressed.perplexity == evaluate(study, apply(study, plan)).perplexity
    assert finished.record.eval.dense.perplexity == evaluate(study).perplexity
    for given in (finished, finished.folder, finished.folder / "plan.json"):
        assert apply(study, given).digest == apply(study, plan).digest
    stages = {stage.name: stage.cached for stage in finished.record.stages}
    again = read_run(run(*once, "seed=0", folder=tmp_path / "again").folder)
    assert {s.name: s.cached for s in again.record.stages} == {**stages, **dict.fromkeys(
        ("calibrate", "similarity", "evaluate_dense", "plan", "evaluate"), True)}


def test_a_plan_leaves_the_dense_weights_and_a_width_pruner_takes_part(study):
    before = [p.clone() for p in study.dense.model.parameters()]
    plan = find_plan(study, "width=magnitude", "width.ratio=0.3")
    assert plan.width is not None
    narrow = apply(study, plan)
    assert narrow.n_params < apply(study, find_plan(study)).n_params < study.dense.n_params
    better = recover(study, find_plan(study), "recovery=reconstruct", *SMALL_FIT)
    assert better.digest != apply(study, find_plan(study)).digest
    assert all(torch.equal(a, b) for a, b in zip(before, study.dense.model.parameters(), strict=True))


def test_a_plan_brings_its_rule(study):
    plan = find_plan(study, "merge_rule=mean")
    by_mean = apply(study.with_("merge_rule=mean"), plan)
    assert apply(study, plan).digest == by_mean.digest
    bare = MergePlan(8, groups=plan.groups)
    assert apply(study, bare).digest == apply(study, MergePlan(8, groups=plan.groups, rule="top_layer")).digest


def test_frames_have_a_row_per_run_whatever_its_state(finished_run, tmp_path):
    for name, status in (("a", "finished"), ("b", "failed")):
        (tmp_path / name).mkdir()
        record = json.loads((finished_run / "record.json").read_text()) | {"status": status}
        (tmp_path / name / "record.json").write_text(json.dumps(record))
    frame = read_runs(tmp_path, finished_run)
    assert list(frame["state"]) == ["damaged", "failed", "finished"]
    assert frame["layers/after"].nunique() == 1
    assert frame["config/method/threshold"].iloc[0] == 0.5
    with pytest.raises(SlmError, match="holds no run"):
        read_runs(ROOT / "docs")


@pytest.mark.parametrize(("call", "said"), [
    (lambda: compose("method.treshold=1"), "Did you mean threshold"),
    (lambda: compose("method.threshold=0.9,0.8"), "several values make a sweep"),
    (lambda: compose("hydra.run.dir=x"), "folder=FOLDER"),
    (lambda: load("model=tiny", "calibration.seq_len=100000"), "calibration.seq_len = 100000"),
])  # fmt: skip
def test_a_wrong_call_is_refused_before_anything_loads(call, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        call()


def test_what_does_not_fit_the_study_is_refused(study, tmp_path):
    with pytest.raises(ConfigError, match="for the model that is loaded"):
        find_plan(study, "model.layers=6")
    (tmp_path / "short.jsonl").write_text('{"text": "a word"}\n')
    with pytest.raises(DataError, match=r"recovery\.n_samples"):
        recover(study, find_plan(study), "recovery=reconstruct", f"recovery.path={tmp_path / 'short.jsonl'}")
    with pytest.raises(PlanError, match="9 layers"):
        apply(study, MergePlan(9, dropped=(1,)))


def test_a_member_of_a_cell_can_be_tried_but_not_run(study, tmp_path):
    """Its code has no file, so nothing could repeat the run and no key could see an edit."""
    text = ("@register('method', 'of_a_cell')\n@dataclass\nclass Cell(Baseline):\n"
            "    def choose(self, task, n_remove):\n        return Selection(({at},))\n")  # fmt: skip
    imports = ("from dataclasses import dataclass\nfrom slm_exp.core.registry import register\n"
               "from slm_exp.methods.base import Baseline, Selection\n")  # fmt: skip
    for at in (3, 5):
        exec(imports + text.format(at=at), {"__name__": "__cell__"})
        assert find_plan(study, "method=of_a_cell", "method.target_layers=7").dropped == (at,)
    with pytest.raises(ConfigError, match=r"defined in __cell__.*plugin=\[FILE\]"):
        run(*TINY, "method=of_a_cell", "method.target_layers=7", folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_slm_merge_writes_the_checkpoint_of_the_run(finished_run, tmp_path, capsys):
    assert slm(["merge", "tiny", str(finished_run), str(tmp_path / "out")]) == 0
    assert "of 8 layers" in capsys.readouterr().out
    from safetensors.torch import load_file

    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "out", finished_run / "model"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert MergePlan.load(tmp_path / "out").effect() == MergePlan.load(finished_run).effect()
    assert slm(["merge", str(finished_run / "model"), str(finished_run), str(tmp_path / "no")]) == 2
    assert "a plan for the" in capsys.readouterr().err


@pytest.mark.parametrize(("out", "said"), [
    ("run", "it has no config.json"), ("notes", "it holds notes.txt"), ("both", "it holds record.json"),
    ("a link", "it is no folder"), ("a file", "it is no folder"),
])  # fmt: skip
def test_slm_merge_replaces_a_checkpoint_and_nothing_else(out, said, finished_run, tmp_path, capsys):
    """A run's folder has a plan.json too: its record and samples were lost."""
    for name, source in (("run", "."), ("notes", "model"), ("both", "model")):
        shutil.copytree(finished_run / source, tmp_path / name)
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    shutil.copy(finished_run / "record.json", tmp_path / "both")
    (tmp_path / "a link").symlink_to(finished_run / "model")
    (tmp_path / "a file").write_text("mine")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert slm(["merge", "tiny", str(finished_run), str(tmp_path / out)]) == 2
    assert said in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert no_checkpoint(finished_run / "model") is None


@pytest.mark.parametrize(("words", "said"), [
    (["tiyn", "PLAN", "out"], "Did you mean tiny?"),
    (["tiny", "nowhere", "out"], "PLAN = nowhere; expected a plan.json, or the folder of a run. There is no nowhere."),
    (["tiny", "PLAN", "."], "OUT = .; expected a new folder"),
    (["tiny", "PLAN", "out", "merge_rule=maen"], "Did you mean mean?"),
])  # fmt: skip
def test_slm_merge_refuses_a_wrong_call_in_a_line(words, said, finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert slm(["merge", *(str(finished_run) if word == "PLAN" else word for word in words)]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
