"""The entry point: what a user types, and the message when it is wrong."""

import dataclasses
import importlib.util
import itertools
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from slm_exp.cli import run as entry_point
from slm_exp.core.errors import ConfigError
from slm_exp.core.registry import GROUPS, available
from slm_exp.launch import jobs
from slm_exp.launch.compose import Composer, compose_raw, compose_run, conf_dir
from slm_exp.launch.hydra_compat import probes
from slm_exp.models.packaged import Packaged

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["model=tiny", "evaluation=none", "tracking=none"]


def python_m(*args: str, cwd: Path = ROOT, module: str = "slm_exp", **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-m", module, *args], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": path, **env})


def presets(group: str) -> list[str]:
    return sorted(p.stem for p in (conf_dir() / group).glob("*.yaml"))


@pytest.mark.parametrize("group", GROUPS)
def test_every_member_composes_and_has_an_identity(group):
    for name in {*available(group), *presets(group)} - {"from_plan", "jsonl", "tokens", "hf", "cuda"}:
        sizes = getattr(available(group).get(name), "targets", ())  # a method that takes a size takes no default
        package = getattr(available(group).get(name), "package", "")
        if package and importlib.util.find_spec(package) is None:
            continue
        words = [*[f"{group}.target_ratio=0.1"] * ("target_ratio" in sizes),
                 *["recovery.steps=[reconstruct]"] * (name == "chain")]
        cfg = compose_run(["model=tiny", f"{group}={name}", *words])
        member = getattr(cfg, group)
        if isinstance(member, Packaged) and any(importlib.util.find_spec(part[0]) is None for part in member.parts):
            with pytest.raises(ConfigError, match=rf"{name}[\s\S]*make assets"):
                member.identity()
        else:
            assert member.identity()["name"] in available(group), name


@pytest.mark.parametrize("name", presets("experiment"))
def test_every_experiment_composes(name):
    first = (conf_dir() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    words = first.removeprefix("# python -m slm_exp ").split()
    assert words[0] == f"experiment={name}"
    assert compose_run(words).run_id


@pytest.mark.parametrize("name", presets("sweep"))
def test_every_sweep_composes_job_by_job(name):
    sweeper = compose_raw([f"sweep={name}"], with_hydra=True).hydra.sweeper
    given = [f"sweep={name}"], dict(sweeper.params)
    cells = jobs.split_sweep(*given) if sweeper.search is None else probes(jobs.search_axes(*given))
    composer = Composer()
    ids = [composer.run_config([o for o in job if not o.startswith("hydra")]).run_id for job in cells]
    assert len(ids) > 1
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("path", sorted(conf_dir().rglob("*.yaml")), ids=lambda p: p.stem)
def test_presets_open_with_the_command_that_runs_them(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("# "), path
    if path.parent.name in ("experiment", "sweep"):
        assert first.split()[:5] == ["#", "python", "-m", "slm_exp", f"{path.parent.name}={path.stem}"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("kernel=rbff", ["kernel = rbff", "expected one of", "laplacian", "Did you mean rbf?"]),
        ("method.treshold=0.8", ["there is no method.treshold", "Did you mean threshold?"]),
        ("kernell=rbf", ["there is no kernell", "Did you mean kernel?"]),
        ("seeed=1", ["there is no seeed", "Did you mean seed?"]),
        ("+model.extra=1", ["there is no model.extra"]),
        ("method.threshold=high", ["method.threshold=high", "'high'", "Float"]),
        ("method.threshold=1.3", ["method.threshold = 1.3", "[-1, 1]", "try 0.9"]),
        ("model.dtype=int8", ["model.dtype = int8", "float32", "bfloat16"]),
        ("calibration.n_samples=0", ["calibration.n_samples = 0", ">= 1"]),
        ("similarity.estimator=unbaised", ["similarity.estimator = unbaised", "Did you mean unbiased?"]),
        ("evaluation.limit=0", ["evaluation.limit = 0", ">= 1"]),
        ("runtime.device=tpu", ["runtime.device = tpu", "cuda"]),
        ("runtime.device=cpu:1:2", ["runtime.device = cpu:1:2", "cuda:N"]),
        ("model.device='cuda:x'", ["model.device = cuda:x", "cuda:N"]),
        ("seed=-1", ["seed = -1", ">= 0"]),
        ("experiment=dem", ["experiment = dem", "demo"]),
    ],
)
def test_a_wrong_setting_says_where_what_wanted_and_what_to_do(override, said):
    with pytest.raises(ConfigError) as error:
        compose_run(["model=tiny", "tracking=none", override])
    for part in said:
        assert part in str(error.value), str(error.value)


def test_two_ways_of_asking_for_a_size_are_refused():
    with pytest.raises(ConfigError, match=r"at most one of.*method.threshold = 0.8.*method.target_layers = 4"):
        compose_run(["model=tiny", "method.threshold=0.8", "method.target_layers=4"])


def test_run_id_is_science_only():
    base = compose_run(QUICK).run_id
    for same in ("tracking=wandb", "runtime=cpu", "runtime.threads=1", "evaluation.batch_size=3", "model.device=cpu",
                 "cache.dir=/nowhere", "save_model=false"):
        assert compose_run([*QUICK, same]).run_id == base, same
    others = ["seed=1", "method.threshold=0.91", "merge_rule=mean", "kernel=rbf", "similarity=cka", "model.seed=5",
              "calibration.n_samples=11", "kernel=cosine", "kernel=angular"]
    ids = [compose_run([*QUICK, other]).run_id for other in others]
    assert len({base, *ids}) == len(others) + 1


def test_sweeps_are_named_by_what_they_are():
    def folder(*overrides: str) -> str:
        return str(compose_raw(overrides, with_hydra=True).hydra.sweep.dir)

    assert folder("sweep=threshold_rule") == "outputs/multirun/threshold_rule"
    assert folder("sweep=threshold_rule", "seed=1") != folder("sweep=threshold_rule", "seed=2")
    assert folder("seed=1", "kernel=rbf") == folder("kernel=rbf", "seed=1")


def test_help_and_cfg_answer():
    shown = python_m("--help")
    assert shown.returncode == 0
    assert "method.threshold=0.8 kernel=rbf" in shown.stdout
    composed = python_m("--cfg", "job", "method.threshold=0.7")
    assert "threshold: 0.7" in composed.stdout


def test_cfg_of_a_grid_shows_its_first_job(capsys):
    assert entry_point.main(["-m", "merge_rule=mean,keep_low", "seed=7,2", "--cfg", "job"]) == 0
    shown = capsys.readouterr()
    assert "# the first of 4 jobs: merge_rule=mean seed=7" in shown.err
    assert "\nseed: 7\n" in shown.out


def test_cfg_shows_members_by_name_and_what_is_in_force(capsys):
    assert entry_point.main(["--cfg", "job", "kernel=rbf", "model=tiny"]) == 0
    text = capsys.readouterr().out
    shown = yaml.safe_load(text)
    for group in GROUPS:
        member = available(group)[shown[group]["name"]]
        assert set(shown[group]) == {"name", *(f.name for f in dataclasses.fields(member))}
    assert shown["kernel"] == {"name": "rbf", "bandwidth": 1.0}
    assert "evaluation:  # evaluation=smoke" in text
    assert "# method: no size is set, so threshold 0.9\n" in text
    assert "# kernel=rbf shapes the similarity matrix only" in text
    assert entry_point.main(["--cfg", "job", "method.threshold=0.7", "save_model=true"]) == 0
    text = capsys.readouterr().out
    assert "no size is set" not in text
    assert "save_model: yes" not in text
    assert entry_point.main(["--cfg", "job", "method=shortgpt"]) == 0, "shown before it is complete"
    assert "# A run is refused: method=shortgpt takes a size" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "command"), [
    (["tasks=mmlu"], "evaluation.tasks=[mmlu]"),
    (["threshold=0.8", "seed=1"], "method.threshold=0.8 seed=1"),
    (["seed=1", "--threshold", "0.8"], "seed=1 method.threshold=0.8"),
    (["--target-layers=26"], "method.target_layers=26"),
    (["--model", "tiny", "-m", "seed=1,2"], "-m model=tiny seed=1,2"),
    (["model=meta-llama/Llama-2-7b-hf"], "model=hf model.path=meta-llama/Llama-2-7b-hf"),
    (["model=."], "model=hf 'model.path='\"'\"'.'\"'\"''"),
    (["seed=1,2", "model=tiny"], "-m seed=1,2 model=tiny"),
    (["evaluation.tasks=piqa,boolq"], "evaluation.tasks=[piqa,boolq])"),
])  # fmt: skip
def test_a_command_that_cannot_be_meant_is_answered_with_the_one_that_can(words, command, capsys):
    assert entry_point.main(words) == 2
    shown = capsys.readouterr().err
    assert command in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(("words", "said"), [
    (["--multirn", "seed=1"], "Did you mean --multirun?"),
    (["-m", "method.threshold=interval(0.5,0.9)"], "expected range(start,stop,step)"),
    (["path=x"], "there is no path"),
])  # fmt: skip
def test_a_form_that_is_not_known_is_refused_in_a_line(words, said, capsys):
    assert entry_point.main(words) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(("words", "n"), [
    (["kernel=glob(*)"], 6), (["kernel=glob(*,exclude=l*)"], 4), (["method.threshold=choice(0.9,0.8,0.7)"], 3),
    (["seed=range(1,9,2)", "merge_rule=mean,keep_low"], 8), (["seed=shuffle(1,2,3)"], 3),
])  # fmt: skip
def test_hydras_forms_of_a_grid(words, n, tmp_path):
    assert len(jobs.check_all(["model=tiny", *words, f"hydra.sweep.dir={tmp_path}"], multirun=True).jobs) == n


def test_options_may_stand_anywhere_and_a_plus_before_a_group_is_nothing(tmp_path, monkeypatch):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hydra.main", lambda **settings: lambda job: lambda: None)
    monkeypatch.setattr(entry_point, "mask_logs", lambda: None)
    monkeypatch.setattr(sys, "argv", ["slm-exp"])
    assert entry_point.main(["model=tiny", "+experiment=mine", "-m", "kernel=rbf,linear", "--config-dir", "."]) == 0
    assert sys.argv[1:] == ["-m", "--config-dir", ".", "model=tiny", "experiment=mine", "kernel=rbf,linear"]


def test_a_model_preset_in_a_folder_of_ones_own_is_no_repo_id(tmp_path, capsys):
    (tmp_path / "model" / "lab").mkdir(parents=True)
    (tmp_path / "model" / "lab" / "small.yaml").write_text("layers: [")
    assert entry_point.main(["--config-dir", str(tmp_path), "model=lab/small"]) == 2
    shown = capsys.readouterr().err
    assert "expected plain YAML" in shown, "the file was read"
    assert "model=hf" not in shown


def test_a_typo_ends_with_status_2_before_anything_exists(tmp_path):
    wrong = python_m("method.treshold=0.8", *QUICK, f"hydra.run.dir={tmp_path / 'run'}")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "Did you mean threshold?" in wrong.stderr
    assert not (tmp_path / "run").exists()


def test_a_bad_cell_stops_a_multirun_before_its_first_job(tmp_path):
    wrong = python_m("-m", "method.threshold=0.9,1.9", *QUICK, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert wrong.returncode == 2
    assert "method.threshold = 1.9" in wrong.stderr
    assert not (tmp_path / "sweep").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    wrong = python_m(*QUICK, f"hydra.run.dir={tmp_path / 'file' / 'run'}")
    assert wrong.returncode == 2
    assert "hydra.run.dir" in wrong.stderr
    assert "can be written" in wrong.stderr


@pytest.mark.parametrize("by", ["--config-dir", "hydra.searchpath"])
def test_a_sweep_preset_of_ones_own(by, tmp_path, monkeypatch):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      kernel: rbf,laplacian\n")
    where = ["--config-dir", str(tmp_path)] if by == "--config-dir" else [f"hydra.searchpath=[file://{tmp_path}]"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hydra.main", lambda **settings: lambda job: lambda: None)
    monkeypatch.setattr(entry_point, "mask_logs", lambda: None)
    monkeypatch.setattr(sys, "argv", ["slm-exp"])
    assert entry_point.main(["model=tiny", "sweep=mine", "kernel.bandwidth=0.5", *where]) == 0
    assert "kernel.bandwidth=choice(0.5)" in sys.argv


@pytest.mark.parametrize(("overrides", "field"), [
    (["method=angular,shortgpt", "method.target_layers=6", "method.merge=true"], "method.merge=choice(true)"),
    (["width=flap,magnitude", "width.layers=[2,6]", "width.uniform=false"], "width.layers=choice([2,6])"),
    (["sweep=kernel_threshold", "kernel=rbf,laplacian", "kernel.bandwidth=0.5"], "kernel.bandwidth=choice(0.5)"),
])  # fmt: skip
def test_a_field_of_swept_members_need_not_be_one_of_the_default_member(overrides, field, tmp_path, monkeypatch):
    """Hydra composes a multirun's own config with the default member, which may not have the field."""
    monkeypatch.chdir(tmp_path)
    assert jobs.check_all(["model=tiny", *overrides], multirun=True).jobs
    given = jobs.fields_of_swept_groups(overrides)
    assert field in given
    assert jobs.fields_of_swept_groups(given) == given
    assert jobs.fields_of_swept_groups(["method.threshold=0.8"]) == ["method.threshold=0.8"]


def test_every_requirement_of_every_extra_has_a_tested_version_that_it_allows():
    """What they require in turn only an installer can tell: `pip install --dry-run -c constraints.txt '.[EXTRAS]'`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    tested = {canonicalize_name(name): version for name, version in pins.items()}
    extras = project["optional-dependencies"]
    assert {"trackio", "tensorboard", "search"} <= extras.keys()
    for line in (*project["dependencies"], *itertools.chain(*extras.values())):
        wanted = Requirement(line)
        assert wanted.specifier.contains(tested[canonicalize_name(wanted.name)]), line
