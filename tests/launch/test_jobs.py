"""The jobs of a command line: composed as Hydra composes them, cheaply, and refused before they are made."""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm_exp.cli.plan import make_plan
from slm_exp.core.errors import ConfigError
from slm_exp.core.registry import GROUPS, available
from slm_exp.launch.compose import Composer, choices, compose_run
from slm_exp.launch.hydra_compat import axes, count, grid
from slm_exp.launch.jobs import check_all, command_jobs, pool_workers, split_sweep
from slm_exp.pipeline.config import RunConfig

NO_DEFAULT = {"from_plan", "jsonl", "tokens", "hf", "cuda"}
"""Members that take a value from the user before they can be composed."""


def single_choices() -> list[str]:
    made = []
    for group in GROUPS:
        for name in set(choices(group)) - NO_DEFAULT:
            sizes = getattr(available(group).get(name), "targets", ())
            made.append(" ".join([f"{group}={name}", *(f"{group}.{size}=0.1" for size in sizes[-1:])]))
    return sorted(made)


def outcome(compose: Callable[[list[str]], RunConfig], job: list[str]) -> dict[str, Any] | str:
    """The resolved config, or the message that refuses it."""
    try:
        return compose(job).resolved()
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize(("alone", "together"), [(20, 20), pytest.param(None, 60, marks=pytest.mark.slow)])
def test_a_composed_job_is_what_hydra_composes(alone: int | None, together: int) -> None:
    """Members alone (None: every one), and random combinations of members, values and presets."""
    composer, draw = Composer(), random.Random(0)
    singles = single_choices()
    values = ["seed=3", "save_model=true", "method.threshold=0.7", "calibration.n_samples=4", "cache.enabled=false",
              "evaluation.corpora.mine=/x", "+seed=2", "++evaluation.limit=3", "experiment=demo",
              "sweep=threshold_rule"]  # fmt: skip
    jobs = [["model=tiny", *single.split()] for single in singles if not single.startswith("model=")]
    jobs = jobs if alone is None else draw.sample(jobs, alone)
    for _ in range(together):
        parts = draw.sample(singles, 3) + draw.sample(values, draw.randint(0, 3))
        job = [word for part in parts for word in part.split()]
        keys = [word.partition("=")[0].lstrip("+") for word in job]
        if len(set(keys)) == len(keys):
            jobs.append(job)
    compared = 0
    for job in jobs:
        wanted = outcome(compose_run, job)
        assert outcome(composer.run_config, job) == wanted, job
        compared += isinstance(wanted, dict)
    assert compared > len(jobs) / 2


def test_a_choice_that_changes_more_than_its_group_is_composed_with_the_others(tmp_path: Path) -> None:
    preset = tmp_path / "kernel" / "wide.yaml"
    preset.parent.mkdir()
    preset.write_text("# @package _global_\ndefaults:\n  - /kernel/rbf@kernel\nseed: 7\nkernel:\n  bandwidth: 3.0\n")
    search = f"hydra.searchpath=[file://{tmp_path}]"
    job = ["model=tiny", "kernel=wide", "merge_rule=mean"]
    composed = Composer([search]).run_config(job)
    assert composed.resolved() == compose_run([search, *job]).resolved()
    assert (composed.seed, composed.kernel.name) == (7, "rbf")


def test_a_thousand_jobs_are_composed_in_seconds() -> None:
    started = time.monotonic()
    found = command_jobs(["model=tiny", "seed=range(0,50)", "merge_rule=mean,top_layer,keep_low,keep_top",
                          "kernel=rbf,linear,cosine,angular,laplacian"], multirun=True)  # fmt: skip
    assert len(found.jobs) == 1000
    assert len({job.run_id for job, _ in found.jobs}) == 1000
    assert time.monotonic() - started < 60, "20 s on a machine left alone; Hydra alone takes 100 s and more"


@pytest.mark.parametrize(("words", "jobs"), [
    (["seed=range(0,10000)"], 10_000),
    (["seed=range(0,1000000000)", "kernel=rbf,linear"], 2_000_000_000),
    (["method.threshold=range(0.5,1.0,0.001)", "merge_rule=mean,top_layer,keep_low"], 1500),
])  # fmt: skip
@pytest.mark.parametrize("ask", [lambda w: check_all(w, True), lambda w: make_plan(w, True)], ids=["run", "plan"])
def test_a_large_grid_is_refused_with_its_count_before_it_is_composed(words, jobs, ask) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=rf"^{jobs} jobs: .*hydra.sweeper.max_jobs={jobs}$"):
        ask(["model=tiny", *words])
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(("words", "dealt"), [
    (["runtime=cpu,auto"], True), (["runtime=auto,cpu"], True), (["runtime=cpu", "seed=1,2"], False),
    (["runtime=cuda", "runtime.device=cuda,cuda:1"], False), (["model.device_map=null,auto"], False),
])  # fmt: skip
def test_gpus_are_dealt_out_where_any_job_may_use_one(
    words: list[str], dealt: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm_exp.launch.jobs.visible_gpus", lambda: ["GPU-a", "GPU-b"])
    model = ["model=hf", f"model.path={tmp_path}"] if "map" in words[0] else ["model=tiny"]
    found = command_jobs([*model, *words, f"hydra.sweep.dir={tmp_path}"], multirun=True, identify=lambda cfg: "")
    workers = pool_workers([cfg for _, cfg in found.jobs], None, 1)
    given = {w.env.get("CUDA_VISIBLE_DEVICES") for w in workers}
    assert given == ({"GPU-a", "GPU-b"} if dealt else {None})


def test_the_capacity_is_that_of_the_job_with_most_threads(tmp_path: Path) -> None:
    words = ["model=tiny", "runtime=cpu", "runtime.threads=1,3", f"hydra.sweep.dir={tmp_path}"]
    assert command_jobs(words, multirun=True, identify=lambda cfg: "").capacity()[1] == 3


def test_max_jobs_can_be_raised_or_lowered(tmp_path: Path) -> None:
    sweep = ["model=tiny", "seed=0,1,2", f"hydra.sweep.dir={tmp_path}"]
    with pytest.raises(ConfigError, match="3 jobs: seed"):
        check_all([*sweep, "hydra.sweeper.max_jobs=2"], multirun=True)
    assert len(check_all([*sweep, "hydra.sweeper.max_jobs=3"], multirun=True).jobs) == 3


@pytest.mark.parametrize("override", ["a=1", "a=1,2,3", "a=range(0,10)", "a=range(5)", "a=range(10,0,-3)",
                                      "a=range(0.5,0.9,0.1)", "a=choice(x,y)", "a=range(3,3)"])  # fmt: skip
def test_counting_and_listing_agree(override: str) -> None:
    of = axes([override])
    assert count(of["a"]) == len(grid(of))


def test_a_grid_has_every_combination_the_last_axis_fastest() -> None:
    jobs = split_sweep(["kernel=glob(l*)", "seed=1"], {"merge_rule": "mean,keep_low", "seed": "5,6"})
    rules, kernels = ("mean", "keep_low"), ("laplacian", "linear")
    assert jobs == [[f"merge_rule={r}", f"kernel={k}", "seed=1"] for r, k in itertools.product(rules, kernels)]


@pytest.mark.parametrize(("words", "said"), [
    (["seed=interval(0,1)"], "an interval is no grid"),
    (["seed=range(0,3,0)"], "a step of 0"),
    (["seed=0,1", "method.treshold=0.5"], "Did you mean threshold?"),
    (["seed=0,-1"], "job model=tiny seed=-1: seed = -1"),
])  # fmt: skip
def test_a_grid_that_cannot_work_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        command_jobs(["model=tiny", *words], multirun=True)
    assert said in str(error.value)


def test_several_values_without_m_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^seed=0,1: several .* add -m: python -m slm_exp -m model=tiny seed=0,1$"):
        check_all(["model=tiny", "seed=0,1"], multirun=False)


def test_folders_are_those_that_hydra_resolves(tmp_path: Path) -> None:
    single = command_jobs(["model=tiny"])
    assert single.folder == Path("outputs") / single.jobs[0][0].run_id
    assert command_jobs(["model=tiny"], identify=lambda cfg: "").folder == Path("outputs/RUN_ID")
    assert command_jobs(["model=tiny", f"hydra.run.dir={tmp_path}/x"]).folder == tmp_path / "x"
    grid = command_jobs(["model=tiny", "seed=1,2"], multirun=True)
    assert grid.folder != command_jobs(["model=tiny", "seed=1,3"], multirun=True).folder
    assert [job.folder for job, _ in grid.jobs] == [grid.folder / job.run_id for job, _ in grid.jobs]
    named = command_jobs(["model=tiny", "seed=1,2", f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=s"], True)
    assert {job.folder for job, _ in named.jobs} == {tmp_path / "s"}
    cells = command_jobs([], cells=[["model=tiny", "seed=1"], ["model=tiny", "seed=1"]], name="main")
    assert (cells.folder, len(cells.jobs)) == (Path("outputs/multirun/main"), 1)


def test_a_job_whose_recovery_trains_over_gpus_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    found = command_jobs(["model=tiny", "seed=0,1,2,3", "recovery=lora", "recovery.processes=2"], multirun=True)
    workers = pool_workers([cfg for _, cfg in found.jobs], None, 1)
    assert [w.env["CUDA_VISIBLE_DEVICES"] for w in workers] == ["0,1", "2,3"]


@pytest.mark.parametrize(("words", "why"), [
    (["hydra.launcher.workers=0"], "hydra.launcher.workers = 0; expected null or a number >= 1"),
    (["hydra.launcher.retries=-1"], "hydra.launcher.retries = -1"),
    (["hydra/launcher=slurm"], "there is no sbatch on PATH"),
    (["hydra/launcher=slurm", "hydra/sweeper=basic"], "works with hydra/sweeper=grid"),
    (["hydra/launcher=slurm", "hydra.launcher.detatch=true"], "Did you mean detach"),
])  # fmt: skip
def test_what_a_launcher_cannot_do_is_refused_first(words: list[str], why: str, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=re.escape(why)):
        check_all(["model=tiny", "seed=0,1", *words, f"hydra.sweep.dir={tmp_path}"], multirun=True)
