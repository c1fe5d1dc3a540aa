"""W&B sweep files and `sweep=` presets: the same cells, by commands that reach Hydra."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from slm_exp.launch.compose import compose_raw, compose_run, conf_dir
from slm_exp.launch.hydra_compat import probes
from slm_exp.launch.jobs import check_all, search_axes, split_sweep

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(p.stem for p in (ROOT / "sweeps").glob("*.yaml"))
PRESETS = sorted(p.stem for p in (conf_dir() / "sweep").glob("*.yaml") if p.stem != "search")  # a search is no grid


def sweep_file(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text())


def agent_commands(told: dict[str, Any]) -> list[list[str]]:
    """What W&B's agent runs for every combination of the file's values; its own function fills in the arguments."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    names = list(told["parameters"])
    choices = [p["values"] if "values" in p else [p["value"]] for p in told["parameters"].values()]
    commands = []
    for values in itertools.product(*choices):
        args = {name: {"value": value} for name, value in zip(names, values, strict=True)}
        filled = create_sweep_command_args({"args": args, "program": told["program"]})
        filled |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [told["program"]]}
        commands.append(
            [word for part in told["command"] for word in (filled[part[2:-1]] if part.startswith("${") else [part])]
        )
    return commands


def cells(name: str) -> list[list[str]]:
    whole = compose_raw([f"sweep={name}"], with_hydra=True)
    return split_sweep([f"sweep={name}"], dict(whole.hydra.sweeper.params))


def test_every_file_has_its_preset_and_the_other_way_round() -> None:
    assert FILES
    assert FILES == PRESETS
    assert {sweep_file(name)["method"] for name in FILES} == {"grid", "random", "bayes"}


@pytest.mark.parametrize("name", FILES)
def test_file_and_preset_are_the_same_cells(name: str) -> None:
    """The swept values are the same words, in every combination; the rest is the same experiment, seen at both ends."""
    commands, jobs, told = agent_commands(sweep_file(name)), cells(name), sweep_file(name)["parameters"]
    assert all(c[:2] == ["/usr/bin/env", "slm-exp"] for c in commands)  # no path of a checkout
    assert sweep_file(name)["program"] == "slm-exp"
    swept = [f"{key}={value}" for key, p in told.items() for value in p.get("values", [])]
    by_agent = [{o for o in c if o in swept} for c in commands]
    by_preset = [{o for o in job if o in swept} for job in jobs]
    assert sorted(map(sorted, by_agent)) == sorted(map(sorted, by_preset))
    assert all(len(cell) == len(job) - 1 for cell, job in zip(by_preset, jobs, strict=True))  # all but `sweep=NAME`
    for i in (0, -1):
        same = next(j for j, cell in zip(jobs, by_preset, strict=True) if cell == by_agent[i])
        assert compose_run(commands[i][2:]).run_id == compose_run(same).run_id


@pytest.mark.parametrize("name", FILES)
def test_the_first_line_launches_it(name: str) -> None:
    first = (conf_dir() / "sweep" / f"{name}.yaml").read_text().splitlines()[0]
    assert shlex.split(first.lstrip("# ")) == ["python", "-m", "slm_exp", f"sweep={name}"]
    head = (ROOT / "sweeps" / f"{name}.yaml").read_text().split("project:")[0]
    assert f"wandb sweep sweeps/{name}.yaml" in head
    assert f"python -m slm_exp sweep={name}" in head


def test_an_agents_cell_saves_no_checkpoint_and_optimises_what_is_logged() -> None:
    for name in FILES:
        told = sweep_file(name)
        assert all(compose_run(c[2:]).save_model is False for c in agent_commands(told)[:1])
        assert told["metric"] == {"name": "eval/compressed/average", "goal": "maximize"}


def test_wandb_takes_the_files() -> None:
    from wandb.sdk.launch.sweeps.utils import load_sweep_config

    for name in FILES:
        assert load_sweep_config(str(ROOT / "sweeps" / f"{name}.yaml"))["parameters"]


def test_the_command_line_changes_a_preset(tmp_path: Path) -> None:
    params = dict(compose_raw(["sweep=threshold_rule"], with_hydra=True).hydra.sweeper.params)
    assert len(split_sweep(["sweep=threshold_rule"], params)) == 18
    assert len(split_sweep(["sweep=threshold_rule", "method.threshold=0.9,0.8"], params)) == 6
    check_all(["sweep=threshold_rule", f"hydra.sweep.dir={tmp_path}"], multirun=False)


@pytest.mark.parametrize("name", sorted(p.stem for p in (conf_dir() / "hydra/launcher").glob("*.yaml")))
def test_launcher_presets_compose(name: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    launcher = compose_raw([f"hydra/launcher={name}"], with_hydra=True).hydra.launcher
    assert launcher.n_jobs >= 1


def test_processes_is_the_default_launcher() -> None:
    hydra = compose_raw([], with_hydra=True).hydra
    assert hydra.launcher._target_.endswith("ProcessLauncher")
    assert hydra.sweeper._target_.endswith("GridSweeper")


def documented() -> list[list[str]]:
    lines = (ROOT / "docs" / "sweeps.md").read_text().splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("python -m slm_exp ")]
    return [c[3:] for c in commands if any(w == "-m" or w.startswith("sweep=") for w in c[3:])]


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_documented_commands_compose(words: list[str]) -> None:
    overrides = [w.replace("NAME", "cpu") for w in words if w != "-m"]
    if any("launcher=" in w for w in words):
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    for tracker in ("trackio", "tensorboard"):
        if f"tracking={tracker}" in words:
            pytest.importorskip(tracker)
    sweeper = compose_raw([o for o in overrides if "," not in o], with_hydra=True).hydra.sweeper
    if sweeper.search is not None:
        jobs = probes(search_axes([o for o in overrides if not o.startswith("hydra.")], dict(sweeper.params)))
    else:
        jobs = split_sweep(overrides, dict(sweeper.params or {}))
    many = "-m" in words or any(w.startswith("sweep=") for w in words)
    assert len(jobs) >= (1 if not many else 4 if sweeper.search is None else 3)
    compose_run([o for o in jobs[-1] if not o.startswith("hydra")])
